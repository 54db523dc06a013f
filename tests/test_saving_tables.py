"""Saving a model whose tables are not parameters: they are linked, written once, and never lost."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from table_models import logits
from tiny_backbones import build, random_ids
from transformers import Trainer, TrainingArguments

from engram_hf import EngramForCausalLM
from engram_hf.claimed_saving_engram import ClaimedFolderWriter
from engram_hf.loading_engram import TABLES_MEMBER
from engram_hf.safetensors_engram import read_header
from engram_hf.saving_engram import complete_save, is_table_file, save_tables, tables_by_reference
from engram_hf.table_check_engram import check_folder
from engram_hf.table_format_engram import MANIFEST_NAME, read_tables


def save_only_tables(model, folder: str | os.PathLike) -> None:
    """Save like `save_pretrained`, without weights."""
    with ClaimedFolderWriter(folder) as writer:
        save_tables(model.model, writer.path)
        complete_save(model.model, writer)


def test_save_pretrained_links_a_mapped_table(saved_tables, tmp_path):
    tmp_path, elsewhere = tmp_path / "saved_tables", tmp_path / "moved"
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    model.save_pretrained(tmp_path)
    tables = sorted(path.name for path in tmp_path.iterdir() if is_table_file(path.name))
    assert tables == ["engram-layer-00001.safetensors", "engram-layer-00002.safetensors", "engram_tables.json"]
    for name in tables[:2]:
        assert (tmp_path / name).samefile(saved_tables[2] / name)
        assert all(".table." in tensor for tensor in read_header(tmp_path / name).tensors)
    check_folder(tmp_path, rows=True)
    shutil.copytree(tmp_path, elsewhere)
    shutil.rmtree(tmp_path)
    moved = EngramForCausalLM.from_pretrained(elsewhere, engram_residency="mapped")
    assert torch.equal(logits(moved), logits(saved_tables[0]))
    # The open files remain readable after their names are removed.
    assert torch.equal(logits(model), logits(saved_tables[0]))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path)), logits(saved_tables[0]))


def test_saved_folder_protects_the_files_it_shares(saved_tables):
    """Copying over it with `cp -r other/. saved/` as an ordinary user does not change the source of the saved folder."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        source = shutil.copytree(saved_tables[2], root / "source")
        content = {path.name: path.read_bytes() for path in source.iterdir()}
        shutil.copytree(source, root / "other", copy_function=shutil.copyfile)
        for path in (root / "other").glob("engram-layer-*"):
            data = path.read_bytes()
            path.write_bytes(data[:-64] + bytes(64))
        EngramForCausalLM.from_pretrained(source, engram_residency="mapped").save_pretrained(root / "saved")
        owner = 65534 if os.geteuid() == 0 else os.geteuid()  # Permissions do not restrict root.
        (root / "other").chmod(0o755)
        if os.geteuid() == 0:
            for path in [root / "saved", *root.glob("s*/*")]:
                os.chown(path, owner, -1)
        options = {"user": owner} if os.geteuid() == 0 else {}
        copied = subprocess.run(["cp", "-r", "other/.", "saved/"], cwd=root, capture_output=True, text=True, **options)
        # No file is read-only where the file system shares blocks.
        assert copied.stderr.count("Permission denied") in (0, 2)
        assert {path.name: path.read_bytes() for path in source.iterdir()} == content


def test_save_pretrained_links_a_table_that_it_wrote_before(saved_tables, tmp_path):
    """A table from a file with other weights, or from a deleted file, is written once, and linked from then on."""

    def inodes(folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in folder.glob("engram-layer-*")}

    model = EngramForCausalLM.from_pretrained(saved_tables[1], engram_residency="mapped")
    for name in ("first", "second", "second"):
        model.save_pretrained(tmp_path / name)
    assert inodes(tmp_path / "first") == inodes(tmp_path / "second") != {}
    model = EngramForCausalLM.from_pretrained(tmp_path / "first", engram_residency="mapped")
    for name in ("third", "fourth"):
        model.save_pretrained(tmp_path / name)
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
    assert inodes(tmp_path / "third") == inodes(tmp_path / "fourth") == inodes(tmp_path / "second")
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path / "fourth")), logits(saved_tables[0]))
    # The file that replaced a save is not a copy of these rows.
    other = EngramForCausalLM.from_pretrained(saved_tables[1], engram_residency="mapped")
    for save in (lambda: other.save_pretrained(tmp_path / "fifth"), lambda: model.save_pretrained(tmp_path / "fifth")):
        save()
    for path in (tmp_path / "fifth").glob("engram-layer-*"):
        noise = path.read_bytes()
        path.unlink()
        path.write_bytes(noise[:-64] + bytes(64))
    shutil.rmtree(tmp_path / "third")
    shutil.rmtree(tmp_path / "fourth")
    model.save_pretrained(tmp_path / "sixth")
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path / "sixth")), logits(saved_tables[0]))


def test_push_to_hub_needs_no_space_for_tables(saved_tables):
    """Its temporary folder may be small and on a file system that hard links cannot reach."""
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with tables_by_reference():
            save_only_tables(model, folder)
        check_folder(folder, rows=True)
        for path in Path(folder).glob("engram-layer-*"):
            assert path.is_symlink()
            assert path.samefile(saved_tables[2] / path.name)
        for name in ("first", "second"):
            save_only_tables(model, Path(folder, name))
        inodes = [
            [path.stat().st_ino for path in sorted(Path(folder, name).glob("engram-layer-*"))]
            for name in ("first", "second")
        ]
        assert inodes[0] == inodes[1] != []  # From another file system, the tables are copied once.
        save_only_tables(model, Path(folder, "kept"))
        assert not any(path.is_symlink() for path in Path(folder, "kept").iterdir())


def test_manifest_describes_files_without_a_description(saved_tables, tmp_path):
    """Shards of a release may lie beside a model in this form."""
    from test_table_format import METADATA_KEY, edit_header

    shutil.copytree(saved_tables[2], tmp_path / "undescribed")
    expected = {layer: table.description for layer, table in read_tables(saved_tables[2]).items()}
    for path in (tmp_path / "undescribed").glob("engram-layer-*"):
        edit_header(path, lambda header: header["__metadata__"].pop(METADATA_KEY))
    manifest = tmp_path / "undescribed" / MANIFEST_NAME
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), TABLES_MEMBER: {}}))
    model = EngramForCausalLM.from_pretrained(tmp_path / "undescribed", engram_residency="mapped")
    assert not any(table.description for table in read_tables(tmp_path / "undescribed").values())
    model.save_pretrained(tmp_path / "saved_tables")
    tables = read_tables(tmp_path / "saved_tables")
    assert {layer: table.description for layer, table in tables.items()} == expected
    for path in (tmp_path / "saved_tables").glob("engram-layer-*"):
        assert path.samefile(tmp_path / "undescribed" / path.name)


def test_push_to_hub_refers_to_tables_that_were_saved_before(saved_tables, tmp_path):
    """This also holds if its own files contain other weights."""
    model = EngramForCausalLM.from_pretrained(saved_tables[1], engram_residency="mapped")
    save_only_tables(model, tmp_path)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with tables_by_reference():
            save_only_tables(model, folder)
        names = [path.name for path in Path(folder).iterdir() if path.is_symlink()]
        assert sorted(names) == [f"engram-layer-0000{layer}.safetensors" for layer in (1, 2)]
        assert all(Path(folder, name).samefile(tmp_path / name) for name in names)


def test_relative_path_of_a_table_survives_a_change_of_folder(saved_tables, tmp_path, monkeypatch):
    monkeypatch.chdir(saved_tables[2].parent)
    model = EngramForCausalLM.from_pretrained(saved_tables[2].name, engram_residency="mapped")
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("saved_tables")
    name = "engram-layer-00001.safetensors"
    assert Path("saved_tables", name).samefile(saved_tables[2] / name)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(saved_tables[0]))


@pytest.mark.parametrize("residency", ["auto", "resident", "mapped"])
def test_tables_among_the_weights_take_precedence_over_an_older_manifest(saved_tables, tmp_path, residency):
    """`push_to_hub` of a mapped model, then of a trained one, leaves both: uploads delete nothing."""
    trained = copy.deepcopy(saved_tables[0])
    with torch.no_grad():
        for memory in trained.model.memories().values():
            (memory.table.weight if memory.table.scale is None else memory.table.scale).copy_(
                (memory.table.weight if memory.table.scale is None else memory.table.scale).float() * 2
            )
    trained.save_pretrained(tmp_path)
    for path in saved_tables[2].iterdir():
        if is_table_file(path.name):
            shutil.copy(path, tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path, engram_residency=residency)
    assert torch.equal(logits(loaded), logits(trained))
    assert not torch.equal(logits(loaded), logits(saved_tables[0]))


def test_only_the_first_process_saves_tables(saved_tables, tmp_path, monkeypatch):
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    monkeypatch.setattr(model, "should_save_on_this_rank", lambda is_main_process: False)
    model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_resizing_embeddings_of_a_mapped_model_keeps_its_ids(saved_tables, tmp_path):
    """Its tables record the ids they were written for; the model gets a token map that keeps these ids."""
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    assert model.config.engram_compressed_vocab_size is None
    model.resize_token_embeddings(model.config.vocab_size + 12)
    model.save_pretrained(tmp_path)
    for residency in ("auto", "resident", "mapped"):
        loaded = EngramForCausalLM.from_pretrained(tmp_path, engram_residency=residency)
        assert torch.equal(logits(loaded), logits(model))


def test_saving_in_place_and_over_another_residency(saved_tables, tmp_path):
    shutil.copytree(saved_tables[2], tmp_path, dirs_exist_ok=True)
    inodes = {path.name: path.stat().st_ino for path in tmp_path.glob("engram-layer-*")}
    for residency, has_files in (("mapped", True), ("resident", False), ("mapped", True)):
        EngramForCausalLM.from_pretrained(tmp_path, engram_residency=residency).save_pretrained(tmp_path)
        files = {path.name: path.stat().st_ino for path in tmp_path.iterdir() if is_table_file(path.name)}
        assert bool(files) is has_files
        if residency == "mapped" and inodes:
            assert inodes.items() <= files.items()
            inodes = {}
        assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path)), logits(saved_tables[0]))


def test_failed_save_loses_no_table(saved_tables, tmp_path):
    """Until the weights are written, the files it was loaded from are the only copy of a resident table."""
    shutil.copytree(saved_tables[2], tmp_path, dirs_exist_ok=True)
    model = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="resident")
    model.generation_config.temperature = 0.5  # These settings without sampling are refused.
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path)), logits(saved_tables[0]))


def test_table_that_changed_is_not_linked(saved_tables, tmp_path):
    source = shutil.copytree(saved_tables[2], tmp_path / "source")
    model = EngramForCausalLM.from_pretrained(source, engram_residency="mapped")
    os.truncate(source / "engram-layer-00002.safetensors", 5000)
    with pytest.raises(ValueError, match="changed while it was in use"):
        logits(model)
    with pytest.raises(ValueError, match="changed while it was in use"):
        save_only_tables(model, tmp_path / "target")
    assert not (tmp_path / "target" / "engram_tables.json").exists()


def test_trainer_checkpoints_of_a_model_with_mapped_tables(saved_tables, tmp_path):
    """A checkpoint contains the trained weights and links to the tables, and training resumes from it."""
    data = [{"input_ids": row, "labels": row} for row in random_ids(8, 6)]

    def train(resume: bool = False, steps: int = 4) -> EngramForCausalLM:
        model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
        options = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=2,
            max_steps=steps,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            disable_tqdm=True,
        )
        Trainer(model, options, train_dataset=data).train(resume_from_checkpoint=resume)
        return model

    whole = train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "engram-layer-00001.safetensors").samefile(saved_tables[2] / "engram-layer-00001.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert torch.equal(logits(train(resume=True)), logits(whole))
    assert not torch.equal(logits(whole), logits(saved_tables[0]))
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path / "checkpoint-4")), logits(whole))


@pytest.mark.parametrize("spelling", ["compressed-tensors", "ModelOpt"])
def test_four_bit_floats_among_the_weights_under_other_libraries_names(tmp_path, spelling):
    model = build("qwen3", engram_table_dtype="nvfp4", engram_head_dim=32)
    for memory in model.model.memories().values():
        memory.table.reset_parameters(1.0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state, renamed = load_file(path), {}
    names = {"weight": "weight_packed", "scale": "weight_scale", "global_scale": "weight_global_scale"}
    if spelling == "ModelOpt":
        names |= {"weight": "weight", "global_scale": "weight_scale_2"}
    for key, tensor in state.items():
        stem, _, kind = key.rpartition(".")
        if ".table." not in key:
            renamed[key] = tensor
        else:
            renamed[f"{stem}.{names[kind]}"] = tensor.reciprocal() if names[kind] == "weight_scale_2" else tensor
    save_file(renamed, path, metadata={"format": "pt"})
    for residency in ("resident", "mapped"):
        again, info = EngramForCausalLM.from_pretrained(tmp_path, engram_residency=residency, output_loading_info=True)
        assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(logits(again.eval()), logits(model.eval()), rtol=1e-5, atol=1e-5)
        again.save_pretrained(tmp_path / residency)
        saved = EngramForCausalLM.from_pretrained(tmp_path / residency, engram_residency="mapped").eval()
        assert torch.equal(logits(saved), logits(again))

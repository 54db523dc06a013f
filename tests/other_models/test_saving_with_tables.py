"""`save_pretrained` of a model whose tables are in files writes a checkpoint for the stock model, or raises."""

import json
import os
import shutil

import pytest
import torch
from other_tiny_models import QWEN, logits
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from engram_hf import EngramError, load_with_tables


def load(folder, **options):
    return load_with_tables(AutoModelForCausalLM, str(folder), **options)


def files_of(folder) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def qwen(folders):
    return load(folders("qwen4_exp"))


@pytest.mark.parametrize("variant", [None, pytest.param("half", marks=pytest.mark.slow)])
def test_saved_model_is_complete(qwen, tmp_path, variant):
    qwen.save_pretrained(tmp_path, variant=variant)
    for once_more in (False, True):
        saved, info = AutoModelForCausalLM.from_pretrained(tmp_path, variant=variant, output_loading_info=True)
        assert not any(info.values()) and torch.equal(logits(saved), logits(qwen))
        mapped = load(tmp_path, variant=variant)
        assert torch.equal(logits(mapped), logits(qwen))
        if not once_more:
            mapped.save_pretrained(tmp_path, variant=variant)  # The target is the folder its tables are read from.
    index = json.loads((tmp_path / f"model.safetensors.index.{f'{variant}.' if variant else ''}json").read_text())
    assert set(index["weight_map"].values()) == files_of(tmp_path)
    assert sum(".shard_" in key for key in index["weight_map"]) == 8


def test_files_with_only_tables_are_linked(qwen, tmp_path):
    """The second save of a model finds its tables in separate files."""
    qwen.save_pretrained(tmp_path / "first")
    load(tmp_path / "first").save_pretrained(tmp_path / "second")
    (table,) = (tmp_path / "first").glob("model-tables-*")
    assert (
        os.path.samefile(table, tmp_path / "second" / table.name)
        or table.read_bytes() == (tmp_path / "second" / table.name).read_bytes()
    )
    with safe_open(table, "pt") as file:
        assert all(".shard_" in key for key in list(file.keys()))


def test_shards_in_many_files_are_saved(folders, qwen, tmp_path):
    """Each file contains other tensors, too, as in the release."""
    (tmp_path / "a").mkdir()
    shutil.copy(folders("qwen4_exp") / "config.json", tmp_path / "a")
    with safe_open(folders("qwen4_exp") / "model.safetensors", "pt") as file:
        names = sorted(file.keys())
        parts = {f"model-{part:05d}-of-00005.safetensors": names[part::5] for part in range(5)}
        for path, some in parts.items():
            save_file({name: file.get_tensor(name) for name in some}, tmp_path / "a" / path, {"format": "pt"})
    weight_map = {name: path for path, some in parts.items() for name in some}
    (tmp_path / "a" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    mapped = load(tmp_path / "a")
    table = mapped.get_submodule(QWEN).readers["weight"].stored
    assert len(table.parts) == len({header.path for header, _ in table.parts}) == 4
    assert torch.equal(logits(mapped), logits(qwen))
    mapped.save_pretrained(tmp_path / "b", max_shard_size=20_000)
    assert len(list((tmp_path / "b").glob("model-tables-*"))) == 5
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(qwen))


def test_save_pretrained_refuses_models_that_transformers_cannot_save(folders, tmp_path):
    """A model dequantized at loading forgets how its tables are stored; Google's quantizer does not save on some
    versions.
    """
    with pytest.raises(
        EngramError, match=r"was dequantized while it was loaded.*copy the folder that it was loaded from"
    ):
        load(folders("qwen4_exp float8")).save_pretrained(tmp_path)
    model = load(folders("gemma4 int4"))
    if not callable(model.hf_quantizer.is_serializable):
        with pytest.raises(EngramError, match=r"GemmaQuantizer, which this version of transformers cannot save"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())


def test_push_while_saving_is_refused(qwen, tmp_path):
    with pytest.raises(EngramError, match=r"use model\.push_to_hub"):
        qwen.save_pretrained(tmp_path, push_to_hub=True)


def test_peft_adapter_of_transformers_is_saved_alone(folders, tmp_path):
    model = load(folders("gemma3n"))
    try:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:  # transformers may require a later PEFT than the installed one.
        pytest.skip(str(error))
    model.save_pretrained(tmp_path)
    assert files_of(tmp_path) == {"adapter_model.safetensors"}


def test_tables_under_unknown_names_are_refused(folders, qwen, tmp_path):
    apart = tables_apart(folders("qwen4_exp"), tmp_path / "apart", lambda name: name.removeprefix("model.layers."))
    model = load(folders("qwen4_exp"), tables_from=str(apart))
    assert torch.equal(logits(model), logits(qwen))
    with pytest.raises(EngramError, match="would not be found again; load it with residency='resident'"):
        model.save_pretrained(tmp_path / "saved")


def test_interrupted_save_leaves_the_old_files(qwen, tmp_path, monkeypatch):
    qwen.save_pretrained(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr("engram_hf.other_models.saving.write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qwen.save_pretrained(tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def interrupted(*args) -> None:
    raise KeyboardInterrupt


# --- tables from another folder


def tables_apart(folder, target, rename=lambda name: name, change=lambda name, tensor: tensor, config=True):
    """Write a folder with only the tables of a model."""
    target.mkdir()
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {
            name: file.get_tensor(name)
            for name in list(file.keys())
            if "ngram_embedding" in name or "per_layer." in name
        }
    save_file({rename(name): change(name, tensor) for name, tensor in tensors.items()}, target / "tables.safetensors")
    if config:
        shutil.copy(folder / "config.json", target)
    return target


@pytest.fixture
def without_tables(folders, tmp_path):
    """Write a model whose checkpoint lacks its tables."""
    folder = folders("qwen4_exp")
    with safe_open(folder / "model.safetensors", "pt") as file:
        rest = {name: file.get_tensor(name) for name in list(file.keys()) if "ngram_embedding" not in name}
    (tmp_path / "rest").mkdir()
    save_file(rest, tmp_path / "rest" / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path / "rest")
    return tmp_path / "rest"


@pytest.mark.parametrize("residency", ["mapped", "resident"])
def test_tables_from_another_folder(folders, qwen, without_tables, tmp_path, residency):
    apart = tables_apart(folders("qwen4_exp"), tmp_path / "apart")
    model = load(without_tables, tables_from=str(apart), residency=residency)
    assert torch.equal(logits(model), logits(qwen))
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), logits(qwen))
    with pytest.raises(EngramError, match=r"has no tensors of the table .*, or tables_from"):
        load(without_tables)


def test_tables_of_another_shape_dtype_or_vocabulary_are_refused(folders, without_tables, tmp_path):
    folder = folders("qwen4_exp")
    changes = {
        "have 1398 rows together, but the model has 1408": lambda name, tensor: (
            tensor[:-10].clone() if "layers.1." in name and "shard_2" in name else tensor
        ),
        "has rows of": lambda name, tensor: tensor[:, :-1].clone(),
        "is stored as F8_E4M3, but the model has": lambda name, tensor: tensor.to(torch.float8_e4m3fn),
    }
    for number, (said, change) in enumerate(changes.items()):
        apart = tables_apart(folder, tmp_path / str(number), change=change)
        with pytest.raises(EngramError, match=said):
            load(without_tables, tables_from=str(apart))
    apart = tables_apart(folder, tmp_path / "dtype", change=lambda name, tensor: tensor.to(torch.float32))
    with pytest.raises(EngramError, match=r"is stored as F32, but the checkpoint has it as BF16"):
        load(folder, tables_from=str(apart))
    load(without_tables, tables_from=str(apart))  # Nothing says that another float dtype is wrong.
    for field, value in (("vocab_size", 300), ("seed", 7)):
        config = json.loads((apart / "config.json").read_text())
        (apart / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(
            EngramError,
            match=f"were made for {field} {value}, but the model has .*: the same id would read another row",
        ):
            load(without_tables, tables_from=str(apart))
        (apart / "config.json").write_text(json.dumps(config))
    with pytest.raises(EngramError, match="has no safetensors files"):
        (tmp_path / "empty").mkdir()
        load(without_tables, tables_from=str(tmp_path / "empty"))


def test_tables_of_another_save_are_refused(qwen, folders, tmp_path):
    """The index of a saved model identifies its table files by a digest."""
    qwen.save_pretrained(tmp_path / "saved")
    (table,) = (tmp_path / "saved").glob("model-tables-*")
    data = bytearray(table.read_bytes())
    data[-3] ^= 1
    table.unlink()
    table.write_bytes(data)
    for options in ({}, {"tables_from": str(tmp_path / "saved")}):
        with pytest.raises(EngramError, match=r"is not the file of tables that .* was saved with"):
            load(tmp_path / "saved" if not options else folders("qwen4_exp"), **options)

"""`engram quantize`: new tables, and an unchanged rest of the folder."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_models import logits, make_config
from engram_cli import quantization
from engram_cli.main import main
from engram_cli.measurement import read_blocks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_backbones import BACKBONES
from tiny_tokenizer import make_tokenizer

from engram_hf import EngramConfig, EngramForCausalLM, table_writer_engram
from engram_hf.card_engram import model_card
from engram_hf.convert_scripts.safetensors_files import read_checkpoint
from engram_hf.row_sources_engram import MappedRows
from engram_hf.table_writer_engram import quantize_rows

pytestmark = pytest.mark.any_version

CASES = [
    *((dtype, folder) for dtype in ("float8_e4m3fn", "int8") for folder in ("saved", "sharded", "with_files")),
    ("int4", "saved"),
    ("int2", "sharded"),
    ("nvfp4", "with_files"),
]
CHANGES = {"int4": 0.5, "int2": 2.0, "nvfp4": 0.5}


@pytest.fixture(scope="module")
def sharded(saved, tmp_path_factory) -> Path:
    """Save the model in shards of which some hold tables, some do not, and some hold both; tests do not change it."""
    folder = tmp_path_factory.mktemp("sharded")
    EngramForCausalLM.from_pretrained(saved).save_pretrained(folder, max_shard_size="300KB")
    make_tokenizer().save_pretrained(folder)
    return folder


def quantized_in_memory(model: EngramForCausalLM, dtype: str) -> EngramForCausalLM:
    """Return the model with quantized tables, without any file."""
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("table.weight")]:
        global_scale = torch.tensor([448 * 6]) / state[name].abs().max() if dtype == "nvfp4" else None
        values, scale = quantize_rows(state[name], dtype, global_scale)
        state |= {name: values, name.replace("weight", "scale"): scale}
        state |= {} if global_scale is None else {name.replace("weight", "global_scale"): global_scale}
    smaller = EngramForCausalLM(make_config(engram_table_dtype=dtype))
    smaller.load_state_dict(state)
    return smaller.eval()


@pytest.mark.parametrize(("dtype", "folder"), CASES)
def test_quantized_model_equals_one_quantized_in_memory(engram, model, tmp_path, dtype, folder, request):
    source, target = request.getfixturevalue(folder), tmp_path / "target"
    report = engram("quantize", source, target, "--dtype", dtype)
    engram("check", target, "--rows")
    expected = quantized_in_memory(model, dtype)
    resident, mapped = (
        EngramForCausalLM.from_pretrained(target, engram_residency=residency).eval()
        for residency in ("resident", "mapped")
    )
    assert resident.config.engram_table_dtype == mapped.config.engram_table_dtype == dtype
    found, state = resident.state_dict(), expected.state_dict()
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for smaller in (resident, mapped):
        # The logits are not equal to the bit: the address of the data in memory decides in which order some kernels
        # add.
        torch.testing.assert_close(logits(smaller), logits(expected), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(expected), logits(model), rtol=0, atol=CHANGES.get(dtype, 0.15))
    least = []
    for memory, before in zip(expected.model.memories().values(), model.model.memories().values(), strict=True):
        rows = before.table.weight
        decoded = memory.table(torch.arange(len(rows)).unsqueeze(1), dtype=torch.float32)
        relative = (decoded - rows).norm(dim=1) / rows.norm(dim=1)
        assert f"{((decoded - rows).norm() / rows.norm()).item():.2%}" in report
        least.append(relative.min().item())
    # The first line of the histogram gives the lowest error of the rows.
    low, high = re.search(r"^(\d\S*) to (\S+)%", report, re.MULTILINE).groups()
    assert float(low) / 100 <= min(least) < float(high) / 100
    sizes = [sum(path.stat().st_size for path in at.glob("*.safetensors")) for at in (target, source)]
    assert sizes[0] < 0.6 * sizes[1]


def test_quantized_model_loads_as_remote_code(engram, model, sharded, tmp_path):
    engram("quantize", sharded, tmp_path / "target")
    code = f"""
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(tmp_path / "target")!r}
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("the café THE cafe w7", return_tensors="pt")
for residency in ("resident", "mapped"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, engram_residency=residency)
    assert type(model).__module__.startswith("transformers_modules.")
    print(json.dumps(model(**inputs).logits.tolist()))
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    found = [torch.tensor(json.loads(line)) for line in done.stdout.splitlines()]
    assert len(found) == 2, done.stderr
    for output in found:
        torch.testing.assert_close(output, logits(quantized_in_memory(model, "float8_e4m3fn")), rtol=0, atol=1e-5)


def test_shards_and_their_index_lose_only_the_tables(engram, sharded, tmp_path):
    before = read_checkpoint(sharded)
    engram("quantize", sharded, tmp_path)
    after = read_checkpoint(tmp_path)  # This checks that index and shards agree.
    kept = {name for name in before.tensors if ".table." not in name}
    assert set(after.tensors) == kept < set(before.tensors)
    holds_tables = {file: [".table." in name for name in shard.tensors] for file, shard in before.shards.items()}
    assert {(any(some), all(some)) for some in holds_tables.values()} == {(True, True), (True, False), (False, False)}
    for file, some in holds_tables.items():
        assert (tmp_path / file).exists() != all(some)
        if not any(some):
            assert (tmp_path / file).samefile(sharded / file)
        elif not all(some):
            old, new = load_file(sharded / file), load_file(tmp_path / file)
            assert all(torch.equal(tensor, old[name]) for name, tensor in new.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(span.size for span in after.tensors.values())


def test_quantize_copies_documents_and_links_weights(engram, copy, tmp_path):
    """Weights are linked. Documents are copied: otherwise, an edit would change both."""
    documents = {
        "README.md": "Mine.",
        "generation_config.json": '{"temperature": 0.5}',
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "upstream/LICENSE": "Yours.",
    }
    left_behind = [".git/config", ".gitattributes", "checkpoint-7/config.json", "conversion_manifest.json"]
    for name, text in {**documents, **dict.fromkeys(left_behind, "{}")}.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
    before = {path.name for path in copy.iterdir() if path.is_file()}
    engram("quantize", copy, tmp_path / "target")
    target = tmp_path / "target"
    assert {name: (target / name).read_text() for name in documents} == documents
    assert not any((target / name).exists() for name in left_behind)
    assert {path.name for path in target.iterdir() if path.is_file()} == before - set(left_behind)
    assert (target / "model.safetensors").samefile(copy / "model.safetensors")
    assert not (target / "README.md").samefile(copy / "README.md")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (copy, target)]
    assert configs[1] == {**configs[0], "engram_table_dtype": "float8_e4m3fn"}


def test_target_inside_the_folder_does_not_contain_itself(engram, copy):
    (copy / "smaller").mkdir()
    (copy / "smaller" / "notes.txt").write_text("of an earlier attempt")
    engram("quantize", copy, copy / "smaller")
    assert not (copy / "smaller" / "smaller").exists()
    engram("check", copy / "smaller")


def test_generated_card_describes_the_new_tables(engram, copy, tmp_path):
    config = EngramConfig.from_pretrained(copy)
    card = model_card(config, "me/model", license="mit").replace("## Licence", "## Training\n\nMine.\n\n## Licence")
    (copy / "README.md").write_text(card)
    engram("quantize", copy, tmp_path / "target", "--dtype", "int8")
    config.engram_table_dtype = "int8"
    after = (tmp_path / "target" / "README.md").read_text()
    assert after.replace("## Training\n\nMine.\n\n", "") == model_card(config, "me/model", license="mit")
    assert after != card and " int8," in after


@pytest.mark.parametrize("card", [b"# caf\xe9\r\n", b"# Mine\r\n\r\nby hand\r\n"])
def test_card_in_any_encoding_is_copied(engram, copy, tmp_path, card):
    (copy / "README.md").write_bytes(card)
    engram("quantize", copy, tmp_path / "target")
    assert (tmp_path / "target" / "README.md").read_bytes() == card


@pytest.mark.parametrize("metadata", [None, [1], 5, {"total_size": "12"}, {"total_size": None}])
def test_unusual_metadata_of_an_index_is_accepted(engram, sharded, tmp_path, metadata):
    source = Path(shutil.copytree(sharded, tmp_path / "source"))
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": metadata}))
    engram("quantize", source, tmp_path / "target")
    engram("check", tmp_path / "target")
    EngramForCausalLM.from_pretrained(tmp_path / "target")


def test_quantize_a_folder_of_tables_alone(engram, complaint, copy, tmp_path):
    (copy / "config.json").unlink()
    target = tmp_path / "target"
    assert "relative error" in engram("quantize", copy, target, "--dtype", "int8")
    assert "token map checked" in engram("check", target, "--rows")
    with safe_open(target / "engram-layer-00001.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.int8, torch.float32}
    assert "holds a model or tables already" in complaint("quantize", copy, target)
    (copy / "engram_token_map.safetensors").unlink()
    engram("quantize", copy, tmp_path / "unmapped")
    assert "token map absent" in engram("check", tmp_path / "unmapped")


def test_tables_without_their_hash_are_refused(complaint, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    save_file({"layers.1.engram.embed.weight": torch.zeros(4, 32)}, folder / "shard.safetensors")
    assert "does not describe its hash; name a model's folder" in complaint("quantize", folder, tmp_path / "new")


def test_quantize_refuses_quantized_tables_and_existing_targets(engram, complaint, saved, tmp_path):
    engram("quantize", saved, tmp_path / "once")
    assert "holds a model or tables already" in complaint("quantize", saved, tmp_path / "once")
    assert "is F8_E4M3 already" in complaint("quantize", tmp_path / "once", tmp_path / "twice")
    assert not is_whole(tmp_path / "twice")


@pytest.mark.parametrize("dtype", ["int4", "int2", "nvfp4"])
def test_rows_of_four_bits_or_fewer_are_refused(engram, complaint, saved, tmp_path, dtype):
    engram("quantize", saved, tmp_path / "once", "--dtype", dtype)
    said = complaint("quantize", tmp_path / "once", tmp_path / "twice", "--dtype", "int2")
    assert "rows of 8 bits or more" in said and not (tmp_path / "twice").exists()


def test_float8_rows_become_rows_of_two_bits(engram, saved, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:  # The tables are large.
        patched.setattr(table_writer_engram, "_STEP_NUMBERS", 1 << 10)
        patched.setattr(table_writer_engram, "_ALL_COMPARED_ROWS", 10)
        report = engram("quantize", saved, tmp_path / "float8")
    compared, rows = re.search(r"errors of large tables are those of (\S+) of (\S+) rows", report).groups()
    assert 0 < int(compared.replace(",", "")) < int(rows.replace(",", "")) / 4
    said = json.loads(engram("quantize", tmp_path / "float8", tmp_path / "int2", "--dtype", "int2", "--json"))
    engram("check", tmp_path / "int2", "--rows")
    (table, *_) = json.loads(engram("inspect", tmp_path / "int2", "--json"))["tables"]
    quantized, edges = said["tables"][0], said["relative_error_edges"]
    assert [quantized[name] for name in ("layer", "rows")] == [table[name] for name in ("layer", "rows")]
    assert quantized["rows_compared"] == quantized["rows"]
    assert said["loss"] is None and table["bytes"] <= quantized["bytes"] < quantized["bytes_before"] / 2
    assert sum(quantized["rows_by_relative_error"]) == table["rows"] and 0.05 < quantized["relative_error"] < 0.5
    assert len(edges) == len(quantized["rows_by_relative_error"])
    assert table["dtype"] == "I2" and table["bytes"] == table["rows"] * (table["width"] // 4 + 2)
    assert engram("lookup", tmp_path / "int2", "the café") != engram("lookup", saved, "the café")
    resident = EngramForCausalLM.from_pretrained(tmp_path / "int2", engram_residency="resident")
    resident.save_pretrained(tmp_path / "among weights")  # Only the config states the number of bits there.
    make_tokenizer().save_pretrained(tmp_path / "among weights")
    engram("check", tmp_path / "among weights")
    assert json.loads(engram("inspect", tmp_path / "among weights", "--json"))["tables"][0]["dtype"] == "I2"
    mapped = EngramForCausalLM.from_pretrained(tmp_path / "among weights", engram_residency="mapped")
    torch.testing.assert_close(logits(mapped.eval()), logits(resident.eval()), rtol=0, atol=1e-5)


def test_quantize_continues_after_an_interrupt(engram, saved, tmp_path, monkeypatch):
    engram("quantize", saved, tmp_path / "whole", "--dtype", "int2")
    target, begun = tmp_path / "target", []
    write = quantization._link_or_move

    def interrupted(*names):
        begun.append(names)
        if len(begun) == 2:
            raise KeyboardInterrupt
        write(*names)

    monkeypatch.setattr(quantization, "_link_or_move", interrupted)
    assert main(["quantize", str(saved), str(target), "--dtype", "int2"]) != 0
    assert not is_whole(target)
    monkeypatch.undo()
    monkeypatch.setattr(MappedRows, "read", None)  # Both tables were written, so rows are not read again.
    engram("quantize", saved, target, "--dtype", "int2")
    monkeypatch.undo()
    names = {path.name for path in target.iterdir()}
    assert names == {path.name for path in (tmp_path / "whole").iterdir()}
    for name in names:
        assert (target / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_quantize_measures_the_loss(engram, complaint, saved, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cafe w7 the THE café " * 30)
    report = engram("quantize", saved, tmp_path / "int2", "--dtype", "int2", "--measure", text)
    models = [EngramForCausalLM.from_pretrained(folder).eval() for folder in (saved, tmp_path / "int2")]
    ids = read_blocks(saved, text)
    losses = [model(ids, labels=ids).loss.item() for model in models]
    before, after = (re.search(rf"^{name} +(\S+)", report, re.MULTILINE)[1] for name in ("before", "after"))
    assert [float(before), float(after)] == pytest.approx(losses, abs=1e-4) and before != after
    for memory in models[0].model.memories().values():
        memory.zero_value_projection()
    if models[0].config.engram_conv_kernel_size is None:
        without = re.search(r"^without memory +(\S+)", report, re.MULTILINE)[1]
        assert float(without) == pytest.approx(models[0](ids, labels=ids).loss.item(), abs=1e-4)
    assert re.search(r"Memory is worth (nothing|\S+ nats)", report)

    said = json.loads(engram("quantize", saved, tmp_path / "float8", "--measure", text, "--json"))["loss"]
    assert said["before"] == pytest.approx(losses[0], abs=1e-4) and said["positions"] == (ids.shape[1] - 1) * len(ids)
    (tmp_path / "float8" / "config.json").unlink()
    wrong = tmp_path / "wrong"
    assert "without a model" in complaint("quantize", tmp_path / "float8", wrong, "--measure", text)
    assert "No such file" in complaint("quantize", saved, wrong, "--measure", tmp_path / "nothing.txt")
    text.write_text("")
    assert "0 tokens" in complaint("quantize", saved, wrong, "--measure", text)
    text.write_bytes(b"\xff\xfe")
    assert "no text in UTF-8" in complaint("quantize", saved, wrong, "--measure", text)
    shutil.copytree(saved, tmp_path / "bare", ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"])
    assert "no tokenizer" in complaint("quantize", tmp_path / "bare", wrong, "--measure", text)
    assert not wrong.exists()


def test_copied_code_is_replaced(engram, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "old"))
    current = (folder / "table_engram.py").read_bytes()
    (folder / "table_engram.py").write_text("raise NotImplementedError")
    engram("quantize", folder, tmp_path / "target", "--dtype", "int2")
    assert (tmp_path / "target" / "table_engram.py").read_bytes() == current


def is_whole(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "engram_tables.json"))


def test_rows_with_nan_leave_no_model(complaint, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    state = load_file(folder / "model.safetensors")
    state["model.layers.2.engram.table.weight"][-1, 0] = float("nan")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "repair the table" in complaint("quantize", folder, tmp_path / "target")
    assert not is_whole(tmp_path / "target")
    assert not list((tmp_path / "target").glob("*.unfinished"))


LIMITED = """
import resource, sys
from engram_cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(["quantize", *sys.argv[2:]]))
"""


@pytest.mark.slow
def test_full_disk_leaves_no_model_and_the_command_can_be_repeated(engram, saved, tmp_path):
    """The tables fit on the disk, the rest of their file does not."""
    engram("quantize", saved, tmp_path / "whole")
    tables = max(path.stat().st_size for path in (tmp_path / "whole").glob("engram-layer-*"))
    assert tables + 1000 < (tmp_path / "whole" / "model.safetensors").stat().st_size
    target = tmp_path / "target"
    command = [sys.executable, "-c", LIMITED, str(tables + 1000), str(saved), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    sentence = done.stderr.splitlines()[-1]
    assert "model.safetensors needs" in sentence and "free space" in sentence
    assert "the same command goes on" in sentence and not is_whole(target)
    engram("quantize", saved, target)
    assert engram("check", target, "--rows")


@pytest.mark.slow
def test_documents_that_do_not_fit_leave_no_model(with_files, tmp_path):
    """Documents are copied after the tables."""
    source, target = Path(shutil.copytree(with_files, tmp_path / "source")), tmp_path / "target"
    size = max(path.stat().st_size for path in source.iterdir()) + 1000
    (source / "training.log").write_bytes(bytes(size + 1))
    command = [sys.executable, "-c", LIMITED, str(size), str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "File too large" in done.stderr.splitlines()[-1]
    assert [path.name for path in target.iterdir()] == [".engram-quantize"]


MEASURED = """
import re, sys
from engram_cli.main import main
assert main(["quantize", *sys.argv[1:]]) == 0
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_memory(*arguments: Path) -> int:
    """Return the bytes of memory that the command takes in a process of its own."""
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 1024 * int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def peak_of_small_model(saved, tmp_path_factory) -> int:
    return peak_memory(saved, tmp_path_factory.mktemp("small"))


@pytest.mark.slow
@pytest.mark.parametrize("wide", ["backbone", "tables"])
def test_memory_does_not_grow_with_the_model(peak_of_small_model, saved, tmp_path, wide):
    """The backbone has 300 MB more, in one file with the tables; or the tables have 300 MB more."""
    backbone, rows = BACKBONES["llama"](), 499
    if wide == "backbone":
        backbone.hidden_size, backbone.head_dim, backbone.intermediate_size = 1024, 8, 8192
    else:
        rows = 300_000
    sizes = {"engram_n_heads": 2, "engram_head_dim": 32, "engram_vocab_size": rows}
    model = EngramForCausalLM(EngramConfig.for_backbone(backbone, make_tokenizer(), layer_ids=[1, 2], **sizes))
    model.set_token_map(make_tokenizer())
    model.save_pretrained(tmp_path / "large")
    added = sum(
        path.stat().st_size - (saved / path.name).stat().st_size for path in (tmp_path / "large").glob("*.safetensors")
    )
    assert added > 280e6
    grown = peak_memory(tmp_path / "large", tmp_path / "target") - peak_of_small_model
    assert grown < added / 2  # A command that loaded the model would take all of it.

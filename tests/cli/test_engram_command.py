"""The command `engram`, as users type it."""

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_models import TEXT, logits, make_config
from deepseek_v41_reference import copy_release
from engram_cli import checkpoints
from engram_cli.light import postpone_package
from engram_cli.main import build_parser, main
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from table_models import write_table
from tiny_backbones import BACKBONES
from tiny_tokenizer import make_tokenizer
from transformers import LlamaConfig

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.row_sources_engram import MappedRows
from engram_hf.safetensors_engram import VERSION, read_header
from engram_hf.saving_engram import is_table_file
from engram_hf.table_format_engram import file_description, read_tables, token_map_digest

ROOT = Path(__file__).parents[2]
COMMANDS = ["inspect", "card", "lookup", "show", "report", "check", "quantize", "compress", "convert", "export"]
COMMANDS += ["demo", "facts", "serve"]
SCRIPTS = [["convert", "deepseek-v4.1"], ["convert", "demo"], ["export", "deepseek-v4.1"]]


# --- help and usage ---


def test_help_needs_no_heavy_import():
    code = """
import sys
from engram_cli.main import main
try:
    main(["--help"])
finally:
    heavy = {"torch", "transformers", "numpy", "safetensors", "engram_hf"} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f"\n    {command} " in done.stdout for command in COMMANDS)


def test_commands_that_run_no_model_import_neither_torch_nor_transformers(golden, tmp_path):
    """Each command runs in a process of its own, as the console script does; planning and verification need no torch."""
    copy_release(golden / "deepseek_v41_tiny_vl", tmp_path / "release")
    floats = ["convert", "deepseek-v4.1", str(tmp_path / "release"), str(tmp_path / "floats"), "--dtype", "float32"]
    assert main(floats) == 0
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "floats").iterdir()}
    code = """
import contextlib, io, json, os, sys
from pathlib import Path
from engram_cli.main import main

cache = Path(sys.argv[1], "cache")
os.environ |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}

def cached(name, folder):
    commit, place = "0" * 40, cache / f"models--me--{name}"
    for part in ("refs", "snapshots"):
        (place / part).mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots" / commit).symlink_to(Path(folder).absolute())
    return f"me/{name}"

def run(*arguments, expected=0):
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
        assert main(arguments, owns_process=True) == expected, arguments
    heavy = {"torch", "transformers"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
    return output.getvalue()

def convert(*arguments, expected=0):
    run("convert", "deepseek-v4.1", *arguments, "--json", expected=expected)

demo = cached("demo", "examples/engram-demo")
for command in ("inspect", "check", "compress", "card"):
    of_folder, of_hub_id = (json.loads(run(command, name, "--json")) for name in ("examples/engram-demo", demo))
    same = {key for key, value in of_folder.items() if of_hub_id[key] == value}
    assert same == of_folder.keys() - {"folder", "card"}, (command, same)
    run(command, "me/none", expected=1)
assert f'from_pretrained("{demo}"' in run("card", demo)
run("demo", f"{sys.argv[1]}/demo")
run("check", f"{sys.argv[1]}/demo", "--rows")
run("card", "examples/engram-demo", "--repo-id", "me/model", "--license", "mit")
assert run("--version").split() == ["engram-hf", sys.argv[2]]
for script in (["convert", "deepseek-v4.1"], ["convert", "demo"], ["export", "deepseek-v4.1"]):
    run(*script, "--help")
release, kept, floats, back = (f"{sys.argv[1]}/{name}" for name in ("release", "kept", "floats", "back"))
for options in ([], ["--link-tables"], ["--layers", "5"]):
    convert(release, kept + "".join(options), *options)
convert(release, kept, "--verify-only")
convert(cached("release", release), kept, "--verify-only")
run("inspect", kept, "--json")
run("export", "deepseek-v4.1", cached("kept", kept), back, "--record", "me/kept", "--json")
run("export", "deepseek-v4.1", kept, back, "--verify-only")
convert(release, floats, "--dtype", "float32")
convert(release, floats, "--verify-only")
convert(release, floats + "2", "--dtype", "bfloat16", "--dequantize-tables", "--dry-run")
run("export", "deepseek-v4.1", floats, back + "2", "--dry-run")
(Path(release) / "tokenizer.json").rename(f"{release}/gone")
convert(release, kept + "2", expected=1)
convert(back, kept + "2", "--layers", "0", expected=1)
run("convert", "demo", f"{floats}/model-00001-of-00001.safetensors", "nobody/model", kept + "2", expected=1)
run("export", "deepseek-v4.1", "examples/engram-demo", back + "2", expected=1)
"""
    command = [sys.executable, "-c", code, str(tmp_path), VERSION]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "floats").iterdir()} == done


def test_postpone_package_runs_init_when_a_name_is_used(tmp_path, monkeypatch):
    package = tmp_path / "package_of_two"
    package.mkdir()
    (package / "__init__.py").write_text("from . import heavy\nfrom .heavy import NAME\n")
    (package / "heavy.py").write_text("from .light import VALUE as NAME\n")
    (package / "light.py").write_text("VALUE = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    postpone_package(package.name)
    light = importlib.import_module("package_of_two.light")
    assert "package_of_two.heavy" not in sys.modules
    assert importlib.import_module("package_of_two").NAME is light.VALUE
    assert type(sys.modules["package_of_two"]) is ModuleType and "package_of_two.heavy" in sys.modules
    with pytest.raises(AttributeError, match="NOTHING"):
        importlib.import_module("package_of_two").__getattribute__("NOTHING")


def test_main_called_by_other_code_leaves_imports_alone(engram, saved, monkeypatch):
    monkeypatch.setattr("engram_cli.main.postpone_package", pytest.fail)
    engram("inspect", saved)


@pytest.mark.parametrize("command", ["inspect", "check", "compress"])
def test_plain_fields_equal_those_of_the_classes(engram, with_files, copy, command):
    """transformers reads a config that lacks a field, because it knows the field's default; both print the same."""
    for name, field in (("config.json", "engram_seed"), ("tokenizer_config.json", "tokenizer_class")):
        fields = json.loads((copy / name).read_text())
        fields.pop(field)
        (copy / name).write_text(json.dumps(fields))
    plain, whole = (engram(command, folder, "--json") for folder in (with_files, copy))
    assert plain.replace(str(with_files), str(copy)) == whole


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("engram comp", ["compress"]),
        ("engram convert deepseek-v4.1 --d", ["--dtype", "--dequantize-tables", "--dry-run"]),
    ],
)
def test_shell_completes_commands(tmp_path, line, expected):
    """The environment is that of a shell after `register-python-argcomplete engram`; the answer is on file descriptor
    8.
    """
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    command = f"{sys.executable} -c 'from engram_cli.main import run_process; run_process()' 8> {answer}"
    subprocess.run(["bash", "-c", command], cwd=ROOT, env={**os.environ, **asked}, check=True, timeout=60)
    assert answer.read_text().split() == expected


@pytest.mark.parametrize("words", [*([command] for command in COMMANDS), *SCRIPTS], ids=" ".join)
def test_every_command_has_help(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: engram {' '.join(words)} ")


def test_every_option_has_help():
    scripts = [
        importlib.import_module(f"engram_hf.convert_scripts.{name}") for name, _ in checkpoints.SCRIPTS.values()
    ]
    parsers = [build_parser(), *(script.build_parser() for script in scripts)]
    for parser in parsers:  # Parsers of subcommands are appended.
        for action in parser._actions:
            if action.nargs == argparse.PARSER:
                parsers += action.choices.values()
            else:
                assert action.help, (parser.prog, action.dest)
    assert len(parsers) > 20


@pytest.mark.parametrize(
    "words", [[], ["inspekt"], ["lookup", "folder"], ["quantize", "a", "b", "--dtype", "int3"], ["convert", "gguf"]]
)
def test_wrong_usage_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: engram" in capsys.readouterr().err


def test_command_runs_as_a_module_and_ends_without_traceback_on_a_closed_pipe(saved):
    command = [sys.executable, "-m", "engram_cli", "compress", str(saved)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 1
    assert "Traceback" not in errors and "Exception ignored" not in errors


# --- inspect, card, compress ---


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_names_from_files_do_not_move_the_cursor(copy, capsys, command):
    tables, name = json.loads((copy / "engram_tables.json").read_text()), "layer\x1b[31m\x07.safetensors"
    for pieces in tables["tables"]["1"].values():
        for piece in pieces:
            (copy / piece["file"]).rename(copy / name)
            piece["file"] = name
            break
    (copy / "engram_tables.json").write_text(json.dumps(tables))
    if command == "check":
        (copy / name).write_bytes(b"damaged")
    main([command, str(copy)])
    printed = "".join(capsys.readouterr())
    assert "layer?[31m?.safetensors" in printed and "\x1b" not in printed


@pytest.mark.parametrize("folder", ["saved", "with_files"])
def test_inspect_describes_the_folder(engram, model, folder, request):
    folder = request.getfixturevalue(folder)
    found = json.loads(engram("inspect", folder, "--json"))
    tables = [memory.table.weight for memory in model.model.memories().values()]
    assert [table["rows"] for table in found["tables"]] == [len(table) for table in tables]
    assert [table["bytes"] for table in found["tables"]] == [table.nbytes for table in tables]
    assert {(table["layer"], table["dtype"], table["width"]) for table in found["tables"]} == {
        (1, "F32", 32),
        (2, "F32", 32),
    }
    assert all((folder / table["files"]).exists() for table in found["tables"])
    assert found["table_bytes"] == sum(table.nbytes for table in tables)
    assert found["compressed_ids"] == make_tokenizer().compressed_vocab_size
    assert found["backbone"] == "mixtral, 3 layers of width 32"
    assert found["residency"]["auto"] in found["residency"]["options"]


def test_inspect_for_people(engram, saved, model):
    lines = engram("inspect", saved).splitlines()
    assert "memory layers   1, 2" in lines
    rows = f"{model.config.engram_num_embeddings[0]:,}"
    assert any(line.split()[:4] == ["1", rows, "32", "F32"] for line in lines)


def test_inspect_a_folder_of_tables_alone(engram, copy):
    (copy / "config.json").unlink()
    found = json.loads(engram("inspect", copy, "--json"))
    assert [table["layer"] for table in found["tables"]] == [1, 2] and "backbone" not in found


def test_card(engram, saved):
    card = engram("card", saved, "--repo-id", "me/model", "--license", "mit")
    assert "\nlicense: mit\n" in card and '"me/model"' in card
    found = json.loads(engram("card", saved, "--repo-id", "me/model", "--license", "mit", "--json"))
    assert found["card"] == card and found["metadata"]["license"] == "mit"


def test_card_with_results(engram, complaint, saved, tmp_path):
    path = tmp_path / "results.json"
    result = {"task": "text-generation", "dataset": "mine", "metric": "loss", "value": 2.5}
    path.write_text(json.dumps([result]))
    data = ModelCard(engram("card", saved, "--repo-id", "me/model", "--results", path)).data
    (found,) = data.eval_results
    assert (data.model_name, found.dataset_name, found.metric_type, found.metric_value) == (
        "model",
        "mine",
        "loss",
        2.5,
    )
    path.write_text(json.dumps([{**result, "value": "low"}]))
    assert "value, a number" in complaint("card", saved, "--results", path)


def test_json_of_check_and_compress(engram, saved, with_files):
    found = json.loads(engram("check", with_files, "--json"))
    assert found["is_sound"] and len(found["checked"]) == 3
    summary = json.loads(engram("compress", saved, "--json"))
    assert summary["compressed_count"] == make_tokenizer().compressed_vocab_size


def test_compress(engram, saved):
    assert engram("compress", saved, "--examples", "1") == str(make_tokenizer().compression_summary(1)) + "\n"


# --- lookup ---


@pytest.mark.parametrize("folder", ["saved", "with_files"])
def test_lookup_reads_what_the_model_reads(engram, model, folder, request):
    positions = json.loads(engram("lookup", request.getfixturevalue(folder), TEXT, "--json"))
    ids = make_tokenizer()(TEXT, return_tensors="pt")["input_ids"]
    row_ids = model.model.prepare_memory(ids).row_ids[:, 0]
    heads = model.config.engram_n_heads
    for index, (layer, memory) in enumerate(model.model.memories().items()):
        for at, position in enumerate(positions):
            found = [ngram["layers"][index] for ngram in position["ngrams"]]
            assert [entry["layer"] for entry in found] == [layer] * 2
            assert [row for entry in found for row in entry["rows"]] == row_ids[index, at].tolist()
            norms = memory.table.weight[row_ids[index, at]].norm(dim=-1).view(-1, heads)
            torch.testing.assert_close(torch.tensor([entry["norms"] for entry in found]), norms)


def test_lookup_names_tokens_and_ngrams(engram, saved):
    the, cafe, again, *_ = json.loads(engram("lookup", saved, TEXT, "--json"))
    assert (the["token"], the["id"], the["compressed"]) == ("the", 4, again["compressed"])
    assert cafe["same"] == ["café", "Café", "cafe", "CAFE"]
    assert [ngram["tokens"] for ngram in cafe["ngrams"]] == [["the", "café"], [None, "the", "café"]]


def test_lookup_of_equal_words_is_equal(engram, saved):
    plain, loud = (json.loads(engram("lookup", saved, text, "--json")) for text in ("the café", "THE CAFE"))
    rows = [[ngram["layers"] for position in found for ngram in position["ngrams"]] for found in (plain, loud)]
    assert rows[0] == rows[1]


def test_lookup_for_people(engram, saved):
    lines = engram("lookup", saved, "the café").splitlines()
    assert lines[0] == "0  'the'  id 4, compressed 4 ('the' 'THE')"
    at = lines.index("   3-gram  (cut) 'the' 'café'")
    _, cafe = json.loads(engram("lookup", saved, "the café", "--json"))
    for line, layer in zip(lines[at + 1 :], cafe["ngrams"][1]["layers"], strict=True):
        words = ["layer", str(layer["layer"]), "rows", *(f"{row:,}" for row in layer["rows"])]
        assert line.split() == [*words, "norms", *(f"{norm:.3g}" for norm in layer["norms"])]


def test_lookup_reads_only_the_rows_it_needs(engram, tmp_path):
    config = make_config(engram_vocab_size=4_000_000)
    model = EngramForCausalLM(make_config())
    model.set_token_map(make_tokenizer())
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    hashing = model.model.hashing.state_dict() | {"primes": torch.tensor(config.primes)}
    save_file({f"model.hashing.{name}": tensor for name, tensor in hashing.items()}, tmp_path / "model-1.safetensors")
    for layer, rows in zip(config.engram_layer_ids, config.engram_num_embeddings, strict=True):
        sparse_table(tmp_path / f"model-layer-{layer}.safetensors", layer, rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (position,) = json.loads(engram("lookup", tmp_path, "the", "--json"))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 100e6 < 2e9 < sum(config.engram_num_embeddings) * 32 * 4
    assert max(max(layer["rows"]) for ngram in position["ngrams"] for layer in ngram["layers"]) > 8_000_000


def sparse_table(path: Path, layer: int, rows: int) -> None:
    """Write a table of zeros that takes no space on the disk."""
    size = rows * 32 * 4
    entry = {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, size]}
    header = json.dumps({f"model.layers.{layer}.engram.table.weight": entry}).encode()
    header += b" " * (-len(header) % 8)  # safetensors pads headers in this way, too.
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)


# --- check ---


@pytest.mark.parametrize("folder", ["saved", "with_files"])
def test_check_of_a_sound_model(engram, folder, request):
    folder = request.getfixturevalue(folder)
    assert engram("check", folder, "--rows").splitlines()[-1] == f"{folder}: all well"


def test_check_finds_a_damaged_file(complaint, copy):
    path = copy / "engram-layer-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert "engram-layer-00002.safetensors" in complaint("check", copy)


def test_check_finds_another_models_config(complaint, saved, tmp_path):
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["engram_seed"] = 1
    (copy / "config.json").write_text(json.dumps(config))
    assert "multipliers" in complaint("check", copy)


def test_check_finds_tables_of_another_hash(complaint, with_files, copy):
    """The files and the model are valid, but they do not belong together."""
    path = copy / "engram-layer-00001.safetensors"
    described = file_description(read_header(path))
    rows = MappedRows(read_tables(with_files)[1]).read(0, described.num_rows)
    write_table(path, replace(described, multipliers=[1, 3, 5]), *rows)
    assert "written for the multipliers [1, 3, 5]" in complaint("check", copy)


# --- bad input ---


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["inspect", "{empty}"], "holds no memory tables"),
        (["inspect", "nowhere"], "neither a folder nor a Hub id"),
        (["inspect", "org/model"], "the Hub did not give a repository of that name"),
        (["inspect", "{file}"], "neither a folder nor a Hub id"),
        (["check", "org/model"], "the Hub did not give a repository of that name"),
        (["check", "{empty}"], "cannot be read"),
        (["quantize", "{empty}", "{empty}/new"], "holds no memory tables"),
        (["lookup", "{empty}", "text"], "no config.json"),
        (["card", "{plain}"], "plain 'llama' model"),
        (["compress", "{empty}"], "{empty}"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(complaint, tmp_path, monkeypatch, command, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # Otherwise, the client tries for a minute.
    places = {name: tmp_path / name for name in ("empty", "plain", "file")}
    places["empty"].mkdir()
    places["file"].touch()
    LlamaConfig().save_pretrained(places["plain"])
    assert said.format(**places) in complaint(*(word.format(**places) for word in command))


def test_lookup_without_hash_or_text_is_refused(complaint, saved, copy):
    assert "no tokens" in complaint("lookup", saved, "")
    (copy / "model.safetensors").unlink()
    assert "lacks the hash tensors multipliers, primes, token_map" in complaint("lookup", copy, TEXT)


def older_tables(saved: Path, with_files: Path, folder: Path) -> Path:
    """Return a folder as on the Hub after two pushes: of mapped tables, and of the same model with trained tables
    among its weights.
    """
    shutil.copytree(saved, folder)
    trained = EngramForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        for memory in trained.model.memories().values():
            memory.table.weight.mul_(2)
    trained.save_pretrained(folder)
    for path in with_files.iterdir():
        if is_table_file(path.name):
            shutil.copy(path, folder)
    return folder


def test_commands_read_the_tables_that_a_model_reads(engram, complaint, saved, with_files, tmp_path):
    folder = older_tables(saved, with_files, tmp_path / "both")
    norms = [
        [
            layer["norms"]
            for position in json.loads(engram("lookup", at, TEXT, "--json"))
            for ngram in position["ngrams"]
            for layer in ngram["layers"]
        ]
        for at in (folder, saved)
    ]
    torch.testing.assert_close(torch.tensor(norms[0]), 2 * torch.tensor(norms[1]))
    assert "has the tables of layers [1, 2] twice" in complaint("check", folder)
    engram("quantize", folder, tmp_path / "int8", "--dtype", "int8")
    engram("check", tmp_path / "int8", "--rows")
    models = [EngramForCausalLM.from_pretrained(at, engram_residency="mapped") for at in (folder, tmp_path / "int8")]
    torch.testing.assert_close(*(logits(model) for model in models), rtol=0, atol=0.15)


@pytest.mark.parametrize("folder", ["saved", "with_files"])
@pytest.mark.parametrize("command", [["check", "{0}"], ["lookup", "{0}", TEXT], ["quantize", "{0}", "{0}-new"]])
def test_token_map_of_another_tokenizer_is_refused(complaint, folder, command, request, tmp_path):
    copy = shutil.copytree(request.getfixturevalue(folder), tmp_path / "copy")
    metadata = {"format_version": "1", "vocabulary_sha256": "0"}
    values = torch.arange(len(make_tokenizer())).int()
    metadata["map_sha256"] = token_map_digest(values)
    save_file({"token_map": values}, copy / "engram_token_map.safetensors", metadata=metadata)
    assert "is that of another tokenizer" in complaint(*(word.format(copy) for word in command))


def test_lookup_accepts_more_ids_than_the_tokenizer_has(engram, tmp_path):
    """Many releases pad their vocabulary."""
    backbone = BACKBONES["mixtral"]()
    backbone.vocab_size += 32
    sizes = {"engram_n_heads": 2, "engram_head_dim": 32, "engram_vocab_size": 499}
    model = EngramForCausalLM(EngramConfig.for_backbone(backbone, make_tokenizer(), layer_ids=[1, 2], **sizes))
    model.set_token_map(make_tokenizer())
    for part in (model, make_tokenizer()):
        part.save_pretrained(tmp_path)
    assert (tmp_path / "engram_token_map.safetensors").exists()
    assert engram("check", tmp_path).endswith("all well\n")


def test_missing_shard_is_refused(complaint, saved, tmp_path):
    EngramForCausalLM.from_pretrained(saved).save_pretrained(tmp_path, max_shard_size="300KB")
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    (tmp_path / names["model.norm.weight"]).unlink()
    for command in (["check", tmp_path], ["quantize", tmp_path, tmp_path / "new"]):
        assert "lacks 1 shards of its index, such as model-" in complaint(*command)


@pytest.mark.parametrize("command", ["check", "lookup"])
def test_hash_tensors_of_another_shape_are_refused(complaint, copy, command):
    weights = load_file(copy / "model.safetensors")
    weights["model.hashing.primes"] = weights["model.hashing.primes"][:1]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    sentence = complaint(command, copy, *[TEXT] * (command == "lookup"))
    assert (
        "The hash tensor primes" in sentence and "has shape [1, 2, 2], but the config asks for [2, 2, 2]" in sentence
    )


@pytest.mark.parametrize(
    "fields", [{"engram_layer_ids": 3}, {"auto_map": 1}, {"id2label": 0}, {"engram_n_heads": "2"}]
)
def test_config_with_wrong_types_is_refused(complaint, copy, fields):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | fields))
    for command in (["inspect", copy], ["check", copy]):
        assert complaint(*command)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "engram: It looks like the config file"), ('{"model_type": "abacus"}', "engram: The checkpoint you are")],
)
def test_inspect_shows_the_message_of_transformers(complaint, copy, text, said):
    (copy / "config.json").write_text(text)
    assert complaint("inspect", copy).startswith(said)


def test_unconverted_release_is_refused(complaint, golden):
    release = golden / "deepseek_v41_tiny"
    for command in (["check", release], ["lookup", release, TEXT]):
        assert "is in the layout of deepseek_v41; `engram convert` it first" in complaint(*command)


def test_files_that_an_index_does_not_name_are_ignored(engram, saved, tmp_path):
    EngramForCausalLM.from_pretrained(saved).save_pretrained(tmp_path, max_shard_size="300KB")
    save_file({"draft.layers.1.engram.table.weight": torch.zeros(2, 32)}, tmp_path / "notes.safetensors")
    engram("check", tmp_path)
    assert len(json.loads(engram("inspect", tmp_path, "--json"))["tables"]) == 2


def test_files_of_an_older_save_are_ignored(engram, saved, tmp_path):
    """Older versions and transformers leave another variant, and the index of missing shards."""
    folder, model = tmp_path / "folder", EngramForCausalLM.from_pretrained(saved)
    model.save_pretrained(folder, max_shard_size="300KB")
    index = (folder / "model.safetensors.index.json").read_bytes()
    model.save_pretrained(folder)
    assert not (folder / "model.safetensors.index.json").exists()
    (folder / "model.safetensors.index.json").write_bytes(index)
    model.save_pretrained(folder, variant="other")
    make_tokenizer().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists() and (folder / "model.other.safetensors").exists()
    engram("check", folder)
    engram("inspect", folder)
    assert engram("lookup", folder, TEXT) == engram("lookup", saved, TEXT)
    engram("quantize", folder, tmp_path / "new")
    engram("check", tmp_path / "new", "--rows")
    assert not (tmp_path / "new" / "model.safetensors.index.json").exists()


def test_lookup_without_a_tokenizer_is_refused(complaint, copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer; tokenizer.save_pretrained puts one there" in complaint("lookup", copy, TEXT)


def test_lookup_refuses_text_that_is_not_utf8(complaint, saved):
    assert "is not valid UTF-8" in complaint("lookup", saved, "caf\udce9")


def test_names_in_a_file_do_not_reach_the_terminal(complaint, copy):
    manifest = json.loads((copy / "engram_tables.json").read_text())
    manifest["tables"]["1"]["weight"][0]["file"] = "\x1b]0;owned\x07"
    (copy / "engram_tables.json").write_text(json.dumps(manifest))
    assert "?]0;owned?" in complaint("check", copy)


def test_scripts_get_their_arguments(golden, tmp_path, capsys):
    upstream = golden / "deepseek_v41_tiny" / "full"
    source = upstream if upstream.is_dir() else golden / "deepseek_v41_tiny"
    assert main(["convert", "deepseek-v4.1", str(source), str(tmp_path / "target"), "--dry-run"]) == 0
    assert "to write" in capsys.readouterr().out
    assert main(["export", "deepseek-v4.1", str(tmp_path), str(tmp_path / "target")]) == 1
    assert capsys.readouterr().err.startswith("engram: ")

"""The conversion command: its output, the input it refuses, and recovery from interruptions."""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from checkpoint_tools import contents, write_safetensors
from child_processes import forks_of_a_server
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

from engram_hf import EngramConfig
from engram_hf.claiming_engram import LOCK_NAME, FolderClaim
from engram_hf.convert_scripts import convert_deepseek_v41, deepseek_v41_config, streaming
from engram_hf.convert_scripts.command_line import run_command
from engram_hf.convert_scripts.safetensors_files import read_checkpoint
from engram_hf.plain_config_engram import DEFAULTS, VARIANTS, as_plain_config
from engram_hf.table_format_engram import read_tables
from engram_hf.tokenization import EngramTokenizer

pytestmark = pytest.mark.any_version


def run(source, target, *options):
    return convert_deepseek_v41.main([str(source), str(target), *options])


def tensors_of(folder, pattern="*.safetensors"):
    loaded = {}
    for path in sorted(folder.glob(pattern)):
        loaded |= load_file(path)
    return loaded


# --- output ---


def test_convert_keeps_quantized_bytes(tiny, converted):
    ours, upstream = tensors_of(converted, "model-*"), tensors_of(tiny)
    layer = "model.layers.4"
    q_b = ours[f"{layer}.self_attn.q_b_proj.weight"]
    assert q_b.dtype == torch.float8_e4m3fn
    assert torch.equal(q_b.view(torch.uint8), upstream["layers.4.attn.wq_b.weight"].view(torch.uint8))
    scale = ours[f"{layer}.self_attn.q_b_proj.weight_scale_inv"]
    assert scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(scale.view(torch.uint8), upstream["layers.4.attn.wq_b.scale"].view(torch.uint8))


@pytest.mark.parametrize("variant", ["deepseek_v41_tiny", "deepseek_v41_tiny_vl"])
def test_converted_config_equals_that_of_the_config_classes(golden, variant):
    """The conversion writes it without these classes; their derived fields and defaults are equal."""
    release = json.loads((golden / variant / "config.json").read_text(encoding="utf-8"))
    fields = deepseek_v41_config.to_engram_fields(release, "float32", dequantize_tables=True)
    loaded = EngramConfig.from_dict(json.loads(json.dumps(fields)))
    text = {name: value for name, value in release["text_config"].items() if not name.startswith("engram_")}
    text |= {"vision_config": release["vision_config"], "image_token_id": release["image_token_id"]}
    assert loaded.text_config.to_dict() == CONFIG_MAPPING[text.pop("model_type")](**text).to_dict()
    memory = {name: value for name, value in release["text_config"].items() if name.startswith("engram_")}
    expected = EngramConfig(text_config=loaded.text_config, dtype="float32", **{**VARIANTS["v4.1"], **memory})
    assert loaded.to_dict() == {**expected.to_dict(), "architectures": ["EngramForCausalLM"]}
    assert deepseek_v41_config.auto_map(reads_images=True) == loaded.remote_code_map()
    assert DEFAULTS.items() <= EngramConfig().to_dict().items()
    assert as_plain_config(fields).engram_streams == loaded.engram_streams


def test_convert_stacks_experts_gate_before_up(tiny, converted):
    ours, upstream = tensors_of(converted, "model-*"), tensors_of(tiny)
    experts = "model.layers.4.mlp.experts"
    gate_up, scale = ours[f"{experts}.gate_up_proj"], ours[f"{experts}.gate_up_proj_scale_inv"]
    assert gate_up.dtype == torch.int8 and gate_up.shape == (8, 128, 32) and scale.shape == (8, 128, 2)
    for expert in range(8):
        for half, name in enumerate(("w1", "w3")):
            rows = slice(64 * half, 64 * half + 64)
            stem = f"layers.4.ffn.experts.{expert}.{name}"
            assert torch.equal(gate_up[expert, rows], upstream[f"{stem}.weight"])
            assert torch.equal(scale[expert, rows].view(torch.uint8), upstream[f"{stem}.scale"].view(torch.uint8))
        assert torch.equal(ours[f"{experts}.down_proj"][expert], upstream[f"layers.4.ffn.experts.{expert}.w2.weight"])


def test_hash_constants_equal_the_golden_ones(golden, converted):
    ours = tensors_of(converted, "model-00001-*")
    with safe_open(golden / "deepseek_v41_tiny" / "golden.safetensors", "pt") as file:
        assert torch.equal(ours["model.hashing.token_map"], file.get_tensor("engram.token_map").long())
        assert torch.equal(ours["model.hashing.multipliers"], file.get_tensor("engram.multipliers"))
        assert torch.equal(ours["model.hashing.primes"].flatten(1), file.get_tensor("engram.primes"))


def test_index_names_exactly_the_tensors_of_the_model(converted):
    checkpoint = read_checkpoint(converted)
    names = set(checkpoint.tensors)
    assert not any(name.startswith(("vision.", "aligner.", "mtp.", "image_")) for name in names)
    files = {span.path.name for span in checkpoint.tensors.values()}
    on_disk = {
        path.name for pattern in ("model-*.safetensors", "engram-*.safetensors") for path in converted.glob(pattern)
    }
    assert files == on_disk


def test_table_manifest_leads_to_the_tables(tiny, converted):
    tables = json.loads((converted / "engram_tables.json").read_text(encoding="utf-8"))
    upstream = tensors_of(tiny)
    assert tables["format_version"] == 1 and set(tables["tables"]) == {"1", "4"}
    for layer, kinds in tables["tables"].items():
        for kind in ("weight", "scale"):
            (piece,) = kinds[kind]
            found = load_file(converted / piece["file"])[piece["tensor"]].view(torch.uint8)
            expected = upstream[f"layers.{layer}.engram.embed.{kind}"].view(torch.uint8)
            assert piece["rows"] == [0, len(expected)] and torch.equal(found, expected)


def test_unused_tensors_are_passed_through(checkpoint, tmp_path):
    """A tensor without a rule under a known prefix is kept unchanged, and exported again."""
    shard = checkpoint.shard_of("mtp.0.norm.weight")
    checkpoint.rewrite(shard, lambda tensors: tensors.update({"mtp.0.calibration": ["F32", [2], bytes(range(8))]}))
    checkpoint.edit_index(lambda weights: weights.update({"mtp.0.calibration": shard.name}))
    assert run(checkpoint.folder, tmp_path / "out") == 0
    passed_through = tensors_of(tmp_path / "out", "carried-*")
    assert {name: bytes(tensor.view(torch.uint8)) for name, tensor in passed_through.items()} == {
        "mtp.0.calibration": bytes(range(8))
    }


def test_draft_layers_are_passed_through_without_the_layers_they_need(tiny, tmp_path):
    assert run(tiny, tmp_path / "out", "--layers", "5") == 0
    passed_through, upstream = tensors_of(tmp_path / "out", "carried-*"), tensors_of(tiny)
    expected = {name for name in upstream if name.startswith("mtp.")}
    assert set(passed_through) == expected and len(expected) == 61
    assert all(torch.equal(passed_through[n].view(torch.uint8), upstream[n].view(torch.uint8)) for n in expected)


def test_vision_and_draft_tensors_keep_either_float_dtype(checkpoint, tmp_path):
    """Nobody here has read those headers of the release; either dtype is kept."""
    for name in ("image_start", "vision.norm.weight", "mtp.0.confidence_head.proj.weight"):

        def change(tensors, name=name):
            dtype, shape, content = tensors[name]
            raw = torch.frombuffer(bytearray(content), dtype=torch.bfloat16 if dtype == "BF16" else torch.float32)
            other = raw.to(torch.float32 if dtype == "BF16" else torch.bfloat16).view(torch.uint8)
            tensors[name] = ["F32" if dtype == "BF16" else "BF16", shape, bytes(other)]

        checkpoint.rewrite(checkpoint.shard_of(name), change)
    assert run(checkpoint.folder, tmp_path / "out") == 0
    found = tensors_of(tmp_path / "out")
    assert found["model.image_start"].dtype == torch.float32
    assert found["model.vision_tower.post_layernorm.weight"].dtype == torch.bfloat16
    assert found["draft.confidence_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantize_gives_the_golden_values(golden, tiny, tmp_path, dtype):
    assert run(tiny, tmp_path / "out", "--dtype", dtype, "--dequantize-tables") == 0
    ours = tensors_of(tmp_path / "out", "[em]*-0*.safetensors")
    layer = "model.layers.4."
    places = {
        "attn.wo_a.weight": ours[f"{layer}self_attn.o_a_proj.weight"],
        "ffn.shared_experts.w2.weight": ours[f"{layer}mlp.shared_experts.down_proj.weight"],
        "ffn.experts.5.w1.weight": ours[f"{layer}mlp.experts.gate_up_proj"][5, :64],
        "engram.embed.weight": ours[f"{layer}engram.table.weight"],
        "engram.wkv.weight": ours[f"{layer}engram.kv_proj.weight"],
    }
    with safe_open(golden / "deepseek_v41_tiny" / "golden.safetensors", "pt") as file:
        for name, values in places.items():
            assert values.dtype == getattr(torch, dtype)
            assert torch.equal(values.float(), file.get_tensor(f"dequantized.layers.4.{name}")), name
    assert ours[f"{layer}attn_hc.fn"].dtype == torch.float32
    assert not any("scale_inv" in name or name.endswith("table.scale") for name in ours)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config and config["dtype"] == dtype
    assert config.get("engram_table_dtype") is None


def test_tables_stay_quantized_unless_requested(tiny, tmp_path):
    assert run(tiny, tmp_path / "out", "--dtype", "bfloat16") == 0
    table = load_file(tmp_path / "out" / "engram-layer-00004.safetensors")
    assert table["model.layers.4.engram.table.weight"].dtype == torch.float8_e4m3fn
    assert len(table) == 2


def test_link_tables_links_the_upstream_shards(tiny, tmp_path):
    assert run(tiny, tmp_path / "out", "--link-tables") == 0
    linked, original = tmp_path / "out" / "engram-layer-00001.safetensors", tiny / "model-00013-of-00014.safetensors"
    assert linked.samefile(original)
    piece = json.loads((tmp_path / "out" / "engram_tables.json").read_text())["tables"]["1"]["weight"][0]
    assert piece["tensor"] == "layers.1.engram.embed.weight"
    shutil.rmtree(tmp_path / "out")
    assert original.is_file()


def test_layers_option_converts_the_first_layers(tiny, tmp_path):
    assert run(tiny, tmp_path / "out", "--layers", "4") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    assert text["num_hidden_layers"] == 4 and text["compress_ratios"] == [0, 0, 2, 2, 0]
    assert text["kv_source_layer_ids"] == [2] and text["candidate_source_layer_id"] is None
    assert config["engram_layer_ids"] == [1] and config["engram_num_embeddings"] == [1916]
    names = set(read_checkpoint(tmp_path / "out").tensors)
    assert any(".layers.3." in name for name in names) and not any(".layers.4." in name for name in names)


def test_dry_run_writes_nothing(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "out", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "model-00011-of-00011.safetensors" in printed and "to write" in printed
    assert run(tiny, tmp_path / "out", "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert all(file["name"] in printed for file in plan["files"]) and len(plan["files"]) == printed.count("\n") - 1
    assert 0 < plan["bytes_to_write"] < plan["bytes_free"]
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_checkpoint(capsys):
    with pytest.raises(SystemExit) as stop:
        convert_deepseek_v41.main(["--help"])
    assert stop.value.code == 0 and "--link-tables" in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), ("--link-tables",), ("--dtype", "bfloat16", "--dequantize-tables")])
def test_tables_follow_the_table_format(tiny, tmp_path, options):
    assert run(tiny, tmp_path / "out", *options) == 0
    tables = read_tables(tmp_path / "out")
    assert sorted(tables) == [1, 4] and [table.num_rows for table in tables.values()] == [1916, 2148]
    for table in tables.values():
        assert table.description is not None and table.description.width == 32
        assert table.dtype == ("BF16" if "--dtype" in options else "F8_E4M3")
        assert "--link-tables" in options or table.parts[0].weight.offset % 4096 == 0


def test_token_map_is_saved_with_the_tokenizer(golden, converted):
    tokenizer = EngramTokenizer.from_pretrained(converted)
    with safe_open(golden / "deepseek_v41_tiny" / "golden.safetensors", "pt") as file:
        assert torch.equal(tokenizer.token_map, file.get_tensor("engram.token_map").long())
    assert (converted / "engram_token_map.safetensors").is_file()


# --- verification ---


def test_verify_accepts_a_finished_conversion(tiny, converted, capsys):
    assert run(tiny, converted, "--verify-only") == 0
    assert "verified" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["model-00004-of-00011.safetensors", "engram-layer-00004.safetensors", "config.json"])
def test_verify_finds_one_changed_byte(tiny, converted, tmp_path, capsys, name):
    copy = tmp_path / "copy"
    shutil.copytree(converted, copy)
    data = bytearray((copy / name).read_bytes())
    data[-3] ^= 1
    (copy / name).write_bytes(data)
    assert run(tiny, copy, "--verify-only") == 1
    assert name in capsys.readouterr().err


def test_verify_requires_the_same_source(checkpoint, converted, capsys):
    checkpoint.edit_text_config(lambda text: text.update(routed_scaling_factor=2.0))
    assert run(checkpoint.folder, converted, "--verify-only") == 1
    assert "another checkpoint" in capsys.readouterr().err


# --- refusals ---


def remove(name):
    return lambda checkpoint: (
        checkpoint.rewrite(checkpoint.shard_of(name), lambda tensors: tensors.pop(name)),
        checkpoint.edit_index(lambda index: index.pop(name)),
    )


def reshape(name, change):
    return lambda checkpoint: checkpoint.rewrite(checkpoint.shard_of(name), lambda tensors: change(tensors[name]))


def one_row_less(tensor):
    _, shape, content = tensor
    tensor[1:] = [[shape[0] - 1, *shape[1:]], content[: len(content) // shape[0] * (shape[0] - 1)]]


def other_dtype(tensor):
    tensor[0] = {"BF16": "F16", "F8_E4M3": "F8_E8M0", "F32": "I32", "I8": "U8"}[tensor[0]]


def edit_text(**changes):
    return lambda checkpoint: checkpoint.edit_text_config(lambda text: text.update(changes))


def merge_two_tokens(checkpoint):
    """Change the tokenizer so that a special token is a full-width letter, which compresses to the id of the letter
    itself.
    """
    path = checkpoint.folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<｜User｜>", "ａ"), encoding="utf-8")


REFUSED = {
    "weight without scale": (remove("layers.3.attn.wkv.scale"), "its scale 'layers.3.attn.wkv.scale' is missing"),
    "scale without weight": (remove("layers.3.attn.wkv.weight"), "its weight is missing"),
    "expert without scale": (remove("layers.3.ffn.experts.2.w1.scale"), "is missing"),
    "passed-through weight without scale": (remove("mtp.0.main_proj.scale"), "is missing"),
    "table without scale": (remove("layers.1.engram.embed.scale"), "is missing"),
    "missing tensor": (remove("layers.3.attn_norm.weight"), "lacks 'layers.3.attn_norm.weight'"),
    "missing expert": (remove("layers.3.ffn.gate.bias_vl"), "lacks"),
    "table row off by one": (reshape("layers.4.engram.embed.weight", one_row_less), r"F8_E4M3 \[2147, 32\]"),
    "matrix row off by one": (reshape("layers.0.attn.wq_a.weight", one_row_less), r"asks for F8_E4M3 \[64, 64\]"),
    "scale row off by one": (reshape("layers.0.attn.wq_b.scale", one_row_less), "asks for F8_E8M0"),
    "norm off by one": (reshape("norm.weight", one_row_less), r"asks for BF16 \[64\]"),
    "half instead of bfloat": (reshape("layers.0.attn_norm.weight", other_dtype), "is F16"),
    "scale dtype for a weight": (reshape("layers.0.attn.wq_a.weight", other_dtype), "layers.0.attn.wq_a.weight"),
    "integers for a sink": (reshape("layers.0.attn.attn_sink", other_dtype), "is I32"),
    "unsigned experts": (reshape("layers.0.ffn.experts.1.w2.weight", other_dtype), "is U8"),
    "row count is not the primes' sum": (edit_text(engram_vocab_size=320), "primes"),
    "other compressed vocabulary": (edit_text(engram_compressed_vocab_size=884), "compresses 1536 ids to 885"),
    "other tokenizer": (merge_two_tokens, "use the tokenizer of this very release"),
    "no tokenizer": (lambda checkpoint: (checkpoint.folder / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
    "no config": (lambda checkpoint: (checkpoint.folder / "config.json").unlink(), "config.json cannot be read"),
    "other model": (lambda checkpoint: checkpoint.edit_json("config.json", lambda c: c.update(model_type="llama")), "'llama'"),
    "other blocks": (
        lambda checkpoint: checkpoint.edit_json(
            "config.json", lambda c: c["quantization_config"].update(weight_block_size=[128, 128])
        ),
        "weight_block_size",
    ),
    "config lacks a field": (lambda checkpoint: checkpoint.edit_text_config(lambda text: text.pop("q_lora_rank")), "q_lora_rank"),
    "layer out of range": (edit_text(num_hidden_layers=8), "does not have"),
    "truncated shard": (lambda checkpoint: os.truncate(checkpoint.shards[4], 100_000), "cut off"),
    "missing shard": (lambda checkpoint: checkpoint.shards[4].unlink(), "not in the folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_checkpoints_are_refused_before_anything_is_written(checkpoint, tmp_path, capsys, case):
    damage, words = REFUSED[case]
    damage(checkpoint)
    before = contents(checkpoint.folder)
    assert run(checkpoint.folder, tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("engram: ") and captured.err.count("\n") == 1
    assert re.search(words, captured.err), captured.err
    assert not (tmp_path / "out").exists()
    assert contents(checkpoint.folder) == before


def test_every_missing_tensor_is_named(checkpoint, tmp_path, capsys):
    """A sample of tensors is removed, one at a time."""
    draw = random.Random(3)
    index = json.loads((checkpoint.folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    for name in draw.sample([name for name in index if name.startswith("layers.")], 12):
        path, whole = checkpoint.shard_of(name), checkpoint.shard_of(name).read_bytes()
        remove(name)(checkpoint)
        assert run(checkpoint.folder, tmp_path / "out") == 1
        assert name.rpartition(".")[0] in capsys.readouterr().err
        path.write_bytes(whole)
        checkpoint.edit_index(lambda weight_map, name=name, path=path: weight_map.update({name: path.name}))
    assert run(checkpoint.folder, tmp_path / "out") == 0


@pytest.mark.parametrize("layers", ["0", "-1", "10", "1"])
def test_impossible_layer_counts_are_refused(tiny, tmp_path, capsys, layers):
    assert run(tiny, tmp_path / "out", "--layers", layers) == 1
    assert f"--layers is {layers}" in capsys.readouterr().err


def test_convert_refuses_a_source_that_is_neither_folder_nor_hub_id(tmp_path, capsys):
    for source in (tmp_path / "nowhere", "./a/b", "just-a-name"):
        assert run(source, tmp_path / "out") == 1
        assert "neither a folder nor a Hub id" in capsys.readouterr().err


def test_system_errors_are_one_line(tmp_path, capsys):
    assert run_command(lambda: (tmp_path / "gone").read_bytes()) == 1
    message = capsys.readouterr().err
    assert message.startswith("engram: ") and "gone" in message and message.count("\n") == 1


# --- the target folder ---


def test_folder_with_other_files_is_left_unchanged(tiny, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert run(tiny, tmp_path / "out") == 1
    assert "is not empty (it holds notes.txt)" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {"notes.txt": b"mine"}


def test_target_that_is_a_file_is_refused(tiny, tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert run(tiny, tmp_path / "out") == 1
    assert "cannot be read or written" in capsys.readouterr().err


def test_unwritable_target_is_refused(tiny, capsys):
    """`/proc` is unwritable even for root."""
    assert run(tiny, "/proc/engram-conversion") == 1
    assert "cannot be read or written" in capsys.readouterr().err


def test_second_run_finds_the_finished_conversion(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "out") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(tiny, tmp_path / "out") == 0
    assert "already complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_second_run_removes_the_claim_of_a_killed_one(tiny, tmp_path):
    """A process may be killed after everything is written and before it releases its claim of the folder."""
    assert run(tiny, tmp_path / "out") == 0
    lock = tmp_path / "out" / LOCK_NAME
    lock.write_text("{}")
    assert run(tiny, tmp_path / "out") == 0
    assert not lock.exists()


@pytest.mark.parametrize("name", ["model-00003-of-00011.safetensors", "engram-layer-00001.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["lost", "cut off"])
def test_second_run_writes_deleted_files_again(tiny, tmp_path, capsys, name, damage):
    out = tmp_path / "out"
    assert run(tiny, out) == 0
    before, stamps = contents(out), {path.name: path.stat().st_mtime_ns for path in out.glob("*0*.safetensors")}
    if damage == "lost":
        (out / name).unlink()
    elif name == "config.json":  # An edited document belongs to the user.
        (out / name).write_text("{}")
        before[name] = b"{}"
    else:
        os.truncate(out / name, 100)
    assert run(tiny, out) == 0
    assert contents(out) == before
    written = {path.name for path in out.glob("*0*.safetensors") if path.stat().st_mtime_ns != stamps[path.name]}
    assert written == {name} & stamps.keys()
    assert run(tiny, out) == 0
    assert "already complete" in capsys.readouterr().out.splitlines()[-1]


def test_other_options_do_not_overwrite_a_finished_conversion(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "out") == 0
    before = contents(tmp_path / "out")
    assert run(tiny, tmp_path / "out", "--dtype", "bfloat16") == 1
    assert "is not empty" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_small_disk_is_detected_before_writing(checkpoint, tmp_path, capsys):
    """A sparse file holds a draft tensor that is larger than the free disk."""
    free = shutil.disk_usage(tmp_path).free
    path = checkpoint.folder / "model-00015-of-00015.safetensors"
    count = free // 2 + 10**6
    write_safetensors(path, {"mtp.0.large": ["BF16", [count], b""]})
    head = path.read_bytes().replace(b'"data_offsets": [0, 0]', f'"data_offsets": [0, {2 * count}]'.encode())[8:]
    path.write_bytes(len(head).to_bytes(8, "little") + head)
    os.truncate(path, 8 + len(head) + 2 * count)
    checkpoint.edit_index(lambda index: index.update({"mtp.0.large": path.name}))
    assert run(checkpoint.folder, tmp_path / "out") == 1
    assert "free some space or choose another disk" in capsys.readouterr().err
    assert contents(tmp_path / "out") == {}


def test_full_disk_leaves_no_partial_file_and_the_next_run_resumes(tiny, converted, tmp_path, capsys):
    """A limit on the size of files fails a write in the middle, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        assert run(tiny, tmp_path / "out") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "is full or a quota is reached" in capsys.readouterr().err
    assert_only_whole_files(tmp_path / "out", contents(converted), parts=False)
    assert run(tiny, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(converted)


def assert_only_whole_files(folder, expected, parts=True):
    """Require that final names belong to finished files only; unfinished files may exist after a kill."""
    found = contents(folder) if folder.exists() else {}
    own, unfinished = (".conversion-journal", LOCK_NAME), (".part", ".unfinished")
    final = {name: data for name, data in found.items() if not name.endswith(unfinished) and name not in own}
    assert parts or not any(name.endswith(unfinished) for name in found)
    for name, data in final.items():
        assert data == expected[name], name


def run_and_die(source, target, moment, events):
    """Convert, but exit without cleanup at the `moment`-th time a file is opened, renamed or removed after planning.

    Sources are opened once for each copied piece, so moments lie inside files, between them, and around renames.
    """

    def count(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and target.exists():
            events.value += 1
            if events.value == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    run(source, target)


@pytest.mark.slow
def test_conversion_killed_at_ten_random_moments(tiny, converted, tmp_path):
    context = forks_of_a_server()
    expected = contents(converted)

    def die_at(moment, target):
        events = context.Value("i", 0)
        process = context.Process(target=run_and_die, args=(tiny, target, moment, events))
        process.start()
        process.join()
        return process.exitcode, events.value

    code, events = die_at(-1, tmp_path / "whole")
    assert code == 0 and contents(tmp_path / "whole") == expected
    draw, target, states = random.Random(5), tmp_path / "out", set()
    for attempt in range(10):
        # Every other run starts over the remains of the last one, so that resuming is interrupted as well.
        if attempt % 2 == 0:
            shutil.rmtree(target, ignore_errors=True)
        code, _ = die_at(draw.randrange(1, events if attempt % 2 == 0 else events // 3), target)
        assert code in (-signal.SIGKILL, 0)
        states.add(frozenset(contents(target)))
        assert_only_whole_files(target, expected)
        if attempt % 2:
            assert run(tiny, target) == 0
            assert contents(target) == expected
    assert len(states) >= 4  # The progress of its threads at a moment varies.


def test_interrupted_conversion_of_another_source_is_refused(tiny, checkpoint, tmp_path, capsys):
    target = tmp_path / "out"
    assert run(tiny, target) == 0
    (target / "conversion_manifest.json").unlink()
    (target / ".conversion-journal").write_text('{"fingerprint": "other"}\n')
    assert run(tiny, target) == 1
    assert "another source or with other options" in capsys.readouterr().err


def test_conversion_interrupted_before_its_first_journal_line(tiny, converted, tmp_path, monkeypatch):
    """The file exists already; without a journal, no run could resume."""

    def interrupt(journal, put_in_place, record):
        put_in_place()
        raise KeyboardInterrupt

    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(streaming._Journal, "finish", interrupt)
        assert run(tiny, target) == 130
    assert run(tiny, target) == 0
    assert contents(target) == contents(converted)


def test_journal_refuses_files_of_threads_that_outlive_it(tmp_path):
    """An interrupt can hit while a pool starts a thread, which the pool then does not wait for."""
    with streaming._Journal(SimpleNamespace(fingerprint="1"), tmp_path) as journal:
        pass
    with pytest.raises(streaming._Interrupted):
        journal.finish((tmp_path / "late").touch, {"name": "late", "size": 0})
    assert list(tmp_path.iterdir()) == []


def test_torn_journal_line_is_ignored(tiny, converted, tmp_path):
    target = tmp_path / "out"
    manifest = json.loads((converted / "conversion_manifest.json").read_text(encoding="utf-8"))
    target.mkdir()
    name = "model-00001-of-00011.safetensors"
    (target / name).write_bytes(b"not what the torn line would have promised")
    torn = json.dumps({"name": name, "size": 42, "crc32": "0" * 8})[:-9]
    (target / ".conversion-journal").write_text(json.dumps({"fingerprint": manifest["fingerprint"]}) + "\n" + torn)
    assert run(tiny, target) == 0
    assert contents(target) == contents(converted)


def test_folder_claimed_by_another_process_is_refused(tiny, tmp_path, capsys):
    target = tmp_path / "out"
    with FolderClaim(target):
        before = contents(target)
        assert run(tiny, target) == 1
        assert contents(target) == before
    assert f"is being written by process {os.getpid()} on " in capsys.readouterr().err
    assert not target.exists()


# --- damage ---


def assert_one_sentence(capsys, *words):
    message = capsys.readouterr().err
    assert message.startswith("engram: ") and message.count("\n") == 1
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": None}, "does not list files"),
        ({"files": {"a": 1}}, "does not list files"),
        ({"files": {"../../other": {"size": 0}}}, "does not list files"),
        ({"files": {"/etc/hostname": {"size": 0}}}, "does not list files"),
        ({"files": {"a": {"size": -1}}}, "does not list files"),
        ({"files": {"a": {"size": 1, "crc32": 5}}}, "does not list files"),
        ({"fingerprint": None}, "does not list files"),
        ({"options": None}, "options on record"),
        ({"options": {"colour": "red"}}, "options on record"),
    ],
)
def test_damaged_manifest_is_refused(tiny, converted, tmp_path, capsys, change, words):
    target = shutil.copytree(converted, tmp_path / "out")
    path = target / "conversion_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change))
    assert run(tiny, target, "--verify-only") == 1
    assert_one_sentence(capsys, words)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([""], "not valid JSON"),
        (["[1]\n"], "must be a JSON object"),
        (["{FINGERPRINT}", "half\n"], "not valid JSON"),
        (["{FINGERPRINT}", '{"size": 1}\n'], "is damaged"),
        (["{FINGERPRINT}", '{"name": "../other", "size": 1}\n'], "is damaged"),
    ],
)
def test_damaged_journal_is_refused(tiny, converted, tmp_path, capsys, lines, words):
    manifest = json.loads((converted / "conversion_manifest.json").read_text(encoding="utf-8"))
    begin = json.dumps({"fingerprint": manifest["fingerprint"]}) + "\n"
    (tmp_path / "out").mkdir()
    journal = tmp_path / "out" / ".conversion-journal"
    journal.write_text("".join(lines).replace("{FINGERPRINT}", begin))
    before = journal.read_text()
    assert run(tiny, tmp_path / "out") == 1
    assert_one_sentence(capsys, words)
    assert journal.read_text() == before


def test_verify_stops_at_the_first_damage(tiny, converted, tmp_path, capsys, monkeypatch):
    target, read = shutil.copytree(converted, tmp_path / "out"), []
    (target / "model-00001-of-00011.safetensors").write_bytes(b"damaged")
    chunks = streaming.Copy.chunks

    def slow_chunks(part):
        read.append(part.path)
        time.sleep(0.05)
        return chunks(part)

    monkeypatch.setattr(streaming, "WORKERS", 1)
    monkeypatch.setattr(streaming.Copy, "chunks", slow_chunks)
    assert run(tiny, target, "--verify-only") == 1
    assert "model-00001-of-00011.safetensors is missing or has another size" in capsys.readouterr().err
    assert len(read) < len(json.loads((target / "conversion_manifest.json").read_text(encoding="utf-8"))["files"]) / 2


@pytest.mark.parametrize("quantization", [5, [], None, "fp8"])
def test_config_of_another_quantization_is_refused(checkpoint, tmp_path, capsys, quantization):
    path = checkpoint.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"quantization_config": quantization}))
    assert run(checkpoint.folder, tmp_path / "out") == 1
    assert_one_sentence(capsys, "quant_method")

"""The export command: a conversion gives the release back byte for byte, and a changed model gets the release's form."""

import json
import re
import shutil

import pytest
import torch
from checkpoint_tools import contents
from safetensors.torch import load_file, save_file

from engram_hf.convert_scripts import convert_deepseek_v41, export_deepseek_v41
from engram_hf.convert_scripts.number_formats import decode, encode
from engram_hf.convert_scripts.storage import FP4_ROWS, FP8_BLOCKS, FP8_ROWS

pytestmark = pytest.mark.any_version

MANIFEST = "conversion_manifest.json"


def convert(source, target, *options):
    assert convert_deepseek_v41.main([str(source), str(target), *options]) == 0
    return target


def export(source, target, *options):
    return export_deepseek_v41.main([str(source), str(target), *options])


def exported(source, target, *options):
    assert export(source, target, *options) == 0
    return target


def without_manifest(folder):
    return {name: data for name, data in contents(folder).items() if name != MANIFEST}


def tensors_of(folder):
    loaded = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded |= load_file(path)
    return loaded


def storage_of(name):
    return FP4_ROWS if ".ffn.experts." in name else FP8_ROWS if "engram.embed" in name else FP8_BLOCKS


def values_of(tensors):
    """Return every tensor of an upstream state dict in float32, with quantized ones decoded."""
    values = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name.removesuffix("weight") + "scale")
        if name.endswith("weight") and scale is not None:
            values[name] = decode(tensor.view(torch.uint8), scale.view(torch.uint8), storage_of(name))
        elif not name.endswith(".scale"):
            values[name] = tensor.float()
    return values


@pytest.fixture
def copy(converted, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(converted, folder)
    return folder


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("options", [(), ("--link-tables",)])
def test_unmodified_conversion_exports_byte_for_byte(tiny, tmp_path, options):
    ours = convert(tiny, tmp_path / "ours", *options)
    assert without_manifest(exported(ours, tmp_path / "back")) == contents(tiny)


@pytest.mark.parametrize("options", [("bfloat16",), ("float32",), ("bfloat16", "--dequantize-tables")])
def test_dequantized_model_exports_the_values_of_the_release(tiny, tmp_path, options):
    ours = convert(tiny, tmp_path / "ours", "--dtype", *options)
    back = exported(ours, tmp_path / "back")
    original, found = tensors_of(tiny), tensors_of(back)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in original.items()}
    expected = values_of(original)
    assert all(torch.equal(value, expected[name]) for name, value in values_of(found).items())
    documents = {name for name in contents(tiny) if not name.endswith(".safetensors")}
    assert all((back / name).read_bytes() == (tiny / name).read_bytes() for name in documents)


def test_changed_matrix_is_quantized_by_the_rules_of_the_release(tiny, tmp_path):
    ours = convert(tiny, tmp_path / "ours", "--dtype", "float32", "--dequantize-tables")
    generator = torch.Generator().manual_seed(0)
    layer = "model.layers.1"
    changed = {
        "model-00003-of-00011.safetensors": (f"{layer}.self_attn.o_a_proj.weight", "layers.1.attn.wo_a", FP8_BLOCKS),
        "engram-layer-00001.safetensors": (f"{layer}.engram.table.weight", "layers.1.engram.embed", FP8_ROWS),
    }
    truth = {}
    for file, (name, upstream, storage) in changed.items():

        def change(tensors, name=name, upstream=upstream, storage=storage):
            tensors[name] = torch.randn(tensors[name].shape, generator=generator) * 3
            truth[upstream] = encode(tensors[name], storage)

        rewrite(ours / file, change)

    def change_experts(tensors):
        gate_up = tensors[f"{layer}.mlp.experts.gate_up_proj"]
        gate_up[5] = torch.randn(gate_up[5].shape, generator=generator)
        truth["layers.1.ffn.experts.5.w1"] = encode(gate_up[5, :64], FP4_ROWS)
        truth["layers.1.ffn.experts.5.w3"] = encode(gate_up[5, 64:], FP4_ROWS)

    rewrite(ours / "model-00003-of-00011.safetensors", change_experts)
    found = tensors_of(exported(ours, tmp_path / "back"))
    assert len(truth) == 4
    for stem, (weight, scale) in truth.items():
        assert torch.equal(found[f"{stem}.weight"].view(torch.uint8), weight), stem
        assert torch.equal(found[f"{stem}.scale"].view(torch.uint8), scale), stem


def test_export_without_a_record_shards_by_the_rule_of_the_release(converted, tiny, copy, tmp_path):
    shutil.rmtree(copy / "upstream")
    for path in copy.glob("carried-*"):
        path.unlink()
    back = exported(copy, tmp_path / "back")
    index = json.loads((back / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    places = {}
    for name, file in index.items():
        places.setdefault(file, set()).add(".".join(name.split(".")[:2]) + (".engram" if ".engram." in name else ""))
    layers = [{f"layers.{layer}"} for layer in range(9)]
    engram = [{"layers.1.engram"}, {"layers.4.engram"}]
    first, *others = [places[file] for file in sorted(places)]
    assert {"embed.weight", "image_start", "aligner.w1", "vision.norm", "vision.blocks"} <= first
    assert others == [*layers, {"norm.weight", "head.weight"}, {"mtp.0"}, *engram]
    original, found = tensors_of(tiny), tensors_of(back)
    assert set(found) == set(original)
    assert all(
        torch.equal(tensor.view(torch.uint8), original[name].view(torch.uint8)) for name, tensor in found.items()
    )
    assert (back / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()


def test_export_without_a_record_writes_the_config_of_the_release(copy, tiny, tmp_path):
    shutil.rmtree(copy / "upstream")
    back = exported(copy, tmp_path / "back")
    made, release = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (back, tiny))
    assert {key: made["text_config"].get(key) for key in release["text_config"]} == release["text_config"]
    expected = {key: value for key, value in release.items() if key != "text_config"}
    assert {key: value for key, value in made.items() if key != "text_config"} == expected


def test_export_without_a_record_converts_again(copy, converted, tmp_path):
    shutil.rmtree(copy / "upstream")
    back = exported(copy, tmp_path / "back")
    again = convert(back, tmp_path / "again")
    for path in converted.glob("*.safetensors"):
        if not path.name.startswith("carried-"):
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_saved_model_exports_with_the_record_of_its_conversion(converted, copy, tiny, tmp_path):
    """The model is one file, as `save_pretrained` writes a small model, without any file of the release."""
    tensors = {}
    for path in sorted(copy.glob("*.safetensors")):
        tensors |= load_file(path) if path.name.startswith(("model-", "engram-")) else {}
        path.unlink()
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(copy / "upstream")
    (copy / "model.safetensors.index.json").unlink()
    (copy / "engram_tables.json").unlink()
    back = exported(copy, tmp_path / "back", "--record", str(converted))
    assert without_manifest(back) == contents(tiny)


def test_export_of_the_first_layers_is_a_complete_checkpoint(tiny, tmp_path):
    ours = convert(tiny, tmp_path / "ours", "--layers", "5")
    back = exported(ours, tmp_path / "back")
    kept = [f"model-{number:05d}-of-00014.safetensors" for number in (1, 2, 3, 4, 5, 6, 11, 12, 13, 14)]
    assert sorted(path.name for path in back.glob("*.safetensors")) == kept
    assert all((back / name).read_bytes() == (tiny / name).read_bytes() for name in kept)
    again = convert(back, tmp_path / "again")
    for path in ours.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_export_dry_run_and_verification(converted, tmp_path, capsys):
    assert export(converted, tmp_path / "back", "--dry-run") == 0
    assert "model-00014-of-00014.safetensors" in capsys.readouterr().out and not (tmp_path / "back").exists()
    exported(converted, tmp_path / "back")
    capsys.readouterr()
    assert export(converted, tmp_path / "back", "--verify-only", "--json") == 0
    verified = json.loads(capsys.readouterr().out)
    assert verified["bytes_verified"] > 0 and verified["target"] == str(tmp_path / "back")
    path = tmp_path / "back" / "model-00007-of-00014.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert export(converted, tmp_path / "back", "--verify-only") == 1
    assert path.name in capsys.readouterr().err


def edit_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["text_config"] |= changes.pop("text", {})
        (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")

    return damage


def edit_first_layer(change):
    """Change the tensors of layer 0 and update their names in the index."""

    def damage(folder):
        path = folder / "model-00002-of-00011.safetensors"
        rewrite(path, change)
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        names = {name: file for name, file in index["weight_map"].items() if file != path.name}
        index["weight_map"] = names | dict.fromkeys(load_file(path), path.name)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return damage


LAYER = "model.layers.0"


def infinite(tensors):
    tensors.pop(f"{LAYER}.self_attn.kv_proj.weight_scale_inv")
    tensors[f"{LAYER}.self_attn.kv_proj.weight"] = torch.full((32, 64), float("inf"))


def split_table(folder):
    tables = json.loads((folder / "engram_tables.json").read_text(encoding="utf-8"))
    tables["tables"]["1"]["weight"] *= 2
    (folder / "engram_tables.json").write_text(json.dumps(tables), encoding="utf-8")


def table_elsewhere(folder):
    text = (folder / "engram_tables.json").read_text(encoding="utf-8")
    (folder / "engram_tables.json").write_text(
        text.replace("engram-layer-00001", "../engram-layer-00001"), encoding="utf-8"
    )


REFUSED = {
    "no engram model": (edit_config(model_type="mixtral"), "'mixtral'"),
    "other backbone": (edit_config(text={"model_type": "mixtral"}), "'mixtral'"),
    "adapter beside the weights": (
        edit_first_layer(lambda t: t.update({f"{LAYER}.self_attn.q_a_proj.lora_A.weight": torch.zeros(2, 2)})),
        "merge adapters",
    ),
    "missing tensor": (edit_first_layer(lambda t: t.pop(f"{LAYER}.input_layernorm.weight")), "lacks the tensor"),
    "quantized without scale": (edit_first_layer(lambda t: t.pop(f"{LAYER}.self_attn.kv_proj.weight_scale_inv")), "has no scale"),
    "float with scale": (
        edit_first_layer(lambda t: t.update({f"{LAYER}.self_attn.kv_proj.weight": torch.zeros(32, 64)})),
        "but has a scale",
    ),
    "other shape": (edit_first_layer(lambda t: t.update({f"{LAYER}.self_attn.sinks": torch.zeros(5)})), r"is \[5\]"),
    "integers": (
        edit_first_layer(lambda t: t.update({f"{LAYER}.self_attn.sinks": torch.zeros(4, dtype=torch.int32)})),
        "is I32",
    ),
    "infinite": (edit_first_layer(infinite), "infinite or undefined"),
    "table in pieces": (split_table, "gap or an overlap"),
    "table elsewhere": (table_elsewhere, "without a path"),
    "record of another model": (lambda folder: (folder / "upstream" / "model-00005-of-00014.safetensors.header").unlink(), "no place for"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_export_refuses_bad_models(copy, tmp_path, capsys, case):
    damage, words = REFUSED[case]
    damage(copy)
    before = contents(copy)
    assert export(copy, tmp_path / "back") == 1
    message = capsys.readouterr().err
    assert message.startswith("engram: ") and message.count("\n") == 1
    assert re.search(words, message), message
    written = contents(tmp_path / "back") if (tmp_path / "back").exists() else {}
    assert not any(name.endswith((".part", ".unfinished")) for name in written)
    assert contents(copy) == before


def test_export_refuses_a_config_without_memory(converted, tmp_path, capsys):
    source = shutil.copytree(converted, tmp_path / "source")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    del config["engram_n_heads"]
    (source / "config.json").write_text(json.dumps(config))
    assert export(source, tmp_path / "back") == 1
    assert "config.json lacks 'engram_n_heads'" in capsys.readouterr().err

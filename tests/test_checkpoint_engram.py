"""A model of the first layers, from a checkpoint of all: what is opened, what is loaded, and what is said."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_backbones import BACKBONES, build, built, random_ids
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from engram_hf import EngramConfig, EngramForCausalLM, EngramModel, checkpoint_engram
from engram_hf.safetensors_engram import FileFormatError, read_weight_map

COUNT = 2  # of three layers; layer 1 has a memory, and layer 2 another one
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: a backbone's model in many small shards; a copy of its own for each test that changes it."""

    def save(name: str = "mixtral", **kwargs) -> Path:
        folder = tmp_path_factory.mktemp(name)
        built(name).save_pretrained(folder, max_shard_size="20KB", **kwargs)
        return folder

    return save


@pytest.fixture(scope="module")
def mapped(saved, tmp_path_factory) -> Path:
    """The same with tables in files of their own."""
    folder = tmp_path_factory.mktemp("mapped")
    model = EngramForCausalLM.from_pretrained(saved(), engram_residency="mapped")
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def messages(caplog, monkeypatch):
    """What transformers warns of."""
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    return lambda: [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def unneeded_shards(folder: Path, count: int = COUNT, index: str = INDEX) -> set[str]:
    weight_map = json.loads((folder / index).read_text())["weight_map"]
    later = {key for key in weight_map if (found := re.search(r"layers\.(\d+)\.", key)) and int(found[1]) >= count}
    return set(weight_map.values()) - {file for key, file in weight_map.items() if key not in later}


def remove_what_is_not_needed(folder: Path) -> Path:
    """What is absent cannot have been opened."""
    unneeded = unneeded_shards(folder)
    assert unneeded
    for file in unneeded:
        (folder / file).unlink()
    return folder


def first_layers(folder: Path, count: int = COUNT, **kwargs) -> EngramForCausalLM:
    """The first layers; everything they need must be found, and nothing else be mentioned."""
    config = EngramConfig.from_pretrained(folder, **kwargs).first_layers(count)
    model, info = EngramForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model


def layer_output(model: EngramForCausalLM, layer: int = COUNT - 1) -> torch.Tensor:
    outputs = []
    hook = model.model.backbone.layers[layer].register_forward_hook(lambda _module, _args, out: outputs.append(out))
    with torch.no_grad():
        model(random_ids(2, 9), use_cache=False)
    hook.remove()
    (output,) = outputs
    return output[0] if isinstance(output, tuple) else output


def assert_first_layers_of(whole: EngramForCausalLM, model: EngramForCausalLM) -> None:
    assert len(model.model.backbone.layers) == COUNT and list(model.model.memories()) == [1]
    assert torch.equal(layer_output(model), layer_output(whole))
    assert torch.equal(model.lm_head.weight, whole.lm_head.weight)
    assert torch.equal(model.model.hashing.primes, whole.model.hashing.primes[:1])
    assert torch.equal(model.model.hashing.multipliers, whole.model.hashing.multipliers[:1])


# --- values


@pytest.mark.parametrize("hub_layout", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_first_layers_of_every_backbone_are_those_of_the_whole_model(saved, name, hub_layout):
    """In the layout of the backbone's own checkpoints (experts apart, other names) as well."""
    folder = remove_what_is_not_needed(saved(name, save_original_format=hub_layout))
    assert_first_layers_of(built(name), first_layers(folder))


@pytest.mark.parametrize("residency", ["auto", "resident", "mapped"])
def test_tables_among_the_weights_and_in_files_of_their_own(saved, mapped, tmp_path, residency):
    for index, source in enumerate((saved(), mapped)):
        folder = remove_what_is_not_needed(shutil.copytree(source, tmp_path / str(index)))
        (folder / "engram-layer-00002.safetensors").unlink(missing_ok=True)
        model = first_layers(folder, engram_residency=residency)
        assert_first_layers_of(built("mixtral"), model)
        assert ("model.backbone.layers.1.engram.table.weight" in model.state_dict()) == (residency != "mapped")


def test_the_base_model_alone(saved):
    folder = remove_what_is_not_needed(saved())
    config = EngramConfig.from_pretrained(folder).first_layers(COUNT)
    model = EngramModel.from_pretrained(folder, config=config)
    with torch.no_grad():
        hidden = model(random_ids(2, 9)).last_hidden_state
        expected = built("mixtral").model.backbone.norm(layer_output(built("mixtral")))
    assert torch.equal(hidden, expected)


def test_through_the_auto_class(saved):
    folder = remove_what_is_not_needed(saved())
    config = EngramConfig.from_pretrained(folder).first_layers(COUNT)
    assert_first_layers_of(built("mixtral"), AutoModelForCausalLM.from_pretrained(folder, config=config))


def test_with_layers_on_disk(saved, tmp_path):
    folder = remove_what_is_not_needed(saved("llama"))
    device_map = {
        "model.hashing": "cpu",
        "model.backbone.embed_tokens": "cpu",
        "model.backbone.rotary_emb": "cpu",
        "model.backbone.layers.0": "cpu",
        "model.backbone.layers.1": "disk",
        "model.backbone.norm": "cpu",
        "lm_head": "cpu",
    }
    config = EngramConfig.from_pretrained(folder).first_layers(COUNT)
    model = EngramForCausalLM.from_pretrained(folder, config=config, device_map=device_map, offload_folder=tmp_path)
    assert model.model.backbone.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(layer_output(model), layer_output(built("llama")))


def test_one_file_for_everything(tmp_path, messages):
    built("mixtral").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert_first_layers_of(built("mixtral"), first_layers(tmp_path))
    assert messages() == []


def test_one_shard_of_two(tmp_path):
    built("mixtral").save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    weight_map = {key: "later.safetensors" if "layers.2." in key else "first.safetensors" for key in whole}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    first = {key: value for key, value in whole.items() if weight_map[key] == "first.safetensors"}
    save_file(first, tmp_path / "first.safetensors", metadata={"format": "pt"})
    assert_first_layers_of(built("mixtral"), first_layers(tmp_path))


def test_a_variant_and_a_subfolder(tmp_path):
    built("mixtral").save_pretrained(tmp_path / "inner", max_shard_size="20KB", variant="small")
    index = "model.safetensors.index.small.json"
    for file in unneeded_shards(tmp_path / "inner", index=index):
        (tmp_path / "inner" / file).unlink()
    config = EngramConfig.from_pretrained(tmp_path, subfolder="inner").first_layers(COUNT)
    for residency in ("auto", "mapped"):
        model = EngramForCausalLM.from_pretrained(
            tmp_path, config=config, subfolder="inner", variant="small", engram_residency=residency
        )
        assert_first_layers_of(built("mixtral"), model)


# --- what is left of it


def test_the_model_is_an_ordinary_one_afterwards(saved, tmp_path):
    folder = saved()
    given = EngramConfig.from_pretrained(folder).first_layers(COUNT)
    before = given.to_dict()
    model = EngramForCausalLM.from_pretrained(folder, config=given)
    assert given.to_dict() == before
    assert model.name_or_path == model.config.name_or_path == str(folder)
    assert vars(model.config).keys() == vars(EngramForCausalLM.from_pretrained(folder).config).keys()
    for hub_layout in (False, True):
        model.save_pretrained(tmp_path, save_original_format=hub_layout)
        assert json.loads((tmp_path / "config.json").read_text())["text_config"]["num_hidden_layers"] == COUNT
        again, info = EngramForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert_first_layers_of(built("mixtral"), again)


def test_mapped_tables_of_the_first_layers_are_saved_alone(mapped, tmp_path):
    first_layers(mapped, engram_residency="mapped").save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("engram-layer-*")} == {"engram-layer-00001.safetensors"}
    again = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    assert_first_layers_of(built("mixtral"), again)


def test_generation_settings_are_those_of_the_folder(tmp_path):
    model = build("mixtral")
    model.generation_config.max_new_tokens = 5
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    first = first_layers(tmp_path)
    assert first.generation_config.to_dict() == EngramForCausalLM.from_pretrained(tmp_path).generation_config.to_dict()
    assert first.generate(random_ids(1, 4)).shape[1] <= 9


def test_all_layers_are_loaded_as_ever(saved):
    folder = saved()
    config = EngramConfig.from_pretrained(folder).first_layers(3)
    model = EngramForCausalLM.from_pretrained(folder, config=config)
    for name, value in built("mixtral").state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_config_json_that_lost_layers_is_not_taken_for_a_wish(saved, messages):
    """Only whoever passes a shorter config than the folder's wants fewer layers; a damaged folder is to be noticed."""
    folder = saved()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 2}
    config |= {"engram_layer_ids": [1], "engram_num_embeddings": None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="the above report"):
        EngramForCausalLM.from_pretrained(folder)
    (report,) = (message for message in messages() if "LOAD REPORT" in message)
    assert "model.backbone.layers.2" in report and "model.hashing.primes" in report


def test_without_a_config_json_nothing_is_known_of_more_layers(saved):
    folder = saved()
    config = EngramConfig.from_pretrained(folder)
    (folder / "config.json").unlink()
    model, info = EngramForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(layer_output(model, 2), layer_output(built("mixtral"), 2))


def test_a_config_json_may_hold_infinity(saved):
    """As Python writes it, and transformers for some backbones."""
    path = saved() / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "limit": float("inf")}))
    assert_first_layers_of(built("mixtral"), first_layers(remove_what_is_not_needed(path.parent)))


def test_whoever_names_the_weights_gets_those(saved):
    folder = saved()
    config = EngramConfig.from_pretrained(folder).first_layers(COUNT)
    with pytest.raises(OSError, match="no file named"):
        EngramForCausalLM.from_pretrained(folder, config=config, use_safetensors=False)
    for path in folder.glob("model-*.safetensors"):
        path.unlink()
    save_file(built("mixtral").state_dict(), folder / "mine.safetensors", metadata={"format": "pt"})
    config.transformers_weights = "mine.safetensors"
    model, info = EngramForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
    assert not any(info.values()), info
    assert_first_layers_of(built("mixtral"), model)


def test_weights_without_a_name_come_from_no_folder(saved, tmp_path, monkeypatch):
    """Not from one that is called None."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved(), tmp_path / "None")
    config = EngramConfig.from_pretrained("None").first_layers(COUNT)
    state = first_layers(tmp_path / "None").state_dict()
    model, info = EngramForCausalLM.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    assert not any(info.values()), info
    assert_first_layers_of(built("mixtral"), model)


# --- bad input


def test_files_are_looked_for_where_the_model_comes_from(monkeypatch):
    where = {
        "cache_dir": "cache",
        "force_download": True,
        "proxies": {"https": "proxy"},
        "token": False,
        "revision": "v2",
        "subfolder": "inner",
        "local_files_only": True,
    }
    asked = []
    monkeypatch.setattr(checkpoint_engram, "cached_file", lambda *args, **options: asked.append((args, options)))
    resolve = checkpoint_engram.resolver("me/model", {**where, "dtype": "auto", "variant": None})
    assert resolve("config.json") is None
    assert asked == [(("me/model", "config.json"), where)]


@pytest.mark.parametrize("cause", [None, ConnectionError("busy")], ids=["full disk", "busy Hub"])
def test_what_cannot_be_had_is_not_absent(monkeypatch, cause):
    """Else a model would be loaded without it."""

    def fail(*_, **__):
        raise (OSError(errno.ENOSPC, "sorry") if cause is None else OSError("sorry")) from cause

    monkeypatch.setattr(checkpoint_engram, "cached_file", fail)
    with pytest.raises(OSError, match="sorry"):
        checkpoint_engram.resolver("me/model", {})("model.safetensors")


def test_a_needed_shard_that_is_missing(saved):
    folder = saved()
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    missing = weight_map["model.backbone.layers.1.mlp.gate.weight"]
    (folder / missing).unlink()
    with pytest.raises(OSError, match=re.escape(missing)):
        first_layers(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/model.safetensors", "a\\model.safetensors", "..", ""])
def test_an_index_that_leaves_its_folder(saved, file):
    folder = saved("llama")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.backbone.layers.1.mlp.up_proj.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(FileFormatError, match=r"names the file .* named without a path"):
        first_layers(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object"),
        ("{}", "has no weight_map"),
        ('{"weight_map": ["a"]}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {"a": "b.safetensors", "c": []}}', "has no weight_map"),
        ('{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "names 'a' twice"),
    ],
)
def test_an_index_that_is_none(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_weight_map(tmp_path / INDEX)

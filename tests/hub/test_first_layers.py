"""Whole models and their first layers from a Hub: which files are downloaded, and that the first layers are the model's.

One child process, where `engram_hf` cannot be imported, loads everything; every case has a repository of its own, so that
the Hub's log tells them apart.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from child_processes import WITHOUT_PACKAGE, finish, start
from hub_server import TOKEN, HubServer, client_environment
from tiny_backbones import random_ids, randomize
from transformers import LlamaConfig

from engram_hf import EngramConfig, EngramForCausalLM

COUNT = 2  # of four layers; layers 1 and 3 have a memory
TABLES = {1: "engram-layer-00001.safetensors", 3: "engram-layer-00003.safetensors"}
LOAD = (
    WITHOUT_PACKAGE
    + """
import sys, json
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

first_commit, ids_file, outputs_file = sys.argv[1:]
ids = torch.from_numpy(np.load(ids_file))
outputs, said = {}, {}

def load(case, name, count=None, **kwargs):
    if count is not None:
        config = AutoConfig.from_pretrained(name, trust_remote_code=True, **kwargs)
        kwargs["config"] = config.first_layers(count)
    residency = kwargs.pop("engram_residency", "auto")
    model, info = AutoModelForCausalLM.from_pretrained(
        name, trust_remote_code=True, engram_residency=residency, output_loading_info=True, **kwargs)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    said[case] = {"keys": sorted(key for keys in info.values() for key in keys), "name": model.name_or_path,
        "config name": model.config.name_or_path, "tokens": model.generation_config.max_new_tokens}
    layer = model.model.backbone.layers[1]
    hook = layer.register_forward_hook(lambda _module, _args, out: outputs.__setitem__(case, out.numpy()))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return model

load("whole", "me/whole")
model = load("first", "me/first", COUNT)
model.push_to_hub("me/pushed")
load("offline", "me/first", COUNT, local_files_only=True)
load("mapped", "me/mapped", engram_residency="mapped")
load("mapped again", "me/mapped", engram_residency="mapped")
load("first mapped", "me/first-mapped", COUNT, engram_residency="mapped")
load("first of mapped, resident", "me/first-resident", COUNT, engram_residency="resident")
load("revision", "me/revisions", COUNT, revision=first_commit)
load("subfolder", "me/inner", COUNT, subfolder="inner", cache_dir="elsewhere", token=False)
load("forced", "me/forced", COUNT, force_download=True)
load("single", "me/single", COUNT)
np.savez(outputs_file, **outputs)
print(json.dumps(said))
"""
)


def build() -> EngramForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    backbone = LlamaConfig(vocab_size=128, num_hidden_layers=4, bos_token_id=1, eos_token_id=2, **sizes)
    memory = {"engram_n_heads": 2, "engram_head_dim": 8, "engram_vocab_size": 97}
    model = randomize(EngramForCausalLM(EngramConfig.for_backbone(backbone, layer_ids=[1, 3], **memory))).eval()
    model.generation_config.max_new_tokens = 5
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The model in shards, in one file, and with tables in files of their own."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("sharded", "single", "mapped")}
    build().save_pretrained(made["sharded"], max_shard_size="20KB")
    build().save_pretrained(made["single"])
    model = EngramForCausalLM.from_pretrained(made["sharded"], engram_residency="mapped")
    model.save_pretrained(made["mapped"], max_shard_size="20KB")
    return made


def layer_output() -> np.ndarray:
    outputs = []
    model = build()
    model.model.backbone.layers[COUNT - 1].register_forward_hook(lambda _module, _args, out: outputs.append(out))
    with torch.no_grad():
        model(random_ids(2, 9), use_cache=False)
    return outputs[0].numpy()


class Loaded:
    """The outcome of all cases."""

    def __init__(self, hub: HubServer, folders: dict[str, Path], said: dict, outputs: dict[str, np.ndarray]):
        self.hub, self.folders, self.said, self.outputs = hub, folders, said, outputs

    def downloads(self, repository: str) -> list[str]:
        """Files whose content was asked for, once for every time."""
        pattern = re.compile(f"/me/{repository}/resolve/[^/]+/(.*)")
        found = [pattern.fullmatch(request.path) for request in self.hub.requests if request.method == "GET"]
        return [match[1] for match in found if match]

    def weights(self, repository: str) -> list[str]:
        return sorted(file for file in self.downloads(repository) if file.endswith(".safetensors"))

    def shards(self, folder: str, count: int | None = None) -> list[str]:
        """Shards of a folder with a tensor of the first `count` layers or of no layer."""
        weight_map = json.loads((self.folders[folder] / "model.safetensors.index.json").read_text())["weight_map"]
        layers = {key: re.search(r"\.layers\.(\d+)\.", key) for key in weight_map}
        needed = (key for key, layer in layers.items() if count is None or layer is None or int(layer[1]) < count)
        return sorted({weight_map[key] for key in needed})


@pytest.fixture(scope="module")
def loaded(folders, tmp_path_factory) -> Loaded:
    folder = tmp_path_factory.mktemp("load")
    np.save(folder / "ids.npy", random_ids(2, 9).numpy())
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:

        def commit(repository: str, source: str, inner: str = "") -> str:
            # transformers looks for code in the root alone.
            places = {
                path: path.name if path.suffix == ".py" else inner + path.name for path in folders[source].iterdir()
            }
            files = {place: hub.store(path.read_bytes()) for path, place in places.items()}
            known = hub.repositories.get(f"me/{repository}") or hub.create(f"me/{repository}")
            return known.commit("main", "upload", files)

        for repository in ("whole", "first", "forced"):
            commit(repository, "sharded")
        for repository in ("mapped", "first-mapped", "first-resident"):
            commit(repository, "mapped")
        commit("inner", "sharded", "inner/")
        commit("single", "single")
        first_commit = commit("revisions", "sharded")
        commit("revisions", "single")
        env = client_environment(hub, folder / "home", HF_TOKEN=TOKEN)
        code = LOAD.replace("COUNT", str(COUNT))
        said = finish(start(code, first_commit, "ids.npy", "outputs.npz", env=env, cwd=folder))
        with np.load(folder / "outputs.npz") as outputs:
            return Loaded(hub, folders, said, dict(outputs))


CASES = [
    "whole",
    "first",
    "offline",
    "mapped",
    "mapped again",
    "first mapped",
    "first of mapped, resident",
    "revision",
    "subfolder",
    "forced",
    "single",
]


@pytest.mark.parametrize("case", CASES)
def test_the_first_layers_compute_what_they_compute_in_the_whole_model(loaded, case):
    np.testing.assert_allclose(loaded.outputs[case], layer_output(), rtol=0, atol=1e-6)
    assert loaded.outputs.keys() == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_no_key_is_missing_or_left_over(loaded, case):
    assert loaded.said[case]["keys"] == []


def test_the_whole_model_takes_all_shards(loaded):
    assert loaded.weights("whole") == loaded.shards("sharded")


@pytest.mark.parametrize("repository", ["first", "revisions"])
def test_the_first_layers_take_their_shards_alone(loaded, repository):
    needed = loaded.shards("sharded", COUNT)
    assert 2 < len(needed) < len(loaded.shards("sharded"))
    assert loaded.weights(repository) == needed


def test_in_a_subfolder_too(loaded):
    assert loaded.weights("inner") == [f"inner/{file}" for file in loaded.shards("sharded", COUNT)]


def test_a_forced_download_asks_for_no_other_shard(loaded):
    assert set(loaded.weights("forced")) == set(loaded.shards("sharded", COUNT))


def test_one_file_holds_all_layers(loaded):
    assert loaded.weights("single") == ["model.safetensors"]


def test_mapped_tables_are_downloaded_once(loaded):
    assert loaded.weights("mapped") == sorted([*loaded.shards("mapped"), *TABLES.values()])


@pytest.mark.parametrize("repository", ["first-mapped", "first-resident"])
def test_of_the_tables_only_those_of_the_first_layers_are_downloaded(loaded, repository):
    assert loaded.weights(repository) == sorted([*loaded.shards("mapped", COUNT), TABLES[1]])


def test_the_model_is_known_by_the_name_of_its_repository(loaded):
    for case, repository in (("first", "me/first"), ("first mapped", "me/first-mapped"), ("single", "me/single")):
        assert loaded.said[case]["name"] == loaded.said[case]["config name"] == repository
        assert loaded.said[case]["tokens"] == 5


def test_the_first_layers_are_pushed_as_a_whole_model(loaded, tmp_path):
    for path in loaded.hub.files("me/pushed"):
        (tmp_path / path).write_bytes(loaded.hub.read("me/pushed", path))
    model, info = EngramForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert model.config.num_hidden_layers == COUNT and not any(info.values())
    whole = build().state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, whole[name][: len(value)]), name

"""The lookup of a checkpoint's files, in folders and on the Hub."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from table_models import logits
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import find_adapter_config_file

from engram_hf import EngramForCausalLM, loading_engram
from engram_hf.configuration_engram import FORMAT_VERSION
from engram_hf.loading_engram import Checkpoint
from engram_hf.safetensors_engram import FileFormatError, read_weight_map

INDEX = "model.safetensors.index.json"
FIXTURES = Path(__file__).parent / "fixtures"


def test_files_are_looked_up_where_the_model_comes_from(monkeypatch):
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
    monkeypatch.setattr(loading_engram, "cached_file", lambda *args, **options: asked.append((args, options)))
    resolve = loading_engram.resolver("me/model", {**where, "dtype": "auto", "variant": None})
    assert resolve("config.json") is None
    assert asked == [(("me/model", "config.json"), where)]


@pytest.mark.parametrize("cause", [None, ConnectionError("busy")], ids=["full disk", "busy Hub"])
def test_resolver_raises_if_a_file_cannot_be_fetched(monkeypatch, cause):
    """Otherwise a model would be loaded without the file."""

    def fail(*_, **__):
        raise (OSError(errno.ENOSPC, "sorry") if cause is None else OSError("sorry")) from cause

    monkeypatch.setattr(loading_engram, "cached_file", fail)
    with pytest.raises(OSError, match="sorry"):
        loading_engram.resolver("me/model", {})("model.safetensors")


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
def test_invalid_index_is_refused(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_weight_map(tmp_path / INDEX)


# --- checkpoints of earlier versions


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("folder", ["model_version_1", "mapped_version_1"])
@pytest.mark.parametrize("residency", ["auto", "mapped"])
def test_checkpoint_of_version_1_still_loads(auto, folder, residency, tmp_path):
    """Its parameters are named `model.backbone.*`; saving it again gives today's names."""
    expected = load_file(FIXTURES / "model_version_1" / "expected.safetensors")
    model, info = auto.from_pretrained(FIXTURES / folder, engram_residency=residency, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not {key for key in info["unexpected_keys"] if "lm_head" not in key}
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path)
    assert again.config.engram_format_version == FORMAT_VERSION
    for loaded in (model.eval(), again.eval()):
        with torch.no_grad():
            outputs = loaded(expected["input_ids"])
            states = outputs.logits if auto is AutoModelForCausalLM else outputs.last_hidden_state
        if auto is AutoModelForCausalLM:
            torch.testing.assert_close(states, expected["logits"], rtol=0, atol=1e-5)
        assert not any("backbone" in key for key in load_file(tmp_path / "model.safetensors"))


# --- adapters


@pytest.fixture(scope="module")
def adapter(saved_tables, tmp_path_factory):
    """Return a mapped model with an adapter, and the folder of the adapter alone."""
    folder = tmp_path_factory.mktemp("adapter")
    base = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("load", [EngramForCausalLM, AutoModelForCausalLM], ids=lambda load: load.__name__)
@pytest.mark.parametrize("residency", ["auto", "resident", "mapped"])
def test_adapter_loads_the_tables_of_its_base_model(saved_tables, adapter, load, residency):
    model, folder = adapter
    loaded = load.from_pretrained(folder, engram_residency=residency).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(saved_tables[0]))
    for memory in loaded.base_model.memories().values():
        assert memory.table.is_resident is (residency != "mapped")


def test_adapter_in_a_subfolder_takes_its_base_model_from_that_subfolder(saved_tables, adapter, tmp_path):
    """transformers takes both from the same subfolder."""
    model, folder = adapter
    shutil.copytree(folder, tmp_path / "adapters" / "inner")
    shutil.copytree(saved_tables[2], tmp_path / "bases" / "inner")
    if find_adapter_config_file(str(tmp_path / "adapters"), subfolder="inner") is None:
        pytest.skip("this version of transformers looks for adapters in subfolders of the Hub's repositories alone")
    config = tmp_path / "adapters" / "inner" / "adapter_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "bases")})
    )
    loaded = EngramForCausalLM.from_pretrained(
        tmp_path / "adapters", subfolder="inner", engram_residency="mapped", adapter_kwargs={"subfolder": "inner"}
    )
    assert torch.equal(logits(loaded.eval()), logits(model))
    assert not any(memory.table.is_resident for memory in loaded.model.memories().values())


def test_complete_model_with_an_adapter_in_its_folder_uses_its_own_tables(saved_tables, adapter, tmp_path):
    model, folder = adapter
    shutil.copytree(saved_tables[2], tmp_path, dirs_exist_ok=True)
    for path in folder.glob("adapter*"):
        shutil.copy(path, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "no/such-model"}))
    loaded = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped").eval()
    assert torch.equal(logits(loaded), logits(model))
    for memory in loaded.model.memories().values():
        assert {path.parent for path in memory.table.source.files} == {tmp_path}


@pytest.mark.parametrize("residency", ["auto", "resident", "mapped"])
def test_base_model_of_an_adapter_without_tables_is_refused(saved_tables, adapter, tmp_path, residency):
    """The message of transformers about missing weights would name the adapter."""
    base = shutil.copytree(saved_tables[2], tmp_path / "base")
    (base / "engram_tables.json").unlink()
    folder = shutil.copytree(adapter[1], tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(base)}))
    for load in (EngramForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"engram_tables\.json"):
            load.from_pretrained(folder, engram_residency=residency)


def test_adapter_without_a_base_model_name_is_refused(adapter, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileFormatError, match="does not name its base_model_name_or_path"):
        EngramForCausalLM.from_pretrained(tmp_path)


# --- one look at each file


def test_config_is_looked_up_once(saved_tables, monkeypatch):
    asked, look = [], loading_engram.cached_file
    monkeypatch.setattr(
        loading_engram, "cached_file", lambda name, file, **options: asked.append(file) or look(name, file, **options)
    )
    Checkpoint(saved_tables[2], {}).find_tables("mapped")
    assert asked.count("config.json") == asked.count("engram_tables.json") == 1


def test_state_dict_without_tables_is_refused(saved_tables):
    model, folder = saved_tables[0], saved_tables[2]
    state = {key: value for key, value in model.state_dict().items() if ".table." not in key}
    with pytest.raises(ValueError, match=r"lacks \d tensors of the memory, such as .*table"):
        EngramForCausalLM.from_pretrained(None, config=model.config, state_dict=state)
    whole = EngramForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert torch.equal(logits(whole), logits(model))
    with pytest.raises(ValueError, match="state_dict"):  # Both are passed, which transformers refuses.
        EngramForCausalLM.from_pretrained(folder, state_dict=state)

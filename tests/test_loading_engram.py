"""Where the files of a checkpoint come from."""

import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from engram_hf import loading_engram
from engram_hf.configuration_engram import FORMAT_VERSION
from engram_hf.safetensors_engram import FileFormatError, read_weight_map

INDEX = "model.safetensors.index.json"
FIXTURES = Path(__file__).parent / "fixtures"


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
    monkeypatch.setattr(loading_engram, "cached_file", lambda *args, **options: asked.append((args, options)))
    resolve = loading_engram.resolver("me/model", {**where, "dtype": "auto", "variant": None})
    assert resolve("config.json") is None
    assert asked == [(("me/model", "config.json"), where)]


@pytest.mark.parametrize("cause", [None, ConnectionError("busy")], ids=["full disk", "busy Hub"])
def test_what_cannot_be_had_is_not_absent(monkeypatch, cause):
    """Else a model would be loaded without it."""

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
def test_an_index_that_is_none(tmp_path, text, message):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(FileFormatError, match=message):
        read_weight_map(tmp_path / INDEX)


# --- checkpoints of earlier versions


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("folder", ["model_version_1", "mapped_version_1"])
@pytest.mark.parametrize("residency", ["auto", "mapped"])
def test_a_checkpoint_of_version_1_still_loads(auto, folder, residency, tmp_path):
    """Its parameters are named `model.backbone.*`; saved again, they have today's names."""
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

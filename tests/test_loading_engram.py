"""Where the files of a checkpoint come from."""

import errno

import pytest

from engram_hf import loading_engram
from engram_hf.safetensors_engram import FileFormatError, read_weight_map

INDEX = "model.safetensors.index.json"


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

"""`engram inspect` on models of other projects: tables, sizes, and the cost of each residency."""

import json
import sys
from pathlib import Path

import pytest
from engram_cli.main import main

import engram_hf

sys.path.insert(0, str(Path(engram_hf.__file__).parent / "tests" / "hub"))
from hub_server import HubServer


@pytest.fixture
def inspect(capsys):
    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["inspect", *map(str, arguments)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


QWEN = {
    "table_bytes": 16_896,
    "residency": {
        "mapped": {"memory_bytes": 0, "read_bytes_per_token": 128},
        "pinned": {"locked_host_bytes": 16_896},
        "resident": {"memory_bytes": 16_896, "peak_bytes": 33_792},
    },
}


def test_inspect_hashed_tables_in_shards(folders, inspect):
    found = json.loads(inspect(folders("qwen4_exp float8"), "--json"))
    assert {key: found[key] for key in QWEN} == QWEN
    first, second = found["tables"]
    assert first["table"] == "model.layers.1.ple.ple_embedding.ngram_embedding"
    assert (first["rows"], first["width"], first["dtype"], first["shards"]) == (1408, 4, "F8_E4M3", 4)
    assert first["rows_per_token"] == 16 and first["bytes"] + second["bytes"] == found["table_bytes"]


def test_inspect_rows_with_scales(folders, inspect):
    (table,) = json.loads(inspect(folders("gemma4 int4"), "--json"))["tables"]
    assert (table["dtype"], table["width"], table["bytes_per_token"], table["bytes"]) == ("U8", 12, 16, 3200)


def test_inspect_prints_text(folders, inspect):
    lines = inspect(folders("gemma3n")).splitlines()
    assert (
        "residency       mapped: 0 B memory, 48 B read per token; pinned: 9.6 kB locked host; resident: 9.6 kB memory, 9.6 kB peak"
        in lines
    )


def test_inspect_of_a_hub_id_reads_headers_only(folders, inspect, tmp_path, monkeypatch):
    with HubServer(tmp_path) as hub:
        files = {path.name: hub.store(path.read_bytes()) for path in folders("qwen4_exp float8").iterdir()}
        hub.create("org/qwen").commit("main", "release", files)
        for name, value in {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        found = json.loads(inspect("org/qwen", "--json"))
        ranges = [request.range for request in hub.requests if request.path.endswith("model.safetensors")]
        assert ranges and all(ranges), "a file was fetched whole"
        assert main(["inspect", "org/nothing"]) == 1
    assert found["repository"] == "org/qwen" and {key: found[key] for key in QWEN} == QWEN

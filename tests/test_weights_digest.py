"""The digests by which weights and tables recognize each other."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_backbones import build

from engram_hf import EngramForCausalLM
from engram_hf.loading_engram import weights_digest
from engram_hf.safetensors_engram import FileFormatError
from engram_hf.table_format_engram import TableFormatError

SMALL = {"a": torch.arange(10.0), "b": torch.ones(3, 4)}
LARGE = {f"layer{i}": torch.randn(500, 400, generator=torch.Generator().manual_seed(i)) for i in range(4)}


def digest(folder, *shards):
    paths = [folder / f"{index}.safetensors" for index in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path, metadata={"format": "pt"})
    return weights_digest(paths)


@pytest.mark.parametrize("state", [SMALL, LARGE])
def test_weights_digest_depends_on_tensors_and_not_on_shards(tmp_path, state):
    names = list(state)
    whole = digest(tmp_path, state)
    assert digest(tmp_path, {name: state[name] for name in names[1:]}, {names[0]: state[names[0]]}) == whole
    changed = {
        "first value": state
        | {
            names[0]: torch.cat([state[names[0]].flatten()[:1] + 1, state[names[0]].flatten()[1:]]).view_as(
                state[names[0]]
            )
        },
        "every value": state | {names[-1]: state[names[-1]] * 1.001},
        "shape": state | {names[0]: state[names[0]].reshape(-1, 2).clone()},
        "dtype": state | {names[0]: state[names[0]].view(torch.int32)},
        "name": {f"{name}x": tensor for name, tensor in state.items()},
        "fewer": {name: state[name] for name in names[1:]},
    }
    digests = {what: digest(tmp_path, other) for what, other in changed.items()}
    assert len({whole, *digests.values()}) == len(digests) + 1, digests


def test_small_weights_are_read_completely(tmp_path):
    whole = digest(tmp_path, SMALL)
    for index in range(10):
        other = {name: tensor.clone() for name, tensor in SMALL.items()}
        other["a"][index] += 1
        assert digest(tmp_path, other) != whole


def test_weights_digest_leaves_tables_out(tmp_path):
    table = {"model.backbone.layers.1.engram.table.weight": torch.ones(7, 4)}
    assert digest(tmp_path, SMALL | table) == digest(tmp_path, SMALL)


def test_weights_digest_reads_a_small_part(tmp_path, monkeypatch):
    """At most 1% of the bytes are read, beside headers."""
    from engram_hf import loading_engram

    read, real = [], loading_engram._read
    monkeypatch.setattr(loading_engram, "_read", lambda *given: read.append(given[2]) or real(*given))
    digest(tmp_path, LARGE)
    assert 0 < sum(read) <= 0.01 * sum(tensor.nbytes for tensor in LARGE.values())


def test_weights_digest_refuses_a_truncated_file(tmp_path):
    digest(tmp_path, SMALL)
    os.truncate(tmp_path / "0.safetensors", 100)
    with pytest.raises(FileFormatError):
        weights_digest([tmp_path / "0.safetensors"])


@pytest.mark.parametrize("residency", ["resident", "mapped"])
def test_table_file_of_another_model_is_refused(tmp_path, residency):
    """Shape and hash are equal, so only the rows can reveal the difference."""
    for name in ("old", "new"):
        model = build("qwen3", engram_head_dim=32)
        with torch.no_grad():
            for memory in model.base_model.memories().values():
                memory.table.weight.add_(1.0 if name == "new" else 0.0)
        model.save_pretrained(tmp_path / f"{name} plain")
        EngramForCausalLM.from_pretrained(tmp_path / f"{name} plain", engram_residency="mapped").save_pretrained(
            tmp_path / name
        )
    EngramForCausalLM.from_pretrained(tmp_path / "old", engram_residency=residency)
    shutil.copy(tmp_path / "new" / "engram-layer-00002.safetensors", tmp_path / "copy")
    os.replace(tmp_path / "copy", tmp_path / "old" / "engram-layer-00002.safetensors")
    with pytest.raises(TableFormatError, match=r"engram-layer-00002\.safetensors holds another table"):
        EngramForCausalLM.from_pretrained(tmp_path / "old", engram_residency=residency)


def test_table_digest_follows_the_documented_format(tmp_path):
    build("qwen3", engram_head_dim=32).save_pretrained(tmp_path / "plain")
    mapped = EngramForCausalLM.from_pretrained(tmp_path / "plain", engram_residency="mapped")
    mapped.save_pretrained(tmp_path / "files")
    recorded = json.loads((tmp_path / "files" / "engram_tables.json").read_text())["tables_sha256"]
    assert set(recorded) == {path.name for path in (tmp_path / "files").glob("engram-layer-*")} != set()
    for name, digest in recorded.items():
        data = (tmp_path / "files" / name).read_bytes()
        head = 8 + int.from_bytes(data[:8], "little")
        begins = [head + index * max(len(data) - 4096 - head, 0) // 63 for index in range(64)]
        blocks = b"".join(data[begin : begin + 4096] for begin in begins)
        assert digest == hashlib.sha256(data[:head] + blocks).hexdigest()

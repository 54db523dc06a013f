"""The digest by which tables know the weights they were saved with."""

import os

import pytest
import torch
from safetensors.torch import save_file

from engram_hf.loading_engram import weights_digest
from engram_hf.safetensors_engram import FileFormatError

SMALL = {"a": torch.arange(10.0), "b": torch.ones(3, 4)}
LARGE = {f"layer{i}": torch.randn(500, 400, generator=torch.Generator().manual_seed(i)) for i in range(4)}


def digest(folder, *shards):
    paths = [folder / f"{index}.safetensors" for index in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        save_file(shard, path, metadata={"format": "pt"})
    return weights_digest(paths)


@pytest.mark.parametrize("state", [SMALL, LARGE])
def test_it_depends_on_tensors_and_not_on_shards(tmp_path, state):
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


def test_small_weights_count_whole(tmp_path):
    whole = digest(tmp_path, SMALL)
    for index in range(10):
        other = {name: tensor.clone() for name, tensor in SMALL.items()}
        other["a"][index] += 1
        assert digest(tmp_path, other) != whole


def test_tables_are_left_out(tmp_path):
    table = {"model.backbone.layers.1.engram.table.weight": torch.ones(7, 4)}
    assert digest(tmp_path, SMALL | table) == digest(tmp_path, SMALL)


def test_a_small_part_is_read(tmp_path, monkeypatch):
    """At most 1% of the bytes, beside headers."""
    from engram_hf import loading_engram

    read, real = [], loading_engram._read
    monkeypatch.setattr(loading_engram, "_read", lambda *given: read.append(given[3]) or real(*given))
    digest(tmp_path, LARGE)
    assert 0 < sum(read) <= 0.01 * sum(tensor.nbytes for tensor in LARGE.values())


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    digest(tmp_path, SMALL)
    os.truncate(tmp_path / "0.safetensors", 100)
    with pytest.raises(FileFormatError):
        weights_digest([tmp_path / "0.safetensors"])

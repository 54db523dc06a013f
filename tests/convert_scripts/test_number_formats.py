"""The quantized number formats agree with the golden decodings and roundings."""

import pytest
import torch
from safetensors import safe_open

from engram_hf.convert_scripts.number_formats import decode, encode
from engram_hf.convert_scripts.safetensors_files import read_checkpoint
from engram_hf.convert_scripts.storage import FP4_ROWS, FP8_BLOCKS, FP8_ROWS, Storage

pytestmark = pytest.mark.any_version


@pytest.fixture(scope="module")
def checkpoint(golden):
    return read_checkpoint(golden / "deepseek_v41_tiny")


@pytest.fixture(scope="module")
def truth(golden):
    with safe_open(golden / "deepseek_v41_tiny" / "golden.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(("dequantized.", "rounding."))]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def stored(checkpoint, name):
    with safe_open(checkpoint.tensors[name].path, "pt") as file:
        return file.get_tensor(name).view(torch.uint8)


def test_every_storage_has_a_golden_decoding(truth):
    kinds = {name.split(".", 3)[3] for name in truth if name.startswith("dequantized.")}
    assert {"attn.wo_a.weight", "ffn.experts.5.w1.weight", "engram.embed.weight", "engram.wkv.weight"} <= kinds


def test_decode_gives_the_golden_values(checkpoint, truth):
    for key, expected in truth.items():
        if key.startswith("dequantized."):
            stem = key.removeprefix("dequantized.").removesuffix(".weight")
            storage = FP4_ROWS if ".experts." in stem else FP8_ROWS if stem.endswith(".embed") else FP8_BLOCKS
            values = decode(stored(checkpoint, f"{stem}.weight"), stored(checkpoint, f"{stem}.scale"), storage)
            assert torch.equal(values, expected), key


@pytest.mark.parametrize(
    ("key", "storage", "floor"), [("rounding.fp8", FP8_ROWS, 1e-4), ("rounding.mxfp4", FP4_ROWS, None)]
)
def test_encode_gives_the_golden_values(truth, key, storage, floor):
    weight, scale = encode(truth["rounding.input"], storage, floor)
    assert torch.equal(decode(weight, scale, storage), truth[key])


@pytest.mark.parametrize("storage", [FP8_BLOCKS, FP8_ROWS, FP4_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_values_encode_to_themselves(storage, dtype):
    """With any stored scale, an exported model has the values of the decoded one, in bfloat16 as well."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, 256, (96, 64), dtype=torch.uint8, generator=generator)
    if not storage.is_packed:
        weight[(weight & 0x7F) == 0x7F] = 0  # These are the two NaN codes.
    scale_shape = storage.scale_shape((96, 128 if storage.is_packed else 64))
    scale = torch.randint(64, 180, scale_shape, dtype=torch.uint8, generator=generator)
    values = decode(weight, scale, storage)
    values[:32] = 0
    assert torch.equal(decode(*encode(values.to(dtype).float(), storage), storage), values)


def test_ties_round_to_the_even_code():
    values = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]])
    weight, scale = encode(values.repeat(1, 4), FP4_ROWS)
    assert scale.tolist() == [[127]]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    assert decode(weight, scale, FP4_ROWS)[0, :8].tolist() == expected


def test_blocks_at_the_edge_may_be_incomplete():
    values = torch.randn(40, 72, generator=torch.Generator().manual_seed(0))
    weight, scale = encode(values, FP8_BLOCKS)
    assert weight.shape == (40, 72) and scale.shape == (2, 3)
    assert (decode(weight, scale, FP8_BLOCKS) - values).abs().max() < 0.25
    assert Storage("F8_E4M3", (32, 32)).scale_shape((40, 72)) == (2, 3)

"""The release's quantized number formats, decoded and encoded in float32.

E4M3 and E2M1 values are stored next to a power of two per block, an E8M0 byte `e` that means `2^(e - 127)`. Two E2M1 codes
share a byte, the even column in the low nibble; a code's magnitudes are 0, .5, 1, 1.5, 2, 3, 4, 6, bit 3 is the sign.

Encoding follows the release: with `a` the largest magnitude of a block, the scale is the smallest power of two that is at
least `max(a, floor) / limit` (found from the float's exponent bits, not by a logarithm), values are divided by it, clamped to
the limit, and rounded to the nearest code, ties to the even code.

Shapes: values `[R, C]`, weights `[R, C]` (E4M3) or `[R, C / 2]` (E2M1), scales `[ceil(R / block rows), ceil(C / block columns)]`;
weights and scales are passed as their stored bytes, `uint8`.
"""

import torch
import torch.nn.functional as F

from ..table_engram import E2M1_VALUES, E4M3_MAX, exponent_above
from ..table_writer_engram import E2M1_LIMIT, e2m1_codes, pack
from .storage import Storage

# The only floor for weights is the smallest scale that is a normal number, because decoded values must encode to the same bytes.
SMALLEST_NORMAL = 2.0**-126


def decode(weight: torch.Tensor, scale: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Return values `[R, C]` in float32 of quantized bytes."""
    codes = _unpack_e2m1(weight) if storage.is_packed else weight.view(torch.float8_e4m3fn).float()
    factors = scale.view(torch.float8_e8m0fnu).float()
    return codes * _spread(factors, storage.block, codes.shape)


def encode(values: torch.Tensor, storage: Storage, floor: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the quantized bytes of `values` `[R, C]`, float32: weight and scale. `floor` is as in `encode_scale`."""
    scale = encode_scale(values, storage, floor)
    return encode_weight(values, scale, storage), scale


def encode_scale(values: torch.Tensor, storage: Storage, floor: float | None = None) -> torch.Tensor:
    """Return the scales of `values`.

    Args:
        values: `[R, C]`, float32.
        storage: a quantized storage.
        floor: lower limit for the maximum of a block; by default the smallest with a normal scale. The release's FP8
            activations use 1e-4.
    """
    limit = _limit(storage)
    largest = _block_maximum(values, storage.block)
    quotients = largest.clamp_min(limit * SMALLEST_NORMAL if floor is None else floor) / limit
    return exponent_above(quotients.contiguous()).to(torch.uint8)


def encode_weight(values: torch.Tensor, scale: torch.Tensor, storage: Storage) -> torch.Tensor:
    """Return the weight bytes of `values` `[R, C]` under given scales."""
    limit = _limit(storage)
    factors = scale.view(torch.float8_e8m0fnu).float()
    scaled = (values / _spread(factors, storage.block, values.shape)).clamp(-limit, limit)
    return pack(e2m1_codes(scaled), 4) if storage.is_packed else scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def _limit(storage: Storage) -> float:
    return E2M1_LIMIT if storage.is_packed else E4M3_MAX


def _spread(factors: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    rows, columns = shape
    return factors.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def _block_maximum(values: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return the largest magnitude of every block; a block that is cut off by the edge is padded with zeros."""
    rows, columns = values.shape
    padded = F.pad(values.abs(), (0, -columns % block[1], 0, -rows % block[0]))
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax(dim=(1, 3))


def _unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Decode both values of every byte with one look-up, which is four times as fast as splitting the nibbles first."""
    magnitudes = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    pairs = torch.stack((magnitudes.repeat(16), magnitudes.repeat_interleave(16)), dim=-1)
    return pairs.index_select(0, packed.flatten().int()).view(packed.shape[0], -1)

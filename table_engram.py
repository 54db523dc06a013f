"""`EngramTable`: the rows of one layer's memory, how they are fetched, what they may be stored as and what that means.

Shape letters: R rows of the table, W channels of a row, T heads a position reads (all n-gram orders), C channels that
share a scale.
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .safetensors_engram import EngramError


class RowFormat(NamedTuple):
    """What the rows of a table may be stored as.

    Args:
        dtype: of the rows.
        scale_dtype: of their scales; None for rows without.
        block: channels that share a scale; 0 for all of a row.
        multiple: what the width of a row must be a multiple of.
    """

    dtype: torch.dtype
    scale_dtype: torch.dtype | None = None
    block: int = 0
    multiple: int = 1

    @property
    def name(self) -> str:
        """The dtype's name in torch, such as `"int8"`."""
        return str(self.dtype).removeprefix("torch.")

    def scales(self, width: int) -> int:
        """How many scales a row of `width` channels has."""
        return 0 if self.scale_dtype is None else width // (self.block or width)


# The one list of what tables may be stored as, by the dtype's name in a safetensors file (docs/engram-table-format.md).
ROW_FORMATS = {
    "F32": RowFormat(torch.float32),
    "BF16": RowFormat(torch.bfloat16),
    "F16": RowFormat(torch.float16),
    "F8_E4M3": RowFormat(torch.float8_e4m3fn, torch.float8_e8m0fnu, 32, 32),  # as in DeepSeek-V4.1
    "I8": RowFormat(torch.int8, torch.float32, 0, 4),
}
# What `engram_table_dtype` may be, beside None.
QUANTIZED_FORMATS = {row_format.name: row_format for row_format in ROW_FORMATS.values() if row_format.scale_dtype}
TORCH_DTYPES = {name: row_format.dtype for name, row_format in ROW_FORMATS.items()} | {"F8_E8M0": torch.float8_e8m0fnu}
SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

E4M3_MAX = 448.0
# Rows a thread decodes at once: enough that threads seldom wait for each other, few enough for a large cache.
_CHUNK_ROWS = 8192
_INIT_ROWS = 65_536
# The bits of a bfloat16 that a float8 shifted left by 4 fills, as a signed 16-bit integer: 0x87F0.
_E4M3_BITS = -0x7810
# From an E8M0 byte to the exponent of the scale times 2^120, which makes up for the two formats' biases, 7 and 127.
_E8M0_TO_FACTOR = 120
_LARGEST_FAST_SCALE = 0xFE - _E8M0_TO_FACTOR


class RowReader(Protocol):
    """Rows that are not on the device that needs them, read by number."""

    width: int

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stored values `[n, W]` and scales `[n, W / C]` (or None) of int64 `row_ids` `[n]`.

        They are on the CPU, or on the device of the ids if the reader brings them there.
        """


class RowSource(RowReader, Protocol):
    """All rows of a table."""

    num_rows: int

    def read(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stored values and scales of the rows `first..stop-1`, read in file order, on the CPU."""


class EngramTable(nn.Module):
    """An embedding table that hash heads read rows from.

    Its rows are parameters (*resident*), or come from a `source` in host memory or in a file, which then is neither a
    parameter nor a buffer: it stays where it is when the model moves, and out of the state dict.

    Args:
        num_rows: R, the sum of the layer's primes.
        width: W, `engram_head_dim`.
        table_dtype: None for rows in `dtype`, trainable; `"float8_e4m3fn"` for frozen rows with an E8M0
            (power-of-two) scale per 32 channels; `"int8"` for frozen rows with a float32 scale each.
        device, dtype: of the parameters, as in `torch.nn` modules.

    Parameters:
        weight: `[R, W]`.
        scale: float8_e8m0fnu `[R, W / 32]` or float32 `[R, 1]`; None for float rows.
    """

    def __init__(self, num_rows: int, width: int, table_dtype: str | None = None, device=None, dtype=None):
        super().__init__()
        self.num_rows, self.width, self.table_dtype = num_rows, width, table_dtype
        self.row_dtype = dtype or torch.get_default_dtype()
        self.source: RowSource | None = None
        self.unread: RowSource | None = None  # what the parameters are to be filled from
        scale, stored = None, self.row_dtype
        if table_dtype is not None:
            row_format = _quantized_format(table_dtype, width)
            empty = torch.empty((num_rows, row_format.scales(width)), device=device, dtype=row_format.scale_dtype)
            scale, stored = nn.Parameter(empty, requires_grad=False), row_format.dtype
        empty = torch.empty((num_rows, width), device=device, dtype=stored)
        self.weight = nn.Parameter(empty, requires_grad=table_dtype is None)
        self.register_parameter("scale", scale)

    def mount(self, source: RowSource) -> None:
        """Read rows from `source` from now on; the parameters are given up."""
        self.weight = self.scale = None
        self.source = source

    def keep_frozen(self) -> None:
        """Quantized rows take no gradient; transformers loads every parameter of floating point as a trainable one."""
        if self.table_dtype is not None:
            self.requires_grad_(False)

    @property
    def is_resident(self) -> bool:
        """Whether the rows are parameters of this module."""
        return self.source is None

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` moves dtypes, but a quantized row means nothing without its scale: only devices move.
        self.row_dtype = fn(torch.empty(0, dtype=self.row_dtype)).dtype
        if self.scale is None:
            return super()._apply(fn, recurse)
        return super()._apply(lambda tensor: _keep_dtype(tensor, fn(tensor)), recurse)

    def extra_repr(self) -> str:
        """Rows, channels and stored dtype, for `print(model)`."""
        return f"{self.num_rows}, {self.width}, {f'dtype={self.weight.dtype}' if self.is_resident else self.source}"

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Fill parameters that no checkpoint filled: with the rows of `unread`, or else with normal noise.

        A few rows at a time, so that a table has no second copy, let alone one in float32.
        """
        if not self.is_resident or getattr(self.weight, "_is_hf_initialized", False):
            return
        for first in self._steps():
            stop = min(first + _INIT_ROWS, self.num_rows)
            values, scale = self._noise(stop - first, std) if self.unread is None else self.unread.read(first, stop)
            self.weight[first:stop].copy_(values)
            if scale is not None:
                self.scale[first:stop].copy_(scale)

    def _steps(self) -> Iterable[int]:
        firsts = range(0, self.num_rows, _INIT_ROWS)
        # What is read from files may take minutes.
        return firsts if self.unread is None else logging.tqdm(firsts, desc="Reading a memory table", delay=1)

    def _noise(self, count: int, std: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        noise = torch.empty((count, self.width), device=self.weight.device, dtype=self.row_dtype).normal_(std=std)
        return (noise, None) if self.table_dtype is None else quantize_rows(noise, self.table_dtype)

    def forward(
        self, row_ids: torch.Tensor, dtype: torch.dtype | None = None, source: RowReader | None = None
    ) -> torch.Tensor:
        """Rows of `row_ids` `[..., T]`, side by side: `[..., T * W]`, on the device of `row_ids`.

        Args:
            row_ids: int64, each in `0..R-1`.
            dtype: of the result, for a quantized table; rows of a float table keep theirs.
            source: rows of these ids that were fetched ahead, to be used instead of the table's own.

        Raises:
            ValueError: on the CPU, for a row that does not exist; or a mapped file changed under the model.
        """
        source = source or self.source
        if source is None and self.scale is None:
            return self._embed(row_ids).flatten(-2)
        if row_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            _require_rows(row_ids, self.num_rows)
        if self.table_dtype is None:
            dtype = self.row_dtype
        if source is not None:
            return _read_from(source, row_ids, dtype)
        if row_ids.device.type == "cpu":
            return read_rows(self, row_ids, dtype)
        return dequantize_rows(*self.fetch(row_ids), dtype).flatten(-2)

    def _embed(self, row_ids: torch.Tensor) -> torch.Tensor:
        # Ids are not looked at beforehand: under `torch.func.vmap` nothing may depend on their values.
        try:
            return F.embedding(row_ids, self.weight)
        except IndexError:
            _require_rows(row_ids, self.num_rows)
            raise

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stored values `[..., W]` and scales of the parameters, as they are; see [`RowSource`]."""
        return gather_stored(self.weight, row_ids), None if self.scale is None else gather_stored(self.scale, row_ids)


def _quantized_format(table_dtype: str, width: int) -> RowFormat:
    row_format = QUANTIZED_FORMATS.get(table_dtype)
    if row_format is None or width % row_format.multiple:
        known = ", ".join(f"{name!r} with a multiple of {some.multiple}" for name, some in QUANTIZED_FORMATS.items())
        raise EngramError(
            f"A table of width {width} cannot be stored as {table_dtype!r}: use {known} channels, or None."
        )
    return row_format


def _require_rows(row_ids: torch.Tensor, num_rows: int) -> None:
    if row_ids.numel() == 0:
        return
    first, last = torch.aminmax(row_ids)
    if first < 0 or last >= num_rows:
        wrong = int(first if first < 0 else last)
        raise EngramError(
            f"Row {wrong} was asked for, but the table has rows 0..{num_rows - 1}; the hash and the table do not belong "
            "together."
        )


@torch.compiler.disable
def _read_from(source: RowReader, row_ids: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Rows of `row_ids` `[..., T]`, side by side; they travel to a device as stored, and are decoded there."""
    device = row_ids.device
    if device.type == "cpu":
        return read_rows(source, row_ids, dtype)
    values, scale = source.fetch(row_ids.reshape(-1))
    scale = None if scale is None else _to_device(scale, device)
    return _side_by_side(dequantize_rows(_to_device(values, device), scale, dtype), row_ids)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # Asynchronous only from page-locked memory, and only there sure to be read before it is used for others.
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _side_by_side(rows: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
    return rows.view(*row_ids.shape[:-1], row_ids.shape[-1] * rows.shape[-1])


def read_rows(source: RowReader, row_ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Fetch and decode rows of `row_ids` `[..., T]` on the CPU: `[..., T * W]`.

    Args:
        dtype: of the result; float32 if None.
    """
    ids = row_ids.reshape(-1)
    rows = torch.empty((ids.numel(), source.width), dtype=dtype or torch.float32, device="cpu")
    chunk = _CHUNK_ROWS * torch.get_num_threads()
    for some_ids, some_rows in zip(ids.split(chunk), rows.split(chunk), strict=True):
        if some_ids.numel():
            _decode_into(some_rows, *source.fetch(some_ids))
    return _side_by_side(rows, row_ids)


def _decode_into(rows: torch.Tensor, values: torch.Tensor, scale: torch.Tensor | None) -> None:
    if scale is None:
        rows.copy_(values)
    elif not _decode_float8_fast(rows, values, scale):
        rows.copy_(dequantize_rows(values, scale, rows.dtype))


def _decode_float8_fast(rows: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> bool:
    """Decode float8 values on the CPU, where torch converts them one by one: False if these have to go that way.

    A float8 value shifted left by 4 bits is a bfloat16 with the value times 2^-120, subnormal ones included, so that one
    multiplication by the scale times 2^120 yields the exact product. NaN, scales beyond 2^7 and a processor that is set
    to flush subnormal numbers are left to the plain way.
    """
    if values.dtype != torch.float8_e4m3fn or rows.dtype not in (torch.bfloat16, torch.float32):
        return False
    raw, exponents = values.view(torch.int8), scale.view(torch.uint8)
    has_nan = raw.amax() == 0x7F or values.view(torch.uint8).amax() == 0xFF
    if has_nan or exponents.amax() > _LARGEST_FAST_SCALE or _flushes_subnormals():
        return False
    decoded = rows if rows.dtype == torch.bfloat16 else torch.empty_like(rows, dtype=torch.bfloat16)
    decoded.view(torch.int16).copy_(raw).bitwise_left_shift_(4).bitwise_and_(_E4M3_BITS)
    factors = exponents.to(torch.int16).add_(_E8M0_TO_FACTOR).bitwise_left_shift_(7).view(torch.bfloat16)
    if decoded is not rows:
        rows.copy_(decoded)
    rows.unflatten(-1, (scale.shape[-1], -1)).mul_(factors.to(rows.dtype).unsqueeze(-1))
    return True


def _flushes_subnormals() -> bool:
    return bool((torch.full((1,), 2.0**-130, device="cpu") * 1.0 == 0).item())


def dequantize_rows(
    values: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """`value * scale`, each scale shared by C neighbouring channels.

    Args:
        values: `[..., W]`, float8_e4m3fn or int8; rows without `scale` are only cast.
        scale: float8_e8m0fnu or float32 `[..., W / C]`.
        dtype: of the result; float32 if None. The product is rounded to float32, and then once to this dtype.
    """
    rows = values.to(torch.float32)
    if scale is not None:
        rows = (rows.unflatten(-1, (scale.shape[-1], -1)) * scale.to(torch.float32).unsqueeze(-1)).flatten(-2)
    return rows if dtype is None else rows.to(dtype)


def quantize_rows(rows: torch.Tensor, table_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[..., W]` and scales of float `rows` `[..., W]`; see section 5 of docs/engram-table-format.md.

    Args:
        table_dtype: `"float8_e4m3fn"`, by the rule of DeepSeek-V4.1 (scale `2^ceil(log2(max(amax, 1e-4) / 448))` per
            32 channels), or `"int8"`.

    Raises:
        ValueError: for another dtype, a width that it cannot have, or rows that are not finite.
    """
    row_format = _quantized_format(table_dtype, rows.shape[-1])
    blocks = rows.to(torch.float32).unflatten(-1, (row_format.scales(rows.shape[-1]), -1))
    largest = blocks.abs().amax(-1)
    if not largest.isfinite().all():
        raise EngramError("Rows with NaN or infinite channels cannot be quantized; repair the table first.")
    if table_dtype == "int8":
        scale = torch.where(largest > 0, largest / 127, 1.0)
        # A subnormal maximum may round to a scale of zero.
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        values = (blocks / scale.unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8)
        return values.flatten(-2), scale
    scale = exponent_above(largest.clamp_min(1e-4) / E4M3_MAX).to(torch.uint8).view(row_format.scale_dtype)
    values = (blocks / scale.to(torch.float32).unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return values.flatten(-2), scale


def exponent_above(x: torch.Tensor) -> torch.Tensor:
    """Exponent of the smallest power of two that is at least `x`, biased by 127 as in E8M0 and float32, as int32.

    Args:
        x: positive, normal, contiguous float32. Its bits are read, since a logarithm would not be exact.
    """
    bits = x.view(torch.int32)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)


def gather_stored(table: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
    """Rows `[..., W]` of `table` in its own dtype, gathered as bytes: not every device indexes float8."""
    raw = table.detach().view(torch.uint8).index_select(0, row_ids.reshape(-1))
    return raw.view(table.dtype).view(*row_ids.shape, table.shape[1])


def _keep_dtype(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return after if after.dtype == before.dtype else before.to(after.device)

"""`EngramTable`: the rows of one layer's memory, how they are fetched and stored, and the values of stored numbers.

Shape letters: R rows of the table, W channels of a row, T heads a position reads (all n-gram orders), C channels that
share a scale.
"""

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .safetensors_engram import EngramError
from .table_format_engram import QUANTIZED_FORMATS, ROW_FORMATS, RowFormat

# This is the torch dtype of stored numbers, by its name in a safetensors file.
TORCH_DTYPES = {name: getattr(torch, form.name) for name, form in ROW_FORMATS.items() if form.packed == 1}
TORCH_DTYPES |= {"U8": torch.uint8, "F8_E8M0": torch.float8_e8m0fnu}
SAFETENSORS_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# These are the 4-bit floats with 2 bits of exponent and one of mantissa, by their lower three bits.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

E4M3_MAX = 448.0
# A thread decodes this many rows at once: enough that threads seldom wait, few enough for a large cache.
_CHUNK_ROWS = 8192
_INIT_ROWS = 65_536


class RowReader(Protocol):
    """Reads rows by number that are not on the device that needs them."""

    width: int

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return stored values `[n, W / channels in one]` and scales `[n, W / C]` (or None) of int64 `row_ids` `[n]`.

        They are on the CPU, or on the device of the ids if the reader copies them there. A global scale is applied.
        """


class RowSource(RowReader, Protocol):
    """A source of all rows of a table."""

    num_rows: int
    global_scale: torch.Tensor | None  # float32 `[1]`, on the CPU

    def read(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return values and scales of the stored rows `first..stop-1`, read in file order, on the CPU."""


class EngramTable(nn.Module):
    """An embedding table that hash heads read rows from.

    Its rows are parameters (*resident*), or come from a `source` in host memory or in a file. A source is neither a
    parameter nor a buffer: it is not moved with the model, and is not in the state dict.

    Args:
        num_rows: R, the sum of the layer's primes.
        width: W, `engram_head_dim`.
        table_dtype: None for rows in `dtype`, trainable; else one of `QUANTIZED_FORMATS`, for frozen rows with scales.
        device, dtype: those of the parameters, as in `torch.nn` modules.

    Parameters:
        weight: `[R, W / channels in a stored number]`.
        scale: `[R, W / C]`; None for float rows.
        global_scale: float32 `[1]`, which divides all scales; None for a format without one.
    """

    def __init__(self, num_rows: int, width: int, table_dtype: str | None = None, device=None, dtype=None):
        super().__init__()
        self.num_rows, self.width, self.table_dtype = num_rows, width, table_dtype
        self.row_dtype = dtype or torch.get_default_dtype()
        self.source: RowSource | None = None
        self.unread: RowSource | None = None  # It has the initial values of the parameters.
        form = RowFormat("", "") if table_dtype is None else require_format(table_dtype, width)
        stored_dtypes = TORCH_DTYPES.get(form.dtype, self.row_dtype), TORCH_DTYPES.get(form.scale_dtype)
        sizes = {"weight": (width // form.packed, stored_dtypes[0]), "scale": (form.scales(width), stored_dtypes[1])}
        for kind in ("weight", "scale"):
            size, stored = sizes[kind]
            empty = torch.empty((num_rows, size), device=device, dtype=stored) if kind in form.kinds else None
            self.register_parameter(kind, empty if empty is None else nn.Parameter(empty, table_dtype is None))
        one = nn.Parameter(torch.ones(1, device=device, dtype=torch.float32), False) if form.has_global else None
        self.register_parameter("global_scale", one)

    def mount(self, source: RowSource) -> None:
        """Read rows from `source` from now on; the parameters are removed."""
        self.weight = self.scale = self.global_scale = None
        self.source = source

    def keep_frozen(self) -> None:
        """Freeze quantized rows: transformers loads every parameter of floating point as a trainable one."""
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
        """Return rows, channels and stored dtype, for `print(model)`."""
        return f"{self.num_rows}, {self.width}, {f'dtype={self.weight.dtype}' if self.is_resident else self.source}"

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Fill parameters that no checkpoint filled: with the rows of `unread`, or else with normal noise.

        A few rows are filled at a time, so that a table has no second copy, in particular none in float32.
        """
        if not self.is_resident or all(getattr(some, "_is_hf_initialized", False) for some in self.parameters()):
            return
        for first in self._steps():
            stop = min(first + _INIT_ROWS, self.num_rows)
            values, scale = self._noise(stop - first, std) if self.unread is None else self.unread.read(first, stop)
            self.weight[first:stop].copy_(values)
            if scale is not None:
                self.scale[first:stop].copy_(scale)
        if self.unread is not None and self.unread.global_scale is not None:
            self.global_scale.copy_(self.unread.global_scale)

    def _steps(self) -> Iterable[int]:
        firsts = range(0, self.num_rows, _INIT_ROWS)
        # Reading from files may take minutes.
        return firsts if self.unread is None else logging.tqdm(firsts, desc="Reading a memory table", delay=1)

    def _noise(self, count: int, std: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return normal noise; for packed numbers, in which every code is equally likely, uniform noise."""
        values = torch.empty((count, self.weight.shape[1]), device=self.weight.device, dtype=self.row_dtype)
        values.normal_(std=std)
        if self.scale is None:
            return values, None
        if self.weight.dtype == torch.uint8:
            values = torch.randint_like(values, 256)
            unit = std / _of_bytes(self.width // values.shape[1], self.global_scale is not None).std().item()
        else:
            # It is a power of two, which every scale can be; of int8, some 16 steps are in a standard deviation.
            unit = 2.0 ** math.floor(math.log2(max(std, 1e-30)) - 4 * (self.weight.dtype == torch.int8))
            values = values.div_(unit).clamp_(-127, 127)
        if self.global_scale is not None:
            self.global_scale.fill_(1 / max(unit, 1e-30))
            unit = 1.0
        return values.to(self.weight.dtype), torch.full_like(self.scale[:count], 1, dtype=torch.float32) * unit

    def forward(
        self, row_ids: torch.Tensor, dtype: torch.dtype | None = None, source: RowReader | None = None
    ) -> torch.Tensor:
        """Return rows of `row_ids` `[..., T]`, concatenated: `[..., T * W]`, on the device of `row_ids`.

        Args:
            row_ids: int64, each in `0..R-1`.
            dtype: the dtype of the result, for a quantized table; rows of a float table keep theirs.
            source: prefetched rows of these ids, used instead of the table's own.

        Raises:
            ValueError: on the CPU, for a row that does not exist; or a mapped file changed while the model uses it.
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
        return dequantize_rows(*self.fetch(row_ids), dtype, self.width).flatten(-2)

    def _embed(self, row_ids: torch.Tensor) -> torch.Tensor:
        # Ids are not inspected beforehand: under `torch.func.vmap` nothing may depend on their values.
        try:
            return F.embedding(row_ids, self.weight)
        except IndexError:
            _require_rows(row_ids, self.num_rows)
            raise

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return values `[..., W / channels in one]` of the parameters, and their scales; see [`RowReader`]."""
        scale = None if self.scale is None else gather_stored(self.scale, row_ids)
        return gather_stored(self.weight, row_ids), apply_global_scale(scale, self.global_scale)


def require_format(table_dtype: str, width: int) -> RowFormat:
    """Return the stored format of quantized rows of `width` channels.

    Raises:
        ValueError: for a dtype that is not among `QUANTIZED_FORMATS`, or an unsupported width.
    """
    row_format = QUANTIZED_FORMATS.get(table_dtype)
    if row_format is None or width % row_format.multiple:
        known = ", ".join(f"{name!r} with a multiple of {some.multiple}" for name, some in QUANTIZED_FORMATS.items())
        raise EngramError(
            f"A table of width {width} cannot be stored as {table_dtype!r}: use {known} channels, or None."
        )
    return row_format


def apply_global_scale(scale: torch.Tensor | None, global_scale: torch.Tensor | None) -> torch.Tensor | None:
    """Return scales, divided in float32 by that of the whole table `[1]` if there is one."""
    # The divisor is a tensor, because a GPU multiplies by the reciprocal of a Python number.
    return scale if global_scale is None else scale.to(torch.float32) / global_scale.to(scale.device)


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
    """Return rows of `row_ids` `[..., T]`, concatenated; they are copied to a device as stored, and decoded there."""
    device = row_ids.device
    if device.type == "cpu":
        return read_rows(source, row_ids, dtype)
    values, scale = source.fetch(row_ids.reshape(-1))
    scale = None if scale is None else _to_device(scale, device)
    return _side_by_side(dequantize_rows(_to_device(values, device), scale, dtype, source.width), row_ids)


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # A copy is asynchronous only from page-locked memory, and only then sure to be read before its memory is reused.
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _side_by_side(rows: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
    return rows.view(*row_ids.shape[:-1], row_ids.shape[-1] * rows.shape[-1])


def read_rows(source: RowReader, row_ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Fetch and decode rows of `row_ids` `[..., T]` on the CPU: `[..., T * W]`.

    Args:
        dtype: the dtype of the result; float32 if None.
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
    elif rows.dtype == torch.bfloat16 and scale.dtype in (torch.bfloat16, torch.float8_e8m0fnu):
        # The numbers are exact in float32, so that the product is rounded once.
        blocks = rows.unflatten(-1, (scale.shape[-1], -1))
        numbers = _numbers(values, scale, rows.shape[-1], torch.bfloat16).view_as(blocks)
        torch.mul(numbers, scale.to(torch.bfloat16).unsqueeze(-1), out=blocks)
    else:
        rows.copy_(dequantize_rows(values, scale, None, rows.shape[-1]))


def _numbers(values: torch.Tensor, scale: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return packed or float8 `values` without their scales: `[..., W]`, bfloat16 or float32.

    4-bit floats have float32 scales of blocks, which integers never have.
    """
    packed = width // values.shape[-1]
    build = _of_bytes.__wrapped__ if torch.compiler.is_compiling() else _of_bytes
    numbers = build(packed, scale.dtype == torch.float32, values.device, dtype if packed < 4 else torch.bfloat16)
    # One look-up per byte gives one integer with all its numbers: gathering rows of few numbers is four times slower.
    together = numbers.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[packed * numbers.itemsize]).flatten()
    found = together.index_select(0, values.view(torch.uint8).flatten().int()).view(numbers.dtype)
    return found.view(*values.shape[:-1], width).to(dtype)


@lru_cache
def _of_bytes(packed: int, is_float: bool, device: torch.device | str = "cpu", dtype=torch.float32) -> torch.Tensor:
    """Return the numbers in each of the 256 bytes, the one in the lowest bits first: `[256, packed]`."""
    codes, bits = torch.arange(256, device=device).unsqueeze(1), 8 // packed
    if packed == 1:
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).to(dtype)
    codes = codes >> torch.arange(0, 8, bits, device=device) & (1 << bits) - 1
    if is_float:
        return torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=device)[codes].to(dtype)
    return (codes - ((1 << bits) - 1) / 2).to(dtype)


def dequantize_rows(
    values: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype | None = None, width: int | None = None
) -> torch.Tensor:
    """Return `value * scale`, each scale shared by C neighbouring channels.

    Args:
        values: `[..., W]`, float8_e4m3fn or int8; rows without `scale` are only cast. Or packed, uint8.
        scale: `[..., W / C]`, a global scale applied.
        dtype: the dtype of the result; float32 if None. The product is rounded to float32, then to this dtype.
        width: W, of packed values.
    """
    width = width or values.shape[-1]
    # On the CPU, torch converts float8 numbers one by one.
    is_float8_here = values.dtype == torch.float8_e4m3fn and values.device.type == "cpu"
    by_byte = scale is not None and (values.dtype == torch.uint8 or is_float8_here)
    rows = _numbers(values, scale, width, torch.float32) if by_byte else values.to(torch.float32)
    if scale is not None:  # It works in place: a table's rows are not floats yet, so these are a copy.
        rows.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.to(torch.float32).unsqueeze(-1))
    return rows if dtype is None else rows.to(dtype)


def exponent_above(x: torch.Tensor) -> torch.Tensor:
    """Return the int32 exponent of the smallest power of two that is at least `x`, biased by 127 as in E8M0.

    Args:
        x: positive, normal, contiguous float32. Its bits are read, since a logarithm would not be exact.
    """
    bits = x.view(torch.int32)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)


def gather_stored(table: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
    """Return rows `[..., W]` of `table` in its own dtype, gathered as bytes: not every device indexes float8."""
    raw = table.detach().view(torch.uint8).index_select(0, row_ids.reshape(-1))
    return raw.view(table.dtype).view(*row_ids.shape, table.shape[1])


def _keep_dtype(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return after if after.dtype == before.dtype else before.to(after.device)

"""Writing new table files: row range by row range, and quantized."""

import collections
import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .safetensors_engram import (
    ITEM_BITS,
    EngramError,
    FileFormatError,
    FileWriter,
    parse_head,
    read_json,
    reserve,
    write_json,
)
from .saving_engram import table_head
from .table_engram import (
    E4M3_MAX,
    apply_global_scale,
    dequantize_rows,
    exponent_above,
    require_format,
)
from .table_format_engram import ROW_FORMATS, RowFormat, TableDescription, tensor_names

# Numbers that a thread reads and writes at once.
_STEP_NUMBERS = 1 << 19
# Numbers that are converted at once: all that is needed for them stays in a processor's own cache.
_CHUNK_NUMBERS = 1 << 17
# Counts the changes of what `quantize_rows` makes of the same rows: a table that was begun before one is begun again.
_RULES = 2
E2M1_LIMIT = 6.0
# The step between neighbouring levels of that number of bits that leaves about the least squares, as a combination of the root mean
# square of a row and of its largest magnitude. Fitted to the best steps for rows of trained tables, and of normal, uniform and
# Laplace numbers.
_STEPS = {4: (0.1003, 0.0788), 2: (0.8507, 0.05)}
# Edges of the histogram of relative errors.
ERROR_EDGES = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)


class TableWriter(FileWriter):
    """Writes one table file, row range by row range.

    Args:
        path: of the file.
        description: of the table, with the `rows` of this file. Its scales follow its rows.
        global_scale: that of the table, where its format has one.
    """

    def __init__(
        self, path: str | os.PathLike, description: TableDescription, global_scale: torch.Tensor | None = None
    ):
        self.description = description
        super().__init__(path, table_head(description))
        if global_scale is not None:
            self._write("global_scale", 0, global_scale.view(1))

    def write(self, first: int, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Write rows from table row `first` on, as stored: `values` `[n, W / channels in one]`, `scale` `[n, W / C]`."""
        for kind, tensor in (("weight", values), ("scale", scale)):
            if tensor is not None:
                self._write(kind, first - self.description.rows[0], tensor)

    def _write(self, kind: str, row: int, tensor: torch.Tensor) -> None:
        begin = self.header.tensors[self.description.tensors[kind]].offset
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        self.write_at(begin + row * data[0].nbytes, memoryview(data).cast("B"))


class ResumableTableWriter(TableWriter):
    """Writes one table file in place, so that a process can continue after a kill.

    Args:
        goes_on: whether what is there is kept.
    """

    def __init__(
        self, path: str | os.PathLike, description: TableDescription, global_scale: torch.Tensor | None, goes_on: bool
    ):
        self.description, self.path, head = description, Path(path), table_head(description)
        self.header = parse_head(self.path, head)
        with self._explained(), contextlib.ExitStack() as stack:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            stack.callback(os.close, self._file)
            if not goes_on:
                os.ftruncate(self._file, 0)
                reserve(self._file, self.header.size)
                self.write_at(0, memoryview(head))
                if global_scale is not None:
                    self._write("global_scale", 0, global_scale.view(1))
            self._stack = stack.pop_all()

    def sync(self) -> None:
        """Have all that was written survive a loss of power."""
        with self._explained():
            os.fsync(self._file)


class Journal:
    """How far a table file is, beside it.

    Args:
        path: of the journal; None to keep none.
        made_of: what the table depends on; a journal that names something else is not gone on with.
    """

    def __init__(self, path: Path | None, made_of: list[str]):
        self.path, self._made_of = path, made_of

    def read(self) -> dict[str, Any]:
        """What was last written; empty if there is nothing to go on with."""
        with contextlib.suppress(FileFormatError):
            journal = {} if self.path is None else read_json(self.path)
            return journal.get("state", {}) if journal.get("made_of") == self._made_of else {}
        return {}

    def write(self, state: dict[str, Any]) -> None:
        """Note how far the file is."""
        if self.path is not None:
            write_json(self.path, {"made_of": self._made_of, "state": state})


@dataclass
class QuantizationError:
    """What quantizing a table changed.

    Args:
        rows: rows compared.
        largest: largest difference of a channel.
        relative: root of the summed squared differences over that of the summed squares; 0 for a table of zeros.
        histogram: how many rows have a relative error below each of `ERROR_EDGES` and not below the one before; the last
            number is of those above all.
    """

    rows: int = 0
    largest: float = 0.0
    squares: float = 0.0
    squared_differences: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * (len(ERROR_EDGES) + 1))

    @property
    def relative(self) -> float:
        return (self.squared_differences / self.squares) ** 0.5 if self.squares else 0.0

    def add(self, *compared: "tuple[torch.Tensor, torch.Tensor, float]") -> None:
        """Count rows; see [`compare_rows`]."""
        # By NumPy: torch would take the square roots of a few thousand numbers in all its threads, which wait for each other.
        squares, squared_differences = (
            torch.cat(some).numpy().astype(np.float64) for some in list(zip(*compared, strict=True))[:2]
        )
        self.rows += len(squares)
        self.largest = max(self.largest, *(largest for _, _, largest in compared))
        self.squares += squares.sum().item()
        self.squared_differences += squared_differences.sum().item()
        relative = np.sqrt(squared_differences / np.maximum(squares, 1e-300))
        bins = np.searchsorted(ERROR_EDGES, relative, side="right")
        counts = np.bincount(bins, minlength=len(self.histogram)).tolist()
        self.histogram = [count + more for count, more in zip(self.histogram, counts, strict=True)]


def compare_rows(rows: torch.Tensor, decoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Squares and squared differences `[n]` of float32 rows and what became of them, which is overwritten; the largest difference."""
    difference = decoded.sub_(rows)
    squares, squared_differences = (torch.linalg.vector_norm(some, dim=-1).square_() for some in (rows, difference))
    return squares, squared_differences, _magnitude(difference)


def quantize_table(
    source,
    path: str | os.PathLike,
    description: TableDescription,
    table_dtype: str,
    advance: Callable[[int], object] = lambda count: None,
    journal: Path | None = None,
    save_seconds: float = 10.0,
) -> QuantizationError:
    """Write a table of 8 bits or more to one file with rows of fewer bits, about a megabyte at a time.

    Args:
        source: a [`~row_sources_engram.MappedRows`].
        description: of the table as it is.
        table_dtype: one of `QUANTIZED_FORMATS`; see [`quantize_rows`].
        advance: told after every step how many bytes of the source it has read. For `"nvfp4"`, the source is read twice.
        journal: file that says how far the table is. A call with the same one goes on where another was killed; it is the
            caller's to remove. None for a file that is written whole or not at all.
        save_seconds: how often the journal is written.

    Returns:
        The difference it makes.

    Raises:
        ValueError: the table is of as few bits already, or cannot have this dtype, or holds NaN.
    """
    target, step = _quantized(description, table_dtype), max(1, _STEP_NUMBERS // description.width)
    stop, row_bytes = description.rows[1], source.stored.size // source.num_rows
    made_of = Journal(
        journal, [target.to_json(), f"rules {_RULES}", *sorted(digest.hex() for digest in source.digests.values())]
    )
    state = made_of.read() if Path(path).exists() else {}

    def chunks(first: int) -> Iterator[torch.Tensor]:
        stored = source.read(first, min(first + step, stop))
        count = max(1, _CHUNK_NUMBERS // description.width)
        for begin in range(0, len(stored[0]), count):
            some = (None if tensor is None else tensor[begin : begin + count] for tensor in stored)
            yield _decoded(*some)

    firsts = range(*description.rows, step)

    def count(first: int) -> None:
        advance((min(first + step, stop) - first) * row_bytes)

    global_scale = None
    if "global_scale" in target.tensors:
        found = state.get("global_scale")
        if found is None:
            largest = 0.0
            with contextlib.closing(
                _in_order(lambda first: max(map(_magnitude, chunks(first))), firsts)
            ) as found_largest:
                for first, some in found_largest:
                    count(first)
                    largest = max(largest, some)
            global_scale = _global_scale(largest)
        else:
            global_scale = torch.tensor([found])
        advance(0 if found is None else source.num_rows * row_bytes)
    known = {} if global_scale is None else {"global_scale": global_scale.item()}
    error = QuantizationError(**state.get("error", {}))
    done, saved = state.get("rows", description.rows[0]), time.monotonic()
    advance((done - description.rows[0]) * row_bytes)
    with (
        TableWriter(path, target, global_scale)
        if journal is None
        else ResumableTableWriter(path, target, global_scale, bool(state))
    ) as writer:

        @torch.inference_mode()
        def quantize(first: int) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
            made, compared = [], []
            for rows in chunks(first):
                *stored, decoded = _quantize(rows, table_dtype, global_scale)
                made.append(stored)
                compared.append(compare_rows(rows, decoded))
            writer.write(first, *map(_joined, zip(*made, strict=True)))
            return compared

        with contextlib.closing(_in_order(quantize, range(done, stop, step))) as results:
            for first, compared in results:
                count(first)
                error.add(*compared)
                is_end = first + step >= stop
                if journal is not None and (is_end or time.monotonic() - saved >= save_seconds):
                    writer.sync()
                    made_of.write({"rows": min(first + step, stop), "error": asdict(error), **known})
                    saved = time.monotonic()
    return error


def _in_order(work: Callable[[int], Any], items: Iterable[int]) -> Iterator[tuple[int, Any]]:
    """Each item with what `work` makes of it, in their order, computed a few ahead in as many threads as torch uses.

    Each thread reads, computes and writes by itself, so that the others go on while one waits for the disk.
    """
    waiting: collections.deque[tuple[int, Future]] = collections.deque()
    threads = torch.get_num_threads()
    with _lone_threads(threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 2 * threads:
                    first, result = waiting.popleft()
                    yield first, result.result()
            for first, result in waiting:
                yield first, result.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _lone_threads(count: int) -> ThreadPoolExecutor:
    """Threads in each of which torch computes alone: threads of its own would wait for each other after every operation.

    `torch.set_num_threads` holds for the thread that calls it, and for those that use torch for the first time later on. For
    the sake of the latter, which are not ours, it is set back before there is any work.
    """
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # the first question gives a thread the process's number, whatever it was set to before
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, "engram-quantize", start)
    try:
        for _ in range(count):
            pool.submit(int)  # starts a thread, since none is idle yet
        started.wait()
    except BaseException:
        started.abort()  # so that threads end that wait for one that could not be started
        raise
    finally:
        torch.set_num_threads(count)
    return pool


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Tensors of any dtype one after another, as bytes."""
    return torch.cat([part.view(torch.uint8) for part in parts])


def _magnitude(rows: torch.Tensor) -> float:
    return _largest(rows, rows.shape[-1]).max().item()


def _global_scale(largest: float) -> torch.Tensor:
    """What brings the scales of all blocks into float8, with the largest one at its end; as compressed-tensors."""
    scale = torch.tensor([E4M3_MAX * E2M1_LIMIT]) / max(largest, torch.finfo(torch.float32).tiny)
    return scale if scale.isfinite().item() else torch.ones(1)


def _quantized(description: TableDescription, table_dtype: str) -> TableDescription:
    row_format = require_format(table_dtype, description.width)
    before, bits = ROW_FORMATS[description.dtype], _bits(row_format)
    if before.packed > 1 or _bits(before) <= bits:
        raise EngramError(
            f"The table of layer {description.layer} is {description.dtype} already, rows of {_bits(before):g} bits; quantize rows "
            f"of {'16 bits or more' if bits == 8 else '8 bits or more, of which the model was better'}."
        )
    dtype = next(name for name, some in ROW_FORMATS.items() if some is row_format)
    # What the tables were called before is kept where it still says what they are.
    names = tensor_names(description.layer, dtype)
    weight = description.tensors["weight"]
    if not row_format.has_global:
        names = {"weight": weight, "scale": f"{weight.removesuffix('weight')}scale"}
    return replace(
        description,
        dtype=dtype,
        scale_dtype=row_format.scale_dtype,
        scale_block=row_format.block or description.width,
        tensors=names,
    )


def _bits(row_format: RowFormat) -> float:
    """Bits of a channel, without scales."""
    return ITEM_BITS[row_format.dtype] / row_format.packed


def quantize_rows(
    rows: torch.Tensor, table_dtype: str, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and scales of float `rows` `[..., W]`; see section 5 of docs/engram-table-format.md.

    Args:
        table_dtype: `"float8_e4m3fn"`, by the rule of DeepSeek-V4.1 (scale `2^ceil(log2(max(amax, 1e-4) / 448))` per
            32 channels); `"int8"`; `"int4"` or `"int2"`, by least squares; `"nvfp4"`.
        global_scale: float32 `[1]`, for `"nvfp4"`; by default that of these rows.

    Raises:
        ValueError: for another dtype, a width that it cannot have, or rows that are not finite.
    """
    values, scale, _ = _quantize(rows.to(torch.float32), table_dtype, global_scale)
    return values, scale


def _quantize(
    rows: torch.Tensor, table_dtype: str, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, scales, and what they are read back as, of float32 `rows`."""
    row_format, width = require_format(table_dtype, rows.shape[-1]), rows.shape[-1]
    largest = _largest(rows, width // row_format.scales(width))
    if not largest.isfinite().all():
        raise _not_finite()
    if table_dtype == "int8":
        return _to_int8(rows, largest)
    if row_format.packed > 1 and not row_format.has_global:
        return _by_least_squares(rows, largest, 8 // row_format.packed)
    blocks = rows.unflatten(-1, (largest.shape[-1], -1))
    if not row_format.has_global:
        values, scale = _to_float8(blocks, largest)
        return values, scale, _decoded(values, scale)
    global_scale = _global_scale(_magnitude(rows)) if global_scale is None else global_scale
    values, scale = _to_nvfp4(blocks, largest, global_scale)
    return values, scale, dequantize_rows(values, apply_global_scale(scale, global_scale), None, width)


def _not_finite() -> EngramError:
    return EngramError("Rows with NaN or infinite channels cannot be quantized; repair the table first.")


def _decoded(values: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What rows of eight bits or more are, as float32.

    Raises:
        ValueError: there are float8 numbers that are none.
    """
    if values.dtype != torch.float8_e4m3fn or scale is None:
        return dequantize_rows(values, scale)
    bits = values.view(torch.int8)
    if (bits & 0x7F).amax().item() == 0x7F:
        raise _not_finite()
    # Half-precision numbers of the same bits are 2^8 times smaller; processors convert many of them at once.
    halves = bits.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    rows = halves.to(torch.float32)
    rows.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.to(torch.float32).mul_(256).unsqueeze(-1))
    return rows


def _largest(rows: torch.Tensor, block: int) -> torch.Tensor:
    """Largest magnitude `[..., W / block]` of each `block` channels; NaN where one is."""
    if block == rows.shape[-1]:
        return torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True))
    # Twice as fast as `amax` of short blocks.
    pooled = F.max_pool1d(rows.abs().reshape(-1, 1, rows.shape[-1]), block)
    return pooled.view(*rows.shape[:-1], -1)


def _to_int8(rows: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole numbers and the float32 scale of each row, the largest number at its end."""
    scale = torch.where(largest > 0, largest / 127, 1.0)
    # A subnormal maximum may round to a scale of zero.
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    # No quotient rounds to more than 127: that of the largest channel is 127 up to an error of division.
    numbers = (rows / scale).round_()
    return numbers.to(torch.int8), scale, numbers.mul_(scale)


def _to_float8(blocks: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Float8 `[..., W]` and powers of two of `blocks` `[..., W / 32, 32]` with `largest` magnitudes."""
    exponents = exponent_above(largest.clamp_min(1e-4) / E4M3_MAX)
    # A power of two divides exactly by its reciprocal, and no quotient rounds to more than 448.
    inverse = (254 - exponents).bitwise_left_shift_(23).view(torch.float32)
    values = (blocks * inverse.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values.flatten(-2), exponents.to(torch.uint8).view(torch.float8_e8m0fnu)


def _by_least_squares(
    rows: torch.Tensor, largest: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of `bits` bits, packed, and the bfloat16 scale of each row that leaves the least squared difference, nearly.

    The levels lie half a step beside the whole numbers, so that there are as many below zero as above. Each number gets the
    nearest level for a step that is close to the best one, and then the scale is the best one for these levels.
    """
    half, (of_root, of_largest) = 1 << (bits - 1), _STEPS[bits]
    step = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).mul_(of_root / rows.shape[-1] ** 0.5)
    inverse = step.add_(largest, alpha=of_largest).clamp_min_(torch.finfo(torch.float32).tiny).reciprocal_()
    levels = (rows * inverse).clamp_(-half, half - 1).floor_()
    # By way of int8, which floats are converted to several times as fast as to uint8.
    codes = levels.to(torch.int8).add_(half)
    levels.add_(0.5)
    scale = (rows * levels).sum(-1, keepdim=True)
    scale = scale.div_(torch.linalg.vector_norm(levels, dim=-1, keepdim=True).square_()).to(torch.bfloat16)
    return pack(codes.view(torch.uint8), bits), scale, levels.mul_(scale.to(torch.float32))


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[..., W]` below `2^bits`, uint8, several to a byte, the first in the lowest bits: `[..., W * bits / 8]`."""
    # One 16- or 32-bit number holds the codes of one byte, each in a byte of its own.
    together = codes.view({4: torch.int16, 2: torch.int32}[bits])
    packed = together.clone()
    for index in range(1, 8 // bits):
        packed |= together >> index * (8 - bits)
    return packed.to(torch.uint8)


def _to_nvfp4(
    blocks: torch.Tensor, largest: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed 4-bit floats `[..., W / 2]` and float8 scales of `blocks` `[..., W / 16, 16]` with `largest` magnitudes."""
    scale = (largest / E2M1_LIMIT * global_scale).clamp_max_(E4M3_MAX).to(torch.float8_e4m3fn)
    divisor = apply_global_scale(scale, global_scale)
    divisor.masked_fill_(divisor == 0, math.inf)
    return pack(e2m1_codes(blocks / divisor.unsqueeze(-1)).flatten(-2), 4), scale


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest 4-bit floats of float32 `values`, ties to even; uint8, bit 3 is the sign."""
    values = values.clamp(-E2M1_LIMIT, E2M1_LIMIT)
    signs = values.view(torch.int32).bitwise_right_shift(28).to(torch.int8).bitwise_and_(8)
    # Codes are 1/2 apart up to 2, then 1, then 2; where a spacing is not the right one, it gives a larger code.
    codes = torch.minimum(_whole_magnitudes(values, 2), _whole_magnitudes(values, 1).add_(2))
    codes = torch.minimum(codes, _whole_magnitudes(values, 0.5).add_(4))
    return codes.bitwise_or_(signs).view(torch.uint8)


def _whole_magnitudes(values: torch.Tensor, factor: float) -> torch.Tensor:
    """Magnitudes of `values * factor`, rounded to whole numbers, ties to even: int8.

    Args:
        factor: a power of two, so that nothing but the sum is rounded.
    """
    # A number of this size has no bits behind the point, and that many in its lowest byte.
    return torch.add(torch.tensor(1.5 * 2**23), values, alpha=factor).view(torch.int32).to(torch.int8).abs_()

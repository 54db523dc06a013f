"""Writing new table files: row range by row range, and quantized."""

import collections
import contextlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
    exponent_above,
    require_format,
)
from .table_format_engram import ROW_FORMATS, RowFormat, TableDescription, tensor_names

# A thread reads and writes this many numbers at once.
_STEP_NUMBERS = 1 << 19
# This many numbers are converted at once: their intermediate results stay in a processor's caches, and each operation of
# torch takes longer than it takes to begin.
_CHUNK_NUMBERS = 1 << 18
# In a table of more rows than this, one step of `_COMPARED_ONE_IN` is compared with its result: comparing takes up to
# half of the time, and a sample of this size tells the error as well.
_ALL_COMPARED_ROWS = 1 << 18
_COMPARED_ONE_IN = 8
# This counts the changes of `quantize_rows`' results for equal rows: a table that was begun with another one is begun
# again.
_RULES = 3
E2M1_LIMIT = 6.0
# For least squares, products are rounded to these bits before they are added, in rows of up to 256 channels, whose sums
# then have at most 24 bits, and in wider ones.
SUM_BITS = 16, 22
# The powers of two are these at least, so that squares and products of small numbers do not vanish in steps that float32
# cannot have; and squares of numbers beyond the last would be infinite.
LEAST_POWERS, LARGEST_SQUARED = (2.0**-50, 2.0**-100), 2.0**56
# The step between neighbouring levels, by number of bits, with about the least squares, is this combination of a row's
# root mean square and its largest magnitude. It is fitted to the best steps for rows of trained tables, and of normal,
# uniform and Laplace numbers.
STEPS = {4: (0.1003, 0.0788), 2: (0.8507, 0.05)}
# These are the edges of the histogram of relative errors.
ERROR_EDGES = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
_SQUARED_EDGES = np.square(ERROR_EDGES).astype(np.float32)


class TableWriter(FileWriter):
    """Writes one table file, row range by row range.

    Args:
        path: the path of the file.
        description: the description of the table, with the `rows` of this file. Its scales follow its rows.
        global_scale: that of the table, if its format has one.
    """

    def __init__(
        self, path: str | os.PathLike, description: TableDescription, global_scale: torch.Tensor | None = None
    ):
        self.description = description
        super().__init__(path, table_head(description))
        if global_scale is not None:
            self._write("global_scale", 0, global_scale.view(1))

    def write(self, first: int, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Write stored rows from table row `first` on: `values` `[n, W / channels in one]`, `scale` `[n, W / C]`."""
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
        goes_on: whether the existing content is kept.
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
        """Flush all written data to the disk."""
        with self._explained():
            os.fsync(self._file)


class Journal:
    """The progress of a table file, stored beside it.

    Args:
        path: the path of the journal; None for no journal.
        made_of: what the table depends on; a journal with another value is ignored.
    """

    def __init__(self, path: Path | None, made_of: list[str]):
        self.path, self._made_of = path, made_of

    def read(self) -> dict[str, Any]:
        """Return the last entry; empty if there is nothing to resume."""
        with contextlib.suppress(FileFormatError):
            journal = {} if self.path is None else read_json(self.path)
            return journal.get("state", {}) if journal.get("made_of") == self._made_of else {}
        return {}

    def write(self, state: dict[str, Any]) -> None:
        """Record the progress of the file."""
        if self.path is not None:
            write_json(self.path, {"made_of": self._made_of, "state": state})


class _Scratch(threading.local):
    """Memory for intermediate results, reused from block to block by each thread.

    Fresh memory costs page faults, and it is in no cache: together they take longer than most of the arithmetic.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return memory in the shape of `like`, with any content; it is valid until the same name is taken again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < like.numel() or buffer.device != like.device:
            buffer = self._buffers[name] = torch.empty(like.numel(), dtype=dtype, device=like.device)
        return buffer[: like.numel()].view(like.shape)


@dataclass
class QuantizationError:
    """The change of a table by quantization, from rows in all its parts.

    Args:
        rows: rows compared: all of a table of up to 262,144, else about one in eight.
        largest: largest difference of a channel.
        relative: root of the summed squared differences over that of the summed squares; 0 for a table of zeros.
        histogram: how many rows have a relative error below each of `ERROR_EDGES` and not below the one before; the
            last number counts those above all.
    """

    rows: int = 0
    largest: float = 0.0
    squares: float = 0.0
    squared_differences: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * (len(ERROR_EDGES) + 1))

    @property
    def relative(self) -> float:
        return (self.squared_differences / self.squares) ** 0.5 if self.squares else 0.0

    def add(self, *compared: "ComparedRows") -> None:
        """Count rows that have been compared."""
        for some in compared:
            self.rows += sum(some.histogram)
            self.largest = max(self.largest, some.largest)
            self.squares += some.squares
            self.squared_differences += some.squared_differences
            self.histogram = [count + more for count, more in zip(self.histogram, some.histogram, strict=True)]


# These are values, scales, and a function that decodes them to float32 rows, once, in memory that the next block uses.
_Quantized = tuple[torch.Tensor, torch.Tensor, Callable[[], torch.Tensor]]


class ComparedRows(NamedTuple):
    """The differences of some rows from their quantized values; see [`QuantizationError`]."""

    largest: float
    squares: float
    squared_differences: float
    histogram: list[int]


def compare_rows(rows: torch.Tensor, decoded: torch.Tensor) -> ComparedRows:
    """Compare float32 rows `[n, W]` with their quantized values, which are overwritten."""
    difference = decoded.sub_(rows)
    # NumPy is used for one number per row: torch would take few square roots in all its threads, which wait for each
    # other, and its operations take longer to begin.
    squares, squared_differences = (
        np.square(torch.linalg.vector_norm(some, dim=-1).numpy()) for some in (rows, difference)
    )
    return compared_rows(_magnitude(difference), squares, squared_differences)


def compared_rows(largest: float, squares: np.ndarray, squared_differences: np.ndarray) -> ComparedRows:
    """Summarize the largest difference of some rows, and float32 sums `[n]` of each row's squares."""
    ratios = squared_differences / np.maximum(squares, np.finfo(np.float32).tiny)
    # A row is counted once for each edge that it reaches; a search in the edges takes ten times as long.
    reached = [len(ratios), *(int(np.count_nonzero(ratios >= edge)) for edge in _SQUARED_EDGES), 0]
    return ComparedRows(
        largest,
        squares.sum(dtype=np.float64).item(),
        squared_differences.sum(dtype=np.float64).item(),
        [count - above for count, above in itertools.pairwise(reached)],
    )


class StoredRounding(Protocol):
    """Quantizes stored rows of a table. Several threads use it at the same time."""

    def largest(self, values: torch.Tensor, scale: torch.Tensor | None) -> float:
        """Return the largest magnitude of stored rows and their scales."""

    def quantize(
        self,
        values: torch.Tensor,
        scale: torch.Tensor | None,
        global_scale: torch.Tensor | None,
        is_compared: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, list[ComparedRows]]:
        """Return new values and scales of stored rows, as bytes, and their differences from the old ones.

        The tensors are valid until the same thread calls this again.

        Raises:
            ValueError: a number is not finite.
        """


class _TorchRounding:
    """The [`StoredRounding`] of [`quantize_rows`], for every stored format and device of torch."""

    def __init__(self, table_dtype: str, width: int):
        self._table_dtype, self._scratch = table_dtype, _Scratch()
        self._count = max(1, _CHUNK_NUMBERS // width)

    def largest(self, values: torch.Tensor, scale: torch.Tensor | None) -> float:
        return max(map(_magnitude, self._chunks(values, scale)))

    def quantize(self, values, scale, global_scale, is_compared):
        made, compared = [], []
        for rows in self._chunks(values, scale):
            *stored, decode = _quantize(rows, self._table_dtype, global_scale, self._scratch)
            made.append(stored)
            if is_compared:
                compared.append(compare_rows(rows, decode()))
        return *map(_joined, zip(*made, strict=True)), compared

    def _chunks(self, values: torch.Tensor, scale: torch.Tensor | None) -> Iterator[torch.Tensor]:
        for begin in range(0, len(values), self._count):
            some = (None if tensor is None else tensor[begin : begin + self._count] for tensor in (values, scale))
            yield _decoded(*some, self._scratch)


def quantize_table(
    source,
    path: str | os.PathLike,
    description: TableDescription,
    table_dtype: str,
    advance: Callable[[int], object] = lambda count: None,
    journal: Path | None = None,
    save_seconds: float = 10.0,
    rounding: StoredRounding | None = None,
) -> QuantizationError:
    """Write a table of 8 bits or more to one file with rows of fewer bits, about a megabyte at a time.

    Args:
        source: a [`~row_sources_engram.MappedRows`].
        description: the description of the present table.
        table_dtype: one of `QUANTIZED_FORMATS`; see [`quantize_rows`].
        advance: called after every step with the number of bytes of the source it has read. For `"nvfp4"`, the source
            is read twice.
        journal: a file with the progress of the table. A call with the same one resumes a killed call; the caller must
            remove it. None for a file that is written atomically.
        save_seconds: how often the journal is written.
        rounding: faster code for the stored rows of this table, with the results of `quantize_rows`, which is used
            without.

    Returns:
        The quantization error, of evenly spread rows in a large table.

    Raises:
        ValueError: the table already has as few bits, or cannot have this dtype, or contains NaN.
    """
    target, step = _quantized(description, table_dtype), max(1, _STEP_NUMBERS // description.width)
    stop, row_bytes = description.rows[1], source.stored.size // source.num_rows
    made_of = Journal(
        journal, [target.to_json(), f"rules {_RULES}", *sorted(digest.hex() for digest in source.digests.values())]
    )
    state = made_of.read() if Path(path).exists() else {}

    rounding = _TorchRounding(table_dtype, description.width) if rounding is None else rounding

    def read(first: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return source.read(first, min(first + step, stop))

    firsts = range(*description.rows, step)
    one_in = 1 if stop - firsts.start <= _ALL_COMPARED_ROWS else _COMPARED_ONE_IN

    def count(first: int) -> None:
        advance((min(first + step, stop) - first) * row_bytes)

    global_scale = None
    if "global_scale" in target.tensors:
        found = state.get("global_scale")
        if found is None:
            largest = 0.0
            with contextlib.closing(_in_order(lambda first: rounding.largest(*read(first)), firsts)) as found_largest:
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
        def quantize(first: int) -> list[ComparedRows]:
            is_compared = (first - firsts.start) // step % one_in == 0
            *stored, compared = rounding.quantize(*read(first), global_scale, is_compared)
            writer.write(first, *stored)
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
    """Yield each item with the result of `work`, in order, computed a few ahead in as many threads as torch uses.

    Each thread reads, computes and writes by itself, so that the others continue while one waits for the disk.
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
    """Return threads in which torch uses no threads of its own: those would wait for each other after every operation.

    `torch.set_num_threads` applies to the thread that calls it, and to those that use torch for the first time later.
    For the latter, which are not ours, it is reset before there is any work.
    """
    started = threading.Barrier(count + 1)

    def start() -> None:
        torch.get_num_threads()  # The first query gives a thread the process's number, whatever it was set to before.
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(count, "engram-quantize", start)
    try:
        for _ in range(count):
            pool.submit(int)  # This starts a thread, since none is idle yet.
        started.wait()
    except BaseException:
        started.abort()  # Threads then end that wait for one that could not be started.
        raise
    finally:
        torch.set_num_threads(count)
    return pool


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return tensors of any dtype one after another, as bytes."""
    return torch.cat([part.view(torch.uint8) for part in parts])


def _magnitude(rows: torch.Tensor) -> float:
    """Return the largest magnitude; NaN if one is."""
    return torch.maximum(rows.amax(), -rows.amin()).item()


def _global_scale(largest: float) -> torch.Tensor:
    """Return the scale that maps the scales of all blocks into float8, with the largest one at its end; as
    compressed-tensors.
    """
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
    # The tables' old names are kept if they are still correct.
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
    """Return the bits of a channel, without scales."""
    return ITEM_BITS[row_format.dtype] / row_format.packed


@torch.no_grad()
def quantize_rows(
    rows: torch.Tensor, table_dtype: str, global_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values and scales of float `rows` `[..., W]`; see section 5 of docs/engram-table-format.md.

    Args:
        table_dtype: `"float8_e4m3fn"`, by the rule of DeepSeek-V4.1 (scale `2^ceil(log2(max(amax, 1e-4) / 448))` per
            32 channels); `"int8"`; `"int4"` or `"int2"`, by least squares; `"nvfp4"`.
        global_scale: float32 `[1]`, for `"nvfp4"`; by default that of these rows.

    Raises:
        ValueError: for another dtype, an unsupported width, or rows that are not finite.
    """
    values, scale, _ = _quantize(rows.to(torch.float32), table_dtype, global_scale, _Scratch())
    return values, scale


def _quantize(
    rows: torch.Tensor, table_dtype: str, global_scale: torch.Tensor | None, scratch: _Scratch
) -> _Quantized:
    """Quantize float32 `rows`."""
    row_format, width = require_format(table_dtype, rows.shape[-1]), rows.shape[-1]
    largest = _largest(rows, width // row_format.scales(width), scratch)
    if not largest.isfinite().all():
        raise not_finite()
    if table_dtype == "int8":
        return _to_int8(rows, largest, scratch)
    if row_format.packed > 1 and not row_format.has_global:
        return _by_least_squares(rows, largest, 8 // row_format.packed, scratch)
    blocks = rows.unflatten(-1, (largest.shape[-1], -1))
    if not row_format.has_global:
        return _to_float8(blocks, largest, scratch)
    global_scale = _global_scale(_magnitude(rows)) if global_scale is None else global_scale
    return _to_nvfp4(blocks, largest, global_scale, scratch)


def not_finite() -> EngramError:
    """Return the error for rows that have no quantized form."""
    return EngramError("Rows with NaN or infinite channels cannot be quantized; repair the table first.")


def too_large(bits: int) -> EngramError:
    """Return the error for rows whose squares have no finite sum, so that no step follows from them."""
    return EngramError(
        f"Rows with numbers beyond {LARGEST_SQUARED:.0e} cannot be stored in {bits} bits, since their squares are too large "
        "for float32; use 'int8', or repair the table."
    )


def _decoded(values: torch.Tensor, scale: torch.Tensor | None, scratch: _Scratch) -> torch.Tensor:
    """Return rows of eight bits or more as float32, in `scratch`.

    Raises:
        ValueError: there is a float8 NaN.
    """
    rows = scratch.take("rows", values)
    if values.dtype != torch.float8_e4m3fn or scale is None:
        rows.copy_(values)
        if scale is not None:
            rows.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.to(torch.float32).unsqueeze(-1))
        return rows
    bits = scratch.take("bits", values, torch.int8)
    if torch.bitwise_and(values.view(torch.int8), 0x7F, out=bits).amax().item() == 0x7F:
        raise not_finite()
    return _decode_float8(values, scale, rows, scratch)


def _decode_float8(values: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """Write finite float8 `values` `[..., W]` with E8M0 scales `[..., W / 32]` to float32 `rows`, and return these."""
    # Half-precision numbers with the same bits are 2^8 times smaller; processors convert many of them at once.
    halves = scratch.take("halves", values, torch.int16).copy_(values.view(torch.int8))
    rows.copy_(halves.mul_(1 << 7).bitwise_and_(~0x4000).view(torch.float16))
    rows.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.to(torch.float32).mul_(256).unsqueeze(-1))
    return rows


def _largest(rows: torch.Tensor, block: int, scratch: _Scratch) -> torch.Tensor:
    """Return the largest magnitude `[..., W / block]` of each `block` channels; NaN where one is."""
    if block == rows.shape[-1]:
        # The maximum of zeros alone may be -0.
        return torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True)).abs_()
    magnitudes = torch.abs(rows, out=scratch.take("numbers", rows))
    if block >= 32:
        return magnitudes.unflatten(-1, (-1, block)).amax(-1)
    # For shorter blocks, this is twice as fast as `amax`.
    pooled = F.max_pool1d(magnitudes.view(-1, 1, rows.shape[-1]), block)
    return pooled.view(*rows.shape[:-1], -1)


def _to_int8(rows: torch.Tensor, largest: torch.Tensor, scratch: _Scratch) -> _Quantized:
    """Return integers and the float32 scale of each row, which maps the largest magnitude to 127."""
    scale = torch.where(largest > 0, largest / 127, 1.0)
    # A subnormal maximum may round to a scale of zero.
    scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
    # No quotient rounds to more than 127: that of the largest channel is 127 up to an error of division.
    numbers = torch.div(rows, scale, out=scratch.take("numbers", rows)).round_()
    return numbers.to(torch.int8), scale, lambda: numbers.mul_(scale)


def _to_float8(blocks: torch.Tensor, largest: torch.Tensor, scratch: _Scratch) -> _Quantized:
    """Return float8 `[..., W]` and powers of two of `blocks` `[..., W / 32, 32]` with `largest` magnitudes."""
    exponents = exponent_above(largest.clamp_min(1e-4) / E4M3_MAX)
    # A power of two divides exactly by its reciprocal, and no quotient rounds to more than 448.
    inverse = (254 - exponents).bitwise_left_shift_(23).view(torch.float32)
    numbers = torch.mul(blocks, inverse.unsqueeze(-1), out=scratch.take("numbers", blocks)).flatten(-2)
    values, scale = numbers.to(torch.float8_e4m3fn), exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
    return values, scale, lambda: _decode_float8(values, scale, numbers, scratch)


def _by_least_squares(rows: torch.Tensor, largest: torch.Tensor, bits: int, scratch: _Scratch) -> _Quantized:
    """Return packed codes of `bits` bits, and the bfloat16 scale of each row that nearly minimizes the squared error.

    The levels lie halfway between the integers, equally many below and above zero. Each number gets the nearest level
    for a step that is close to the best one, and then the scale is the best one for these levels.
    """
    half, (of_root, of_largest) = 1 << (bits - 1), STEPS[bits]
    if (largest > LARGEST_SQUARED).any():
        raise too_large(bits)
    # A row's magnitudes are below twice this power of two.
    power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
    squares = _exact_sum(rows, rows, (2 * power).clamp_min_(LEAST_POWERS[0]).square_(), scratch)
    # Other than roots of float64, torch's of float32 have another last bit on some processors. A scaled addition would be
    # rounded once on some, and twice on others.
    root = squares.double().sqrt_().float()
    step = root.mul_(of_root / math.sqrt(rows.shape[-1])).add_(of_largest * largest)
    inverse = step.clamp_min_(torch.finfo(torch.float32).tiny).reciprocal_()
    levels = torch.mul(rows, inverse, out=scratch.take("numbers", rows)).clamp_(-half, half - 1).floor_()
    # The conversion passes through int8, since floats are converted to it several times as fast as to uint8.
    codes = scratch.take("bits", rows, torch.int8).copy_(levels).add_(half)
    levels.add_(0.5)
    scale = _exact_sum(rows, levels, power.clamp_min_(LEAST_POWERS[1]).mul_(2 * half), scratch)
    # The squares of levels have few bits: their sum is exact in any order.
    scale = scale.div_(torch.linalg.vector_norm(levels, dim=-1, keepdim=True).square_()).to(torch.bfloat16)
    return pack(codes.view(torch.uint8), bits, scratch), scale, lambda: levels.mul_(scale.to(torch.float32))


def _exact_sum(rows: torch.Tensor, others: torch.Tensor, limit: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """Return the sums `[..., 1]` of the products of two float32 `[..., W]`, each first rounded to few bits.

    The rounded products are added as integers, so that the sums are the same on all processors, in whatever order these
    add. Only where a product itself has more bits than float32, which none of two-byte floats has, some processors round
    it once, and others twice.

    Args:
        limit: powers of two `[..., 1]` that no product of a row reaches.
    """
    width = rows.shape[-1]
    whole, bits = (torch.int32, SUM_BITS[0]) if width <= 256 else (torch.int64, SUM_BITS[1])
    # Above this number, float32 numbers are as far apart as the rounded products, and count upwards in their bits.
    large = limit * (1.5 * 2.0 ** (23 - bits))
    products = torch.addcmul(large, rows, others, out=scratch.take("products", rows))
    # The sum of bits exceeds 32 bits, but its difference does not.
    sums = products.view(torch.int32).sum(-1, keepdim=True, dtype=whole)
    sums -= large.view(torch.int32).to(whole) * width
    return large.div_(1.5 * 2.0**23).mul_(sums)


def pack(codes: torch.Tensor, bits: int, scratch: _Scratch | None = None) -> torch.Tensor:
    """Pack uint8 codes `[..., W]` below `2^bits`, several to a byte, the first in the lowest bits: `[..., W * bits /
    8]`.
    """
    # One 16- or 32-bit number has the codes of one byte, each in a separate byte.
    together, scratch = codes.view({4: torch.int16, 2: torch.int32}[bits]), scratch or _Scratch()
    # Neighbours are joined to pairs, and then pairs to fours.
    for distance in (8 - bits, 2 * (8 - bits))[: together.itemsize // 2]:
        shifted = scratch.take(f"shifted by {distance}", together, together.dtype)
        together = torch.bitwise_right_shift(together, distance, out=shifted).bitwise_or_(together)
    return together.to(torch.uint8)


def _to_nvfp4(
    blocks: torch.Tensor, largest: torch.Tensor, global_scale: torch.Tensor, scratch: _Scratch
) -> _Quantized:
    """Return packed 4-bit floats `[..., W / 2]` and float8 scales of `blocks` `[..., W / 16, 16]` with `largest`
    magnitudes.
    """
    scale = (largest / E2M1_LIMIT * global_scale).clamp_max_(E4M3_MAX).to(torch.float8_e4m3fn)
    divisor = apply_global_scale(scale, global_scale)
    divided = divisor.masked_fill(divisor == 0, math.inf).unsqueeze(-1)
    numbers = torch.div(blocks, divided, out=scratch.take("numbers", blocks))
    codes = _to_e2m1(numbers, scratch)
    packed = pack(codes.view(torch.uint8).flatten(-2), 4, scratch)
    half = divisor.unsqueeze(-1).mul(0.5)
    return packed, scale, lambda: _twice_e2m1(codes, numbers, scratch).mul_(half).flatten(-2)


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """Return the codes of the nearest 4-bit floats of float32 `values`, ties to even; uint8, bit 3 is the sign."""
    return _to_e2m1(values.clone(), _Scratch()).view(torch.uint8)


def _to_e2m1(values: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """Return codes as [`e2m1_codes`], int8 in `scratch`, of `values` that are overwritten."""
    values.clamp_(-E2M1_LIMIT, E2M1_LIMIT)
    # Codes are 1/2 apart up to 2, then 1, then 2; a wrong spacing gives a larger code.
    codes, other = (scratch.take(name, values, torch.int8) for name in ("bits", "other bits"))
    _whole_magnitudes(values, 2, codes, scratch)
    for factor, more in ((1, 2), (0.5, 4)):
        torch.minimum(codes, _whole_magnitudes(values, factor, other, scratch).add_(more), out=codes)
    signs = values.view(torch.int32).bitwise_right_shift_(28)
    return codes.bitwise_or_(other.copy_(signs).bitwise_and_(8))


def _whole_magnitudes(values: torch.Tensor, factor: float, whole: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """Write magnitudes of `values * factor`, rounded to integers, ties to even, to int8 `whole`, and return it.

    Args:
        factor: a power of two, so that only the sum is rounded.
    """
    # A number of this size has no bits after the point, and the integer in its lowest byte.
    large = values.new_tensor(1.5 * 2**23)
    summed = torch.add(large, values, alpha=factor, out=scratch.take("products", values))
    return whole.copy_(summed.view(torch.int32)).abs_()


def _twice_e2m1(codes: torch.Tensor, numbers: torch.Tensor, scratch: _Scratch) -> torch.Tensor:
    """Write the doubled values of `codes`, which are overwritten, to float32 `numbers`, and return it."""
    # Twice the values are 0, 1, 2, 3, 4, 6, 8 and 12. Subtracting after an exclusive or with -1 negates an integer.
    other = scratch.take("other bits", codes, torch.int8)
    signs = (codes >> 3).neg_()
    codes.bitwise_and_(7)
    steep = torch.mul(codes, 2, out=other).sub_(4)
    torch.maximum(codes, steep, out=codes)
    torch.maximum(codes, steep.mul_(2).sub_(8), out=codes)
    return numbers.copy_(codes.bitwise_xor_(signs).sub_(signs))

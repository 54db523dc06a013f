"""Quantizing rows in compiled code (numba), which reads each number once from memory.

The results are those of [`quantize_rows`][engram_hf.table_writer_engram.quantize_rows], byte by byte. Both use the same
operations in the same order: additions, multiplications, divisions and square roots of float32, each of them rounded
by IEEE 754. Neither numba (without `fastmath`) nor LLVM reorders or joins these. Tests compare all bfloat16 numbers and all
float8 numbers with all scales.

The kernels are compiled in each process. Numba could store them in files, but would unpickle these, so its cache is
not used.
"""

import functools
import math
import threading
from collections.abc import Callable

import numpy as np
import torch
from numba import njit

from ..table_engram import E4M3_MAX, TORCH_DTYPES, require_format
from ..table_format_engram import ROW_FORMATS
from ..table_writer_engram import (
    E2M1_LIMIT,
    LARGEST_SQUARED,
    LEAST_POWERS,
    STEPS,
    SUM_BITS,
    ComparedRows,
    compared_rows,
    not_finite,
    too_large,
)

# Division by zero gives infinity instead of an exception, whose check would prevent vector instructions. The global
# interpreter lock is released, so that the threads of `quantize_table` run side by side.
_compiled = njit(nogil=True, error_model="numpy")

# Numba computes in float64 and int64 unless all operands are 32 bits wide.
_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITY = np.int32(0x7F800000)
_TINY = np.finfo(np.float32).tiny
# A sum of this and a number below 2^22 has no bits after the point: it is rounded, ties to even, and has the integer in
# its lowest bits.
_LARGE = np.float32(1.5 * 2**23)
_LARGE_BITS = int(_LARGE.view(np.int32))
# The last bit of 2^14 in float32 is the smallest float8 number, 2^-9.
_FLOAT8_LARGE, _FLOAT8_NORMAL = np.float32(2**14), np.float32(2**-6)
_FLOAT8_LARGE_BITS = int(_FLOAT8_LARGE.view(np.int32))
_FLOAT8_FIRST = np.float32(2**-14)
_ONE, _TWO, _HALF, _QUARTER = (np.float32(some) for some in (1, 2, 0.5, 0.25))
# These are the rules of the path of torch for sums, which it explains.
_NARROW, _WIDE = (np.float32(1.5 * 2.0 ** (23 - bits)) for bits in SUM_BITS)
(_LEAST_SQUARED, _LEAST_PRODUCT), _LARGEST_SQUARED = map(np.float32, LEAST_POWERS), np.float32(LARGEST_SQUARED)
_INT8_MAX, _E4M3_MAX, _E2M1_LIMIT = np.float32(127), np.float32(E4M3_MAX), np.float32(E2M1_LIMIT)
_LEAST = np.float32(1e-4)
_UNSCALED = np.float32(256)
# Kernels return one of these.
_DONE, _NOT_FINITE, _TOO_LARGE = 0, 1, 2


# --- numbers -------------------------------------------------------------------------------------------------


@_compiled
def _bits(number):
    """Return the bits of a float32 number as an integer."""
    return np.float32(number).view(np.int32)


@_compiled
def _float(bits):
    """Return the float32 number that has these bits."""
    return np.int32(bits).view(np.float32)


@_compiled
def _largest_bits(numbers):
    """Return the bits of the largest magnitude, as an integer: NaN and infinity are the largest of all."""
    bits, largest = numbers.view(np.int32), np.int32(0)
    for i in range(len(numbers)):
        magnitude = np.int32(bits[i] & _MAGNITUDE)
        if magnitude > largest:
            largest = magnitude
    return largest


@_compiled
def _fill(numbers, value):
    # A loop of constant length inside of another one would not use vector instructions.
    for i in range(len(numbers)):
        numbers[i] = value


@_compiled
def _sum_of_units(sums, large):
    """Return a sum of rounded products that is counted in units of the last bit of `large`."""
    return np.float32(np.float32(sums) * np.float32(large / _LARGE))


@_compiled
def _write_bfloat16(number):
    """Return the bits of a finite number as bfloat16, ties to even."""
    bits = np.int64(_bits(number))
    return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@_compiled
def _write_float8(numbers, codes):
    """Write the nearest float8 numbers of magnitudes up to 448, ties to even."""
    for i in range(len(numbers)):
        number = numbers[i]
        bits = _bits(number)
        magnitude = np.int32(bits & _MAGNITUDE)
        # The exponent's bias falls from 127 to 7.
        normal = np.int32(magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
        subnormal = np.int32(_bits(abs(number) + _FLOAT8_LARGE) - _FLOAT8_LARGE_BITS)
        code = subnormal if abs(number) < _FLOAT8_NORMAL else normal
        codes[i] = np.uint8(code | ((bits >> 24) & 0x80))


@_compiled
def _read_float8(codes, numbers):
    """Write the numbers of finite float8 `codes`, divided by 2^8.

    The quotient keeps its sign and bits, with the exponent of a half-precision number, as in torch's path.
    """
    bits = numbers.view(np.int32)
    for i in range(len(codes)):
        magnitude = np.int32(codes[i] & 0x7F)
        normal = np.int32((magnitude << 20) + (112 << 23))
        subnormal = _bits(_float((magnitude << 20) + (113 << 23)) - _FLOAT8_FIRST)
        number = subnormal if magnitude < 8 else normal
        bits[i] = np.int32(number | (np.int32(codes[i] & 0x80) << 24))


@_compiled
def _largest_float8(codes):
    """Return the largest code without its sign; from 0x7F on, one is NaN."""
    largest = np.uint8(0)
    for i in range(len(codes)):
        code = np.uint8(codes[i] & 0x7F)
        largest = code if code > largest else largest
    return largest


# --- reading stored rows ----------------------------------------------------------------------------------------------


@_compiled
def _read_bfloat16_row(stored, _, row):
    bits = row.view(np.int32)
    for i in range(len(row)):
        bits[i] = np.int32(stored[i]) << 16
    return True


@_compiled
def _scale_blocks(row, scale):
    """Multiply 32 channels each by 2^8 times their power of two; return whether all of these are finite."""
    blocks = row.reshape(len(scale), 32)
    for block in range(len(scale)):
        # 2^8 times a scale of 2^120 is infinite in float32, and byte 255 is NaN.
        if scale[block] >= 247:
            return False
        numbers, factor = blocks[block], _float((np.int32(scale[block]) + 8) << 23)
        for i in range(len(numbers)):
            numbers[i] *= factor
    return True


@_compiled
def _read_float8_row(stored, scale, row):
    """Read a row with powers of two for each 32 channels; return whether it may be finite."""
    if _largest_float8(stored) >= 0x7F:
        return False
    _read_float8(stored, row)
    return _scale_blocks(row, scale)


@_compiled
def _read_largest_bfloat16(stored, scale, codes, largest):
    """Write the bfloat16 number with the largest magnitude of a row, as a row of one number; always return True."""
    found = np.uint16(0)
    for i in range(len(stored)):
        magnitude = np.uint16(stored[i] & 0x7FFF)
        found = magnitude if magnitude > found else found
    largest[0] = _float(np.int32(found) << 16)
    return True


@_compiled
def _read_largest_float8(stored, scale, codes, largest):
    """Write the largest magnitude of each 32 channels; return whether they may be finite."""
    blocks = stored.reshape(len(scale), 32)
    for block in range(len(scale)):
        codes[block] = _largest_float8(blocks[block])
        if codes[block] >= 0x7F or scale[block] >= 247:
            return False
    _read_float8(codes, largest)
    for block in range(len(scale)):
        largest[block] *= _float((np.int32(scale[block]) + 8) << 23)
    return True


# --- quantizing a row -------------------------------------------------------------------------------------------------
# Every function takes a float32 row, memory of its size and of the number of its scales, writes values and scales, and returns `_DONE` or the reason why
# there are none. With `is_compared`, it leaves the decoded row in `work`.


@_compiled
def _to_int8(row, work, few, codes, global_scale, values, scale, is_compared):
    largest = _largest_bits(row)
    if largest >= _INFINITY:
        return _NOT_FINITE
    step = np.float32(_float(largest) / _INT8_MAX) if largest > 0 else _ONE
    step = max(step, _TINY)
    scale[0] = step
    for i in range(len(row)):
        summed = np.float32(row[i] / step) + _LARGE
        values[i] = np.uint8(_bits(summed))
        work[i] = (summed - _LARGE) * step
    return _DONE


@_compiled
def _to_float8(row, work, few, codes, global_scale, values, scale, is_compared):
    blocks, inverses = row.reshape(len(scale), 32), work.reshape(len(scale), 32)
    for block in range(len(scale)):
        largest = _largest_bits(blocks[block])
        if largest >= _INFINITY:
            return _NOT_FINITE
        quotient = _bits(max(_float(largest), _LEAST) / _E4M3_MAX)
        exponent = np.int32((quotient >> 23) + ((quotient & 0x7FFFFF) != 0))
        scale[block] = exponent
        _fill(inverses[block], _float((254 - exponent) << 23))
    for i in range(len(row)):
        work[i] = row[i] * work[i]
    _write_float8(work, values)
    if is_compared:
        _read_float8(values, work)
        _scale_blocks(work, scale)
    return _DONE


def _least_squares(bits: int) -> Callable:
    """Return the function for rows of 2^`bits` levels."""
    half, packed = 1 << (bits - 1), 8 // bits
    low, high = np.float32(-half), np.float32(half - 1)
    of_root, of_largest = STEPS[bits][0], np.float32(STEPS[bits][1])

    @_compiled
    def quantize(row, work, few, codes, global_scale, values, scale, is_compared):
        largest = _largest_bits(row)
        if largest >= _INFINITY:
            return _NOT_FINITE
        if _float(largest) > _LARGEST_SQUARED:
            return _TOO_LARGE
        power = _float(largest & _INFINITY)  # These are the bits of the exponent.
        of_limit = _NARROW if len(row) <= 256 else _WIDE

        least = max(np.float32(_TWO * power), _LEAST_SQUARED)
        large = np.float32(np.float32(least * least) * of_limit)
        sums = np.int64(0)
        for i in range(len(row)):
            sums += np.int32(_bits(large + np.float32(row[i] * row[i])) - _bits(large))
        root = np.float32(np.sqrt(_sum_of_units(sums, large))) * np.float32(of_root / math.sqrt(len(row)))
        step = np.float32(root + np.float32(_float(largest) * of_largest))
        inverse = np.float32(_ONE / max(step, _TINY))

        large = np.float32(np.float32(np.float32(2 * half) * max(power, _LEAST_PRODUCT)) * of_limit)
        sums, squares = np.int64(0), np.int64(0)
        for i in range(len(row)):
            level = np.float32(row[i] * inverse)
            level = low if level < low else level
            level = high if level > high else level
            whole = np.int32(level)
            whole = np.int32(whole - 1) if np.float32(whole) > level else whole
            codes[i] = np.uint8(whole + half)
            middle = np.float32(np.float32(whole) + _HALF)
            work[i] = middle
            sums += np.int32(_bits(large + np.float32(row[i] * middle)) - _bits(large))
            doubled = np.int32(2 * whole + 1)
            squares += np.int32(doubled * doubled)
        # A quarter of the squares of odd numbers are those of the levels. Their root is rounded once, and then its square.
        root = np.float32(np.sqrt(np.float32(np.float32(squares) * _QUARTER)))
        bits_of_scale = _write_bfloat16(_sum_of_units(sums, large) / np.float32(root * root))
        scale[0] = bits_of_scale
        _pack(codes, values, packed)
        if is_compared:
            factor = _float(np.int32(bits_of_scale) << 16)
            for i in range(len(row)):
                work[i] *= factor
        return _DONE

    return quantize


@_compiled
def _pack(codes, values, packed):
    """Pack 2 or 4 codes into a byte, the first in its lowest bits."""
    if packed == 2:
        pairs = codes.view(np.uint16)
        for i in range(len(values)):
            values[i] = np.uint8(pairs[i] | (pairs[i] >> 4))
    else:
        fours = codes.view(np.uint32)
        for i in range(len(values)):
            pair = np.uint32(fours[i] | (fours[i] >> 6))
            values[i] = np.uint8(pair | (pair >> 12))


@_compiled
def _largest_of_sixteen(row, work, few):
    """Write the largest magnitude of each 16 channels to `few`; NaN and infinity are the largest of all."""
    bits, found, largest = row.view(np.int32), work.view(np.int32), few.view(np.int32)
    # One half is compared with the other, which takes half the time of comparing one number after the other.
    for block in range(len(few)):
        for i in range(8):
            first = np.int32(bits[16 * block + i] & _MAGNITUDE)
            second = np.int32(bits[16 * block + 8 + i] & _MAGNITUDE)
            found[8 * block + i] = first if first > second else second
    for block in range(len(few)):
        for i in range(4):
            first, second = found[8 * block + i], found[8 * block + 4 + i]
            found[4 * block + i] = first if first > second else second
    for block in range(len(few)):
        first = max(found[4 * block], found[4 * block + 1])
        largest[block] = max(first, max(found[4 * block + 2], found[4 * block + 3]))


@_compiled
def _to_nvfp4(row, work, few, codes, global_scale, values, scale, is_compared):
    count = len(scale)
    _largest_of_sixteen(row, work, few)
    if _largest_bits(few) >= _INFINITY:
        return _NOT_FINITE
    for block in range(count):
        few[block] = min(np.float32(np.float32(few[block] / _E2M1_LIMIT) * global_scale), _E4M3_MAX)
    _write_float8(few, scale)
    _read_float8(scale, few)
    for block in range(count):
        few[block] = np.float32(few[block] * _UNSCALED) / global_scale
    wide = work.reshape(count, 16)
    for block in range(count):
        _fill(wide[block], few[block] if few[block] > 0 else np.float32(np.inf))
    for i in range(len(row)):
        work[i] = row[i] / work[i]
    for i in range(len(row)):
        magnitude = min(abs(work[i]), _E2M1_LIMIT)
        # Codes are 1/2 apart up to 2, then 1, then 2; a wrong spacing gives a larger code.
        fine = np.int32(_bits(magnitude * _TWO + _LARGE) - _LARGE_BITS)
        middle = np.int32(_bits(magnitude + _LARGE) - _LARGE_BITS + 2)
        coarse = np.int32(_bits(magnitude * _HALF + _LARGE) - _LARGE_BITS + 4)
        middle = coarse if coarse < middle else middle
        code = middle if middle < fine else fine
        codes[i] = np.uint8(code | ((_bits(work[i]) >> 28) & 8))
    if is_compared:
        for block in range(count):
            _fill(wide[block], np.float32(few[block] * _HALF))
        for i in range(len(row)):
            code = np.int32(codes[i] & 7)
            # Twice the values are 0, 1, 2, 3, 4, 6, 8 and 12.
            twice = max(code, max(np.int32(2 * code - 4), np.int32(4 * code - 16)))
            value = np.float32(np.float32(twice) * work[i])
            work[i] = -value if codes[i] >= 8 else value
    _pack(codes, values, 2)
    return _DONE


# Only these sums, of which nothing but a report depends, may be added in any order.
@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _compare(row, decoded, compared):
    """Write the largest difference, the sum of squares and that of squared differences; `decoded` is overwritten."""
    squares = squared_differences = np.float32(0)
    for i in range(len(row)):
        difference = np.float32(decoded[i] - row[i])
        decoded[i] = difference
        squares += np.float32(row[i] * row[i])
        squared_differences += np.float32(difference * difference)
    compared[0] = _float(_largest_bits(decoded))
    compared[1] = squares
    compared[2] = squared_differences


# --- all rows ---------------------------------------------------------------------------------------------------------


def _largest_of_rows(read_largest: Callable) -> Callable:
    @_compiled
    def largest_of_rows(stored, stored_scale):
        """Return the bits of the largest magnitude; -1 for a float8 number that is not finite."""
        count, largest = max(1, stored_scale.shape[1]), np.int32(0)
        codes, numbers = np.empty(count, np.uint8), np.empty(count, np.float32)
        for i in range(len(stored)):
            if not read_largest(stored[i], stored_scale[i], codes, numbers):
                return np.int32(-1)
            largest = max(largest, _largest_bits(numbers))
        return largest

    return largest_of_rows


def _quantize_rows(read: Callable, quantize: Callable) -> Callable:
    @_compiled
    def quantize_rows(stored, stored_scale, width, global_scale, values, scale, compared, is_compared):
        """Return `_DONE`, or the reason why a row was not quantized."""
        row, work, codes = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.uint8)
        few = np.empty(scale.shape[1], np.float32)
        for i in range(len(stored)):
            if not read(stored[i], stored_scale[i], row):
                return _NOT_FINITE
            status = quantize(row, work, few, codes, global_scale, values[i], scale[i], is_compared)
            if status != _DONE:
                return status
            if is_compared:
                _compare(row, work, compared[i])
        return _DONE

    return quantize_rows


# --- a table ----------------------------------------------------------------------------------------------------------

# These read a row, or only numbers among which is its largest magnitude.
_READERS = {
    "BF16": (_read_bfloat16_row, _read_largest_bfloat16),
    "F8_E4M3": (_read_float8_row, _read_largest_float8),
}
_QUANTIZERS: dict[str, Callable] = {
    "int8": _to_int8,
    "float8_e4m3fn": _to_float8,
    "int4": _least_squares(4),
    "int2": _least_squares(2),
    "nvfp4": _to_nvfp4,
}
# The path of torch adds the squares of levels exactly, and therefore in any order, up to this width.
_WIDEST = 1 << 16


def is_compilable(dtype: str, width: int) -> bool:
    """Return whether rows of `dtype`, a key of `ROW_FORMATS`, and `width` channels have compiled code."""
    return dtype in _READERS and width <= _WIDEST


class CompiledRounding:
    """The [`StoredRounding`][engram_hf.table_writer_engram.StoredRounding] of compiled code.

    The code is compiled on construction, which takes some seconds.

    Args:
        dtype: the dtype of the stored rows; see [`is_compilable`].
        table_dtype: the new one, one of `QUANTIZED_FORMATS`.
        width: W, the channels of a row.

    Raises:
        ValueError: rows of this width cannot have the new dtype.
    """

    def __init__(self, dtype: str, table_dtype: str, width: int):
        self._format, self._width, self._memory = require_format(table_dtype, width), width, threading.local()
        self._quantize_rows, self._largest_of_rows = _kernels(dtype, table_dtype)
        scales = ROW_FORMATS[dtype].scales(width)
        zeros = torch.zeros((1, width), dtype=TORCH_DTYPES[dtype]), torch.zeros((1, scales), dtype=torch.uint8)
        self.quantize(*zeros, None, is_compared=False)
        if self._format.has_global:
            self.largest(*zeros)

    def largest(self, values: torch.Tensor, scale: torch.Tensor | None) -> float:
        """Return the largest magnitude of stored rows and their scales."""
        bits = self._largest_of_rows(*_arrays(values, scale))
        if bits < 0:
            raise not_finite()
        return np.int32(bits).view(np.float32).item()

    def quantize(
        self,
        values: torch.Tensor,
        scale: torch.Tensor | None,
        global_scale: torch.Tensor | None,
        is_compared: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, list[ComparedRows]]:
        """Return new values and scales of stored rows, as bytes, and their differences from the old ones.

        Raises:
            ValueError: a number is not finite, or too large.
        """
        made, made_scale, compared = (some[: len(values)] for some in self._take(len(values)))
        factor = np.float32(1 if global_scale is None else global_scale.item())
        stored = _arrays(values, scale)
        status = self._quantize_rows(*stored, self._width, factor, made, made_scale, compared, is_compared)
        if status == _NOT_FINITE:
            raise not_finite()
        if status == _TOO_LARGE:
            raise too_large(8 // self._format.packed)
        differences = (
            [compared_rows(compared[:, 0].max().item(), compared[:, 1], compared[:, 2])] if is_compared else []
        )
        return torch.from_numpy(made), torch.from_numpy(made_scale.view(np.uint8)), differences

    def _take(self, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return memory of this thread for the results of at least `count` rows."""
        found = getattr(self._memory, "results", None)
        if found is None or len(found[0]) < count:
            form, width = self._format, self._width
            found = self._memory.results = (
                np.empty((count, width // form.packed), np.uint8),
                np.empty((count, form.scales(width)), _SCALES.get(form.scale_dtype, np.uint8)),
                np.empty((count, 3), np.float32),
            )
        return found


_SCALES = {"F32": np.float32, "BF16": np.uint16}


@functools.cache
def _kernels(dtype: str, table_dtype: str) -> tuple[Callable, Callable]:
    read, read_largest = _READERS[dtype]
    return _quantize_rows(read, _QUANTIZERS[table_dtype]), _largest_of_rows(read_largest)


def _arrays(values: torch.Tensor, scale: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Return stored rows as unsigned integers, and their scales as bytes (none for bfloat16)."""
    scales = torch.empty((len(values), 0), dtype=torch.uint8) if scale is None else scale.view(torch.uint8)
    return values.view({1: torch.uint8, 2: torch.uint16}[values.itemsize]).numpy(), scales.numpy()

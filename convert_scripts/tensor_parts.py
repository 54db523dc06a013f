"""The parts a converted tensor is made of: bytes copied, decoded or encoded, chunk by chunk.

A chunk covers whole quantization blocks, so that memory does not depend on the tensor's size, and is small enough for the
processor's cache: decoding is five times as fast as with chunks of 16 MB.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..safetensors_engram import TensorSpan, tensor_bytes
from .number_formats import Storage, decode, encode_scale, encode_weight
from .safetensors_files import ConversionError
from .streaming import Computed, Copy, Part, copy_of

CHUNK_VALUES = 1 << 18
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def decoded(weight: TensorSpan, scale: TensorSpan, storage: Storage, shape: tuple[int, ...], dtype: str) -> Part:
    """Quantized `weight` and `scale` as floats of `dtype`; `shape` `[R, C]` is that of the values."""

    def produce() -> Iterator[memoryview]:
        for start, stop in _row_chunks(shape, storage.block[0]):
            scale_rows = scale.rows(start // storage.block[0], -(-stop // storage.block[0]))
            values = decode(_read(weight.rows(start, stop)), _read(scale_rows), storage)
            yield _to_bytes(values.to(FLOATS[dtype]))

    return Computed(tensor_bytes(dtype, shape), produce)


def cast(span: TensorSpan, dtype: str) -> Part:
    """A float tensor as floats of `dtype`; the same bytes where it is that already."""
    if span.dtype == dtype:
        return copy_of(span)
    flat = _flat(span)

    def produce() -> Iterator[memoryview]:
        for start, stop in _row_chunks(flat.shape, 1):
            yield _to_bytes(_read_values(flat.rows(start, stop)).to(FLOATS[dtype]))

    return Computed(tensor_bytes(dtype, span.shape), produce)


def encoded(span: TensorSpan, storage: Storage, scales: bool) -> Part:
    """A float matrix `[R, C]`, quantized: the bytes of its weight, or with `scales` those of its scales."""
    shape = storage.scale_shape(span.shape) if scales else storage.weight_shape(span.shape)

    def produce() -> Iterator[memoryview]:
        for start, stop in _row_chunks(span.shape, storage.block[0]):
            values = _read_values(span.rows(start, stop))
            if not values.isfinite().all():
                raise ConversionError(
                    f"tensor {span.name!r} of {span.path} holds infinite or undefined numbers, which have no quantized "
                    f"form; export a model that is whole."
                )
            scale = encode_scale(values, storage)
            yield _to_bytes(scale if scales else encode_weight(values, scale, storage))

    return Computed(math.prod(shape), produce)


@contextmanager
def single_threaded_tensors() -> Iterator[None]:
    """Files are written side by side already; several threads for each small chunk would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _row_chunks(shape: tuple[int, ...], multiple: int) -> Iterator[tuple[int, int]]:
    rows, columns = shape
    step = max(1, CHUNK_VALUES // max(columns, 1) // multiple) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _flat(span: TensorSpan) -> TensorSpan:
    """The span as a matrix of one column, so that vectors and scalars are cut like matrices."""
    return TensorSpan(span.path, span.name, span.dtype, (math.prod(span.shape), 1), span.offset)


def _read(span: TensorSpan) -> torch.Tensor:
    """The stored bytes of a matrix, uint8 `[R, row bytes]`."""
    data = bytearray(span.size)
    done = 0
    for chunk in Copy(span.path, span.offset, span.size).chunks():
        data[done : done + len(chunk)] = chunk
        done += len(chunk)
    return torch.frombuffer(data, dtype=torch.uint8).view(span.shape[0], -1)


def _read_values(span: TensorSpan) -> torch.Tensor:
    return _read(span).view(FLOATS[span.dtype]).float()


def _to_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")

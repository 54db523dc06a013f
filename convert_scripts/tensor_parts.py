"""The parts of a converted tensor: bytes that are copied, decoded or encoded.

Planning needs only their sizes, so torch is imported when the first computed part is written.
"""

import math
from collections.abc import Iterator

from ..safetensors_engram import TensorSpan, tensor_bytes
from .storage import Storage
from .streaming import Computed, Part, copy_of


def decoded(weight: TensorSpan, scale: TensorSpan, storage: Storage, shape: tuple[int, ...], dtype: str) -> Part:
    """Return quantized `weight` and `scale` as floats of `dtype`; `shape` `[R, C]` is that of the values."""

    def produce() -> Iterator[memoryview]:
        from .tensor_chunks import decode_chunks

        return decode_chunks(weight, scale, storage, shape, dtype)

    return Computed(tensor_bytes(dtype, shape), produce)


def cast(span: TensorSpan, dtype: str) -> Part:
    """Return a float tensor as floats of `dtype`; its bytes are unchanged if it has this dtype."""
    if span.dtype == dtype:
        return copy_of(span)

    def produce() -> Iterator[memoryview]:
        from .tensor_chunks import cast_chunks

        return cast_chunks(span, dtype)

    return Computed(tensor_bytes(dtype, span.shape), produce)


def encoded(span: TensorSpan, storage: Storage, scales: bool) -> Part:
    """Return a quantized float matrix `[R, C]`: the bytes of its weight, or with `scales` those of its scales."""
    shape = storage.scale_shape(span.shape) if scales else storage.weight_shape(span.shape)

    def produce() -> Iterator[memoryview]:
        from .tensor_chunks import encode_chunks

        return encode_chunks(span, storage, scales)

    return Computed(math.prod(shape), produce)

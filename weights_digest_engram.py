"""What tells the weights of two saves apart, at a small part of the cost of reading them.

Table files are written and passed on apart from the other weights. Nothing in either shows that both are of one model, so the
manifest of the tables records a digest of the weights that were saved with them.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from .safetensors_engram import FileFormatError, TensorSpan, read_header
from .table_format_engram import table_keys

# Weights up to this size are read whole.
_WHOLE_BYTES = 1 << 20
# Of larger ones, each tensor gives at most so many pieces of at most so many bytes, and 1% of its bytes or two pieces of 64.
_MOST_PIECES, _PIECE_BYTES, _LEAST_BYTES = 8, 4096, 64


def weights_digest(files: Iterable[str | os.PathLike]) -> str:
    """SHA-256, in hex, over the names, dtypes and shapes of all tensors and pieces of each, however they are sharded.

    Tables are left out. Two models that differ only in bytes between the pieces have one digest.

    Args:
        files: the safetensors files of a checkpoint.

    Raises:
        FileFormatError: a file is damaged.
        OSError: a file cannot be read.
    """
    is_table = table_keys().search
    spans = [span for file in files for span in read_header(file).tensors.values() if not is_table(span.name)]
    is_small = sum(span.size for span in spans) <= _WHOLE_BYTES
    digest, opened = hashlib.sha256(), {}
    try:
        for span in sorted(spans, key=lambda span: span.name):
            digest.update(repr((span.name, span.dtype, span.shape)).encode())
            if span.path not in opened:
                opened[span.path] = open(span.path, "rb", buffering=0)  # noqa: SIM115 (closed below)
            for offset, size in [(0, span.size)] if is_small else _pieces(span):
                digest.update(_read(opened[span.path], span.path, span.offset + offset, size))
    finally:
        for file in opened.values():
            file.close()
    return digest.hexdigest()


def _pieces(span: TensorSpan) -> list[tuple[int, int]]:
    """Offset and size of pieces that are spread evenly over a tensor, its first and last bytes included."""
    count = min(_MOST_PIECES, max(2, span.size >> 22))
    size = max(_LEAST_BYTES, min(_PIECE_BYTES, span.size // (100 * count)))
    if span.size <= count * size:
        return [(0, span.size)]
    return [(index * (span.size - size) // (count - 1), size) for index in range(count)]


def _read(file, path: Path, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = b""
    while len(data) < size:
        piece = file.read(size - len(data))
        if not piece:
            raise FileFormatError(f"{path} became shorter while it was read; restore it, and load the model again.")
        data += piece
    return data

"""Safetensors checkpoints read as untrusted input: headers and the index are checked, tensor data is never loaded.

The format (github.com/huggingface/safetensors): 8 bytes, the header's length as a little-endian unsigned integer; the
header, JSON that maps each tensor to `dtype`, `shape` and `data_offsets` (counted from the header's end); the data, without
holes. A checkpoint of several files has an index, `model.safetensors.index.json`, which names the file of every tensor.

Everything here raises `ConversionError`, a `ValueError` whose text is one sentence for the person at the keyboard.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

INDEX_NAME = "model.safetensors.index.json"
# The limit of the reference implementation: a longer header is an attack or garbage, not a checkpoint.
MAX_HEADER_BYTES = 100_000_000

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


class ConversionError(ValueError):
    """Input that cannot be converted, said in one sentence: what is wrong, what was expected, what to do."""


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where a tensor (or some of its leading rows) lies: `size` bytes from `offset` of `path`, in row-major order."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def rows(self, start: int, stop: int) -> "TensorSpan":
        """The span of `tensor[start:stop]`."""
        row_bytes = math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + start * row_bytes)

    def __getitem__(self, index: int) -> "TensorSpan":
        """The span of `tensor[index]`, without its leading dimension."""
        row = self.rows(index, index + 1)
        return replace(row, shape=self.shape[1:])


@dataclass(frozen=True)
class Shard:
    """One checked safetensors file: `head` is its length prefix and header, byte for byte."""

    path: Path
    head: bytes
    tensors: dict[str, TensorSpan]

    @property
    def size(self) -> int:
        return len(self.head) + sum(span.size for span in self.tensors.values())


@dataclass(frozen=True)
class Checkpoint:
    """A folder of checked shards: every tensor of the index in exactly the file the index names, and no other tensor."""

    folder: Path
    shards: dict[str, Shard]
    tensors: dict[str, TensorSpan]

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards.values())


def parse_json(data: bytes, what: str) -> dict:
    """Parse one JSON object in which no key stands twice; `what` names the file in the error."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{what} is not valid JSON ({error}); fetch the file again.") from error
    except _DuplicateKey as error:
        raise ConversionError(f"{what} names {error} twice; every name may stand once.") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{what} must hold a JSON object, it holds a {type(value).__name__}.")
    return value


class _DuplicateKey(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(repr(next(name for name in names if names.count(name) > 1)))
    return seen


def read_json(path: Path) -> dict:
    """Read a JSON object from a file that must exist."""
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; is {path.parent} the folder of a checkpoint?")
    return parse_json(path.read_bytes(), str(path))


def read_shard(path: Path) -> Shard:
    """Read and check the header of one safetensors file; the data is not touched."""
    if not path.is_file():
        raise ConversionError(f"{path} does not exist; fetch the missing file.")
    file_size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ConversionError(
                f"{path} is {file_size} bytes long, too short for a safetensors file; fetch it again."
            )
        (length,) = struct.unpack("<Q", prefix)
        if length > min(MAX_HEADER_BYTES, file_size - 8):
            raise ConversionError(
                f"{path} announces a header of {length} bytes, but the file has {file_size} bytes and a header may have "
                f"{MAX_HEADER_BYTES}; the file is truncated or damaged, fetch it again."
            )
        head = prefix + file.read(length)
    spans = parse_head(path, head)
    end = len(head) + sum(span.size for span in spans.values())
    if end != file_size:
        raise ConversionError(
            f"{path} has {file_size} bytes, its header describes {end}; the file is truncated or damaged, fetch it again."
        )
    return Shard(path, head, spans)


def parse_head(path: Path, head: bytes) -> dict[str, TensorSpan]:
    """Check a length prefix and header on their own and return the tensors they describe."""
    header = parse_json(head[8:], f"the header of {path}")
    metadata = header.pop("__metadata__", {"format": "pt"})
    if not isinstance(metadata, dict) or metadata.get("format") != "pt":
        raise ConversionError(f"the metadata of {path} is {metadata!r}, expected {{'format': 'pt'}}; fetch it again.")
    spans = {name: _check_entry(path, len(head), name, entry) for name, entry in header.items()}
    end = len(head)
    for span in sorted(spans.values(), key=lambda span: (span.offset, span.size)):
        if span.offset != end:
            raise ConversionError(
                f"tensor {span.name!r} of {path} starts at byte {span.offset}, expected {end}: the header leaves a hole "
                f"or tensors overlap; the file is damaged, fetch it again."
            )
        end += span.size
    return spans


def _check_entry(path: Path, data_start: int, name: str, entry: object) -> TensorSpan:
    where = f"tensor {name!r} of {path}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(f"{where} is described by {entry!r}, expected dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise ConversionError(f"{where} has the unknown dtype {dtype!r}, expected one of {', '.join(ITEM_BYTES)}.")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ConversionError(f"{where} has shape {shape!r} and data_offsets {offsets!r}, expected lists of sizes.")
    span = TensorSpan(path, name, dtype, tuple(shape), data_start + offsets[0])
    if span.size != offsets[1] - offsets[0]:
        raise ConversionError(
            f"{where} is {dtype} {shape}, {span.size} bytes, but its data_offsets {offsets} hold "
            f"{offsets[1] - offsets[0]}; the header is damaged, fetch the file again."
        )
    return span


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def read_index(folder: Path) -> dict[str, str]:
    """The file of every tensor, from the folder's index; names that leave the folder are refused."""
    path = folder / INDEX_NAME
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ConversionError(f"{path} has no weight_map from tensor names to file names; fetch it again.")
    for file in sorted(set(weight_map.values())):
        if file in ("", ".", "..") or Path(file).name != file or "\\" in file or "\0" in file:
            raise ConversionError(
                f"{path} names the file {file!r}; files must lie in the same folder, without a path."
            )
        if not (folder / file).is_file():
            raise ConversionError(f"{path} names {file}, which is not in the folder; fetch the missing file.")
    return weight_map


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the index and every header of a checkpoint and check that they say the same."""
    weight_map = read_index(folder)
    shards = {file: read_shard(folder / file) for file in sorted(set(weight_map.values()))}
    tensors = {}
    for file, shard in shards.items():
        for name, span in shard.tensors.items():
            if weight_map.get(name) != file:
                raise ConversionError(_misplaced(name, file, weight_map.get(name), folder))
            tensors[name] = span
    missing = weight_map.keys() - tensors.keys()
    if missing:
        name = min(missing)
        raise ConversionError(
            f"the index of {folder} places {enumerate_names(missing)} in {weight_map[name]} "
            f"and elsewhere, but the file does not hold it; fetch the checkpoint again."
        )
    return Checkpoint(folder, shards, tensors)


def _misplaced(name: str, file: str, expected: str | None, folder: Path) -> str:
    if expected is None:
        return (
            f"{file} holds the tensor {name!r}, which the index of {folder} does not name; fetch the checkpoint again."
        )
    return (
        f"tensor {name!r} is in {file}, the index of {folder} places it in {expected}; a tensor may be in one file only, "
        f"fetch the checkpoint again."
    )


def enumerate_names(names: Iterable[str], most: int = 3) -> str:
    """A readable list of the first few of `names`."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(repr(name) for name in ordered[:most]) + more


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None, page: int = 8
) -> bytes:
    """Length prefix and header of a safetensors file that holds `(name, dtype, shape)` in this order.

    Padded with spaces to a multiple of `page` bytes, so that the data of a memory-mapped file is aligned.
    """
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % page)
    return struct.pack("<Q", len(text)) + text

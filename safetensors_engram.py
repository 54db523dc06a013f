"""Safetensors files as untrusted input: their headers are checked to the last byte, tensor data is never loaded.

The format (github.com/huggingface/safetensors): 8 bytes, the header's length as a little-endian unsigned integer; the
header, JSON that maps each tensor to `dtype`, `shape` and `data_offsets` (counted from the header's end), and
`__metadata__` to strings; the data, without holes, to the end of the file.
"""

import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

# The limit of safetensors' own reader; a longer header is damaged.
MAX_HEADER_BYTES = 100_000_000
# The product of many sizes is a number that takes minutes to compute.
MAX_DIMENSIONS = 64
# What an error may quote of a hostile file.
_MAX_MESSAGE = 1000
# Of all dtypes that safetensors knows.
ITEM_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor; of those of less than a byte a number, whole bytes."""
    return math.prod(shape) * ITEM_BITS[dtype] // 8


class FileFormatError(ValueError):
    """A file that is missing, cut off, damaged, or against the rules of its format, said in one sentence."""

    def __init__(self, message: str):
        half = _MAX_MESSAGE // 2
        super().__init__(message if len(message) <= _MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}")


class MissingFileError(FileFormatError, FileNotFoundError):
    """A file that is not there."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.ENOENT

    def __str__(self) -> str:
        return self.args[0]  # an OSError would print number and name instead


# What a user can do about errors of the system that say nothing about what the file holds.
_ADVICE = {
    errno.EACCES: "give this user the right to do that",
    errno.EPERM: "give this user the right to do that",
    errno.EMFILE: "close files, or raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "close files, or raise the system's limit of open files",
    errno.EIO: "check the disk or the network, and fetch the file again if it is damaged",
    errno.ESTALE: "the file server replaced the file, so load the model again",
    errno.ENOMEM: "free memory, or raise the limit of this process (`ulimit -v`)",
}


def system_error(error: OSError, path: str | os.PathLike, doing: str, advice: str | None = None) -> OSError:
    """An OSError of the same kind and number, which says for which file, and what to do about it.

    Args:
        doing: what could not be done, such as "read".
        advice: instead of what helps against errors of this number in general.
    """
    advice = advice or _ADVICE.get(error.errno)
    message = f"{error.strerror or error}, so {Path(path).name} cannot be {doing}" + (f"; {advice}" if advice else "")
    return OSError(error.errno, message, str(path))


@contextlib.contextmanager
def reading(path: Path, advice: str = "fetch the missing file") -> Iterator[None]:
    """Says of an error that reading `path` meets what can be done about it.

    Args:
        advice: for a file that is not there.

    Raises:
        MissingFileError: there is no such file.
        FileFormatError: there is something else in its place, such as a folder.
        OSError: of the same kind as the system's.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"{path} cannot be read ({error.strerror}); {advice}.") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileFormatError(f"{path} cannot be read ({error.strerror}); {advice}.") from error
    except OSError as error:
        raise system_error(error, path, "read") from error


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where a tensor (or some of its rows) lies: `size` bytes from byte `offset` of the file at `path`, row-major."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return tensor_bytes(self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> "TensorSpan":
        """The span of `tensor[start:stop]`."""
        skipped = tensor_bytes(self.dtype, (start, *self.shape[1:]))
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + skipped)

    def __getitem__(self, index: int) -> "TensorSpan":
        """The span of `tensor[index]`, without its leading dimension."""
        row = self.rows(index, index + 1)
        return replace(row, shape=self.shape[1:])


@dataclass(frozen=True)
class FileHeader:
    """A checked header: its tensors cover the data section exactly.

    Args:
        head: the length prefix and the header, byte for byte.
        stamp: of the file that it was read from; None for a file that is to be written.
    """

    path: Path
    head: bytes
    tensors: dict[str, TensorSpan]
    metadata: dict[str, str]
    stamp: "FileStamp | None" = None

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + sum(span.size for span in self.tensors.values())

    def __reduce__(self):
        return parse_head, (self.path, self.head, self.stamp)  # all the rest is in these


class FileStamp(NamedTuple):
    """What the system says about an open file. Another file has another device or inode.

    Both times change when a file is written, but also when somebody touches it; making a link changes `changed` alone, and
    whoever writes a file may set `modified` back.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def read(cls, descriptor: int) -> "FileStamp":
        """The stamp of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def is_same_file(self, other: "FileStamp") -> bool:
        """Whether both are of one file, which has kept its size; what it holds may have changed."""
        return self[:3] == other[:3]


def read_header(path: str | os.PathLike) -> FileHeader:
    """Read the header of a safetensors file and check it against itself and the size of the file.

    Raises:
        FileFormatError: the file is missing (then it is a `MissingFileError`), cut off, damaged, or of another format.
        OSError: the system cannot read it; the message says what to do.
    """
    path = Path(path)
    with reading(path):
        _require_regular(path)
        with path.open("rb") as file:
            stamp = FileStamp.read(file.fileno())
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if not 2 <= length <= min(stamp.size - 8, MAX_HEADER_BYTES):
                raise FileFormatError(
                    f"{path} is not a whole safetensors file: it has {stamp.size} bytes and announces a header of {length} "
                    f"(a header may have {MAX_HEADER_BYTES}); fetch it again."
                )
            head = prefix + file.read(length)
    header = parse_head(path, head, stamp)
    if header.size != stamp.size:
        raise FileFormatError(
            f"{path} has {stamp.size} bytes, but its header describes {header.size}: it is cut off or damaged; fetch it "
            "again."
        )
    return header


def parse_head(path: Path, head: bytes, stamp: FileStamp | None = None) -> FileHeader:
    """Check the length prefix and header `head` of the file at `path` on their own.

    Raises:
        FileFormatError: the header contradicts itself.
    """
    entries = parse_json(head[8:], f"The header of {path}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(f"The __metadata__ of {path} must map strings to strings; fetch the file again.")
    tensors = {name: _read_span(path, len(head), name, entry) for name, entry in entries.items()}
    end = len(head)
    for span in sorted(tensors.values(), key=lambda span: (span.offset, span.size)):
        if span.offset != end:
            raise FileFormatError(
                f"Tensor {span.name!r} of {path} begins at byte {span.offset}, expected {end}: tensors overlap or leave a "
                "hole; fetch the file again."
            )
        end += span.size
    return FileHeader(path, head, tensors, metadata, stamp)


def _read_span(path: Path, data_start: int, name: str, entry) -> TensorSpan:
    where = f"Tensor {name!r} of {path}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(f"{where} is described by {entry!r}, expected dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise FileFormatError(f"{where} has the unknown dtype {dtype!r}; upgrade engram-hf, or fetch the file again.")
    if not are_counts(shape) or len(shape) > MAX_DIMENSIONS or not are_counts(offsets) or len(offsets) != 2:
        raise FileFormatError(f"{where} has shape {shape!r} and data_offsets {offsets!r}, expected lists of sizes.")
    span = TensorSpan(path, name, dtype, tuple(shape), data_start + offsets[0])
    if span.size != offsets[1] - offsets[0] or math.prod(shape) * ITEM_BITS[dtype] % 8:
        raise FileFormatError(
            f"{where} is {dtype} {shape}, {span.size} bytes, but its data_offsets hold {offsets[1] - offsets[0]}; fetch "
            "the file again."
        )
    return span


def are_counts(value) -> bool:
    """Whether parsed JSON is a list of whole numbers, none of them negative or beyond 64 bits."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _require_regular(path: Path) -> None:
    """Refuse pipes and devices, which may never end. What is missing, or a folder, is told when it is opened."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileFormatError(f"{path} is no regular file, but a pipe, socket or device; put the file itself there.")


def read_json(path: Path, constants: bool = False) -> dict:
    """Read a file that is one JSON object; see [`parse_json`]."""
    with reading(path, f"check whether {path.parent} is the right folder"):
        _require_regular(path)
        data = path.read_bytes()
    return parse_json(data, str(path), constants)


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, from the index of a checkpoint.

    Raises:
        FileFormatError: the index is damaged, or names a file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise FileFormatError(f"{index} has no weight_map from tensor names to file names; fetch it again.")
    for file in set(weight_map.values()):
        if not is_file_name(file):
            raise FileFormatError(
                f"{index} names the file {file!r}; shards lie in the folder of their index, named without a path."
            )
    return weight_map


def is_file_name(name) -> bool:
    """Whether `name` names a file of a folder by itself, without a way out of it, on every system."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\:\0\ud800-\udfff]", name)


def parse_json(data: bytes | str, what: str, constants: bool = False) -> dict:
    """One JSON object in which no name stands twice.

    Args:
        what: begins the sentence of an error, such as "The header of x.safetensors".
        constants: take NaN and infinity, which Python writes (into config.json, say) but JSON does not have.

    Raises:
        FileFormatError: it is something else.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(
            text, object_pairs_hook=_unique_members, parse_constant=None if constants else _refuse_constant
        )
    # A number of thousands of digits is a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{what} is not valid JSON ({error}); fetch the file again.") from error
    except KeyError as error:
        raise FileFormatError(f"{what} names {error} twice; fetch the file again.") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"{what} must be a JSON object, not {type(value).__name__}.")
    return value


def _refuse_constant(name: str):
    raise ValueError(f"it has no {name}")


def _unique_members(pairs: list[tuple[str, object]]) -> dict:
    members = {}
    for name, value in pairs:
        if name in members:
            raise KeyError(name)
        members[name] = value
    return members


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None, page: int = 8
) -> bytes:
    """Length prefix and header of a file that holds `(name, dtype, shape)` in this order; equal input, equal bytes.

    Args:
        metadata: beside `format`, which says that the tensors are torch's.
        page: the data begin at a multiple of so many bytes.
    """
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % page)
    return len(text).to_bytes(8, "little") + text

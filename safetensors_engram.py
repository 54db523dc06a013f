"""Safetensors files, read as untrusted input; these and all our other files are written atomically.

Headers are checked to the last byte, and tensor data is never loaded. A file is written beside its name and renamed
when it is complete; files that do not change are linked, or copied inside the kernel.

The format (github.com/huggingface/safetensors): 8 bytes, the header's length as a little-endian unsigned integer; the
header, JSON that maps each tensor to `dtype`, `shape` and `data_offsets` (counted from the header's end), and
`__metadata__` to strings; the data, without holes, to the end of the file.
"""

import contextlib
import errno
import glob
import io
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ModuleNotFoundError:  # This is not a Unix system.
    fcntl = None

# The version of engram-hf: setup.py, the package and every saved config read it from here.
VERSION = "0.2.0"
# This is the limit of safetensors' own reader; a longer header is damaged.
MAX_HEADER_BYTES = 100_000_000
# With more dimensions, the product of sizes could take minutes to compute.
MAX_DIMENSIONS = 64
# An error quotes at most this many characters of a file.
_MAX_MESSAGE = 1000
# These are the bits of a number, for all dtypes of safetensors.
ITEM_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# This is Linux' request to share the blocks of one file with another (include/uapi/linux/fs.h).
_FICLONE = 0x40049409
# Weights are in one file, or in several with an index.
_WEIGHTS_NAMES = ("model.safetensors", "model.safetensors.index.json")
# The names of incomplete files end in this.
UNFINISHED = ".unfinished"
# Hidden folders inside a target: of a save that is being written, and of one that is whole and being put in place.
SAVE_PREFIX, EXCHANGE_PREFIX = ".engram-save-", ".engram-exchange-"
POLL_SECONDS = 0.01
# A link is renamed at once after it is made.
_LINK_SECONDS = 60
# Systems and file systems without links, or without links between these two places, answer with these errors.
_CANNOT_LINK = {getattr(errno, name) for name in ("EXDEV", "EPERM", "EMLINK", "ENOTSUP", "ENOSYS", "ENOENT", "EACCES")}


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor; numbers of less than a byte are rounded up to whole bytes."""
    return math.prod(shape) * ITEM_BITS[dtype] // 8


class EngramError(ValueError):
    """The base of all errors of this package: wrong input, explained in one sentence."""


class FileFormatError(EngramError):
    """A file that is missing, truncated, damaged, or violates its format, explained in one sentence."""

    def __init__(self, message: str):
        half = _MAX_MESSAGE // 2
        super().__init__(message if len(message) <= _MAX_MESSAGE else f"{message[:half]} ... {message[-half:]}")


class MissingFileError(FileFormatError, FileNotFoundError):
    """A file is missing."""

    def __init__(self, message: str):
        super().__init__(message)
        self.errno = errno.ENOENT

    def __str__(self) -> str:
        return self.args[0]  # An OSError would print number and name instead.


# This is the advice for errors of the system that do not depend on the file's content.
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
    """Return an OSError of the same type and number, with the file and advice.

    Args:
        doing: the failed action, such as "read".
        advice: replaces the general advice for errors of this number.
    """
    advice = advice or _ADVICE.get(error.errno)
    message = f"{error.strerror or error}, so {Path(path).name} cannot be {doing}" + (f"; {advice}" if advice else "")
    return OSError(error.errno, message, str(path))


@contextlib.contextmanager
def reading(path: Path, advice: str = "fetch the missing file") -> Iterator[None]:
    """Add advice to an error that occurs while `path` is read.

    Args:
        advice: for a missing file.

    Raises:
        MissingFileError: there is no such file.
        FileFormatError: there is something else in its place, such as a folder.
        OSError: of the same type as the system's.
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
    """The place of a tensor (or some of its rows): `size` bytes from byte `offset` of the file at `path`, row-major."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """The size in bytes."""
        return tensor_bytes(self.dtype, self.shape)

    def rows(self, start: int, stop: int) -> "TensorSpan":
        """Return the span of `tensor[start:stop]`."""
        skipped = tensor_bytes(self.dtype, (start, *self.shape[1:]))
        return replace(self, shape=(stop - start, *self.shape[1:]), offset=self.offset + skipped)

    def __getitem__(self, index: int) -> "TensorSpan":
        """Return the span of `tensor[index]`, without its leading dimension."""
        row = self.rows(index, index + 1)
        return replace(row, shape=self.shape[1:])


@dataclass(frozen=True)
class FileHeader:
    """A checked header: its tensors cover the data section exactly.

    Args:
        head: the length prefix and the header, byte for byte.
        stamp: the stamp of the file that it was read from; None for a file that will be written.
    """

    path: Path
    head: bytes
    tensors: dict[str, TensorSpan]
    metadata: dict[str, str]
    stamp: "FileStamp | None" = None

    @property
    def size(self) -> int:
        """The size of the whole file in bytes."""
        return len(self.head) + sum(span.size for span in self.tensors.values())

    def __reduce__(self):
        return parse_head, (self.path, self.head, self.stamp)  # All other fields depend on these.


class FileStamp(NamedTuple):
    """The system's data on an open file. Another file has another device or inode.

    Both times change when a file is written, but also when it is touched; making a link changes `changed` alone, and a
    writer may restore `modified`.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def read(cls, descriptor: int) -> "FileStamp":
        """Return the stamp of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def is_same_file(self, other: "FileStamp") -> bool:
        """Return whether both belong to one file, whose size is unchanged; its content may have changed."""
        return self[:3] == other[:3]


def read_header(path: str | os.PathLike) -> FileHeader:
    """Read the header of a safetensors file and check it against itself and the size of the file.

    Raises:
        FileFormatError: the file is missing (a `MissingFileError`), truncated, damaged, or of another format.
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
        raise FileFormatError(f"{where} is {entry!r}, expected dtype, shape and data_offsets; fetch the file again.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BITS:
        raise FileFormatError(f"{where} has the unknown dtype {dtype!r}; upgrade engram-hf, or fetch the file again.")
    if not are_counts(shape) or len(shape) > MAX_DIMENSIONS or not are_counts(offsets) or len(offsets) != 2:
        raise FileFormatError(
            f"{where} has shape {shape!r} and data_offsets {offsets!r}, expected lists of sizes; fetch the file again."
        )
    span = TensorSpan(path, name, dtype, tuple(shape), data_start + offsets[0])
    if span.size != offsets[1] - offsets[0] or math.prod(shape) * ITEM_BITS[dtype] % 8:
        raise FileFormatError(
            f"{where} is {dtype} {shape}, {span.size} bytes, but its data_offsets hold {offsets[1] - offsets[0]}; fetch "
            "the file again."
        )
    return span


def are_counts(value) -> bool:
    """Return whether parsed JSON is a list of whole numbers, none of them negative or beyond 64 bits."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _require_regular(path: Path) -> None:
    """Refuse pipes and devices, which may never end. Opening reports missing files and folders."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileFormatError(f"{path} is no regular file, but a pipe, socket or device; put the file itself there.")


def read_json(path: Path, constants: bool = False) -> dict:
    """Read a file that is one JSON object; see [`parse_json`]."""
    with reading(path, f"check whether {path.parent} is the right folder"):
        _require_regular(path)
        data = path.read_bytes()
    return parse_json(data, str(path), constants)


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of every tensor, from the index of a checkpoint.

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
                f"{index} names the file {file!r}; shards lie beside it, named without a path; fetch it again."
            )
    return weight_map


def find_weights(resolve: Callable[[str], Path | None], variant: str | None) -> tuple[Path | None, Path | None]:
    """Return the only safetensors file of a checkpoint, or else the index of its shards; None for missing ones."""
    single, index = (_of_variant(name, variant) for name in _WEIGHTS_NAMES)
    found = resolve(single)
    return (found, None) if found is not None else (None, resolve(index))


def is_weights_file(name: str, variant: str | None) -> bool:
    """Return whether a file of a model folder has the name of weights of this variant, their shards or index."""
    single, index = (_of_variant(file, variant) for file in _WEIGHTS_NAMES)
    stem = re.escape(single.removesuffix(".safetensors"))
    return name in (single, index) or re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors", name) is not None


def find_weight_files(resolve: Callable[[str], Path | None], variant: str | None) -> list[Path]:
    """Return all existing safetensors files of a checkpoint's weights."""
    single, index = find_weights(resolve, variant)
    names = set() if index is None else set(read_weight_map(index).values())
    paths = [single, *map(resolve, sorted(names))]
    return [path for path in paths if path is not None]


def _of_variant(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def is_file_name(name) -> bool:
    """Return whether `name` names a file inside a folder on every system, without a way out of it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\:\0\ud800-\udfff]", name)


def parse_json(data: bytes | str, what: str, constants: bool = False) -> dict:
    """Parse one JSON object without duplicate names.

    Args:
        what: begins the sentence of an error, such as "The header of x.safetensors".
        constants: accept NaN and infinity, which Python writes (such as into config.json) but JSON does not have.

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
        raise FileFormatError(f"{what} must be a JSON object, not {type(value).__name__}; fetch the file again.")
    return value


def _refuse_constant(name: str):
    raise EngramError(f"it has no {name}")


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
    """Return length prefix and header of a file with these `(name, dtype, shape)`; equal input gives equal bytes.

    Args:
        metadata: entries beside `format`, which says that the tensors are torch's.
        page: the data begin at a multiple of this many bytes.
    """
    header: dict = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % page)
    return len(text).to_bytes(8, "little") + text


# --- writing -----------------------------------------------------------------------------


class FileWriter:
    """Writes one safetensors file, in any order; as a context manager, it leaves a complete file or none.

    Args:
        path: the path of the file.
        head: its first bytes; see [`header_bytes`].

    Raises:
        OSError: it cannot be written; the message says what to do.
    """

    def __init__(self, path: str | os.PathLike, head: bytes):
        self.path = Path(path)
        self.header = parse_head(self.path, head)
        with contextlib.ExitStack() as stack, self._explained():
            self._file = stack.enter_context(_replacing(self.path))
            reserve(self._file, self.header.size)
            _write_all(self._file, head, 0)
            self._stack = stack.pop_all()

    def copy(self, name: str, span: TensorSpan, source: int) -> None:
        """Write the tensor `name` from `span`, which lies in the open file `source`, inside the kernel."""
        with self._explained():
            _copy_range(source, span.offset, self._file, self.header.tensors[name].offset, span.size)

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write bytes from byte `offset` of the file on."""
        with self._explained():
            _write_all(self._file, data, offset)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._explained():
            self._stack.__exit__(kind, error, trace)

    def _explained(self):
        return _explained(self.path, self.header.size)


def link_or_copy(source: int, path: Path, target: Path, symbolic: bool = False) -> None:
    """Hard-link `target` to the file that is open as `source` and was opened at `path`, or copy it.

    A file system that shares blocks (XFS, Btrfs) makes a copy that takes no space. Elsewhere it is a hard link, and
    the file becomes read-only under all its names: copying another file over one name would overwrite it under the
    others, too. If neither is possible, it is a copy.

    Args:
        symbolic: make a symbolic link instead, for a folder that is only read and soon removed.

    Raises:
        OSError: the target cannot be written.
    """
    status = os.fstat(source)
    with _explained(target, status.st_size):
        ways = [_link_symbolically] if symbolic else [_clone, _link_read_only]
        if not still_names(target, source) and not any(_made(source, path, target, way) for way in ways):
            _copy_file(source, target, status.st_size)


def can_link(source: int, path: Path, folder: Path) -> bool:
    """Return whether `link_or_copy` would take no space for the file that is open as `source` in `folder`.

    Only trying shows it: one disk may be mounted twice, and another user's files may be protected.
    """
    target = _aside(folder / path.name)
    with _explained(folder / path.name, 0):
        try:
            return any(_made(source, path, target, way) for way in (_clone, _link))
        finally:
            target.unlink(missing_ok=True)


def _made(source: int, path: Path, target: Path, way: Callable[[int, Path, Path], None]) -> bool:
    """Return whether `target` was made of the open file in a way that not all systems have."""
    made = _aside(target)
    try:
        way(source, path, made)
        os.replace(made, target)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    finally:
        made.unlink(missing_ok=True)  # It still exists, too, if the target became the same file meanwhile.
    return True


def _clone(source: int, path: Path, target: Path) -> None:
    """Share the blocks of the open file."""
    file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no ioctl")
        fcntl.ioctl(file, _FICLONE, source)
    except OSError as error:
        raise OSError(errno.ENOTSUP, "no shared blocks") from error  # Systems report this with different errors.
    finally:
        os.close(file)


def _link(source: int, path: Path, target: Path) -> None:
    """Make a hard link, if the open file still has its name."""
    if not still_names(path, source):
        raise OSError(errno.ENOENT, "another file has its name")
    os.link(os.path.realpath(path), target)  # A link to a symbolic link of a download cache would break with it.


def _link_read_only(source: int, path: Path, target: Path) -> None:
    _link(source, path, target)
    os.chmod(target, stat.S_IMODE(os.fstat(source).st_mode) & ~0o222)


def _link_symbolically(source: int, path: Path, target: Path) -> None:
    if not still_names(path, source):
        raise OSError(errno.ENOENT, "another file has its name")
    os.symlink(os.path.realpath(path), target)


def still_names(path: Path, source: int) -> bool:
    """Return whether the file that is open as `source` still has its name, and no other file took that."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(source))
    except OSError:
        return False


def _copy_file(source: int, target: Path, size: int) -> None:
    with _replacing(target) as file:
        _copy_range(source, 0, file, 0, size)


def write_json(path: Path, content: dict) -> None:
    """Write a small JSON file atomically."""
    write_file(path, json_bytes(content))


def json_bytes(content: object) -> bytes:
    """Return JSON in the format of all our files: readable, in the given order, with one newline at the end."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically, also if the power fails."""
    with _explained(path, len(data)), _replacing(path) as file:
        _write_all(file, data, 0)
        os.fsync(file)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """Yield a new file, open for writing, that becomes `path` if the block ends without an exception.

    Each process has its own file, and the one that ends last wins. Files that killed processes left are removed.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{UNFINISHED}"):
        _remove_if_left(left)
    unfinished, file = _create(path)
    try:
        yield file.fileno()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        file.close()  # This comes last, since it is locked until then.


def _create(path: Path) -> tuple[Path, io.FileIO]:
    # An interrupt can hit between any two steps. A file object is closed even then, so that what it leaves is unlocked.
    while True:
        unfinished = _aside(path)
        file = open(unfinished, "x+b", buffering=0)  # noqa: SIM115 (the caller closes it)
        lock_file(file.fileno())
        if still_names(unfinished, file.fileno()):
            return unfinished, file
        file.close()  # Another process took it for an abandoned file.


def _aside(path: Path) -> Path:
    """Return a name beside `path` that no other process uses."""
    return Path(f"{path}.{secrets.token_hex(8)}{UNFINISHED}")


def _remove_if_left(unfinished: Path) -> None:
    """Remove the remains of a killed process: a file that is not locked, or a link that is too old to be renamed soon."""
    with contextlib.suppress(OSError):
        status = unfinished.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            if time.time() - status.st_ctime > _LINK_SECONDS:
                unfinished.unlink()
            return
        file = os.open(unfinished, os.O_RDWR)  # NFS locks only files that are open for writing.
        try:
            if lock_file(file):  # Without locks, abandoned files cannot be recognized.
                unfinished.unlink()
        finally:
            os.close(file)


def lock_file(file: int) -> bool | None:
    """Lock an open file for this process, until it is closed; False if another process has it, None without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # This file system has no locks.
        return None
    return True


@contextlib.contextmanager
def alone_in(folder: str | os.PathLike) -> Iterator[None]:
    """Wait for other processes in this block for the same folder, and exclude them until the block ends.

    There is no waiting where folders cannot be locked.
    """
    if fcntl is None:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    """Add advice to errors that occur while `size` bytes are written to `path`; their class stays the same."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"{path.name} needs {size:,} bytes, which do not fit there; free space, or write to another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"{path.name} cannot be written ({error.strerror}); choose a folder that is writable"
        else:
            raise
        raise OSError(error.errno, message, str(path)) from error


def reserve(file: int, size: int) -> None:
    """Reserve the space now: a disk that is too small is found before hours of work, not after."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def _write_all(file: int, data, offset: int) -> None:
    data = memoryview(data)
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _copy_range(source: int, source_offset: int, target: int, target_offset: int, count: int) -> None:
    """Copy bytes between open files; the kernel shares the blocks where the file system can."""
    while count:
        try:
            copied = os.copy_file_range(source, target, min(count, 1 << 30), source_offset, target_offset)
        except (AttributeError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            # It is not supported on this system, or not between these file systems.
            copied = os.pwrite(target, os.pread(source, min(count, 1 << 22), source_offset), target_offset)
        if not copied:
            raise FileFormatError("A file became shorter while it was copied; restore it and copy again.")
        source_offset, target_offset, count = source_offset + copied, target_offset + copied, count - copied

"""What `save_pretrained` does with tables that are no parameters, and how any file of ours is written: whole or not at all.

A file is written beside its name and renamed when it is complete. Tables have not changed since they were loaded, so their files
are linked, or copied inside the kernel.
"""

import contextlib
import errno
import glob
import json
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path

from .row_sources_engram import MappedRows
from .safetensors_engram import FileFormatError, TensorSpan, header_bytes, parse_head
from .table_format_engram import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    METADATA_KEY,
    PAGE,
    StoredTable,
    TableDescription,
    TableFormatError,
    describe_table,
    read_tables,
)

try:
    import fcntl
except ModuleNotFoundError:  # not a Unix system
    fcntl = None

# Linux' request to share the blocks of one file with another (include/uapi/linux/fs.h).
_FICLONE = 0x40049409
# Ends the names of files that are not whole yet.
_UNFINISHED = ".unfinished"
# A link is renamed at once after it is made.
_LINK_SECONDS = 60
# What systems and file systems answer that have no links, or not between these two places.
_CANNOT_LINK = {getattr(errno, name) for name in ("EXDEV", "EPERM", "EMLINK", "ENOTSUP", "ENOSYS", "ENOENT", "EACCES")}


class FileWriter:
    """Writes one safetensors file, in any order; as a context manager, it leaves a whole file or none.

    Args:
        path: of the file.
        head: what it begins with; see `safetensors_engram.header_bytes`.

    Raises:
        OSError: it cannot be written; the message says what to do.
    """

    def __init__(self, path: str | os.PathLike, head: bytes):
        self.path = Path(path)
        self.header = parse_head(self.path, head)
        with contextlib.ExitStack() as stack, self._explained():
            self._file = stack.enter_context(_replacing(self.path))
            _reserve(self._file, self.header.size)
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
    """Make `target` the file that is open as `source` and was opened at `path`, without moving its bytes if that is possible.

    On a file system that shares blocks (XFS, Btrfs), it is a copy that takes no space. Elsewhere it is a hard link, and the
    file becomes read-only under all its names: whoever copies another file over one name would overwrite it under the
    others, too. Where neither is possible, it is a copy.

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
    """Whether `link_or_copy` would take no space for the file that is open as `source` in `folder`.

    Tried, for nothing else tells: one disk may be mounted twice, and another user's files may be protected.
    """
    target = _aside(folder / path.name)
    with _explained(folder / path.name, 0):
        try:
            return any(_made(source, path, target, way) for way in (_clone, _link))
        finally:
            target.unlink(missing_ok=True)


def _made(source: int, path: Path, target: Path, way: Callable[[int, Path, Path], None]) -> bool:
    """Whether `target` was made of the open file in a way that not all systems have."""
    made = _aside(target)
    try:
        way(source, path, made)
        os.replace(made, target)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    finally:
        made.unlink(missing_ok=True)  # still there, too, if the target became the same file meanwhile
    return True


def _clone(source: int, path: Path, target: Path) -> None:
    """Share the blocks of the open file."""
    file = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no ioctl")
        fcntl.ioctl(file, _FICLONE, source)
    except OSError as error:
        raise OSError(errno.ENOTSUP, "no shared blocks") from error  # systems answer this in many ways
    finally:
        os.close(file)


def _link(source: int, path: Path, target: Path) -> None:
    """Make a hard link, if the open file still has its name."""
    if not still_names(path, source):
        raise OSError(errno.ENOENT, "another file has its name")
    os.link(os.path.realpath(path), target)  # a link to a symbolic link of a download cache would break with it


def _link_read_only(source: int, path: Path, target: Path) -> None:
    _link(source, path, target)
    os.chmod(target, stat.S_IMODE(os.fstat(source).st_mode) & ~0o222)


def _link_symbolically(source: int, path: Path, target: Path) -> None:
    if not still_names(path, source):
        raise OSError(errno.ENOENT, "another file has its name")
    os.symlink(os.path.realpath(path), target)


def still_names(path: Path, source: int) -> bool:
    """Whether the file that is open as `source` still has its name, and no other file took that."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(source))
    except OSError:
        return False


def _copy_file(source: int, target: Path, size: int) -> None:
    with _replacing(target) as file:
        _copy_range(source, 0, file, 0, size)


def write_json(path: Path, content: dict) -> None:
    """Write a small JSON file, complete or not at all."""
    text = (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    with _explained(path, len(text)), _replacing(path) as file:
        _write_all(file, text, 0)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """A new file, open for writing, that becomes `path` if the block ends without an exception.

    Each process has a file of its own, and the one that ends last wins. Files that killed processes left are removed.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*{_UNFINISHED}"):
        _remove_if_left(left)
    unfinished, file = _create(path)
    try:
        yield file
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        os.close(file)  # last, since it is locked until then


def _create(path: Path) -> tuple[Path, int]:
    while True:
        unfinished = _aside(path)
        file = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        lock_file(file)
        if still_names(unfinished, file):
            return unfinished, file
        os.close(file)  # another process took it for left


def _aside(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return Path(f"{path}.{secrets.token_hex(8)}{_UNFINISHED}")


def _remove_if_left(unfinished: Path) -> None:
    """Remove what a killed process left: a file that nobody has locked, or a link that is too old to be renamed soon."""
    with contextlib.suppress(OSError):
        status = unfinished.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            if time.time() - status.st_ctime > _LINK_SECONDS:
                unfinished.unlink()
            return
        file = os.open(unfinished, os.O_RDWR)  # NFS locks only what is open for writing
        try:
            if lock_file(file):  # without locks, nobody can tell
                unfinished.unlink()
        finally:
            os.close(file)


def lock_file(file: int) -> bool | None:
    """Lock an open file for this process, until it is closed; False if another has done so, None without locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that has none
        return None
    return True


@contextlib.contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    """Says of errors that writing `size` bytes to `path` meets what can be done about them; their kind stays the same."""
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


def _reserve(file: int, size: int) -> None:
    """Take the space now: a disk that is too small is found before hours of work, not after."""
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
            # Not on this system, or not between these file systems.
            copied = os.pwrite(target, os.pread(source, min(count, 1 << 22), source_offset), target_offset)
        if not copied:
            raise FileFormatError("A file became shorter while it was copied; restore it and copy again.")
        source_offset, target_offset, count = source_offset + copied, target_offset + copied, count - copied


# --- tables ------------------------------------------------------------------------------


def table_file_name(layer: int, part: int = 0, parts: int = 1) -> str:
    """`engram-layer-00001.safetensors`; of several parts, `engram-layer-00001-00000-of-00002.safetensors`."""
    return f"engram-layer-{layer:05d}{f'-{part:05d}-of-{parts:05d}' if parts > 1 else ''}.safetensors"


def table_file_names(stored: StoredTable) -> list[str]:
    """What the files of a table's parts are called in a model folder."""
    return [table_file_name(stored.layer, index, len(stored.parts)) for index in range(len(stored.parts))]


def is_table_file(name: str) -> bool:
    """Whether a file of a model folder is named as `save_tables` names its files."""
    return name == MANIFEST_NAME or re.fullmatch(r"engram-layer-[0-9-]+(-of-\d+)?\.safetensors", name) is not None


def table_head(d: TableDescription) -> bytes:
    """The header of a table file, padded to a page."""
    count = d.rows[1] - d.rows[0]
    tensors = [(d.tensors["weight"], d.dtype, (count, d.width))]
    if d.scale_dtype:
        tensors.append((d.tensors["scale"], d.scale_dtype, (count, d.width // d.scale_block)))
    return header_bytes(tensors, {METADATA_KEY: d.to_json()}, PAGE)


def write_manifest(folder: str | os.PathLike, entries: dict[int, dict]) -> None:
    """Write `engram_tables.json`, complete or not at all; write it last.

    Args:
        entries: by layer; see [`manifest_entry`].
    """
    tables = {str(layer): entries[layer] for layer in sorted(entries)}
    write_json(Path(folder) / MANIFEST_NAME, {"format_version": FORMAT_VERSION, "tables": tables})


def manifest_entry(
    parts: Iterable[tuple[str, tuple[int, int], dict[str, str]]], description: TableDescription | None = None
) -> dict:
    """One layer's entry of a manifest.

    Args:
        parts: file name, `(first, stop)` and tensor names by `"weight"` and `"scale"` of every part, in row order.
        description: for files that do not describe themselves.
    """
    entry: dict = {}
    for file, rows, names in parts:
        for kind, tensor in names.items():
            entry.setdefault(kind, []).append({"file": file, "tensor": tensor, "rows": list(rows)})
    if description is not None:
        members = asdict(description)
        entry["description"] = {name: members[name] for name in members if name not in ("rows", "tensors")}
    return entry


def can_be_linked(stored: StoredTable, files: dict[Path, int], folder: Path) -> bool:
    """Whether `pass_on` has nothing to copy."""
    return stored.has_own_files and all(can_link(source, path, folder) for path, source in files.items())


def pass_on(
    stored: StoredTable,
    files: dict[Path, int],
    folder: Path,
    description: TableDescription,
    symbolic: bool = False,
) -> dict:
    """Make an unchanged table part of `folder`; returns its entry of the manifest.

    Files that hold nothing but this table are linked, or copied whole. Out of files that hold other tensors too, the
    table is copied into files of its own.

    Args:
        files: open file of every path in `stored`.
        description: of the table, for files that are written.
        symbolic: as in [`link_or_copy`].
    """
    names = table_file_names(stored)
    sources = [files[part.file.path] for part in stored.parts]
    ranges = [(part.first, part.stop) for part in stored.parts]
    if stored.has_own_files:
        for part, name, source in zip(stored.parts, names, sources, strict=True):
            link_or_copy(source, part.file.path, folder / name, symbolic)
        tensors = [part.names for part in stored.parts]
        self_describing = METADATA_KEY in stored.parts[0].file.metadata
        return manifest_entry(zip(names, ranges, tensors, strict=True), None if self_describing else description)
    for part, name, source in zip(stored.parts, names, sources, strict=True):
        with FileWriter(folder / name, table_head(description.with_rows(part.first, part.stop))) as writer:
            for kind, span in part.spans.items():
                writer.copy(description.tensors[kind], span, source)
    return manifest_entry((name, rows, description.tensors) for name, rows in zip(names, ranges, strict=True))


_BY_REFERENCE = ContextVar("tables are saved by reference", default=False)


@contextlib.contextmanager
def tables_by_reference() -> Iterator[None]:
    """Within it, `save_tables` makes symbolic links where it cannot make hard ones: for a folder that is only uploaded.

    That is a temporary one, perhaps on a file system in memory with no room for tables.
    """
    token = _BY_REFERENCE.set(True)
    try:
        yield
    finally:
        _BY_REFERENCE.reset(token)


def save_tables(model, folder: str | os.PathLike) -> None:
    """Bring the tables of an `EngramModel` that are not in its state dict to a folder that it is saved to.

    They have not changed since they were loaded, so their files are linked, or copied inside the kernel.

    Raises:
        TableFormatError: a file changed since it was loaded.
        OSError: the folder cannot be written; the message says why.
    """
    folder, entries = Path(folder), {}
    for index, (layer, memory) in enumerate(model.memories().items()):
        source = memory.table.source
        if source is not None:
            folder.mkdir(parents=True, exist_ok=True)
            description = describe_table(model.hashing, index, width=source.width, dtype=source.stored.dtype)
            nearest = _nearest(source, folder)
            entries[layer] = pass_on(nearest.stored, nearest.files, folder, description, _BY_REFERENCE.get())
    if entries:
        write_manifest(folder, entries)
        # What is only uploaded is gone soon.
        for layer, stored in read_tables(folder).items() if not _BY_REFERENCE.get() else ():
            model.memories()[layer].table.source.saved = stored, MappedRows(stored).digests


def _nearest(source: MappedRows, folder: Path) -> MappedRows:
    """A table's own files, or those that the last save made of them if only these can be linked to `folder`."""
    source.require_unchanged()
    if source.saved is not None and not _takes_no_space(source, folder):
        with contextlib.suppress(TableFormatError):  # that save is gone, or was written over
            saved = MappedRows(*source.saved)
            if _takes_no_space(saved, folder):
                return saved
    return source


def _takes_no_space(source: MappedRows, folder: Path) -> bool:
    if _BY_REFERENCE.get():
        return source.stored.has_own_files
    return can_be_linked(source.stored, source.files, folder)


def remove_stale_tables(model, folder: str | os.PathLike) -> None:
    """Remove table files that an earlier save left in a folder, and that are not of the `EngramModel` saved there now.

    To be called when its weights are written: until then, these files may be the only copy of a resident table.
    """
    sources = [memory.table.source for memory in model.memories().values()]
    current = {name for source in sources if source is not None for name in table_file_names(source.stored)}
    current |= {MANIFEST_NAME} if current else set()
    for path in Path(folder).iterdir():
        if is_table_file(path.name) and path.name not in current:
            path.unlink()

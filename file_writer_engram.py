"""Writing files that are whole or not there: written beside their name, by one process at a time, and renamed when complete."""

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from .safetensors_engram import FileFormatError, TensorSpan, parse_head

try:
    import fcntl
except ModuleNotFoundError:  # not a Unix system
    fcntl = None

# Linux' request to share the blocks of one file with another (include/uapi/linux/fs.h).
_FICLONE = 0x40049409
# What systems and file systems answer that have no links, or not between these two places.
_CANNOT_LINK = {getattr(errno, name) for name in ("EXDEV", "EPERM", "EMLINK", "ENOTSUP", "ENOSYS", "ENOENT", "EACCES")}


class FileWriter:
    """Writes one safetensors file, in any order; as a context manager, it leaves a whole file or none.

    Args:
        path: of the file.
        head: what it begins with; see `safetensors_engram.header_bytes`.

    Raises:
        ValueError: another process is writing the file.
        OSError: it cannot be written; the message says what is missing.
    """

    def __init__(self, path: str | os.PathLike, head: bytes):
        self.path = Path(path)
        self.header = parse_head(self.path, head)
        with self._explained():
            self._unfinished, self._file = _begin(self.path)
        try:
            with self._explained():
                _reserve(self._file, self.header.size)
                _write_all(self._file, head, 0)
        except BaseException:
            self._abandon()
            raise

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
        if kind is not None:
            self._abandon()
            return
        with self._explained():
            os.replace(self._unfinished, self.path)
            os.close(self._file)  # last, since it is locked until then

    def _explained(self):
        return _explained(self.path, self.header.size)

    def _abandon(self) -> None:
        self._unfinished.unlink(missing_ok=True)
        os.close(self._file)


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
    file = _create(target)
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


def _aside(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return Path(f"{path}.{secrets.token_hex(8)}.unfinished")


def still_names(path: Path, source: int) -> bool:
    """Whether the file that is open as `source` still has its name, and no other file took that."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(source))
    except OSError:
        return False


def _copy_file(source: int, target: Path, size: int) -> None:
    unfinished, file = _begin(target)
    try:
        _copy_range(source, 0, file, 0, size)
        os.replace(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        os.close(file)


def write_json(path: Path, content: dict) -> None:
    """Write a small JSON file, complete or not at all."""
    unfinished, text = _aside(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with _explained(path, len(text)):
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def _begin(path: Path) -> tuple[Path, int]:
    """Open the file that is to become `path`, empty; locked, and in place of one that was left by a killed process.

    Raises:
        ValueError: another process is writing it.
    """
    unfinished = Path(f"{path}.unfinished")
    while True:
        # What is there already is not emptied: it may be written by others, or be a link to another file.
        with contextlib.suppress(FileExistsError):
            file = _create(unfinished)
            if lock_file(file) is not False and still_names(unfinished, file):
                return unfinished, file
            os.close(file)
            continue
        is_left = _is_left(unfinished)
        if is_left is None:  # nobody can tell
            unfinished = _aside(path)
            return unfinished, _create(unfinished)
        if not is_left:
            raise ValueError(f"{path} is being written by another process; wait for it, or name another folder.")


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)


def _is_left(unfinished: Path) -> bool | None:
    """Whether a file that is there was left by a killed process, and is gone now; None if the file system has no locks."""
    if unfinished.is_symlink():
        unfinished.unlink(missing_ok=True)
        return True
    try:
        file = os.open(unfinished, os.O_RDWR | os.O_NONBLOCK)  # NFS locks only what is open for writing
    except FileNotFoundError:
        return True
    try:
        is_left = lock_file(file)
        if is_left and still_names(unfinished, file):
            unfinished.unlink()
    finally:
        os.close(file)
    return is_left


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
            message = f"{size:,} bytes do not fit there; free space, or write to another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"the file cannot be written ({error.strerror}); choose a folder that is writable"
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

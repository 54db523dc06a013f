"""Claims of folders that one process writes to at a time, without importing torch or transformers."""

import contextlib
import errno
import io
import json
import os
import socket
import time
from pathlib import Path

from .safetensors_engram import EXCHANGE_PREFIX, POLL_SECONDS, SAVE_PREFIX, EngramError, lock_file, still_names

LOCK_NAME = ".engram-lock"


def is_hidden_file(name: str) -> bool:
    """Return whether a file or folder in a target belongs to a running or killed save."""
    return name == LOCK_NAME or name.startswith((SAVE_PREFIX, EXCHANGE_PREFIX))


class FolderInUseError(EngramError):
    """Another process, or another thread, is writing to a folder."""


class FolderClaim:
    """The right to write to a folder, which ends with the process.

    It is a locked file in the folder that names its process. On file systems without locks the file alone counts, and
    one of an ended process of this machine is taken over.

    Args:
        folder: is made if it is missing, and removed again on release if nothing was put into it.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.path = self.folder / LOCK_NAME
        self._file: io.FileIO | None = None
        self._made_folder = False

    def take(self, wait: float = 0.0) -> "FolderClaim":
        """Claim the folder before anything is written to it.

        Args:
            wait: seconds to wait for the holder of the claim.

        Raises:
            FolderInUseError: it is claimed; the message names the process, its machine and the time. Nothing was
                changed.
            OSError: the folder cannot be written.
        """
        self.make_folder()
        deadline = time.monotonic() + wait
        while self._file is None:
            holder = self._try()
            if holder is not None and time.monotonic() >= deadline:
                known = {"pid", "host", "since"} <= holder.keys()
                who = "process {pid} on {host} (since {since})".format(**holder) if known else "another process"
                raise FolderInUseError(
                    f"{self.folder} is being written by {who}; wait for it to end, or name another folder "
                    f"(if that process is not writing there, delete {self.path})."
                )
            if holder is not None:
                time.sleep(POLL_SECONDS)
        return self

    def release(self) -> None:
        """Let other processes write; do nothing if the folder was not claimed."""
        if self._file is not None:
            if os.name == "nt":  # Windows cannot remove an open file.
                self._file.close()
            with contextlib.suppress(OSError):
                self.path.unlink()  # It is removed while it is locked, so that no process locks a file without a name.
            self._file.close()
            self._file = None
        if self._made_folder:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def __enter__(self) -> "FolderClaim":
        return self.take()

    def __exit__(self, *_: object) -> None:
        self.release()

    def make_folder(self) -> None:
        """Make the folder if it is missing."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.folder.mkdir()
                self._made_folder = True
            except FileExistsError:
                if self.folder.is_file():
                    raise NotADirectoryError(errno.ENOTDIR, f"{self.folder} is a file; name a folder") from None
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def _try(self) -> dict | None:
        """Try once to claim the folder; return the data on its holder if there is one."""
        try:
            file = open(self.path, "x+b", buffering=0)  # noqa: SIM115 (it is held open as long as the claim)
        except FileExistsError:
            return _remove_abandoned(self.path)
        except FileNotFoundError:  # Another process removed the empty folder as an abandoned one.
            self.make_folder()
            return None
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        # Between the two calls, another process may remove the file as an abandoned one.
        if lock_file(file.fileno()) is False or not still_names(self.path, file.fileno()):
            file.close()
            return None
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())
        self._file = file
        return None


def _unwritable(folder: Path, error: OSError) -> OSError:
    """Return the same error, with advice if there is any."""
    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return error
    return OSError(error.errno, f"{folder} cannot be written ({error.strerror}); choose a folder that is writable")


def _remove_abandoned(path: Path) -> dict | None:
    """Remove the lock file of a process that has ended; otherwise, return its data on the process."""
    try:
        # NFS locks only files that are open for writing. Opening a pipe in its place must not block.
        file = os.open(path, os.O_RDWR | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    try:
        is_abandoned, holder = lock_file(file), _read_holder(file)
        if is_abandoned is None:
            is_abandoned = _has_ended(holder)
        if not is_abandoned:
            return holder
        if still_names(path, file):
            path.unlink()
        return None
    finally:
        os.close(file)


def _read_holder(file: int) -> dict:
    # The process that holds the lock may not have written its name yet; a moment is enough for that.
    for _ in range(20):
        os.lseek(file, 0, os.SEEK_SET)
        with contextlib.suppress(ValueError, OSError):
            holder = json.loads(os.read(file, 4096))
            return holder if isinstance(holder, dict) else {}
        time.sleep(POLL_SECONDS / 2)
    return {}


def _has_ended(holder: dict) -> bool:
    """Return whether a lock file, on a file system without locks, is that of an ended process of this machine."""
    if holder.get("host") != socket.gethostname() or type(holder.get("pid")) is not int or os.name == "nt":
        return False  # (On Windows, a query of a process would end it.)
    try:
        os.kill(holder["pid"], 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False

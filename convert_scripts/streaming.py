"""The engine of every conversion: it writes output files from byte recipes, streamed, checked and resumable.

An `OutputFile` is a list of parts in the order of their bytes: ranges copied from source files, literal bytes, and computed
bytes (dequantization) produced chunk by chunk. Nothing ever holds a whole tensor. A file is written as `NAME.part`, synced,
and renamed; only then its size and checksum go into a journal. A conversion that was killed and is started again keeps
the journalled files and rewrites the others, so the result does not depend on where it stopped. The manifest, written last, replaces the journal.

Checksums are CRC-32: they detect damage, not manipulation, and cost a fraction of the copying. (SHA-256 halved the
throughput on a machine with two busy cores.)
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..claiming_engram import LOCK_NAME, FolderClaim, FolderInUseError
from ..safetensors_engram import (
    UNFINISHED,
    TensorSpan,
    header_bytes,
    is_file_name,
    json_bytes,
    parse_json,
    read_json,
    write_file,
)
from .safetensors_files import ConversionError

MANIFEST_NAME = "conversion_manifest.json"
JOURNAL_NAME = ".conversion-journal"
FORMAT_VERSION = 1
# A chunk is small enough to be hashed and written while it is in the processor's cache.
CHUNK_BYTES = 1 << 20
# Several files at once hide the wait for the disk; reading, checksums and writing release the interpreter lock.
WORKERS = 4

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Part(Protocol):
    """Some consecutive bytes of an output file."""

    size: int

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Produce exactly `size` bytes; a chunk is valid until the next one is requested."""
        ...


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes known in advance."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        yield self.data


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of a source file, unchanged."""

    path: Path
    offset: int
    size: int

    def chunks(self) -> Iterator[memoryview]:
        """Read with `pread`, not through a memory map: a file that shrinks meanwhile causes an error, not a crash."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, self.size)))
        with self.path.open("rb") as file:
            done = 0
            while done < self.size:
                count = os.preadv(file.fileno(), [buffer[: self.size - done]], self.offset + done)
                if count == 0:
                    raise ConversionError(
                        f"{self.path} became shorter while it was read; convert from a complete copy."
                    )
                yield buffer[:count]
                done += count


@dataclass(frozen=True, slots=True)
class Computed:
    """`size` bytes which `produce` yields in order."""

    size: int
    produce: Callable[[], Iterable[bytes | memoryview]]

    def chunks(self) -> Iterator[bytes | memoryview]:
        yield from self.produce()


def copy_of(span: TensorSpan) -> Copy:
    """Return the unchanged bytes of a tensor."""
    return Copy(span.path, span.offset, span.size)


@dataclass(frozen=True)
class Tensor:
    """A tensor of an output file, and the parts that give its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: list[Part] = field(repr=False)


@dataclass(frozen=True)
class OutputFile:
    """A file to write: `parts` in order, or `link`, the file with the same bytes, which is linked instead of copied.

    `tensors` lists its contents for readers: name -> (dtype, shape).
    """

    name: str
    parts: list[Part] = field(default_factory=list, repr=False)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict, repr=False)
    link: Path | None = None

    @property
    def size(self) -> int:
        return sum(part.size for part in self.parts)


def tensor_file(name: str, tensors: list[Tensor], head: bytes | None = None) -> OutputFile:
    """Return a safetensors file with the given tensors in this order; `head` overrides the header, byte for byte."""
    if head is None:
        head = header_bytes((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    parts: list[Part] = [Literal(head), *(part for tensor in tensors for part in tensor.parts)]
    return OutputFile(name, parts, {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors})


@dataclass(frozen=True)
class Plan:
    """A whole conversion: large `files` that are streamed, `documents` written after them, and the `provenance` of
    both.

    `provenance` (source, options, shapes: all that determines the bytes) identifies the conversion: it resumes, or verifies,
    only if the same provenance is recorded.
    """

    files: list[OutputFile]
    documents: dict[str, bytes]
    provenance: dict

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json_bytes(self.provenance)).hexdigest()

    @property
    def bytes_to_write(self) -> int:
        return sum(file.size for file in self.files if not file.link) + sum(map(len, self.documents.values()))


def run_plan(plan: Plan, target: Path) -> int:
    """Execute `plan` in `target`, an empty or new folder, or a folder in which the same plan was interrupted.

    Returns:
        The number of bytes written: 0 if the folder is a finished conversion of the same plan already.

    Raises:
        ConversionError: the folder holds something else, cannot be written, or the disk is full, or another process is
            writing to it. Nothing is left under a final name that is not complete, and files already complete are kept
            for the next start.
    """
    try:
        # A finished conversion may be in a folder where nothing can be written.
        if _is_finished(plan, target) and _is_whole(plan, target):
            _remove_abandoned_claim(target)
            return 0
        with FolderClaim(target):
            return _run_claimed(plan, target)
    except FolderInUseError as error:
        raise ConversionError(str(error)) from error
    except OSError as error:
        raise _explain(error, target) from error


def _remove_abandoned_claim(target: Path) -> None:
    """Remove the claim of a process that was killed between its last file and its end, if that is possible."""
    if (target / LOCK_NAME).exists():
        with contextlib.suppress(OSError, FolderInUseError), FolderClaim(target):
            pass


def _run_claimed(plan: Plan, target: Path) -> int:
    if _is_finished(plan, target):
        if _is_whole(plan, target):  # Another process has finished it in the meantime.
            return 0
        _reopen(plan, target)
    with _Journal(plan, target) as journal:
        todo = [file for file in plan.files if not _is_done(file, target, journal.done)]
        # Large files come first: a table of 100 GB at the end would be written by one thread alone.
        todo.sort(key=lambda file: file.size, reverse=True)
        needed = sum(file.size for file in todo if not file.link) + sum(map(len, plan.documents.values()))
        _check_space(needed, target)
        _write_files(todo, target, journal)
        _write_documents(plan, target, journal.done)
        return needed


def _is_finished(plan: Plan, target: Path) -> bool:
    manifest, journal = target / MANIFEST_NAME, target / JOURNAL_NAME
    if journal.exists() or not manifest.is_file():
        return False
    return read_manifest(target)["fingerprint"] == plan.fingerprint


def _is_whole(plan: Plan, target: Path) -> bool:
    """Return whether a finished conversion still has its files; documents may have been edited since."""
    files = read_manifest(target)["files"]
    documents = all((target / name).is_file() for name in plan.documents)
    return documents and all(_is_done(file, target, files) for file in plan.files)


def _reopen(plan: Plan, target: Path) -> None:
    """Make a finished conversion that lost files an interrupted one, which continues with the remaining files."""
    files = read_manifest(target)["files"]
    kept = [{"name": file.name, **files[file.name]} for file in plan.files if _is_done(file, target, files)]
    lines = [{"fingerprint": plan.fingerprint}, *kept]
    write_file(target / JOURNAL_NAME, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    (target / MANIFEST_NAME).unlink()


def read_manifest(folder: Path) -> dict:
    """Return the manifest of a finished conversion."""
    manifest = read_json(folder / MANIFEST_NAME)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise ConversionError(
            f"{folder / MANIFEST_NAME} has format version {manifest.get('format_version')!r}, but this release reads "
            f"{FORMAT_VERSION}; use the release that wrote it."
        )
    files = manifest.get("files")
    is_listed = isinstance(files, dict) and all(_is_record(name, record) for name, record in files.items())
    if not is_listed or not isinstance(manifest.get("fingerprint"), str):
        raise ConversionError(
            f"{folder / MANIFEST_NAME} does not list files with their sizes and checksums; it is damaged, convert again."
        )
    return manifest


def _is_record(name, record) -> bool:
    """Return whether parsed JSON names a file below the folder, its size, and its checksum if it has one."""
    return (
        isinstance(name, str)
        and all(map(is_file_name, name.split("/")))
        and isinstance(record, dict)
        and type(record.get("size")) is int
        and record["size"] >= 0
        and isinstance(record.get("crc32", ""), str)
    )


class _Journal:
    """The record of finished files in a claimed folder. An incomplete last line counts as absent."""

    def __init__(self, plan: Plan, target: Path):
        self.path = target / JOURNAL_NAME
        self.fingerprint = plan.fingerprint
        self.done: dict[str, dict] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> "_Journal":
        if not self.path.exists():
            self._start()
        self._file = self.path.open("r+b")
        self._read()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # A start that wrote nothing removes its journal, so that a start with other options is not refused. A file may exist
        # without being on record, if the process was interrupted between writing and recording it.
        with self._lock:
            self._is_closed = True
            if kind is None or not (self.done or self._strangers()):
                self.path.unlink()
            self._file.close()

    def _strangers(self) -> list[str]:
        """Return names of files in the folder that this module did not write."""
        names = sorted(path.name for path in self.path.parent.iterdir() if path.name not in (JOURNAL_NAME, LOCK_NAME))
        return [name for name in names if not (name.startswith(JOURNAL_NAME) and name.endswith(UNFINISHED))]

    def _start(self) -> None:
        if strangers := self._strangers():
            raise ConversionError(
                f"{self.path.parent} is not empty (it holds {strangers[0]}) and no interrupted conversion; "
                f"choose a new or an empty folder."
            )
        write_file(self.path, json.dumps({"fingerprint": self.fingerprint}).encode() + b"\n")

    def _read(self) -> None:
        lines = self._file.read().splitlines(keepends=True) or [b""]
        complete = [line for line in lines[1:] if line.endswith(b"\n")]
        begin, *records = [parse_json(line, str(self.path)) for line in [lines[0], *complete]]
        if begin.get("fingerprint") != self.fingerprint:
            raise ConversionError(
                f"{self.path.parent} holds an interrupted conversion of another source or with other options; "
                f"repeat that command, or choose an empty folder."
            )
        if not all(_is_record(record.get("name"), record) for record in records):
            raise ConversionError(f"{self.path} is damaged; empty {self.path.parent}, and convert again.")
        self.done = {record["name"]: record for record in records}
        self._file.truncate(sum(map(len, [lines[0], *complete])))
        self._file.seek(0, os.SEEK_END)

    def finish(self, put_in_place: Callable[[], object], record: dict) -> None:
        """Put a file in place and record it.

        Raises:
            _Interrupted: the conversion has ended; an interrupt may leave a thread of which its pool knows nothing.
        """
        with self._lock:
            if self._is_closed:
                raise _Interrupted
            put_in_place()
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
            self.done[record["name"]] = record


class _removed_on_error:
    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.path.unlink(missing_ok=True)


def free_bytes(target: Path) -> int:
    """Return the free space on the disk where `target` is or will be."""
    existing = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _check_space(needed: int, target: Path) -> None:
    free = free_bytes(target)
    if needed > free:
        raise ConversionError(
            f"The conversion writes {format_bytes(needed)}, but the disk of {target} has {format_bytes(free)} free; "
            f"free some space or choose another disk."
        )


def _write_files(todo: list[OutputFile], target: Path, journal: _Journal) -> None:
    from tqdm import tqdm

    stop = threading.Event()
    total = sum(file.size for file in todo if not file.link)
    # With `disable=None`, no bar is shown unless the error stream is a terminal.
    with (
        tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar,
        ThreadPoolExecutor(WORKERS) as pool,
    ):
        jobs = []
        try:
            for file in todo:
                jobs.append(pool.submit(_write_file, file, target, journal, bar.update, stop))
            finished, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        finally:
            # The first error or keyboard interrupt stops the other files, too.
            stop.set()
            for job in jobs:
                job.cancel()
    for job in finished:
        job.result()


def _is_done(file: OutputFile, target: Path, done: dict[str, dict]) -> bool:
    path = target / file.name
    return file.name in done and path.is_file() and path.stat().st_size == file.size


def _write_file(
    file: OutputFile, target: Path, journal: _Journal, advance: Callable[[int], object], stop: threading.Event
) -> None:
    path = target / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if (source := file.link) is not None:
        journal.finish(lambda: _link(source, path), {"name": file.name, "size": file.size, "linked": True})
        return
    part = path.with_name(path.name + ".part")
    with _removed_on_error(part):
        checksum = _stream(file, part, advance, stop)
        journal.finish(lambda: part.replace(path), {"name": file.name, "size": file.size, "crc32": checksum})


class _Interrupted(Exception):
    pass


def _stream(file: OutputFile, path: Path, advance: Callable[[int], object], stop: threading.Event) -> str:
    checksum = 0
    with path.open("wb", buffering=0) as out:
        for part in file.parts:
            for chunk in part.chunks():
                if stop.is_set():
                    raise _Interrupted
                checksum = zlib.crc32(chunk, checksum)
                _write_all(out.fileno(), chunk)
                advance(len(chunk))
        if out.tell() != file.size:
            raise ConversionError(
                f"{file.name} came out with {out.tell()} bytes instead of {file.size}, which is a bug: report it."
            )
        os.fsync(out.fileno())
    return f"{checksum:08x}"


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def _link(source: Path, path: Path) -> None:
    """Hard-link `path` to `source`, so that the target outlives the source folder; on another disk, link it
    symbolically.
    """
    source = source.resolve()
    path.unlink(missing_ok=True)
    try:
        path.hardlink_to(source)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP):
            raise
        path.symlink_to(source)


def _write_documents(plan: Plan, target: Path, done: dict[str, dict]) -> None:
    """Write documents after the data, and the manifest after the documents: a folder with a manifest is complete."""
    for name, data in plan.documents.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        write_file(target / name, data)
    records = [done[file.name] for file in plan.files]
    records += [_record(name, data) for name, data in plan.documents.items()]
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": plan.fingerprint,
        **plan.provenance,
        "files": {record["name"]: {k: v for k, v in record.items() if k != "name"} for record in records},
    }
    write_file(target / MANIFEST_NAME, json_bytes(manifest))


def _record(name: str, data: bytes) -> dict:
    return {"name": name, "size": len(data), "crc32": f"{zlib.crc32(data):08x}"}


def _explain(error: OSError, target: Path) -> ConversionError:
    if error.errno in _DISK_FULL:
        return ConversionError(
            f"The disk of {target} is full or a quota is reached ({error.strerror}); free some space and start again, "
            f"finished files are kept."
        )
    name = error.filename or target
    return ConversionError(
        f"{name} cannot be read or written ({error.strerror or error}); check the path and its rights."
    )


def verify_files(folder: Path, manifest: dict) -> int:
    """Read every file again and compare it with the manifest; return the number of bytes read.

    Linked files belong to the source: only their size is compared.

    Raises:
        ConversionError: a file is missing or differs; the message names it.
    """
    from tqdm import tqdm

    read = 0
    total = sum(record["size"] for record in manifest["files"].values() if "crc32" in record)
    stop = threading.Event()
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar, ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(_verify_file, folder / name, record, stop) for name, record in manifest["files"].items()]
        try:
            for job in as_completed(jobs):
                read += job.result()
                bar.update(read - bar.n)
        finally:
            # The first damage or keyboard interrupt is reported before hundreds of gigabytes are read.
            stop.set()
            for job in jobs:
                job.cancel()
    return read


def _verify_file(path: Path, record: dict, stop: threading.Event) -> int:
    if not path.is_file() or path.stat().st_size != record["size"]:
        raise ConversionError(f"{path} is missing or has another size than the manifest says; convert again.")
    if "crc32" not in record:
        return 0
    checksum = 0
    for chunk in Copy(path, 0, record["size"]).chunks():
        if stop.is_set():
            raise _Interrupted
        checksum = zlib.crc32(chunk, checksum)
    if f"{checksum:08x}" != record["crc32"]:
        raise ConversionError(
            f"{path} differs from the checksum in the manifest; it is damaged or edited: delete it and convert again."
        )
    return record["size"]


def format_bytes(count: float) -> str:
    """Return a byte count for people, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


class Stopwatch:
    """Seconds since its creation, for the line that reports a rate."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def report(self, target: Path, done: str, count: int, as_json: bool = False) -> str:
        """Return what was `done` to the `count` bytes of `target`, for people or as JSON."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        if as_json:
            return json.dumps({"target": str(target), f"bytes_{done}": count, "seconds": seconds}, indent=2)
        if count == 0:
            return f"{target}: already complete"
        return f"{target}: {done} {format_bytes(count)} in {seconds:.1f} s ({format_bytes(count / seconds)}/s)"


def print_plan(plan: Plan, target: Path, as_json: bool = False) -> None:
    """Print the files that `plan` would write to `target`, and the disk space they need."""
    needed, free = plan.bytes_to_write, free_bytes(target)
    if as_json:
        files = [
            {"name": file.name, "bytes": file.size, "linked_to": file.link and str(file.link)} for file in plan.files
        ]
        print(
            json.dumps({"target": str(target), "files": files, "bytes_to_write": needed, "bytes_free": free}, indent=2)
        )
        return
    for file in plan.files:
        print(f"{format_bytes(file.size):>10}  {file.name}" + (f" -> {file.link}" if file.link else ""))
    print(f"{format_bytes(needed)} to write, {format_bytes(free)} free on the disk of {target}")

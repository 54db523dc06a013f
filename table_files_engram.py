"""Table files: writing them in the format, quantizing them, and passing them on without reading them.

Files are written beside their name and renamed when complete, so that a name always stands for a whole file.
"""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .memory_engram import dequantize_rows, quantize_rows
from .safetensors_engram import TensorSpan, header_bytes, parse_head
from .table_format_engram import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    METADATA_KEY,
    NAMES,
    PAGE,
    ROW_FORMATS,
    StoredTable,
    TableDescription,
    TableFormatError,
)

try:
    import fcntl
except ModuleNotFoundError:  # not a Unix system
    fcntl = None

# Bytes of rows held at once while a table is converted.
_STEP_BYTES = 4 << 20
# What systems and file systems answer that have no hard links, or not between these two places.
_CANNOT_LINK = {getattr(errno, name) for name in ("EXDEV", "EPERM", "EMLINK", "ENOTSUP", "ENOSYS", "ENOENT", "EACCES")}


def table_file_name(layer: int, part: int = 0, parts: int = 1) -> str:
    """`engram-layer-00001.safetensors`; of several parts, `engram-layer-00001-00000-of-00002.safetensors`."""
    return f"engram-layer-{layer:05d}{f'-{part:05d}-of-{parts:05d}' if parts > 1 else ''}.safetensors"


class FileWriter:
    """Writes one safetensors file, in any order; as a context manager, it leaves a whole file or none.

    Args:
        path: of the file.
        head: what it begins with; see `safetensors_engram.header_bytes`.

    Raises:
        OSError: the file cannot be written; its message says what is missing.
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


class TableWriter(FileWriter):
    """Writes one table file, row range by row range.

    Args:
        path: of the file.
        description: of the table, with the `rows` of this file. Its scales follow its rows.
    """

    def __init__(self, path: str | os.PathLike, description: TableDescription):
        self.description = description
        super().__init__(path, _head(description))

    def write(self, first: int, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Write rows from table row `first` on, as stored: `values` `[n, W]`, `scale` `[n, W / C]`."""
        row = first - self.description.rows[0]
        for kind, tensor in (("weight", values), ("scale", scale)):
            if tensor is not None:
                begin = self.header.tensors[self.description.tensors[kind]].offset
                data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                with self._explained():
                    _write_all(self._file, memoryview(data).cast("B"), begin + row * data[0].nbytes)


def _head(d: TableDescription) -> bytes:
    """The header of a table file, padded to a page."""
    count = d.rows[1] - d.rows[0]
    tensors = [(d.tensors["weight"], d.dtype, (count, d.width))]
    if d.scale_dtype:
        tensors.append((d.tensors["scale"], d.scale_dtype, (count, d.width // d.scale_block)))
    return header_bytes(tensors, {METADATA_KEY: d.to_json()}, PAGE)


def _begin(path: Path) -> tuple[Path, int]:
    """Open the file that is to become `path`, empty; locked, and in place of one that was left by a killed process.

    Raises:
        ValueError: another process is writing it.
    """
    unfinished = Path(f"{path}.unfinished")
    while True:
        # What is there already is not emptied: it may be written by others, or be a link to another file.
        with contextlib.suppress(FileExistsError):
            file = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            if _lock(file) and _still_names(unfinished, file):
                return unfinished, file
            os.close(file)
            continue
        with contextlib.suppress(FileNotFoundError):
            file = os.open(unfinished, os.O_RDONLY)
            try:
                if not _lock(file):
                    raise ValueError(
                        f"{path} is being written by another process; wait for it, or name another folder."
                    )
                if _still_names(unfinished, file):
                    unfinished.unlink()
            finally:
                os.close(file)


def _lock(file: int) -> bool:
    """Lock an open file for this process, until it is closed; False if another has done so."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@contextlib.contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = f"{path} needs {size:,} bytes, which do not fit there; free space, or write to another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            message = f"{path} cannot be written ({error.strerror}); choose a folder that is writable"
        else:
            raise
        raise OSError(error.errno, message) from error


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
            raise TableFormatError("A table file became shorter while it was copied; restore it and copy again.")
        source_offset, target_offset, count = source_offset + copied, target_offset + copied, count - copied


def write_table_file(
    path: str | os.PathLike,
    description: TableDescription,
    rows: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
) -> None:
    """Write one table file from `(values, scale)` of consecutive row ranges, which need not fit into memory together.

    Raises:
        ValueError: there are more or fewer rows than `description` says, or of another dtype or width.
        OSError: the file cannot be written.
    """
    first, stop = description.rows
    with TableWriter(path, description) as writer:
        for values, scale in rows:
            _require_like(description, values, scale)
            if first + len(values) > stop:
                break
            writer.write(first, values, scale)
            first += len(values)
        else:
            if first == stop:
                return
        raise ValueError(f"{path} was to hold rows {list(description.rows)}, but rows for another number were given.")


def _require_like(d: TableDescription, values: torch.Tensor, scale: torch.Tensor | None) -> None:
    given = NAMES.get(values.dtype), tuple(values.shape[1:]), None if scale is None else NAMES.get(scale.dtype)
    if given != (d.dtype, (d.width,), d.scale_dtype):
        raise ValueError(
            f"Rows of dtype, width and scale dtype {given} were given for layer {d.layer}, expected "
            f"{(d.dtype, (d.width,), d.scale_dtype)}."
        )


def link_or_copy(source: int, path: Path, target: Path, symbolic: bool = False) -> None:
    """Make `target` the file that is open as `source` and was opened at `path`: a hard link, or else a copy.

    The bytes do not pass through this process. (On file systems that share blocks, the copy takes no space either.)

    Args:
        symbolic: instead of a copy, a symbolic link.

    Raises:
        OSError: the target cannot be written.
    """
    status = os.fstat(source)
    with _explained(target, status.st_size):
        makers = [os.link, os.symlink] if symbolic else [os.link]
        if not _still_names(target, source) and not any(_linked(source, path, target, make) for make in makers):
            _copy_file(source, target, status.st_size)


def _linked(source: int, path: Path, target: Path, make: Callable[[str, Path], None]) -> bool:
    if not _still_names(path, source):
        return False
    link = _aside(target)
    try:
        make(os.path.realpath(path), link)  # a link to a symbolic link of a download cache would break with it
        os.replace(link, target)
    except OSError as error:
        if error.errno in _CANNOT_LINK:
            return False
        raise
    finally:
        link.unlink(missing_ok=True)  # still there, too, if the target became the same file meanwhile
    return True


def _aside(path: Path) -> Path:
    """A name beside `path` that no other process uses."""
    return Path(f"{path}.{secrets.token_hex(8)}.unfinished")


def _still_names(path: Path, source: int) -> bool:
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


def write_manifest(folder: str | os.PathLike, entries: dict[int, dict]) -> None:
    """Write `engram_tables.json`, complete or not at all; write it last.

    Args:
        entries: by layer; see [`manifest_entry`].
    """
    tables = {str(layer): entries[layer] for layer in sorted(entries)}
    write_json(Path(folder) / MANIFEST_NAME, {"format_version": FORMAT_VERSION, "tables": tables})


def write_json(path: Path, content: dict) -> None:
    """Write a small JSON file, complete or not at all."""
    unfinished, text = _aside(path), json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with _explained(path, len(text)):
        try:
            unfinished.write_text(text, encoding="utf-8")
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


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


@dataclass
class QuantizationError:
    """What quantizing a table changed.

    Args:
        rows: rows compared.
        largest: largest difference of a channel.
        relative: root of the summed squared differences over that of the summed squares; 0 for a table of zeros.
    """

    rows: int = 0
    largest: float = 0.0
    squares: float = 0.0
    squared_differences: float = 0.0

    @property
    def relative(self) -> float:
        return (self.squared_differences / self.squares) ** 0.5 if self.squares else 0.0

    def add(self, rows: torch.Tensor, decoded: torch.Tensor) -> None:
        """Count float32 rows and what became of them."""
        difference = rows - decoded
        self.rows += len(rows)
        self.largest = max(self.largest, difference.abs().max().item())
        self.squares += rows.square().sum(dtype=torch.float64).item()
        self.squared_differences += difference.square().sum(dtype=torch.float64).item()


def quantize_table(
    source,
    path: str | os.PathLike,
    description: TableDescription,
    table_dtype: str,
    advance: Callable[[int], object] = lambda count: None,
) -> QuantizationError:
    """Write a float table to one file as float8 or int8, a few megabytes at a time.

    Args:
        source: what reads the rows; see `memory_engram.RowSource`.
        description: of the table as it is.
        table_dtype: `"float8_e4m3fn"`, by the rule of the release, or `"int8"`.
        advance: told after every step how many bytes of the source it has read.

    Returns:
        The difference it makes.

    Raises:
        ValueError: the table is quantized already, or cannot have this dtype, or holds NaN.
    """
    if description.scale_dtype is not None:
        raise ValueError(
            f"The table of layer {description.layer} is {description.dtype} already; quantize float rows."
        )
    target, error = _quantized(description, table_dtype), QuantizationError()
    step = max(1, _STEP_BYTES // (4 * description.width))
    with TableWriter(path, target) as writer:
        for first in range(*description.rows, step):
            values, _ = source.read(first, min(first + step, description.rows[1]))
            rows = values.to(torch.float32)
            quantized, scale = quantize_rows(rows, table_dtype)
            error.add(rows, dequantize_rows(quantized, scale))
            writer.write(first, quantized, scale)
            advance(values.nbytes)
    return error


def _quantized(description: TableDescription, table_dtype: str) -> TableDescription:
    dtype = NAMES[getattr(torch, table_dtype)]
    scale_dtype, block = ROW_FORMATS[dtype]
    name = description.tensors["weight"]
    return replace(
        description,
        dtype=dtype,
        scale_dtype=scale_dtype,
        scale_block=block or description.width,
        tensors={"weight": name, "scale": f"{name.removesuffix('weight')}scale"},
    )


def can_be_linked(stored: StoredTable, files: dict[Path, int], folder: Path) -> bool:
    """Whether `pass_on` has nothing to copy, as far as can be told without trying."""
    device = folder.stat().st_dev
    return stored.has_own_files and all(
        _still_names(path, source) and os.fstat(source).st_dev == device for path, source in files.items()
    )


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
    names = [table_file_name(stored.layer, index, len(stored.parts)) for index in range(len(stored.parts))]
    sources = [files[part.file.path] for part in stored.parts]
    ranges = [(part.first, part.stop) for part in stored.parts]
    if stored.has_own_files:
        for part, name, source in zip(stored.parts, names, sources, strict=True):
            link_or_copy(source, part.file.path, folder / name, symbolic)
        tensors = [part.names for part in stored.parts]
        self_describing = METADATA_KEY in stored.parts[0].file.metadata
        return manifest_entry(zip(names, ranges, tensors, strict=True), None if self_describing else description)
    for part, name, source in zip(stored.parts, names, sources, strict=True):
        with TableWriter(folder / name, description.with_rows(part.first, part.stop)) as writer:
            for kind, span in part.spans.items():
                writer.copy(description.tensors[kind], span, source)
    return manifest_entry((name, rows, description.tensors) for name, rows in zip(names, ranges, strict=True))

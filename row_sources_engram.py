"""Where rows come from that are no parameters: a table's files, mapped, or page-locked host memory.

Both are a [`~table_engram.RowSource`]. Rows are moved as bytes, whatever their dtype: a file may place them at any offset,
and not every device indexes every dtype.
"""

import contextlib
import hashlib
import math
import mmap
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers.utils import logging

from .safetensors_engram import EngramError, FileHeader, FileStamp, TensorSpan, reading, system_error
from .table_engram import TORCH_DTYPES, apply_global_scale
from .table_format_engram import StoredTable, TableFormatError

_READ_BYTES = 16 << 20
# Blocks of a file, spread evenly, that are compared when only its times have changed, and with the manifest (its format says so).
_SAMPLES, _SAMPLE_BYTES = 64, 4096


class RowBytes(NamedTuple):
    """Rows `first..` of a table as they are stored: uint8 `[n, bytes of a row]`, and the same of their scales."""

    first: int
    weight: torch.Tensor
    scale: torch.Tensor | None

    @classmethod
    def of(cls, first: int, tables: Sequence[torch.Tensor]) -> "RowBytes":
        """With or without scales."""
        return cls(first, tables[0], tables[1] if len(tables) > 1 else None)

    @property
    def tables(self) -> list[torch.Tensor]:
        """One or two."""
        return [self.weight] if self.scale is None else [self.weight, self.scale]


class MappedRows:
    """A table in its files, paged in as rows are read: see [`~table_engram.RowSource`].

    Opening costs no memory whatever the size; processes that map the same file share its pages. It is never copied:
    `deepcopy` and pickling (spawned workers) give another view of the same files.

    Args:
        stored: the checked table.
        digests: samples that the files are to have; see [`FileMap`]. None if the headers tell enough.

    Attributes:
        parts: the rows of every file, over the file.
        global_scale: float32 `[1]`, which divides all scales; None for rows without.
        saved: folder of the last save of these rows, and digests in hex of its table files by name; None before one.

    Raises:
        TableFormatError: a file is not the one that was checked any more.
        OSError: a file cannot be opened; the message says what to do.
    """

    residency = "mapped"

    def __init__(self, stored: StoredTable, digests: dict[Path, bytes] | None = None):
        self.stored = stored
        self.num_rows, self.width = stored.num_rows, stored.width
        spans = stored.parts[0].row_spans
        self._dtypes = [TORCH_DTYPES[span.dtype] for span in spans.values()]
        self.row_bytes = [
            span.shape[1] * dtype.itemsize for span, dtype in zip(spans.values(), self._dtypes, strict=True)
        ]
        headers = {part.file.path: part.file for part in stored.parts}
        self._maps = {path: FileMap(headers[path]) for path in sorted(headers)}
        if digests is not None and digests != self.digests:
            raise _changed(next(path for path in headers if digests.get(path) != self.digests[path]))
        self.global_scale = self._read_global_scale()
        self.saved: tuple[Path, dict[str, str]] | None = None
        self.parts = self._open_parts()

    def _open_parts(self) -> list[RowBytes]:
        parts = []
        for part in self.stored.parts:
            views = [self._maps[part.file.path].view(span) for span in part.row_spans.values()]
            parts.append(RowBytes.of(part.first, views))
        return parts

    def _read_global_scale(self) -> torch.Tensor | None:
        found = [
            (kind, self._maps[part.file.path].read(span, 0, 1).view(torch.float32).view(1))
            for part in self.stored.parts
            for kind, span in part.spans.items()
            if kind not in part.row_spans
        ]
        # compressed-tensors converts ModelOpt's scales in the same way.
        scales = [scale.reciprocal() if kind == "scale_2" else scale for kind, scale in found]
        if any(not scale.isfinite() or scale <= 0 or scale != scales[0] for scale in scales):
            raise TableFormatError(
                f"The global scale of layer {self.stored.layer} in {self.stored.parts[0].file.path} is {[float(s) for s in scales]}, "
                "expected one positive number; write the table again."
            )
        return scales[0] if scales else None

    def __repr__(self) -> str:
        return f"{self.residency}, dtype={self.stored.dtype if self._dtypes[0] == torch.uint8 else self._dtypes[0]}"

    def __deepcopy__(self, memo: dict) -> "MappedRows":
        return self

    def __reduce__(self):
        return type(self), (self.stored, self.digests)

    @property
    def files(self) -> dict[Path, int]:
        """File descriptors of the open files, by path; they have been checked not to have changed."""
        self.require_unchanged()
        return {path: opened.descriptor for path, opened in self._maps.items()}

    @property
    def digests(self) -> dict[Path, bytes]:
        """A digest of samples of each file, which another file would not have."""
        return {path: opened.digest for path, opened in self._maps.items()}

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in [`~table_engram.RowSource`].

        Raises:
            TableFormatError: a file was cut off or overwritten under the running process.
        """
        self.require_unchanged()
        return self.typed(gather_bytes(self.parts, row_ids.cpu()))

    def request(self, row_ids: np.ndarray) -> None:
        """Have the system read what sorted int64 `row_ids` `[n]` lie in, in file order, all at once.

        Does not wait for it, unless for room in the disk's queue. Does nothing where the system takes no such requests.
        """
        for part, rows in zip(self.stored.parts, self.parts, strict=True):
            here = slice(*np.searchsorted(row_ids, [rows.first, rows.first + len(rows.weight)]))
            for span, size in zip(part.row_spans.values(), self.row_bytes, strict=True):
                self._maps[part.file.path].request(span.offset + (row_ids[here] - rows.first) * size, size)

    def release(self) -> None:
        """Give back the pages that were read. They stay in the page cache, but are no memory of this process any more."""
        for opened in self._maps.values():
            with contextlib.suppress(OSError, AttributeError):  # not every system and file system takes advice
                opened._map.madvise(mmap.MADV_DONTNEED)

    def typed(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stored values of gathered bytes, and what multiplies them (or None)."""
        values, scale = self._typed(rows)
        return values, apply_global_scale(scale, self.global_scale)

    def _typed(self, rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        values, *scales = [some.view(dtype) for some, dtype in zip(rows, self._dtypes, strict=True)]
        return values, scales[0] if scales else None

    def read(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in [`~table_engram.RowSource`], by large reads instead of page faults."""
        self.require_unchanged()
        pieces: dict[str, list[torch.Tensor]] = {}
        for part in self.stored.parts:
            begin, end = max(first, part.first), min(stop, part.stop)
            for kind, span in part.row_spans.items() if begin < end else ():
                piece = self._maps[part.file.path].read(span, begin - part.first, end - part.first)
                pieces.setdefault(kind, []).append(piece)
        return self._typed([some[0] if len(some) == 1 else torch.cat(some) for some in pieces.values()])

    def scan(self, kinds: Sequence[str], step: int) -> Iterator[tuple[int, str, torch.Tensor]]:
        """All rows in file order, `step` at a time: first row, `"weight"` or `"scale"`, and the numbers `[n, ...]`.

        Args:
            kinds: which of the two.
        """
        self.require_unchanged()
        for part in self.stored.parts:
            for kind in kinds:
                span = part.spans.get(kind)
                for first in range(0, 0 if span is None else span.shape[0], step):
                    stop = min(first + step, span.shape[0])
                    rows = self._maps[part.file.path].read(span, first, stop)
                    yield part.first + first, kind, rows.view(TORCH_DTYPES[span.dtype])

    def require_unchanged(self) -> None:
        """Raise `TableFormatError` if a file was cut off or overwritten since it was opened; see [`FileMap.changed`]."""
        # Reading a page behind the end of a truncated file kills the process, so the size is checked every time.
        for path, opened in self._maps.items():
            if opened.changed():
                raise _changed(path)


class PinnedRows(MappedRows):
    """A table copied once into page-locked host memory, which a GPU reads by itself, only the rows it needs.

    Args:
        stored: the checked table.

    Attributes:
        readers: the memory as tensors of the GPUs that asked for rows; None for one that cannot read it.

    Raises:
        ValueError: there is no GPU, whose driver would lock the pages, or the driver refuses to lock that much.
    """

    residency = "pinned"

    def _open_parts(self) -> list[RowBytes]:
        if not torch.cuda.is_available():
            raise EngramError(
                "engram_residency='pinned' keeps tables in page-locked memory for a GPU, but there is none; use 'mapped'."
            )
        self.readers: dict[torch.device, RowBytes | None] = {}
        # The CPU is named because transformers builds models with "meta" as the default device.
        tables = [torch.empty((self.num_rows, size), dtype=torch.uint8, device="cpu") for size in self.row_bytes]
        for table in tables:
            _lock_pages(self, table)
        step, name = max(1, _READ_BYTES // max(self.row_bytes)), f"Reading the table of layer {self.stored.layer}"
        with logging.tqdm(total=self.stored.size, desc=name, unit="B", unit_scale=True, delay=1) as progress:
            for first, kind, rows in self.scan(("weight", "scale"), step):
                table = tables[0 if kind == "weight" else 1]
                table[first : first + len(rows)].copy_(rows.view(torch.uint8))
                progress.update(rows.nbytes)
        return [RowBytes.of(0, tables)]

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in [`~table_engram.RowSource`]; on the device of the ids if that can read the memory."""
        if self.is_visible_from(row_ids.device):
            return self.typed(gather_bytes([self.readers[row_ids.device]], row_ids))
        return self.typed(gather_bytes(self.parts, row_ids.cpu()))

    def request(self, row_ids: np.ndarray) -> None:
        """Nothing to do: rows are in memory."""

    def is_visible_from(self, device: torch.device) -> bool:
        """Whether a device can read the memory itself."""
        if device.type != "cuda":
            return False
        if device not in self.readers:
            views = [_device_view(table, device) for table in self.parts[0].tables]
            self.readers[device] = None if any(view is None for view in views) else RowBytes.of(0, views)
        return self.readers[device] is not None


def gather_bytes(parts: Sequence[RowBytes], row_ids: torch.Tensor) -> list[torch.Tensor]:
    """Rows, and scales if there are any, of int64 `row_ids` `[n]` on the device of `parts`: uint8 `[n, bytes of a row]`."""
    if len(parts) == 1:
        return [table.index_select(0, row_ids) for table in parts[0].tables]
    gathered = [table.new_empty((row_ids.numel(), table.shape[1])) for table in parts[0].tables]
    for part in parts:
        (here,) = torch.where((row_ids >= part.first) & (row_ids < part.first + len(part.weight)))
        for rows, table in zip(gathered, part.tables, strict=True):
            rows[here] = table.index_select(0, row_ids[here] - part.first)
    return gathered


def _changed(path: Path) -> TableFormatError:
    return TableFormatError(
        f"{path} was changed while it was in use (cut off or overwritten); restore the file and load the model again."
    )


class FileMap:
    """A whole file mapped for random reads, and the means to tell whether it is still the same.

    Args:
        header: what was read from the file when it was checked.

    Attributes:
        digest: of the header and of samples of the data.

    Raises:
        TableFormatError: the file is another one by now.
        OSError: it cannot be opened; the message says what to do.
    """

    def __init__(self, header: FileHeader):
        self._header, self._descriptor = header, -1
        with reading(header.path):
            self._descriptor = os.open(header.path, os.O_RDONLY)
            self._stamp = FileStamp.read(self._descriptor)
            if self._stamp.size != header.size:
                raise _changed(header.path)
            # Shared and read-only: a private mapping counts as memory that may be needed, and is refused beyond what
            # there is.
            self._map = mmap.mmap(self._descriptor, self._stamp.size, access=mmap.ACCESS_READ)
        with contextlib.suppress(OSError, AttributeError):  # not every system and file system takes advice
            self._map.madvise(mmap.MADV_RANDOM)
        is_checked = header.stamp is None or header.stamp.is_same_file(self._stamp)
        if not is_checked or self._peek(0, len(header.head)) != header.head:
            raise _changed(header.path)
        self.digest = self._digest_of_blocks()

    def __del__(self):
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @property
    def descriptor(self) -> int:
        """The descriptor of the open file."""
        return self._descriptor

    def _peek(self, offset: int, size: int) -> bytes:
        """Bytes of the file. A page that is read in the map would count as memory of this process, with all around it."""
        if not hasattr(os, "pread"):  # not a Unix system
            return self._map[offset : offset + size]
        with reading(self._header.path):
            return os.pread(self._descriptor, size, offset)

    def _digest_of_blocks(self) -> bytes:
        size, head = self._stamp.size, len(self._header.head)
        first = head + np.arange(_SAMPLES) * max(size - _SAMPLE_BYTES - head, 0) // (_SAMPLES - 1)
        self.request(first, min(_SAMPLE_BYTES, size - head))
        samples = [self._peek(0, head), *(self._peek(at, _SAMPLE_BYTES) for at in first.tolist())]
        return hashlib.sha256(b"".join(samples)).digest()

    def changed(self) -> bool:
        """Whether the file was cut off or overwritten since it was opened.

        Where only its times differ, somebody touched or linked it, or wrote to it. The header and samples of the data tell
        these apart, but for a write that leaves all samples as they were.
        """
        stamp = FileStamp.read(self._descriptor)
        if stamp == self._stamp:
            return False
        if not stamp.is_same_file(self._stamp) or self._digest_of_blocks() != self.digest:
            return True
        self._stamp = stamp
        return False

    def read(self, span: TensorSpan, first: int, stop: int) -> torch.Tensor:
        """Rows `first..stop-1` of a tensor, as bytes in memory of their own."""
        if not hasattr(os, "preadv"):  # not a Unix system
            return self.view(span)[first:stop].clone()
        size = span.size // math.prod(span.shape[:1])
        rows = torch.empty((stop - first, size), dtype=torch.uint8, device="cpu")
        target, offset = memoryview(rows.numpy()).cast("B"), span.offset + first * size
        while target:
            try:
                count = os.preadv(self._descriptor, [target], offset)
            except OSError as error:
                raise system_error(error, self._header.path, "read") from error
            if count == 0:
                raise _changed(self._header.path)
            target, offset = target[count:], offset + count
        return rows

    def request(self, offsets: np.ndarray, size: int) -> None:
        """Begin to read `size` bytes from each of the sorted `offsets`; neighbouring pages are one request."""
        if not len(offsets) or not hasattr(os, "posix_fadvise"):
            return
        first, last = offsets // mmap.PAGESIZE, (offsets + size - 1) // mmap.PAGESIZE
        begins = np.flatnonzero(np.append(True, first[1:] > last[:-1] + 1))
        ends = np.append(begins[1:], len(first)) - 1
        runs = zip((first[begins] * mmap.PAGESIZE).tolist(), ((last[ends] + 1) * mmap.PAGESIZE).tolist(), strict=True)
        with contextlib.suppress(OSError):  # not every file system takes advice
            for begin, end in runs:
                os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def view(self, span: TensorSpan) -> torch.Tensor:
        """A tensor `[R, ...]` as bytes over the file."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # nothing writes to it
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=span.size, offset=span.offset)
        return raw.view(math.prod(span.shape[:1]), -1)


class _DeviceMemory:
    """Page-locked memory as CUDA libraries exchange it: the CUDA array interface, version 3 (defined by Numba)."""

    def __init__(self, memory: torch.Tensor):
        self.memory = memory  # kept as long as a view of it
        address = {"data": (memory.data_ptr(), False), "strides": None}
        self.__cuda_array_interface__ = {"shape": tuple(memory.shape), "typestr": "|u1", "version": 3, **address}


def _lock_pages(owner: PinnedRows, memory: torch.Tensor) -> None:
    """Lock the pages of `memory` until `owner` is gone.

    Not by `pin_memory`, which may take up to twice the size.
    """
    address, cudart = memory.data_ptr(), torch.cuda.cudart()
    error = cudart.cudaHostRegister(address, memory.nbytes, 0)
    if int(error) != 0:
        _forget_error()
        raise EngramError(
            f"The GPU's driver refused to lock {memory.nbytes / 1e9:.1f} GB of memory "
            f"({cudart.cudaGetErrorString(error)}); free memory, raise `ulimit -l`, or use engram_residency='mapped'."
        )
    unlock = weakref.finalize(owner, _unlock_pages, address, owner.readers, os.getpid())
    unlock.atexit = False  # the end of the process unlocks the pages


def _forget_error() -> None:
    """Clear CUDA's last error, which the next kernel of another library would report otherwise."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def _unlock_pages(address: int, readers: Iterable[torch.device], process: int) -> None:
    if process != os.getpid():  # a forked process has no CUDA, and the pages are its parent's
        return
    for device in readers:
        torch.cuda.synchronize(device)  # it may still be reading
    torch.cuda.cudart().cudaHostUnregister(address)


def _device_view(memory: torch.Tensor, device: torch.device) -> torch.Tensor | None:
    """Page-locked uint8 `memory` `[R, ...]` as a tensor of the GPU, which reads it over the bus; None if it cannot.

    Some versions of torch make a copy for a GPU that was not current when the memory was locked; one row shows that
    before the whole table is asked for.
    """
    if torch.as_tensor(_DeviceMemory(memory[:1]), device=device).data_ptr() != memory.data_ptr():
        return None
    view = torch.as_tensor(_DeviceMemory(memory), device=device)
    ends = torch.tensor([0, len(memory) - 1], device="cpu")
    return view if torch.equal(view.index_select(0, ends.to(device)).cpu(), memory[ends]) else None

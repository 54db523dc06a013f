"""Fetching rows ahead: row ids depend on token ids alone, so the rows of all layers can be read before the backbone runs.

Reading a page that is not in memory takes the disk some tens of microseconds, and a thread that touches one waits. Asked for
beforehand, in file order, many pages are read at once. Rows for a GPU travel there while it computes the layers before.
"""

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from .hot_rows_engram import HotRows
from .row_sources_engram import MappedRows, PinnedRows
from .table_engram import EngramTable, RowReader

try:
    import resource
except ModuleNotFoundError:  # not a Unix system
    resource = None

# What all tables together keep of rows that are read often, while rows come from a disk.
HOT_BYTES = 256 << 20
# Below one page from disk per so many rows, what remains is faster without another thread.
_ROWS_PER_PAGE = 256
_BLOCKS_PER_PAGE = 8  # of 512 bytes, as the system counts them


class SideStream:
    """A queue of copies and reads for a GPU beside the one it computes in.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device, self._stream = device, torch.cuda.Stream(device)

    def run(self, read: Callable[[], Sequence[torch.Tensor]], needs: torch.Tensor | None = None) -> "Arrival":
        """Queue `read`, after what is queued for computing so far if it `needs` a tensor of that."""
        if needs is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            needs.record_stream(self._stream)  # a forward that is given up does not hold it until it was read
        with torch.cuda.stream(self._stream):
            return Arrival(list(read()), self._stream.record_event())


class Arrival:
    """Tensors that a side stream is still producing."""

    def __init__(self, tensors: list[torch.Tensor], event: torch.cuda.Event):
        self._tensors, self._event = tensors, event

    def wait(self) -> list[torch.Tensor]:
        """The tensors, for use in the current stream, which waits for them; this thread does not."""
        current = torch.cuda.current_stream(self._tensors[0].device)
        current.wait_event(self._event)
        for tensor in self._tensors:
            tensor.record_stream(current)  # not to be used again for others before it is read
        return self._tensors


class FetchedRows:
    """Rows of one layer that another thread is fetching from files: see [`~table_engram.RowReader`].

    Args:
        source: the table.
        row_ids: int64, any shape, on any device; duplicates are read once.
        hot: rows to be had without reading; gets those that are read. None to do without.
        stream: where to bring the rows to; None to leave them in host memory.

    Attributes:
        row_ids: the distinct ones: the read ones first, in file order.
        misses: how many are read.

    Raises:
        TableFormatError: a file was cut off or overwritten under the running process.
    """

    def __init__(
        self, source: MappedRows, row_ids: torch.Tensor, hot: HotRows | None = None, stream: SideStream | None = None
    ):
        source.require_unchanged()
        self.width = source.width
        self._source, self._hot, self._stream = source, hot, stream
        row_ids = np.unique(row_ids.detach().cpu().numpy())  # sorted: in file order
        found, kept = hot.find(row_ids) if hot is not None else (np.zeros(len(row_ids), bool), ())
        self.row_ids = np.concatenate([row_ids[~found], row_ids[found]])
        self.misses = len(row_ids) - int(found.sum())
        self._rows = [
            torch.empty((len(row_ids), size), dtype=torch.uint8, device="cpu", pin_memory=stream is not None)
            for size in source.row_bytes
        ]
        for rows, some in zip(self._rows, kept, strict=False):
            rows[self.misses :] = torch.from_numpy(some)
        self._steps: list[Future] = []

    def request(self, pool: ThreadPoolExecutor) -> None:
        """Have the pages read. To be called for all layers before any is gathered."""
        self._steps.append(pool.submit(self._source.request, self.row_ids[: self.misses]))

    def gather(self, pool: ThreadPoolExecutor) -> None:
        """Have the rows gathered, and brought to where they are needed."""
        self._steps.append(pool.submit(self._gather))

    def keep(self, pool: ThreadPoolExecutor) -> None:
        """Have the next forward profit from what this one reads. Nothing waits for that."""
        if self._hot is not None:
            pool.submit(self._keep)

    def _keep(self) -> None:
        if self._steps[-1].exception() is None:  # else the rows are not there
            self._hot.offer(self.row_ids[: self.misses], self._read)

    @property
    def _read(self) -> list[np.ndarray]:
        return [rows.numpy()[: self.misses] for rows in self._rows]

    def _gather(self) -> Arrival | None:
        self._source.require_unchanged()  # again: the pages may have taken a while
        ids = self.row_ids[: self.misses]
        for part in self._source.parts:
            here = slice(*np.searchsorted(ids, [part.first, part.first + len(part.weight)]))
            for table, rows in zip(part.tables, self._read, strict=True):
                # In mode "clip", numpy writes straight to `out`, and it lets other threads run meanwhile.
                np.take(table.numpy(), ids[here] - part.first, 0, rows[here], "clip")
        return None if self._stream is None else self._upload(self._stream)

    def _upload(self, stream: SideStream) -> Arrival:
        tensors = [torch.from_numpy(self.row_ids).pin_memory(), *self._rows]
        return stream.run(lambda: [tensor.to(stream.device, non_blocking=True) for tensor in tensors])

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in [`~table_engram.RowReader`], of ids that were asked for; waits for them."""
        arrival = [step.result() for step in self._steps][-1]
        known, *rows = [torch.from_numpy(self.row_ids), *self._rows] if arrival is None else arrival.wait()
        known, order = known.sort()
        places = order[torch.searchsorted(known, row_ids.to(known.device))]
        return self._source.typed([some.index_select(0, places) for some in rows])


class ReadByDevice:
    """Rows of one layer that a GPU is reading from page-locked memory: see [`~table_engram.RowReader`].

    Args:
        source: the table, visible from the device of `row_ids`.
        row_ids: int64, any shape.
        stream: of that device.
    """

    def __init__(self, source: PinnedRows, row_ids: torch.Tensor, stream: SideStream):
        self.width = source.width
        self._arrival = stream.run(
            lambda: [rows for rows in source.fetch(row_ids.reshape(-1)) if rows is not None], needs=row_ids
        )

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in [`~table_engram.RowReader`], of the very ids that were asked for."""
        values, *scales = self._arrival.wait()
        return values, scales[0] if scales else None


class Prefetcher:
    """Fetches the rows of all layers of a model ahead of its forward, where that pays.

    For a GPU it always does. On the CPU it pays while rows come from a disk, which is told by what this process has read
    from disks: the system counts that anyway, and it includes what other code reads, which at worst has rows fetched ahead
    for nothing. Only then rows that are read often are kept, too (see [`~hot_rows_engram.HotRows`]): in warm memory
    they are at hand where they are.

    Args:
        tables: of all layers, in the order of the row ids.
        when: `"cold"` (as above), `"always"` or `"never"`.
        hot_bytes: what hot rows of all tables may take; 0 to keep none.

    Attributes:
        statistics: forwards that were seen, and that were fetched for; of those the rows asked for, the distinct ones
            that were kept from before, and that were read.
    """

    def __init__(self, tables: Sequence[EngramTable], when: str = "cold", hot_bytes: int = HOT_BYTES):
        self.tables, self.when, self.hot_bytes = list(tables), when, hot_bytes
        self.statistics = {"forwards": 0, "prefetched": 0, "rows_asked": 0, "rows_hot": 0, "rows_read": 0}
        self._is_cold, self._pages, self._rows_read = True, 0, None
        self._begin()

    def _begin(self) -> None:
        # A forked process inherits neither the thread nor whatever that was writing.
        self._process = os.getpid()
        # One: what was asked for first comes first, and is kept when it has come. It ends with its pool, and that with this.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engram-prefetch")
        self._hot: tuple[int, list[HotRows]] | None = None
        self._streams: dict[torch.device, SideStream] = {}

    @property
    def when(self) -> str:
        """`"cold"`, `"always"` or `"never"`; takes effect with the next forward."""
        return self._when

    @when.setter
    def when(self, when: str) -> None:
        if when not in ("cold", "always", "never"):
            raise ValueError(f"Prefetching is {when!r}; it must be 'cold', 'always' or 'never'.")
        self._when = when

    @torch.compiler.disable
    def start(self, row_ids: torch.Tensor) -> tuple[RowReader, ...] | None:
        """Begin to fetch the rows `row_ids` `[L, ...]`; None if the layers had better read them themselves."""
        self.statistics["forwards"] += 1
        pays = self._pays(row_ids.is_cuda)
        self._rows_read = 0 if pays else row_ids.numel()  # `_prepare` counts those it reads
        if not pays:
            return None
        if self._process != os.getpid():
            self._begin()
        self.statistics["prefetched"] += 1
        self.statistics["rows_asked"] += row_ids.numel()
        if self._can_read(row_ids.device):
            return self._have_read(row_ids)
        fetched = tuple(self._prepare(index, some, row_ids.device) for index, some in enumerate(row_ids.cpu()))
        for step in (FetchedRows.request, FetchedRows.gather, FetchedRows.keep):
            for rows in fetched:
                step(rows, self._pool)
        return fetched

    def _pays(self, is_cuda: bool) -> bool:
        if self.when == "never" or not all(isinstance(table.source, MappedRows) for table in self.tables):
            return False
        self._is_cold = self._came_from_disk()
        return self.when == "always" or self._is_cold or is_cuda

    def _came_from_disk(self) -> bool:
        """Whether the rows that were read last had to come from a disk."""
        if resource is None or any(isinstance(table.source, PinnedRows) for table in self.tables):
            return False
        before, self._pages = self._pages, _pages_from_disks()
        # Of the first forward nothing is known; after a restart the file is most often cold.
        return self._rows_read is None or (self._pages - before) * _ROWS_PER_PAGE > self._rows_read

    def _can_read(self, device: torch.device) -> bool:
        sources = [table.source for table in self.tables]
        return all(isinstance(source, PinnedRows) and source.is_visible_from(device) for source in sources)

    def _have_read(self, row_ids: torch.Tensor) -> tuple[ReadByDevice, ...]:
        self.statistics["rows_read"] += row_ids.numel()
        stream = self._stream(row_ids.device)
        return tuple(
            ReadByDevice(table.source, some, stream) for table, some in zip(self.tables, row_ids, strict=True)
        )

    def _prepare(self, index: int, row_ids: torch.Tensor, device: torch.device) -> FetchedRows:
        fetched = FetchedRows(self.tables[index].source, row_ids, self._hot_rows(index), self._stream(device))
        self._rows_read += fetched.misses
        self.statistics["rows_read"] += fetched.misses
        self.statistics["rows_hot"] += len(fetched.row_ids) - fetched.misses
        return fetched

    def _hot_rows(self, index: int) -> HotRows | None:
        if self.hot_bytes <= 0 or not (self._is_cold or self.when == "always"):
            return None
        if self._hot is None or self._hot[0] != self.hot_bytes:
            rows = sum(table.num_rows for table in self.tables)
            shares = [self.hot_bytes * table.num_rows // rows for table in self.tables]
            caches = [HotRows(table.source.row_bytes, share) for table, share in zip(self.tables, shares, strict=True)]
            self._hot = self.hot_bytes, caches
        return self._hot[1][index]

    def _stream(self, device: torch.device) -> SideStream | None:
        if device.type == "cuda" and device not in self._streams:
            self._streams[device] = SideStream(device)
        return self._streams.get(device)

    def __deepcopy__(self, memo: dict) -> "Prefetcher":
        return type(self)(copy.deepcopy(self.tables, memo), self.when, self.hot_bytes)

    def __reduce__(self):
        return type(self), (self.tables, self.when, self.hot_bytes)


def _pages_from_disks() -> int:
    """Pages that this process has had read so far: by asking for them, or (some file systems count only that) by waiting."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return max(usage.ru_inblock // _BLOCKS_PER_PAGE, usage.ru_majflt)

"""Prefetching: row ids depend on token ids alone, so the rows of all layers can be read before the backbone runs.

Reading a page that is not in memory takes tens of microseconds, in which the thread waits. If requested
beforehand, in file order, many pages are read together. Rows for a GPU are copied while it computes earlier layers.
"""

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from transformers.utils import logging

from .row_sources_engram import MappedRows, PinnedRows
from .safetensors_engram import EngramError
from .table_engram import EngramTable, RowReader
from .table_format_engram import free_host_memory

logger = logging.get_logger(f"transformers.{__name__}")


class SideStream:
    """A queue of copies and reads for a GPU beside its computing queue.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device):
        self.device, self._stream = device, torch.cuda.Stream(device)

    def run(self, read: Callable[[], Sequence[torch.Tensor]], needs: torch.Tensor | None = None) -> "Arrival":
        """Queue `read`, after the work queued for computing so far if it `needs` a tensor of that."""
        if needs is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            needs.record_stream(self._stream)  # An abandoned forward would free the tensor before it is read.
        with torch.cuda.stream(self._stream):
            return Arrival(list(read()), self._stream.record_event())


class Arrival:
    """Tensors that a side stream is still producing."""

    def __init__(self, tensors: list[torch.Tensor], event: torch.cuda.Event):
        self._tensors, self._event = tensors, event

    def wait(self) -> list[torch.Tensor]:
        """Return the tensors for use in the current stream, which waits for them; this thread does not."""
        current = torch.cuda.current_stream(self._tensors[0].device)
        current.wait_event(self._event)
        for tensor in self._tensors:
            tensor.record_stream(current)  # Its memory must not be reused before it is read.
        return self._tensors


class FetchedRows:
    """Rows of one layer that another thread fetches from files: see [`~table_engram.RowReader`].

    Args:
        source: the table.
        row_ids: int64, any shape, on any device; duplicates are read once.
        stream: the stream that copies the rows; None to leave them in host memory.

    Attributes:
        row_ids: the distinct ones, in file order.

    Raises:
        TableFormatError: a file was truncated or overwritten while the process uses it.
    """

    def __init__(self, source: MappedRows, row_ids: torch.Tensor, stream: SideStream | None = None):
        source.require_unchanged()
        self.width = source.width
        self._source, self._stream = source, stream
        self.row_ids = np.unique(row_ids.detach().cpu().numpy())
        self._rows = [
            torch.empty((len(self.row_ids), size), dtype=torch.uint8, device="cpu", pin_memory=stream is not None)
            for size in source.row_bytes
        ]
        self._steps: list[Future] = []

    def request(self, pool: ThreadPoolExecutor) -> None:
        """Ask the system to read the pages. Call this for all layers before any is gathered."""
        self._steps.append(pool.submit(self._source.request, self.row_ids))

    def gather(self, pool: ThreadPoolExecutor) -> None:
        """Copy the rows out of the pages, and to the device that needs them."""
        self._steps.append(pool.submit(self._gather))

    def _gather(self) -> Arrival | None:
        self._source.require_unchanged()  # The check is repeated, since reading the pages may have taken a while.
        for part in self._source.parts:
            here = slice(*np.searchsorted(self.row_ids, [part.first, part.first + len(part.weight)]))
            for table, rows in zip(part.tables, self._rows, strict=True):
                # In mode "clip", numpy writes straight to `out`, and it lets other threads run meanwhile.
                np.take(table.numpy(), self.row_ids[here] - part.first, 0, rows.numpy()[here], "clip")
        return None if self._stream is None else self._upload(self._stream)

    def _upload(self, stream: SideStream) -> Arrival:
        tensors = [torch.from_numpy(self.row_ids).pin_memory(), *self._rows]
        return stream.run(lambda: [tensor.to(stream.device, non_blocking=True) for tensor in tensors])

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return prefetched rows as in [`~table_engram.RowReader`]; wait for them."""
        arrival = [step.result() for step in self._steps][-1]
        known, *rows = [torch.from_numpy(self.row_ids), *self._rows] if arrival is None else arrival.wait()
        places = torch.searchsorted(known, row_ids.to(known.device))
        return self._source.typed([some.index_select(0, places) for some in rows])


class ReadByDevice:
    """Rows of one layer that a GPU is reading from page-locked memory: see [`~table_engram.RowReader`].

    Args:
        source: the table, visible from the device of `row_ids`.
        row_ids: int64, any shape.
        stream: a stream of that device.
    """

    def __init__(self, source: PinnedRows, row_ids: torch.Tensor, stream: SideStream):
        self.width = source.width
        self._arrival = stream.run(
            lambda: [rows for rows in source.fetch(row_ids.reshape(-1)) if rows is not None], needs=row_ids
        )

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the rows as in [`~table_engram.RowReader`], for the same ids as requested."""
        values, *scales = self._arrival.wait()
        return values, scales[0] if scales else None


class Prefetcher:
    """Fetches the rows of all layers of a model before its forward.

    Args:
        tables: the tables of all layers, in the order of the row ids.
        when: `"always"`, `"never"`, or `"auto"`: for a GPU always; on the CPU if the tables are larger than the free
            memory at the first forward, so that rows are read from disk again and again. With rows in memory, another
            thread costs more than it saves (`benchmarks/tables_gather.py`).
    """

    def __init__(self, tables: Sequence[EngramTable], when: str = "auto"):
        self.tables, self.when = list(tables), when
        self._is_larger_than_memory: bool | None = None
        self._begin()

    def _begin(self) -> None:
        # A forked process inherits neither the thread nor the streams.
        self._process = os.getpid()
        # One thread, so that requests finish in the order in which they were made. It ends when the pool is collected.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engram-prefetch")
        self._streams: dict[torch.device, SideStream] = {}

    @property
    def when(self) -> str:
        """The mode `"auto"`, `"always"` or `"never"`; a change takes effect with the next forward."""
        return self._when

    @when.setter
    def when(self, when: str) -> None:
        if when not in ("auto", "always", "never"):
            raise EngramError(f"Prefetching is {when!r}; it must be 'auto', 'always' or 'never'.")
        self._when = when

    @torch.compiler.disable
    def start(self, row_ids: torch.Tensor) -> tuple[RowReader, ...] | None:
        """Begin to fetch the rows `row_ids` `[L, ...]`; return None if the layers should read them directly."""
        if not all(isinstance(table.source, MappedRows) for table in self.tables) or not self.pays(row_ids.is_cuda):
            return None
        if self._process != os.getpid():
            self._begin()
        if self._can_read(row_ids.device):
            return self._read_by_device(row_ids)
        return self._fetch(row_ids)

    def pays(self, is_cuda: bool) -> bool:
        """Return whether prefetching saves time for a forward on a GPU, or on the CPU."""
        if self.when != "auto" or is_cuda:
            return self.when != "never"
        if self._is_larger_than_memory is None:
            self._is_larger_than_memory = sum(table.source.stored.size for table in self.tables) > free_host_memory()
        return self._is_larger_than_memory

    def _fetch(self, row_ids: torch.Tensor) -> tuple[FetchedRows, ...] | None:
        stream = self._stream(row_ids.device)
        fetched = tuple(
            FetchedRows(table.source, some, stream) for table, some in zip(self.tables, row_ids.cpu(), strict=True)
        )
        try:
            for step in (FetchedRows.request, FetchedRows.gather):
                for rows in fetched:
                    step(rows, self._pool)
        except RuntimeError as error:  # No thread can be started, or the process is ending.
            self._begin()  # This drops requests that would wait for a thread that never starts.
            logger.warning_once(f"Rows are read without prefetching, because no thread can be started ({error}).")
            return None
        return fetched

    def _can_read(self, device: torch.device) -> bool:
        sources = [table.source for table in self.tables]
        return all(isinstance(source, PinnedRows) and source.is_visible_from(device) for source in sources)

    def _read_by_device(self, row_ids: torch.Tensor) -> tuple[ReadByDevice, ...]:
        stream = self._stream(row_ids.device)
        return tuple(
            ReadByDevice(table.source, some, stream) for table, some in zip(self.tables, row_ids, strict=True)
        )

    def _stream(self, device: torch.device) -> SideStream | None:
        if device.type == "cuda" and device not in self._streams:
            self._streams[device] = SideStream(device)
        return self._streams.get(device)

    def __deepcopy__(self, memo: dict) -> "Prefetcher":
        return type(self)(copy.deepcopy(self.tables, memo), self.when)

    def __reduce__(self):
        return type(self), (self.tables, self.when)

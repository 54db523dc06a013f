"""Fetching rows ahead: row ids depend on token ids alone, so the rows of all layers can be read before the backbone runs.

Reading a page that is not in memory takes the disk some tens of microseconds, and a thread that touches one waits. Many
threads wait at once, and the disk serves them at once.
"""

import copy
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from .memory_engram import EngramTable, gather_stored
from .residency_engram import MappedRows

try:
    import resource
except ModuleNotFoundError:  # not a Unix system
    resource = None

# Requests in flight at once. More keep a fast disk busier, but every one of them is a thread.
THREADS = 32
# Rows a thread reads before it takes the next piece: long enough to be worth handing out, short enough to share evenly.
_LONGEST_PIECE = 256
# Below one page from disk per so many rows, what remains is faster without threads.
_ROWS_PER_FAULT = 256


class FetchedRows:
    """Rows of one layer that threads are fetching: see [`~memory_engram.RowSource`].

    Args:
        source: the table.
        row_ids: int64, any shape, on any device; duplicates are read once.

    Attributes:
        row_ids: the distinct ones, in file order.
    """

    def __init__(self, source: MappedRows, row_ids: torch.Tensor):
        self.num_rows, self.width = source.num_rows, source.width
        self._source = source
        self.row_ids = torch.unique(row_ids.detach().cpu())  # sorted: in file order
        _, weight, scale = source.parts[0]
        self._values = weight.new_empty((len(self.row_ids), weight.shape[1]))
        self._scales = None if scale is None else scale.new_empty((len(self.row_ids), scale.shape[1]))
        self._pending: list[Future] = []

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Begin to fetch."""
        self._source.require_unchanged()
        ids = self.row_ids.numpy()
        for first, weight, scale in self._source.parts:
            here = slice(*np.searchsorted(ids, [first, first + len(weight)]))
            for table, rows in ((weight, self._values), (scale, self._scales)):
                if table is not None:
                    self._submit(pool, _bytes(table), ids[here] - first, _bytes(rows)[here])

    def _submit(self, pool: ThreadPoolExecutor, table: np.ndarray, ids: np.ndarray, rows: np.ndarray) -> None:
        piece = min(_LONGEST_PIECE, -(-len(ids) // THREADS) or 1)
        for begin in range(0, len(ids), piece):
            some = slice(begin, begin + piece)
            # In mode "clip", numpy writes straight to `out`, and it lets other threads run meanwhile.
            self._pending.append(pool.submit(np.take, table, ids[some], 0, rows[some], "clip"))

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in [`~memory_engram.RowSource`], of ids that were asked for; waits for them."""
        while self._pending:
            self._pending.pop().result()
        places = torch.searchsorted(self.row_ids, row_ids)
        scales = None if self._scales is None else gather_stored(self._scales, places)
        return gather_stored(self._values, places), scales

    def read(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in [`~memory_engram.RowSource`]: of the table itself."""
        return self._source.read(first, stop)


def _bytes(rows: torch.Tensor) -> np.ndarray:
    return rows.view(torch.uint8).numpy()


class Prefetcher:
    """Fetches the rows of all layers of a model ahead of its forward, while that pays.

    It pays when rows come from a disk. Whether they do is told by the page faults that waited for one: the process
    counts them anyway, and they include those of other code, which at worst has rows fetched ahead for nothing.

    Args:
        tables: of all layers, in the order of the row ids.
        when: `"cold"` (while rows come from a disk), `"always"` or `"never"`.

    Attributes:
        statistics: forwards that were seen, and that were fetched for; rows asked for, and rows read for them.
    """

    def __init__(self, tables: Sequence[EngramTable], when: str = "cold"):
        if when not in ("cold", "always", "never"):
            raise ValueError(f"Prefetching is {when!r}; it must be 'cold', 'always' or 'never'.")
        self.tables, self.when = list(tables), when
        self.statistics = {"forwards": 0, "prefetched": 0, "rows_asked": 0, "rows_read": 0}
        self._faults: int | None = None
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    @torch.compiler.disable
    def start(self, row_ids: torch.Tensor) -> tuple[FetchedRows, ...] | None:
        """Begin to fetch the rows `row_ids` `[L, ...]`; None if the layers had better read them themselves."""
        self.statistics["forwards"] += 1
        if not self._pays(row_ids.numel()):
            return None
        ids = row_ids.cpu()
        fetched = tuple(FetchedRows(table.source, some) for table, some in zip(self.tables, ids, strict=True))
        for rows in fetched:
            rows.start(self._threads())
        self.statistics["prefetched"] += 1
        self.statistics["rows_asked"] += ids.numel()
        self.statistics["rows_read"] += sum(len(rows.row_ids) for rows in fetched)
        return fetched

    def _pays(self, rows: int) -> bool:
        if not all(
            isinstance(table.source, MappedRows) and table.source.residency == "mapped" for table in self.tables
        ):
            return False
        if self.when != "cold":
            return self.when == "always"
        if resource is None:
            return False
        before, self._faults = self._faults, resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        # Of the first forward nothing is known; after a restart the file is most often cold.
        return before is None or (self._faults - before) * _ROWS_PER_FAULT > rows

    def _threads(self) -> ThreadPoolExecutor:
        # A forked process inherits the pool, but not its threads. Threads end with their pool, and the pool with this.
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(THREADS, thread_name_prefix="engram-prefetch")
        return self._pool[1]

    def __deepcopy__(self, memo: dict) -> "Prefetcher":
        return type(self)(copy.deepcopy(self.tables, memo), self.when)

    def __reduce__(self):
        return type(self), (self.tables, self.when)

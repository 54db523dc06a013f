"""Rows that are read again and again, kept in memory.

N-gram traffic is Zipfian: a small part of the rows serves a large part of the reads. The page cache of the system keeps pages
of 4 KB, of which a hot row is a few hundred bytes; kept row by row, the same memory holds many times as many of them.
"""

import threading
from collections.abc import Sequence

import numpy as np

# Slots that a row may lie in. More find a better victim, and are all compared at every lookup.
_WAYS = 8
_MOST_USES = 15
# An odd number near 2^64 over the golden ratio spreads neighbouring ids over all sets (Knuth, vol. 3, section 6.4).
_SPREAD = np.int64(-7046029254386353131)


class HotRows:
    """A bounded, set-associative cache of rows that are used most.

    Every slot counts its uses. A row that misses takes the slot of its set with the fewest: at once if that has none left,
    or else it takes one use from each and is not kept. A row read once, as most are, so cannot drive out one read often.

    Args:
        row_bytes: bytes of what is kept of a row: values, and scales if there are any.
        limit: bytes that all of it may take; no memory is touched before it is needed.

    Attributes:
        capacity: rows that fit.
    """

    def __init__(self, row_bytes: Sequence[int], limit: int):
        sets = limit // (_WAYS * (sum(row_bytes) + np.int64().nbytes + np.uint8().nbytes))
        self.capacity = sets * _WAYS
        self._owners = np.zeros((sets, _WAYS), np.int64)  # row id + 1; 0 is free
        self._uses = np.zeros((sets, _WAYS), np.uint8)
        self._rows = [np.empty((self.capacity, size), np.uint8) for size in row_bytes]
        # Threads may run one model at once, and a row must not change while it is copied.
        self._lock = threading.Lock()

    def find(self, row_ids: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Which of the distinct int64 `row_ids` `[n]` are here (bool `[n]`), and copies of the bytes of those, in order."""
        if not self.capacity:
            return np.zeros(len(row_ids), bool), [rows[:0] for rows in self._rows]
        sets = self._sets(row_ids)
        with self._lock:
            same = self._owners[sets] == row_ids[:, None] + 1
            found = same.any(1)
            sets, ways = sets[found], same[found].argmax(1)
            self._uses[sets, ways] = np.minimum(self._uses[sets, ways], _MOST_USES - 1) + 1
            return found, [rows.take(sets * _WAYS + ways, axis=0) for rows in self._rows]

    def offer(self, row_ids: np.ndarray, rows: Sequence[np.ndarray]) -> None:
        """Keep what is worth it of the rows that `find` did not find.

        Args:
            row_ids: distinct, int64 `[n]`.
            rows: uint8 `[n, bytes]` each.
        """
        if not self.capacity:
            return
        # One newcomer a set at a time: two would take the same slot.
        sets, firsts = np.unique(self._sets(row_ids), return_index=True)
        with self._lock:
            ways = self._uses[sets].argmin(1)
            is_free = self._uses[sets, ways] == 0
            self._uses[sets[~is_free]] -= 1
            sets, ways, firsts = sets[is_free], ways[is_free], firsts[is_free]
            self._owners[sets, ways], self._uses[sets, ways] = row_ids[firsts] + 1, 1
            for kept, given in zip(self._rows, rows, strict=True):
                kept[sets * _WAYS + ways] = given[firsts]

    def _sets(self, row_ids: np.ndarray) -> np.ndarray:
        return (row_ids * _SPREAD >> 20) % len(self._owners)

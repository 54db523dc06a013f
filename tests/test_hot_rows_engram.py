"""Rows that are kept because they are read often: never others than asked for, never more than allowed."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engram_hf.hot_rows_engram import HotRows

WIDTHS = (24, 3)


def rows_of(row_ids: np.ndarray) -> list[np.ndarray]:
    """What the rows of these ids are in these tests."""
    return [((row_ids[:, None] * 7 + np.arange(width) * 13) % 251).astype(np.uint8) for width in WIDTHS]


def read(cache: HotRows, row_ids: np.ndarray) -> np.ndarray:
    """Which of the ids were found, right ones; the others are offered."""
    found, rows = cache.find(row_ids)
    for kept, expected in zip(rows, rows_of(row_ids[found]), strict=True):
        assert np.array_equal(kept, expected)
    cache.offer(row_ids[~found], [some[~found] for some in rows_of(row_ids)])
    return found


def zipf_batches(count: int, size: int, rows: int = 200_000, exponent: float = 1.1) -> list[np.ndarray]:
    """Distinct ids of each of `count` batches of Zipfian reads, spread over all ids."""
    generator = np.random.default_rng(0)
    share = 1 / np.arange(1, rows + 1) ** exponent
    ranks = np.searchsorted(share.cumsum() / share.sum(), generator.random((count, size)))
    names = generator.choice(1 << 40, rows, replace=False)
    return [np.unique(names[batch]) for batch in ranks]


def test_what_is_found_is_what_was_offered():
    cache, seen = HotRows(WIDTHS, 50_000), set()
    for row_ids in zipf_batches(100, 300):
        found = read(cache, row_ids)
        assert seen.issuperset(row_ids[found].tolist())
        seen.update(row_ids.tolist())
    assert len(seen) > 3 * cache.capacity  # so that there was something to give way


def test_it_keeps_to_its_limit():
    for limit in (0, 100, 1_000, 100_000):
        cache = HotRows(WIDTHS, limit)
        taken = [value for value in vars(cache).values() if isinstance(value, np.ndarray)] + cache._rows
        assert sum(array.nbytes for array in taken) <= limit
        assert cache.capacity * (sum(WIDTHS) + 9) > limit - 8 * (sum(WIDTHS) + 9)
        read(cache, np.arange(50))
        assert read(cache, np.arange(50)).any() == (limit >= 1_000)


def test_it_finds_most_of_zipfian_traffic_in_a_small_part_of_the_rows():
    batches = zipf_batches(400, 500)
    cache = HotRows(WIDTHS, 4_000 * (sum(WIDTHS) + 9))
    shares = [read(cache, row_ids).mean() for row_ids in batches]
    distinct = np.unique(np.concatenate(batches)).size
    assert cache.capacity < distinct / 7
    # What the best choice of as many rows, kept from the beginning, would find.
    reads = np.sort(np.unique(np.concatenate(batches), return_counts=True)[1])[::-1]
    best = reads[: cache.capacity].sum() / reads.sum()
    assert np.mean(shares[200:]) > 0.75 * best > 0.3


def test_rows_that_are_read_once_do_not_drive_out_those_read_often():
    cache = HotRows(WIDTHS, 100_000)
    often = np.arange(cache.capacity // 8)
    for _ in range(30):
        read(cache, often)
    assert read(cache, often).mean() > 0.95
    for first in range(1, 5):
        read(cache, first * 1_000_000 + np.arange(cache.capacity // 2))
    assert read(cache, often).mean() > 0.9


def test_rows_that_are_read_no_more_give_way():
    cache = HotRows(WIDTHS, 100_000)
    for row_ids in (np.arange(2 * cache.capacity), 1_000_000 + np.arange(cache.capacity // 4)):
        for _ in range(60):
            read(cache, row_ids)
    assert read(cache, row_ids).mean() > 0.9


@pytest.mark.parametrize("row_ids", [np.arange(0), np.array([(1 << 62) + 3, 1 << 40, 0])], ids=["none", "large"])
def test_any_ids(row_ids):
    cache = HotRows(WIDTHS, 10_000)
    read(cache, row_ids.astype(np.int64))
    assert read(cache, row_ids.astype(np.int64)).all()


def test_threads_find_whole_rows():
    cache = HotRows(WIDTHS, 20_000)
    batches = zipf_batches(200, 300)
    with ThreadPoolExecutor(4) as pool:
        assert any(found.any() for found in pool.map(lambda row_ids: read(cache, row_ids), batches))


@pytest.mark.parametrize("use", [HotRows.find, lambda cache, row_ids: cache.offer(row_ids, rows_of(row_ids))])
def test_one_thread_at_a_time(use):
    cache = HotRows(WIDTHS, 20_000)
    with ThreadPoolExecutor(1) as pool:
        with cache._lock:
            future = pool.submit(use, cache, np.arange(9))
            with pytest.raises(TimeoutError):
                future.result(timeout=0.1)
        future.result(timeout=60)

"""Reading rows, warm and cold: `python benchmarks/tables_gather.py [FOLDER]`.

The warm part compares fetching and decoding float8 rows with `torch.nn.functional.embedding` of a bfloat16 table of
the same rows. The cold part reads 100,000 random rows of a file that is not in the page cache, by a lookup alone, with
prefetching, and by plain parallel reads (like `fio`). FOLDER needs disk space for the table.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tables_folder import LAYER, WIDTH, drop_from_page_cache, make_model_folder
from torch.nn import functional as F

from engram_hf.prefetch_engram import Prefetcher
from engram_hf.row_sources_engram import MappedRows
from engram_hf.saving_engram import table_file_name
from engram_hf.table_engram import EngramTable, dequantize_rows, read_rows
from engram_hf.table_format_engram import StoredTable, read_tables


def best(actions: dict, repeats: int) -> dict[str, float]:
    """Return the shortest time of each action; they alternate, so that other work on the machine affects all of them."""
    times = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: min(some) for name, some in times.items()}


def warm(table: StoredTable, repeats: int) -> None:
    source = MappedRows(table)
    values, scale = source.read(0, table.num_rows)
    plain = torch.empty(table.num_rows, WIDTH, dtype=torch.bfloat16)
    for first in range(0, table.num_rows, 1 << 16):
        rows = slice(first, first + (1 << 16))
        plain[rows] = dequantize_rows(values[rows], scale[rows])
    del values, scale
    ids = torch.randint(0, table.num_rows, (4096, 24))
    assert torch.equal(read_rows(source, ids, torch.bfloat16), F.embedding(ids, plain).flatten(-2))
    times = best(
        {
            "bfloat16 embedding": lambda: F.embedding(ids, plain),
            "mapped float8": lambda: read_rows(source, ids, torch.bfloat16),
        },
        repeats,
    )
    for name, seconds in times.items():
        print(f"warm, 4096 x 24 rows, {name:20} {seconds * 1e3:7.1f} ms")
    print(
        f"ratio {times['mapped float8'] / times['bfloat16 embedding']:.2f}x at {table.size / plain.nbytes:.3f} of the bytes"
    )
    for tokens in (1, 512, 4096):
        ids = torch.randint(0, table.num_rows, (1, tokens, 24))
        times = best({"direct": reader(table, ids, "never"), "prefetched": reader(table, ids, "always")}, 10 * repeats)
        more = times["prefetched"] - times["direct"]
        print(
            f"warm, {tokens:4} x 24 rows: direct {times['direct'] * 1e3:7.3f} ms, prefetched {times['prefetched'] * 1e3:7.3f} "
            f"ms, {times['prefetched'] / times['direct']:.2f}x, {more * 1e6:+.0f} us"
        )


def cold(table: StoredTable, path: Path, count: int, repeats: int) -> None:
    results: dict[str, list[float]] = {"lookup alone": [], "with prefetching": [], "parallel reads": []}
    for _ in range(repeats):
        for name, when in (("lookup alone", "never"), ("with prefetching", "always"), ("parallel reads", None)):
            ids = torch.randint(0, table.num_rows, (1, count // 24, 24))
            drop_from_page_cache(path)
            results[name].append(parallel(table, ids) if when is None else timed(reader(table, ids, when)))
    times = {name: sorted(some)[repeats // 2] for name, some in results.items()}
    for name, seconds in times.items():
        print(f"cold, {count} rows, {name:18} {seconds:6.2f} s  {count / seconds / 1e3:6.1f} k rows/s")
    print(
        f"prefetching: {times['lookup alone'] / times['with prefetching']:.2f}x faster than without, "
        f"{times['with prefetching'] / times['parallel reads']:.2f}x the time of parallel reads"
    )


def mounted(table: StoredTable) -> EngramTable:
    module = EngramTable(table.num_rows, table.width, "float8_e4m3fn", device="meta", dtype=torch.bfloat16)
    module.mount(MappedRows(table))
    return module


def reader(table: StoredTable, ids: torch.Tensor, when: str) -> Callable[[], torch.Tensor]:
    """Read the rows of one layer like a model, with or without prefetching."""
    module = mounted(table)
    prefetcher = Prefetcher([module], when)

    def read() -> torch.Tensor:
        (fetched,) = prefetcher.start(ids) or (None,)
        return module(ids[0], torch.bfloat16, source=fetched)

    return read


def timed(read: Callable[[], object]) -> float:
    start = time.perf_counter()
    read()
    return time.perf_counter() - start


def parallel(table: StoredTable, ids: torch.Tensor, threads: int = 64) -> float:
    """Read distinct rows and scales, sorted, by `pread` on threads."""
    part, rows = table.parts[0], torch.unique(ids).tolist()
    file = os.open(part.file.path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    spans = [(part.weight.offset, WIDTH), (part.scale.offset, WIDTH // 32)]
    reads = [(size, offset + row * size) for offset, size in spans for row in rows]

    def work(some: list[tuple[int, int]]) -> None:
        for size, offset in some:
            os.pread(file, size, offset)

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [reads[at : at + 256] for at in range(0, len(reads), 256)]))
    seconds = time.perf_counter() - start
    os.close(file)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="a folder on the disk to measure (default: a temporary one)")
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the table (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        make_model_folder(small, 1, filled=True)
        warm(read_tables(small)[LAYER], 3 * options.repeats)
        make_model_folder(large, options.gigabytes, filled=True)
        cold(read_tables(large)[LAYER], large / table_file_name(LAYER), 100_000, options.repeats)


if __name__ == "__main__":
    main()

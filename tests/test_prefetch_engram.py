"""Prefetched rows equal rows read directly, are fetched where that is faster, and leave no thread behind."""

import copy
import gc
import itertools
import json
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from mmap import PAGESIZE
from pathlib import Path

import child_processes
import pytest
import torch
from table_models import IDS, bits, logits
from tiny_backbones import build
from transformers.utils import logging as transformers_logging

from engram_hf import EngramForCausalLM, prefetch_engram
from engram_hf.prefetch_engram import FetchedRows, Prefetcher
from engram_hf.row_sources_engram import MappedRows
from engram_hf.table_engram import EngramTable, read_rows
from engram_hf.table_format_engram import read_tables, tables_in_checkpoint


def fetch_noted(prefetcher: Prefetcher, monkeypatch) -> list[bool]:
    """Record whether each later forward prefetches its rows."""
    noted, start = [], prefetcher.start

    def noting(row_ids):
        fetched = start(row_ids)
        noted.append(fetched is not None)
        return fetched

    monkeypatch.setattr(prefetcher, "start", noting)
    return noted


def test_prefetched_rows_equal_direct_reads(saved_tables, monkeypatch):
    model, _, folder = saved_tables
    mapped = EngramForCausalLM.from_pretrained(folder, engram_residency="mapped")
    mapped.model.prefetcher.when = "always"
    noted = fetch_noted(mapped.model.prefetcher, monkeypatch)
    for _ in range(3):
        assert torch.equal(logits(mapped), logits(model))
    assert noted == [True] * 3
    row_ids = mapped.model.prepare_memory(IDS).row_ids
    for rows, some in zip(Prefetcher(mapped.model.prefetcher.tables, "always").start(row_ids), row_ids, strict=True):
        assert rows.row_ids.tolist() == sorted(set(some.flatten().tolist()))  # Each row is read once, in file order.


def test_fetched_rows_raise_when_reading_failed(saved_tables):
    source = (
        EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped").model.memories()[1].table.source
    )
    rows = FetchedRows(source, torch.arange(20))
    rows._rows[0] = rows._rows[0][:, :1]  # Reading then fails, as it would on a broken disk.
    with ThreadPoolExecutor(1) as pool:
        rows.request(pool)
        rows.gather(pool)
    with pytest.raises(ValueError):
        rows.fetch(torch.arange(20))


def tables_in_parts(folder: Path) -> list[EngramTable]:
    """Write two tables, each in three files."""
    from test_table_format import LAYERS, NgramHasher, write_folder

    hasher = NgramHasher(
        layer_ids=LAYERS, max_ngram=3, bucket_counts=[400, 500], heads=2, vocab_size=9, compressed_vocab_size=None,
        pad_token_id=0,
    )  # fmt: skip
    for name, constant in hasher.derive_constants().items():
        getattr(hasher, name).copy_(constant)
    write_folder(folder, hasher, "F8_E4M3", parts=3)
    tables = []
    for stored in read_tables(folder).values():
        tables.append(EngramTable(stored.num_rows, stored.width, "float8_e4m3fn"))
        tables[-1].mount(MappedRows(stored))
    return tables


def test_tables_in_parts_are_prefetched_like_one_file(tmp_path):
    tables = tables_in_parts(tmp_path)
    ids = torch.randint(0, min(table.num_rows for table in tables), (2, 3, 700))
    fetched = Prefetcher(tables, "always").start(ids)
    for table, rows, some in zip(tables, fetched, ids, strict=True):
        assert torch.equal(bits(table(some, source=rows)), bits(read_rows(table.source, some)))


def test_prefetch_requests_the_pages_of_all_rows(tmp_path, monkeypatch):
    """Only these pages are requested, in file order, and adjacent ones in one request."""
    requests = []

    def advise(file: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        requests.append((os.path.basename(os.readlink(f"/proc/self/fd/{file}")), offset, length))

    tables = tables_in_parts(tmp_path)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    ids = torch.tensor([[0, 1, 127, 128, 300, 900, 900, table.num_rows - 1] for table in tables])
    for rows, some in zip(Prefetcher(tables, "always").start(ids), ids, strict=True):
        rows.fetch(some)
    expected = []
    for table, some in zip(tables, ids.tolist(), strict=True):
        for part in table.source.stored.parts:
            for span in part.spans.values():
                size = span.size // span.shape[0]
                begins = [span.offset + (row - part.first) * size for row in some if part.first <= row < part.stop]
                pages = {at // PAGESIZE for begin in begins for at in range(begin, begin + size)}
                starts = sorted(page for page in pages if page - 1 not in pages)
                stops = sorted(page + 1 for page in pages if page + 1 not in pages)
                for start, stop in zip(starts, stops, strict=True):
                    expected.append((span.path.name, start * PAGESIZE, (stop - start) * PAGESIZE))
    assert requests == expected
    assert len({length for _, _, length in requests}) > 1


def test_float_table_may_begin_anywhere(tmp_path):
    values = torch.randn(50, 8).to(torch.bfloat16)
    entry = {"dtype": "BF16", "shape": [50, 8], "data_offsets": [0, 800]}
    header = json.dumps({"layers.0.engram.table.weight": entry}).encode()
    header += b" " * (len(header) % 2 + 1)  # This is an odd number of bytes.
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.view(torch.uint8).numpy().tobytes())
    rows = MappedRows(tables_in_checkpoint([path])[0])
    assert rows.parts[0].weight.data_ptr() % 2 == 1  # This view shares the file's memory and is not a copy.
    ids = torch.tensor([49, 0, 7])
    table = EngramTable(50, 8, dtype=torch.bfloat16)
    table.mount(rows)
    (fetched,) = Prefetcher([table], "always").start(ids[None])
    for found, scale in (rows.fetch(ids), fetched.fetch(ids)):
        assert scale is None
        assert torch.equal(found, values[ids])
    assert torch.equal(rows.read(3, 9)[0], values[3:9])


def test_on_the_cpu_only_tables_larger_than_memory_are_prefetched(saved_tables, monkeypatch):
    """In warm memory, another thread costs more than it saves (benchmarks/tables_gather.py)."""
    folder, ids = saved_tables[2], torch.arange(256).view(2, 128) % 100

    def prefetcher(free: int) -> Prefetcher:
        monkeypatch.setattr(prefetch_engram, "free_host_memory", lambda: free)
        return EngramForCausalLM.from_pretrained(folder, engram_residency="mapped").model.prefetcher

    size = sum(stored.size for stored in read_tables(folder).values())
    for free, pays in ((size, False), (size - 1, True)):
        one = prefetcher(free)
        assert one.when == "auto"
        assert (one.start(ids) is not None) == pays
        one.when = "always"
        assert one.start(ids) is not None
        for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert twin.when == "always"
        one.when = "never"
        assert one.start(ids) is None
    assert EngramForCausalLM.from_pretrained(folder, engram_residency="resident").model.prefetcher is None


def test_without_threads_rows_are_read_directly(saved_tables, monkeypatch, library_log):
    """A container may have used up its limit of processes; one warning is given."""
    model, _, folder = saved_tables
    mapped = EngramForCausalLM.from_pretrained(folder, engram_residency="mapped")
    mapped.model.prefetcher.when = "always"
    noted = fetch_noted(mapped.model.prefetcher, monkeypatch)

    def fail(self):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        transformers_logging.warning_once.cache_clear()
        for _ in range(3):
            assert torch.equal(logits(mapped), logits(model))
    assert noted == [False] * 3
    assert ["can't start new thread" in message for message in library_log] == [True]
    assert torch.equal(logits(mapped), logits(model))  # Threads can be started again.
    assert noted[-1]


ENDING = """
import atexit, json, os, sys, threading, torch
from engram_hf import EngramForCausalLM, prefetch_engram
ids = torch.tensor({ids})
def end(how, warm):
    model = EngramForCausalLM.from_pretrained({folder!r}, engram_residency="mapped").eval()
    model.model.prefetcher.when = "always"
    def answer():
        print(json.dumps([how, warm, *model(ids).logits[0, -1].tolist()]), flush=True)
    def after_the_main_thread():
        threading.main_thread().join()
        answer()
    if warm:
        model(ids)
    if how == "atexit":
        atexit.register(answer)
    else:
        threading.Thread(target=after_the_main_thread).start()
for how in ("atexit", "thread"):
    for warm in (False, True):
        process = os.fork()
        if not process:
            end(how, warm)
            sys.exit()  # as a process ends that was started anew: threads first, then what atexit was told
        assert os.waitpid(process, 0)[1] == 0
"""


@pytest.mark.slow
def test_process_at_exit_still_reads_its_rows(tmp_path):
    model = build("qwen3")
    model.save_pretrained(tmp_path / "saved")
    code = ENDING.format(folder=str(tmp_path / "saved"), ids=IDS.tolist())
    process = child_processes.start(code, env=dict(os.environ), cwd=tmp_path)
    output, errors = process.communicate(timeout=child_processes.SECONDS)
    assert process.returncode == 0, errors
    found = [json.loads(line) for line in output.splitlines()]
    assert [tuple(line[:2]) for line in found] == list(itertools.product(("atexit", "thread"), (False, True)))
    for line in found:
        torch.testing.assert_close(torch.tensor(line[2:]), logits(model)[0, -1])


def test_no_thread_outlives_the_model(saved_tables):
    mapped = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    mapped.model.prefetcher.when = "always"
    logits(mapped)

    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("engram-prefetch")]

    assert threads()
    del mapped
    gc.collect()
    deadline = time.monotonic() + 30
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


def test_prefetching_is_auto_always_or_never():
    with pytest.raises(ValueError, match="must be 'auto', 'always' or 'never'"):
        Prefetcher([], "sometimes")
    prefetcher = Prefetcher([])
    with pytest.raises(ValueError, match="must be 'auto', 'always' or 'never'"):
        prefetcher.when = "sometimes"

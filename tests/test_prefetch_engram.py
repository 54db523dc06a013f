"""Rows that are fetched ahead: the same rows, where it pays, and no thread left behind."""

import copy
import gc
import json
import multiprocessing
import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from mmap import PAGESIZE
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from table_models import IDS, bits, logits, put_logits

from engram_hf import EngramForCausalLM
from engram_hf.hot_rows_engram import HotRows
from engram_hf.prefetch_engram import FetchedRows, Prefetcher
from engram_hf.row_sources_engram import MappedRows
from engram_hf.table_engram import EngramTable, read_rows
from engram_hf.table_format_engram import read_tables, tables_in_checkpoint


def test_rows_that_are_fetched_ahead_are_the_rows(saved_tables):
    model, _, folder = saved_tables
    mapped = EngramForCausalLM.from_pretrained(folder, engram_residency="mapped")
    mapped.model.prefetcher.when = "always"
    assert torch.equal(logits(mapped), logits(model))
    statistics = mapped.model.prefetcher.statistics
    assert statistics["prefetched"] == 1
    assert statistics["rows_hot"] == 0 < statistics["rows_read"] < statistics["rows_asked"] == 2 * IDS.numel() * 4


@pytest.mark.parametrize(("hot_bytes", "share"), [(1 << 20, 1), (8 << 10, 0.1), (0, 0)])
def test_rows_that_are_read_again_are_kept(saved_tables, hot_bytes, share):
    model, _, folder = saved_tables
    mapped = EngramForCausalLM.from_pretrained(folder, engram_residency="mapped")
    prefetcher = mapped.model.prefetcher
    prefetcher.when, prefetcher.hot_bytes = "always", hot_bytes
    # As often as it takes all rows to enter: of rows that would take one slot, one does at a time.
    for _ in range(12):
        assert torch.equal(logits(mapped), logits(model))
    before = dict(prefetcher.statistics)
    assert torch.equal(logits(mapped), logits(model))
    hot, read = (prefetcher.statistics[name] - before[name] for name in ("rows_hot", "rows_read"))
    assert hot >= share * (hot + read)
    assert (hot == 0) == (share == 0)
    prefetcher.hot_bytes += 50_000  # another size takes effect at once
    before = dict(prefetcher.statistics)
    logits(mapped)
    assert prefetcher.statistics["rows_hot"] == before["rows_hot"]
    prefetcher.hot_bytes -= 50_000
    twin = copy.deepcopy(mapped).model.prefetcher
    assert (twin.when, twin.hot_bytes, twin.statistics["rows_hot"]) == ("always", hot_bytes, 0)


def test_what_could_not_be_read_is_not_kept(saved_tables):
    source = (
        EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped").model.memories()[1].table.source
    )
    ids, hot = torch.arange(20), HotRows(source.row_bytes, 100_000)
    rows = FetchedRows(source, ids, hot)
    rows._rows[0] = rows._rows[0][:, :1]  # so that reading fails, as it would on a broken disk
    with ThreadPoolExecutor(1) as pool:
        for step in (rows.request, rows.gather, rows.keep):
            step(pool)
    with pytest.raises(ValueError):
        rows.fetch(ids)
    assert not hot.find(ids.numpy())[0].any()


def test_a_fork_while_rows_are_being_kept(saved_tables):
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    model.model.prefetcher.when = "always"
    expected, context = logits(saved_tables[0]), multiprocessing.get_context("fork")
    logits(model)
    with model.model.prefetcher._hot[1][0]._lock:  # held by nobody in the child, who could not wait for it
        queue = context.Queue()
        process = context.Process(target=put_logits, args=(model, queue), daemon=True)
        process.start()
        found = queue.get(timeout=60)
    process.join()
    torch.testing.assert_close(torch.tensor(found), expected)


def tables_in_parts(folder: Path) -> list[EngramTable]:
    """Two tables, each in three files."""
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


def test_parts_are_fetched_ahead_like_one_file(tmp_path):
    tables = tables_in_parts(tmp_path)
    ids = torch.randint(0, min(table.num_rows for table in tables), (2, 3, 700))
    fetched = Prefetcher(tables, "always").start(ids)
    for table, rows, some in zip(tables, fetched, ids, strict=True):
        assert torch.equal(bits(table(some, source=rows)), bits(read_rows(table.source, some)))


def test_the_system_is_asked_for_the_pages_of_all_rows(tmp_path, monkeypatch):
    """For no other pages, in file order, and once for those side by side."""
    requests = []

    def advise(file: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        requests.append((os.path.basename(os.readlink(f"/proc/self/fd/{file}")), offset, length))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    tables = tables_in_parts(tmp_path)
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


def test_a_float_table_may_begin_anywhere(tmp_path):
    values = torch.randn(50, 8).to(torch.bfloat16)
    entry = {"dtype": "BF16", "shape": [50, 8], "data_offsets": [0, 800]}
    header = json.dumps({"layers.0.engram.table.weight": entry}).encode()
    header += b" " * (len(header) % 2 + 1)  # an odd number of bytes
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.view(torch.uint8).numpy().tobytes())
    rows = MappedRows(tables_in_checkpoint([path])[0])
    assert rows.parts[0].weight.data_ptr() % 2 == 1  # over the file, not a copy
    ids = torch.tensor([49, 0, 7])
    table = EngramTable(50, 8, dtype=torch.bfloat16)
    table.mount(rows)
    (fetched,) = Prefetcher([table], "always").start(ids[None])
    for found, scale in (rows.fetch(ids), fetched.fetch(ids)):
        assert scale is None
        assert torch.equal(found, values[ids])
    assert torch.equal(rows.read(3, 9)[0], values[3:9])


def test_rows_are_fetched_ahead_while_they_come_from_a_disk(saved_tables, monkeypatch):
    """Of the first forward nothing is known; then it takes a page from a disk per 256 rows of the last one."""
    usage = SimpleNamespace(ru_inblock=80, ru_majflt=0)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    prefetcher = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped").model.prefetcher
    ids = torch.arange(256).view(2, 128) % 100

    def is_fetched_ahead(more_blocks: int = 0, more_faults: int = 0, row_ids: torch.Tensor = ids) -> bool:
        usage.ru_inblock += more_blocks
        usage.ru_majflt += more_faults
        return prefetcher.start(row_ids) is not None

    assert is_fetched_ahead()
    assert not is_fetched_ahead()
    assert not is_fetched_ahead(8)  # one page, of 256 rows that the layers read themselves
    assert is_fetched_ahead(16)
    assert is_fetched_ahead(8)  # one page, of the 200 rows that were fetched
    assert not is_fetched_ahead(0)
    assert not is_fetched_ahead(0, 12)  # 12 pages by waiting are among the 14 by asking
    assert is_fetched_ahead(0, 4)
    prefetcher.when = "never"
    assert not is_fetched_ahead(800)
    prefetcher.when = "always"
    assert is_fetched_ahead(0)


def test_warm_memory_is_not_fetched_ahead(saved_tables):
    mapped = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    for _ in range(40):
        logits(mapped)
    statistics = mapped.model.prefetcher.statistics
    # The first forward cannot know; faults of other tests' code may look like ours once or twice.
    assert statistics["forwards"] == 40
    assert statistics["prefetched"] < 10
    assert statistics["rows_hot"] == 0 or statistics["prefetched"] > 1
    resident = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="resident")
    assert resident.model.prefetcher is None


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


def test_prefetching_is_cold_always_or_never():
    with pytest.raises(ValueError, match="must be 'cold', 'always' or 'never'"):
        Prefetcher([], "sometimes")
    prefetcher = Prefetcher([])
    with pytest.raises(ValueError, match="must be 'cold', 'always' or 'never'"):
        prefetcher.when = "sometimes"

"""Tables of every dtype, wherever they live: the same rows, the same logits, and nothing of them where it should not be."""

import copy
import gc
import json
import logging
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from mmap import PAGESIZE
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_backbones import build, random_ids
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from engram_hf import EngramForCausalLM, EngramModel, residency_engram, row_sources_engram
from engram_hf.hot_rows_engram import HotRows
from engram_hf.memory_engram import EngramTable, dequantize_rows, quantize_rows, read_rows
from engram_hf.prefetch_engram import FetchedRows, Prefetcher
from engram_hf.residency_engram import (
    choose_residency,
    free_host_memory,
    gpus_of,
    is_table_file,
    save_tables,
    tables_by_reference,
)
from engram_hf.rounding_deepseek_v41 import round_fp8
from engram_hf.row_sources_engram import MappedRows
from engram_hf.safetensors_engram import read_header
from engram_hf.table_check_engram import check_folder
from engram_hf.table_format_engram import read_tables, tables_in_checkpoint

DTYPES = [None, "float8_e4m3fn", "int8"]
ROWS, WIDTH = 40, 64


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


# --- one table --------------------------------------------------------------------------------------------------------


def make_table(table_dtype: str | None, dtype: torch.dtype = torch.float32) -> tuple[EngramTable, torch.Tensor]:
    """A table, and its rows as float32 numbers."""
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    table = EngramTable(ROWS, WIDTH, table_dtype, dtype=dtype)
    with torch.no_grad():
        if table_dtype is None:
            table.weight.copy_(rows)
            return table, table.weight.float()
        values, scale = quantize_rows(rows, table_dtype)
        table.weight.copy_(values)
        table.scale.copy_(scale)
    return table, dequantize_rows(values, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("table_dtype", DTYPES)
def test_rows_lie_side_by_side(table_dtype, dtype):
    table, rows = make_table(table_dtype, dtype)
    ids = torch.randint(0, ROWS, (2, 5, 3))
    found = table(ids, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found, rows[ids].flatten(-2).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_float_rows_are_trained_and_others_are_not(dtype):
    table, _ = make_table(None, dtype)
    ids = torch.tensor([[3, 3], [7, 0]])
    table(ids).sum().backward()
    reference = table.weight.detach().clone().requires_grad_()
    F.embedding(ids, reference).sum().backward()
    assert torch.equal(table.weight.grad, reference.grad)
    for quantized in DTYPES[1:]:
        assert not any(parameter.requires_grad for parameter in make_table(quantized)[0].parameters())


def test_rows_are_float32_unless_asked_otherwise():
    """Whatever is the default while a model is built."""
    table, rows = make_table("int8")
    torch.set_default_dtype(torch.float64)
    try:
        found = read_rows(table, torch.tensor([[3, 5]]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    assert torch.equal(found, rows[[3, 5]].view(1, -1))


def test_every_float8_number_times_every_scale():
    """The fast way on the CPU, against the definition; and where it does not apply, too."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    exponents = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = numbers.view(torch.uint8).repeat(256, 1).view(torch.float8_e4m3fn)  # row r has scale r
    table = EngramTable(256, 256, "float8_e4m3fn")
    scale = exponents.view(torch.uint8).unsqueeze(1).repeat(1, 8).view(torch.float8_e8m0fnu)
    for nan_free in (True, False):
        some = values.view(torch.uint8).clone()
        if nan_free:
            some[:, [0x7F, 0xFF]] = 0
        with torch.no_grad():
            table.weight.copy_(some.view(torch.float8_e4m3fn))
            table.scale.copy_(scale)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = (table.weight.float() * exponents.float().unsqueeze(1)).to(dtype)
            for row in range(256):  # one row at a time: a single large scale sends a whole chunk the slow way
                found = table(torch.tensor([[row]]), dtype=dtype)
                assert torch.equal(found.nan_to_num(7.0), expected[row : row + 1].nan_to_num(7.0)), (row, dtype)


def test_flushed_subnormal_numbers_do_not_change_rows():
    values = torch.arange(1, 33, dtype=torch.uint8).view(1, 32).view(torch.float8_e4m3fn)  # seven of them subnormal
    scale = torch.full((1, 1), 127, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    table = EngramTable(1, 32, "float8_e4m3fn")
    with torch.no_grad():
        table.weight.copy_(values)
        table.scale.copy_(scale)
    torch.set_flush_denormal(True)
    try:
        found = table(torch.tensor([[0]]), dtype=torch.bfloat16)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found, dequantize_rows(values, scale, torch.bfloat16))


def test_quantizing_follows_the_releases_rule():
    rows = torch.randn(300, 64) * torch.logspace(-8, 4, 300).unsqueeze(1)
    assert torch.equal(dequantize_rows(*quantize_rows(rows, "float8_e4m3fn")), round_fp8(rows))
    values, scale = quantize_rows(rows, "int8")
    assert values.abs().max() == 127
    assert ((dequantize_rows(values, scale) - rows).abs() <= scale * 0.5001).all()
    for table_dtype in DTYPES[1:]:
        zeros = quantize_rows(torch.zeros(2, 64), table_dtype)
        assert torch.equal(dequantize_rows(*zeros), torch.zeros(2, 64))
        with pytest.raises(ValueError, match="NaN or infinite"):
            quantize_rows(torch.full((1, 64), float("inf")), table_dtype)
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize_rows(torch.zeros(1, 48), "float8_e4m3fn")
    with pytest.raises(ValueError, match="cannot be stored as 'int4'"):
        EngramTable(3, 64, "int4")


@pytest.mark.parametrize("table_dtype", DTYPES)
def test_rows_that_do_not_exist(table_dtype):
    table, _ = make_table(table_dtype)
    for wrong in (ROWS, -1):
        with pytest.raises(ValueError, match=f"Row {wrong} was asked for, but the table has rows 0..{ROWS - 1}"):
            table(torch.tensor([[0, wrong]]))
    assert table(torch.empty(2, 0, 3, dtype=torch.long)).shape == (2, 0, 3 * WIDTH)


@pytest.mark.parametrize("table_dtype", DTYPES[1:])
def test_a_quantized_table_keeps_its_dtypes(table_dtype):
    table, _ = make_table(table_dtype)
    before = table.weight.dtype, table.scale.dtype
    assert (table.bfloat16().weight.dtype, table.scale.dtype) == before
    assert table.to("meta").weight.device.type == table.scale.device.type == "meta"


def test_a_float_table_goes_along_with_the_models_dtype():
    table, rows = make_table(None)
    assert table.bfloat16().weight.dtype == torch.bfloat16
    assert torch.equal(table(torch.tensor([[3, 5]])), rows[[3, 5]].view(1, -1).bfloat16())


@pytest.mark.parametrize("table_dtype", DTYPES)
def test_a_new_table_holds_noise_of_the_asked_size(table_dtype):
    table = EngramTable(3000, 64, table_dtype)
    table.reset_parameters(0.5)
    rows = table(torch.arange(3000).unsqueeze(1), dtype=torch.float32).detach()
    assert rows.std().item() == pytest.approx(0.5, rel=0.05)
    assert rows.mean().item() == pytest.approx(0.0, abs=0.01)


# --- a model's tables -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def saved(request, tmp_path_factory):
    """A model, the folder it is saved in as ordinary weights, and one that was saved with its tables mapped."""
    model = build("qwen3", engram_table_dtype=request.param, engram_head_dim=32)
    for memory in model.model.memories().values():
        memory.table.reset_parameters(1.0)  # random bytes would be no valid scales
    plain, mapped = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("mapped")
    model.save_pretrained(plain)
    EngramForCausalLM.from_pretrained(plain, engram_residency="mapped").save_pretrained(mapped)
    return model, plain, mapped


IDS = random_ids(2, 9)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def table_keys(model) -> list[str]:
    return [key for key in model.state_dict() if ".table." in key]


@pytest.mark.parametrize("residency", ["auto", "resident", "mapped"])
@pytest.mark.parametrize("folder", [1, 2], ids=["plain", "mapped"])
def test_residency_never_changes_a_value(saved, folder, residency):
    model, info = EngramForCausalLM.from_pretrained(
        saved[folder], engram_residency=residency, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(logits(model), logits(saved[0]))
    is_mapped = residency == "mapped"
    assert table_keys(model) == ([] if is_mapped else table_keys(saved[0]))
    for memory in model.model.memories().values():
        assert memory.table.is_resident is not is_mapped
        assert all(tensor.device.type != "meta" for tensor in memory.parameters())
        is_trained = saved[0].config.engram_table_dtype is None
        assert all(tensor.requires_grad == is_trained for tensor in memory.table.parameters())


@pytest.mark.parametrize("residency", ["resident", "mapped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_give_the_same_rows(saved, residency, dtype):
    _, plain, mapped = saved
    models = [
        EngramForCausalLM.from_pretrained(plain, dtype=dtype, engram_residency="resident"),
        EngramForCausalLM.from_pretrained(mapped, dtype=dtype, engram_residency=residency),
    ]
    assert torch.equal(*map(logits, models))
    tables = [model.model.memories()[1].table for model in models]
    ids = torch.arange(30).view(1, 30)
    assert torch.equal(*(table(ids, dtype=dtype) for table in tables))


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"dtype": "auto"}], ids=str)
def test_loading_options(saved, options):
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped", **options)
    assert torch.equal(logits(model), logits(saved[0]))


def test_the_auto_class_and_the_bare_model(saved):
    model, _, folder = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder, engram_residency="mapped")
    assert torch.equal(logits(loaded), logits(model))
    bare = EngramModel.from_pretrained(folder, engram_residency="mapped")
    with torch.no_grad():
        assert torch.equal(bare(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_generation_is_the_same(saved):
    model, _, folder = saved
    mapped = EngramForCausalLM.from_pretrained(folder, engram_residency="mapped")
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        texts = [m.generate(IDS, max_new_tokens=6, do_sample=False, **options) for m in (model, mapped)]
        assert torch.equal(*texts)


def test_moving_and_copying_leave_a_mapped_table_where_it_is(saved):
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
    expected = logits(saved[0])
    sources = [memory.table.source for memory in model.model.memories().values()]
    twin = copy.deepcopy(model)
    assert [memory.table.source for memory in twin.model.memories().values()] == sources
    model.to("meta")
    assert torch.equal(logits(twin), expected)
    message = pickle.dumps(twin)
    assert torch.equal(logits(pickle.loads(message)), expected)
    # The message has the paths in it, not the rows.
    rows = sources[0].parts[0].weight[:8].numpy().tobytes()
    assert rows in pickle.dumps(saved[0])
    assert rows not in message


def test_a_compiled_backbone(saved):
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
    model.model.backbone.compile(backend="eager")
    for when in ("never", "always"):
        model.model.prefetcher.when = when
        assert torch.equal(logits(model), logits(saved[0]))


def test_backpropagation_passes_a_mapped_table(saved):
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped").train()
    reference = copy.deepcopy(saved[0]).train()
    model.gradient_checkpointing_enable()
    for each in (model, reference):
        each(IDS, labels=IDS).loss.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad)


def _in_a_process(model, queue) -> None:
    torch.set_num_threads(1)  # a forked process does not have the threads of the other
    queue.put(logits(model).tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(tmp_path, method):
    build("qwen3", engram_head_dim=32).save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    model.model.prefetcher.when = "always"
    expected = logits(model)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=_in_a_process, args=(model, queue), daemon=True)
    process.start()
    found = torch.tensor(queue.get(timeout=120))
    process.join()
    torch.testing.assert_close(found, expected)


def test_pinned_memory_needs_a_gpu(saved):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is none; use 'mapped'"):
            EngramForCausalLM.from_pretrained(saved[2], engram_residency="pinned")


class Driver:
    """Stands in for a GPU's driver, which locks pages of host memory: it notes which."""

    def __init__(self):
        self.locked = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.locked[address] = size
        return 0

    def cudaGetErrorString(self, error: int) -> str:
        return "out of memory"

    def cudaHostUnregister(self, address: int) -> int:
        del self.locked[address]
        return 0


def test_a_driver_may_refuse_to_lock_pages(saved, monkeypatch):
    driver = Driver()
    monkeypatch.setattr(driver, "cudaHostRegister", lambda address, size, flags: 2)
    monkeypatch.setattr(row_sources_engram, "_forget_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    with pytest.raises(ValueError, match=r"refused to lock 0\.0 GB of memory \(out of memory\); free memory"):
        EngramForCausalLM.from_pretrained(saved[2], engram_residency="pinned", device_map="cpu")


def test_the_host_reads_pinned_tables_as_well(saved, monkeypatch):
    driver = Driver()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "cudart", lambda: driver)
        model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="pinned", device_map="cpu")
        tables = [memory.table.source for memory in model.model.memories().values()]
        memory = [tensor for table in tables for tensor in table.parts[0].tables]
        assert driver.locked == {tensor.data_ptr(): tensor.nbytes for tensor in memory}
        assert sum(driver.locked.values()) == sum(table.stored.size for table in tables)
        assert torch.equal(logits(model), logits(saved[0]))
        del model, tables
        gc.collect()
        assert not driver.locked


@pytest.mark.parametrize("when", ["always", "never"])
def test_a_default_device_is_not_where_rows_go(saved, when):
    """As with `torch.set_default_device("cuda")`; a device without memory shows what is made there by mistake."""
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
    model.model.prefetcher.when = when
    with torch.device("meta"):
        found = logits(model)
        rows, _ = model.model.memories()[1].table.source.read(0, 5)
    assert torch.equal(found, logits(saved[0]))
    assert rows.device.type == "cpu"


def test_auto_says_what_it_chose(caplog):
    gigabyte = 1 << 30
    assert choose_residency(gigabyte, 8 * gigabyte, None) == "resident"
    assert choose_residency(3 * gigabyte, 8 * gigabyte, None) == "mapped"
    assert choose_residency(3 * gigabyte, 8 * gigabyte, 80 * gigabyte) == "resident"
    assert choose_residency(30 * gigabyte, 80 * gigabyte, 80 * gigabyte) == "pinned"
    library, level = logging.getLogger("transformers"), transformers_logging.get_verbosity()
    library.addHandler(caplog.handler)
    transformers_logging.set_verbosity_info()
    try:
        assert choose_residency(99 * gigabyte, 80 * gigabyte, 80 * gigabyte) == "mapped"
        assert choose_residency(2 * gigabyte, 80 * gigabyte, None) == "resident"
    finally:
        transformers_logging.set_verbosity(level)
        library.removeHandler(caplog.handler)
    assert "Memory tables of 106.3 GB are mapped, not parameters" in caplog.text
    assert "Memory tables of 2.1 GB are resident" in caplog.text


def test_auto_takes_a_quarter_of_max_memory(tmp_path):
    """Within which all of the model would fit."""
    model = build("qwen3", engram_vocab_size=2_000)
    model.save_pretrained(tmp_path)
    size = sum(memory.table.weight.nbytes for memory in model.model.memories().values())
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) < 2 * size
    for times, is_resident in ((3.9, False), (4.1, True)):
        limits = {"cpu": int(times * size)}
        loaded = EngramForCausalLM.from_pretrained(tmp_path, device_map="auto", max_memory=limits)
        assert loaded.model.memories()[1].table.is_resident is is_resident


@pytest.mark.parametrize(
    ("device_map", "gpus"),
    [
        ("auto", {0, 1, 2, 3}),
        ("sequential", {0, 1, 2, 3}),
        ("cpu", set()),
        (torch.device("cpu"), set()),
        ("cuda", {1}),
        ("cuda:2", {2}),
        (3, {3}),
        ({"": "cpu"}, set()),
        ({"model": 0, "lm_head": "cuda:3", "a": "cpu", "b": "disk"}, {0, 3}),
    ],
)
def test_auto_looks_at_the_gpus_that_a_device_map_uses(device_map, gpus):
    assert gpus_of(device_map, count=4, current=1) == gpus


def test_free_memory_is_that_of_the_machine_or_its_container():
    free = free_host_memory()
    (total,) = re.findall(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert 0 < free < int(total) * 1024


MEMINFO = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n"
IN_USE = {"memory.current": "4000\n", "memory.stat": "anon 90\ninactive_file 700\nactive_file 80\n"}
IN_USE_V1 = {
    "memory/memory.usage_in_bytes": "4000\n",
    "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 700\ntotal_unevictable 2\n",  # of groups below, too
}


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({}, 8000 * 1024),
        (IN_USE, 8000 * 1024),
        ({**IN_USE, "memory.max": "max\n"}, 8000 * 1024),
        ({**IN_USE, "memory.max": "5000\n"}, 1700),
        ({**IN_USE, "memory.max": "3000\n"}, 0),  # it was lowered
        ({**IN_USE, "memory.max": "90000000\n"}, 8000 * 1024),
        ({**IN_USE_V1, "memory/memory.limit_in_bytes": "5000\n"}, 1700),
    ],
)
def test_free_memory_of_a_container(tmp_path, monkeypatch, group, free):
    """Both versions of control groups, in a file system that has its root elsewhere."""
    files = {f"sys/fs/cgroup/{name}": text for name, text in group.items()} | {"proc/meminfo": MEMINFO}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(residency_engram, "Path", lambda *parts: tmp_path.joinpath("/".join(parts).lstrip("/")))
    assert free_host_memory() == free


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saving_a_mapped_table_links_it(saved, tmp_path):
    tmp_path, elsewhere = tmp_path / "saved", tmp_path / "moved"
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
    model.save_pretrained(tmp_path)
    tables = sorted(path.name for path in tmp_path.iterdir() if is_table_file(path.name))
    assert tables == ["engram-layer-00001.safetensors", "engram-layer-00002.safetensors", "engram_tables.json"]
    for name in tables[:2]:
        assert (tmp_path / name).samefile(saved[2] / name)
        assert all(".table." in tensor for tensor in read_header(tmp_path / name).tensors)
    check_folder(tmp_path, rows=True)
    shutil.copytree(tmp_path, elsewhere)
    shutil.rmtree(tmp_path)
    moved = EngramForCausalLM.from_pretrained(elsewhere, engram_residency="mapped")
    assert torch.equal(logits(moved), logits(saved[0]))
    # The open files outlive their names.
    assert torch.equal(logits(model), logits(saved[0]))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path)), logits(saved[0]))


def test_no_save_writes_a_table_that_an_earlier_one_wrote(saved, tmp_path):
    """Out of a file with other weights in it, or a file that is gone since, it is written once, and linked from then on."""

    def inodes(folder: Path) -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in folder.glob("engram-layer-*")}

    model = EngramForCausalLM.from_pretrained(saved[1], engram_residency="mapped")
    for name in ("first", "second", "second"):
        model.save_pretrained(tmp_path / name)
    assert inodes(tmp_path / "first") == inodes(tmp_path / "second") != {}
    model = EngramForCausalLM.from_pretrained(tmp_path / "first", engram_residency="mapped")
    for name in ("third", "fourth"):
        model.save_pretrained(tmp_path / name)
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
    assert inodes(tmp_path / "third") == inodes(tmp_path / "fourth") == inodes(tmp_path / "second")
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path / "fourth")), logits(saved[0]))
    # What took the place of a save is no copy of these rows.
    other = EngramForCausalLM.from_pretrained(saved[1], engram_residency="mapped")
    for save in (lambda: other.save_pretrained(tmp_path / "fifth"), lambda: model.save_pretrained(tmp_path / "fifth")):
        save()
    for path in (tmp_path / "fifth").glob("engram-layer-*"):
        noise = path.read_bytes()
        path.unlink()
        path.write_bytes(noise[:-64] + bytes(64))
    shutil.rmtree(tmp_path / "third")
    shutil.rmtree(tmp_path / "fourth")
    model.save_pretrained(tmp_path / "sixth")
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path / "sixth")), logits(saved[0]))


def test_an_upload_needs_no_room_for_tables(saved):
    """Its temporary folder may be on a file system where no hard link leads, and which is small."""
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with tables_by_reference():
            save_tables(model.model, folder)
        check_folder(folder, rows=True)
        for path in Path(folder).glob("engram-layer-*"):
            assert path.is_symlink()
            assert path.samefile(saved[2] / path.name)
        for name in ("first", "second"):
            save_tables(model.model, Path(folder, name))
        inodes = [
            [path.stat().st_ino for path in sorted(Path(folder, name).glob("engram-layer-*"))]
            for name in ("first", "second")
        ]
        assert inodes[0] == inodes[1] != []  # from another file system, they are copied once
        save_tables(model.model, Path(folder, "kept"))
        assert not any(path.is_symlink() for path in Path(folder, "kept").iterdir())


def test_files_that_describe_nothing_are_described_by_the_manifest(saved, tmp_path):
    """As shards of a release may lie beside a model."""
    from test_table_format import METADATA_KEY, edit_header

    shutil.copytree(saved[2], tmp_path / "silent")
    expected = {layer: table.description for layer, table in read_tables(saved[2]).items()}
    for path in (tmp_path / "silent").glob("engram-layer-*"):
        edit_header(path, lambda header: header["__metadata__"].pop(METADATA_KEY))
    model = EngramForCausalLM.from_pretrained(tmp_path / "silent", engram_residency="mapped")
    assert not any(table.description for table in read_tables(tmp_path / "silent").values())
    model.save_pretrained(tmp_path / "saved")
    tables = read_tables(tmp_path / "saved")
    assert {layer: table.description for layer, table in tables.items()} == expected
    for path in (tmp_path / "saved").glob("engram-layer-*"):
        assert path.samefile(tmp_path / "silent" / path.name)


def test_an_upload_refers_to_what_was_saved_before(saved, tmp_path):
    """If its own files have other weights in them, too."""
    model = EngramForCausalLM.from_pretrained(saved[1], engram_residency="mapped")
    save_tables(model.model, tmp_path)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        with tables_by_reference():
            save_tables(model.model, folder)
        names = [path.name for path in Path(folder).iterdir() if path.is_symlink()]
        assert sorted(names) == [f"engram-layer-0000{layer}.safetensors" for layer in (1, 2)]
        assert all(Path(folder, name).samefile(tmp_path / name) for name in names)


def test_a_relative_path_is_kept_wherever_the_process_goes(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved[2].parent)
    model = EngramForCausalLM.from_pretrained(saved[2].name, engram_residency="mapped")
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("saved")
    name = "engram-layer-00001.safetensors"
    assert Path("saved", name).samefile(saved[2] / name)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(saved[0]))


@pytest.mark.parametrize("residency", ["auto", "resident", "mapped"])
def test_tables_among_the_weights_come_before_an_older_manifest(saved, tmp_path, residency):
    """As after `push_to_hub` of a model that was mapped, and then of one that was trained: uploads delete nothing."""
    trained = copy.deepcopy(saved[0])
    with torch.no_grad():
        for memory in trained.model.memories().values():
            (memory.table.weight if memory.table.scale is None else memory.table.scale).copy_(
                (memory.table.weight if memory.table.scale is None else memory.table.scale).float() * 2
            )
    trained.save_pretrained(tmp_path)
    for path in saved[2].iterdir():
        if is_table_file(path.name):
            shutil.copy(path, tmp_path)
    loaded = EngramForCausalLM.from_pretrained(tmp_path, engram_residency=residency)
    assert torch.equal(logits(loaded), logits(trained))
    assert not torch.equal(logits(loaded), logits(saved[0]))


def test_only_the_first_process_saves_tables(saved, tmp_path, monkeypatch):
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
    monkeypatch.setattr(model, "should_save_on_this_rank", lambda is_main_process: False)
    model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_mapped_model_gets_more_tokens(saved, tmp_path):
    """Its tables were written for ids as they are, and say so; the model has a map from now on, which keeps them."""
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
    assert model.config.engram_compressed_vocab_size is None
    model.resize_token_embeddings(model.config.vocab_size + 12)
    model.save_pretrained(tmp_path)
    for residency in ("auto", "resident", "mapped"):
        loaded = EngramForCausalLM.from_pretrained(tmp_path, engram_residency=residency)
        assert torch.equal(logits(loaded), logits(model))


def test_saving_in_place_and_over_another_kind(saved, tmp_path):
    shutil.copytree(saved[2], tmp_path, dirs_exist_ok=True)
    inodes = {path.name: path.stat().st_ino for path in tmp_path.glob("engram-layer-*")}
    for residency, has_files in (("mapped", True), ("resident", False), ("mapped", True)):
        EngramForCausalLM.from_pretrained(tmp_path, engram_residency=residency).save_pretrained(tmp_path)
        files = {path.name: path.stat().st_ino for path in tmp_path.iterdir() if is_table_file(path.name)}
        assert bool(files) is has_files
        if residency == "mapped" and inodes:
            assert inodes.items() <= files.items()
            inodes = {}
        assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path)), logits(saved[0]))


def test_a_save_that_fails_loses_no_table(saved, tmp_path):
    """The only copy of a resident table are the files it was loaded from, until the weights were written."""
    shutil.copytree(saved[2], tmp_path, dirs_exist_ok=True)
    model = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="resident")
    model.generation_config.temperature = 0.5  # without sampling: refused
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path)), logits(saved[0]))


def test_a_table_that_changed_is_not_passed_on(saved, tmp_path):
    source = shutil.copytree(saved[2], tmp_path / "source")
    model = EngramForCausalLM.from_pretrained(source, engram_residency="mapped")
    os.truncate(source / "engram-layer-00002.safetensors", 5000)
    with pytest.raises(ValueError, match="changed while it was in use"):
        logits(model)
    with pytest.raises(ValueError, match="changed while it was in use"):
        save_tables(model.model, tmp_path / "target")
    assert not (tmp_path / "target" / "engram_tables.json").exists()


def test_checkpoints_of_training_beside_a_mapped_table(saved, tmp_path):
    """A checkpoint has what was trained and links to the tables, and training resumes from it."""
    data = [{"input_ids": row, "labels": row} for row in random_ids(8, 6)]

    def train(resume: bool = False, steps: int = 4) -> EngramForCausalLM:
        model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
        options = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=2,
            max_steps=steps,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            disable_tqdm=True,
        )
        Trainer(model, options, train_dataset=data).train(resume_from_checkpoint=resume)
        return model

    whole = train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "engram-layer-00001.safetensors").samefile(saved[2] / "engram-layer-00001.safetensors")
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert torch.equal(logits(train(resume=True)), logits(whole))
    assert not torch.equal(logits(whole), logits(saved[0]))
    assert torch.equal(logits(EngramForCausalLM.from_pretrained(tmp_path / "checkpoint-4")), logits(whole))


# --- tables and model that do not belong together ---------------------------------------------------------------------


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("residency", ["mapped", "resident"])
def test_a_layer_without_table(saved, tmp_path, residency):
    shutil.copytree(saved[2], tmp_path, dirs_exist_ok=True)
    change_json(tmp_path / "engram_tables.json", lambda manifest: manifest["tables"].pop("2"))
    with pytest.raises(ValueError, match="no table for layer 2"):
        EngramForCausalLM.from_pretrained(tmp_path, engram_residency=residency)


def test_a_table_of_another_shape_dtype_or_hash(saved, tmp_path):
    other = build("qwen3", engram_table_dtype=None, engram_head_dim=64)
    other.save_pretrained(tmp_path / "wide")
    seeded = build("qwen3", engram_head_dim=32, engram_table_dtype=saved[0].config.engram_table_dtype, engram_seed=7)
    seeded.save_pretrained(tmp_path / "seeded")
    float16 = build("qwen3", engram_head_dim=32, engram_table_dtype="int8")
    float16.config.engram_table_dtype = "int8"
    float16.save_pretrained(tmp_path / "int8")
    messages = {"wide": "asks for .* of 64", "seeded": "written for the multipliers"}
    if saved[0].config.engram_table_dtype != "int8":
        messages["int8"] = "is stored as .*, but the config says engram_table_dtype 'int8'"
    for name, message in messages.items():
        apart = EngramForCausalLM.from_pretrained(tmp_path / name, engram_residency="mapped")
        apart.save_pretrained(tmp_path / name)
        for path in saved[2].iterdir():
            if is_table_file(path.name):
                shutil.copy(path, tmp_path / name)
        with pytest.raises(ValueError, match=message):
            EngramForCausalLM.from_pretrained(tmp_path / name, engram_residency="mapped")


def test_asking_for_what_there_is_not(saved, tmp_path):
    with pytest.raises(ValueError, match="must be one of 'auto', 'resident', 'mapped', 'pinned'"):
        EngramForCausalLM.from_pretrained(saved[1], engram_residency="disk")
    saved[0].config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no safetensors file with memory tables"):
        EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    (tmp_path / "typo").mkdir()
    with pytest.raises(OSError, match="no file named"):
        EngramForCausalLM.from_pretrained(tmp_path / "typo", engram_residency="mapped")


# --- prefetching ------------------------------------------------------------------------------------------------------


def test_rows_that_are_fetched_ahead_are_the_rows(saved):
    model, _, folder = saved
    mapped = EngramForCausalLM.from_pretrained(folder, engram_residency="mapped")
    mapped.model.prefetcher.when = "always"
    assert torch.equal(logits(mapped), logits(model))
    statistics = mapped.model.prefetcher.statistics
    assert statistics["prefetched"] == 1
    assert statistics["rows_hot"] == 0 < statistics["rows_read"] < statistics["rows_asked"] == 2 * IDS.numel() * 4


@pytest.mark.parametrize(("hot_bytes", "share"), [(1 << 20, 1), (8 << 10, 0.1), (0, 0)])
def test_rows_that_are_read_again_are_kept(saved, hot_bytes, share):
    model, _, folder = saved
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


def test_what_could_not_be_read_is_not_kept(saved):
    source = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped").model.memories()[1].table.source
    ids, hot = torch.arange(20), HotRows(source.row_bytes, 100_000)
    rows = FetchedRows(source, ids, hot)
    rows._rows[0] = rows._rows[0][:, :1]  # so that reading fails, as it would on a broken disk
    with ThreadPoolExecutor(1) as pool:
        for step in (rows.request, rows.gather, rows.keep):
            step(pool)
    with pytest.raises(ValueError):
        rows.fetch(ids)
    assert not hot.find(ids.numpy())[0].any()


def test_a_fork_while_rows_are_being_kept(saved):
    model = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
    model.model.prefetcher.when = "always"
    expected, context = logits(saved[0]), multiprocessing.get_context("fork")
    logits(model)
    with model.model.prefetcher._hot[1][0]._lock:  # held by nobody in the child, who could not wait for it
        queue = context.Queue()
        process = context.Process(target=_in_a_process, args=(model, queue), daemon=True)
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


def test_rows_are_fetched_ahead_while_they_come_from_a_disk(saved, monkeypatch):
    """Of the first forward nothing is known; then it takes a page from a disk per 256 rows of the last one."""
    usage = SimpleNamespace(ru_inblock=80, ru_majflt=0)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    prefetcher = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped").model.prefetcher
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


def test_warm_memory_is_not_fetched_ahead(saved):
    mapped = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
    for _ in range(40):
        logits(mapped)
    statistics = mapped.model.prefetcher.statistics
    # The first forward cannot know; faults of other tests' code may look like ours once or twice.
    assert statistics["forwards"] == 40
    assert statistics["prefetched"] < 10
    assert statistics["rows_hot"] == 0 or statistics["prefetched"] > 1
    resident = EngramForCausalLM.from_pretrained(saved[2], engram_residency="resident")
    assert resident.model.prefetcher is None


def test_no_thread_outlives_the_model(saved):
    mapped = EngramForCausalLM.from_pretrained(saved[2], engram_residency="mapped")
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

"""The residency of a model's tables: the logits are always equal, and tables take no memory where they should not."""

import copy
import gc
import json
import multiprocessing
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from table_models import IDS, Driver, logits, put_logits, table_keys
from tiny_backbones import build
from transformers import AutoModelForCausalLM

from engram_hf import EngramForCausalLM, EngramModel, row_sources_engram, table_format_engram
from engram_hf.loading_engram import gpus_of, resolve_auto
from engram_hf.saving_engram import is_table_file
from engram_hf.table_format_engram import choose_residency, free_host_memory


@pytest.mark.parametrize("residency", ["auto", "resident", "mapped"])
@pytest.mark.parametrize("folder", [1, 2], ids=["plain", "mapped"])
def test_residency_keeps_the_logits(saved_tables, folder, residency):
    model, info = EngramForCausalLM.from_pretrained(
        saved_tables[folder], engram_residency=residency, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(logits(model), logits(saved_tables[0]))
    is_mapped = residency == "mapped"
    assert table_keys(model) == ([] if is_mapped else table_keys(saved_tables[0]))
    for memory in model.model.memories().values():
        assert memory.table.is_resident is not is_mapped
        assert all(tensor.device.type != "meta" for tensor in memory.parameters())
        is_trained = saved_tables[0].config.engram_table_dtype is None
        assert all(tensor.requires_grad == is_trained for tensor in memory.table.parameters())


@pytest.mark.parametrize("residency", ["resident", "mapped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_table_dtypes_give_the_same_rows(saved_tables, residency, dtype):
    _, plain, mapped = saved_tables
    models = [
        EngramForCausalLM.from_pretrained(plain, dtype=dtype, engram_residency="resident"),
        EngramForCausalLM.from_pretrained(mapped, dtype=dtype, engram_residency=residency),
    ]
    assert torch.equal(*map(logits, models))
    tables = [model.model.memories()[1].table for model in models]
    ids = torch.arange(30).view(1, 30)
    assert torch.equal(*(table(ids, dtype=dtype) for table in tables))


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"dtype": "auto"}], ids=str)
def test_residency_with_other_loading_options(saved_tables, options):
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped", **options)
    assert torch.equal(logits(model), logits(saved_tables[0]))


def test_residency_of_the_auto_class_and_the_base_model(saved_tables):
    model, _, folder = saved_tables
    loaded = AutoModelForCausalLM.from_pretrained(folder, engram_residency="mapped")
    assert torch.equal(logits(loaded), logits(model))
    bare = EngramModel.from_pretrained(folder, engram_residency="mapped")
    with torch.no_grad():
        assert torch.equal(bare(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_residency_keeps_the_generated_tokens(saved_tables):
    model, _, folder = saved_tables
    mapped = EngramForCausalLM.from_pretrained(folder, engram_residency="mapped")
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        texts = [m.generate(IDS, max_new_tokens=6, do_sample=False, **options) for m in (model, mapped)]
        assert torch.equal(*texts)


def test_moving_and_copying_a_model_leave_its_mapped_tables_in_place(saved_tables):
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    expected = logits(saved_tables[0])
    sources = [memory.table.source for memory in model.model.memories().values()]
    twin = copy.deepcopy(model)
    assert [memory.table.source for memory in twin.model.memories().values()] == sources
    model.to("meta")
    assert torch.equal(logits(twin), expected)
    message = pickle.dumps(twin)
    assert torch.equal(logits(pickle.loads(message)), expected)
    # The pickle contains the paths, not the rows.
    rows = sources[0].parts[0].weight[:8].numpy().tobytes()
    assert rows in pickle.dumps(saved_tables[0])
    assert rows not in message


@pytest.mark.slow
def test_compiled_model_reads_mapped_tables(saved_tables):
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    model.model.compile(backend="eager")
    for when in ("never", "always"):
        model.model.prefetcher.when = when
        assert torch.equal(logits(model), logits(saved_tables[0]))


def test_backward_skips_a_mapped_table(saved_tables):
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped").train()
    reference = copy.deepcopy(saved_tables[0]).train()
    model.gradient_checkpointing_enable()
    for each in (model, reference):
        each(IDS, labels=IDS).loss.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_mapped_model_in_another_process(tmp_path, method):
    build("qwen3", engram_head_dim=32).save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    model.model.prefetcher.when = "always"
    expected = logits(model)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=put_logits, args=(model, queue), daemon=True)
    process.start()
    found = torch.tensor(queue.get(timeout=120))
    process.join()
    torch.testing.assert_close(found, expected)


def test_pinned_residency_needs_a_gpu(saved_tables):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is none; use 'mapped'"):
            EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="pinned")


def test_pinned_residency_reports_a_driver_that_refuses(saved_tables, monkeypatch):
    driver = Driver()
    monkeypatch.setattr(driver, "cudaHostRegister", lambda address, size, flags: 2)
    monkeypatch.setattr(row_sources_engram, "_forget_error", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    with pytest.raises(ValueError, match=r"refused to lock 0\.0 GB of memory \(out of memory\); free memory"):
        EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="pinned", device_map="cpu")


def test_host_reads_pinned_tables(saved_tables, monkeypatch):
    driver = Driver()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "cudart", lambda: driver)
        model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="pinned", device_map="cpu")
        tables = [memory.table.source for memory in model.model.memories().values()]
        memory = [tensor for table in tables for tensor in table.parts[0].tables]
        assert driver.locked == {tensor.data_ptr(): tensor.nbytes for tensor in memory}
        assert sum(driver.locked.values()) == sum(table.num_rows * sum(table.row_bytes) for table in tables)
        assert torch.equal(logits(model), logits(saved_tables[0]))
        del model, tables
        gc.collect()
        assert not driver.locked


@pytest.mark.parametrize("when", ["always", "never"])
def test_default_device_does_not_receive_rows(saved_tables, when):
    """`torch.set_default_device("cuda")` is the usual case; a device without memory reveals tensors created there by
    mistake.
    """
    model = EngramForCausalLM.from_pretrained(saved_tables[2], engram_residency="mapped")
    model.model.prefetcher.when = when
    with torch.device("meta"):
        found = logits(model)
        rows, _ = model.model.memories()[1].table.source.read(0, 5)
    assert torch.equal(found, logits(saved_tables[0]))
    assert rows.device.type == "cpu"


def test_auto_residency_reports_its_choice(library_log):
    gigabyte = 1 << 30
    assert choose_residency(gigabyte, 8 * gigabyte, None) == "resident"
    assert choose_residency(3 * gigabyte, 8 * gigabyte, None) == "mapped"
    assert choose_residency(3 * gigabyte, 8 * gigabyte, 80 * gigabyte) == "resident"
    assert choose_residency(30 * gigabyte, 80 * gigabyte, 80 * gigabyte) == "pinned"
    assert resolve_auto(2 * gigabyte, 80 * gigabyte, None) == "resident" and not library_log
    assert resolve_auto(99 * gigabyte, 80 * gigabyte, 80 * gigabyte) == "mapped"
    assert "Memory tables of 106.3 GB are mapped, not parameters" in "\n".join(library_log)


def test_auto_residency_uses_a_quarter_of_max_memory(tmp_path):
    """The whole model would fit into `max_memory`."""
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
def test_auto_residency_considers_the_gpus_of_a_device_map(device_map, gpus):
    assert gpus_of(device_map, count=4, current=1) == gpus


@pytest.mark.parametrize("has_psutil", [True, False])
def test_free_memory_is_that_of_the_machine_or_its_container(monkeypatch, has_psutil):
    if not has_psutil:  # psutil comes with accelerate; the remote code of a model works without it.
        monkeypatch.setattr(table_format_engram, "psutil", None)
    free = free_host_memory()
    (total,) = re.findall(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert 0 < free < int(total) * 1024


IN_USE = {"memory.current": "4000\n", "memory.stat": "anon 90\ninactive_file 700\nactive_file 80\n"}
IN_USE_V1 = {
    "memory/memory.usage_in_bytes": "4000\n",
    # The limits of parent groups count, too.
    "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 700\ntotal_unevictable 2\n",
}


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({}, 8000 * 1024),
        (IN_USE, 8000 * 1024),
        ({**IN_USE, "memory.max": "max\n"}, 8000 * 1024),
        ({**IN_USE, "memory.max": "5000\n"}, 1700),
        ({**IN_USE, "memory.max": "3000\n"}, 0),  # The limit was lowered.
        ({**IN_USE, "memory.max": "90000000\n"}, 8000 * 1024),
        ({**IN_USE_V1, "memory/memory.limit_in_bytes": "5000\n"}, 1700),
    ],
)
def test_free_memory_of_a_container(tmp_path, monkeypatch, group, free):
    """Both versions of control groups are read, in a file system whose root is elsewhere."""
    for name, text in group.items():
        name = f"sys/fs/cgroup/{name}"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8000 * 1024))
    monkeypatch.setattr(table_format_engram, "Path", lambda *parts: tmp_path.joinpath("/".join(parts).lstrip("/")))
    assert free_host_memory() == free


# --- tables that do not belong to the model --------------------------------------------------------------------------


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("residency", ["mapped", "resident"])
def test_layer_without_a_table_is_refused(saved_tables, tmp_path, residency):
    shutil.copytree(saved_tables[2], tmp_path, dirs_exist_ok=True)
    change_json(tmp_path / "engram_tables.json", lambda manifest: manifest["tables"].pop("2"))
    with pytest.raises(ValueError, match="no table for layer 2"):
        EngramForCausalLM.from_pretrained(tmp_path, engram_residency=residency)


def test_table_of_another_shape_dtype_or_hash_is_refused(saved_tables, tmp_path):
    other = build("qwen3", engram_table_dtype=None, engram_head_dim=64)
    other.save_pretrained(tmp_path / "wide")
    seeded = build(
        "qwen3", engram_head_dim=32, engram_table_dtype=saved_tables[0].config.engram_table_dtype, engram_seed=7
    )
    seeded.save_pretrained(tmp_path / "seeded")
    float16 = build("qwen3", engram_head_dim=32, engram_table_dtype="int8")
    float16.config.engram_table_dtype = "int8"
    float16.save_pretrained(tmp_path / "int8")
    messages = {"wide": "asks for .* of 64", "seeded": "written for the multipliers"}
    if saved_tables[0].config.engram_table_dtype != "int8":
        messages["int8"] = "is stored as .*, but the config says engram_table_dtype 'int8'"
    for name, message in messages.items():
        apart = EngramForCausalLM.from_pretrained(tmp_path / name, engram_residency="mapped")
        apart.save_pretrained(tmp_path / name)
        for path in saved_tables[2].iterdir():
            if is_table_file(path.name):
                shutil.copy(path, tmp_path / name)
        change_json(
            tmp_path / name / "engram_tables.json",
            lambda manifest: manifest.update(weights_digest={}, tables_sha256={}),
        )
        with pytest.raises(ValueError, match=message):
            EngramForCausalLM.from_pretrained(tmp_path / name, engram_residency="mapped")


def test_residency_that_cannot_apply_is_refused(saved_tables, tmp_path):
    with pytest.raises(ValueError, match="must be one of 'auto', 'resident', 'mapped', 'pinned'"):
        EngramForCausalLM.from_pretrained(saved_tables[1], engram_residency="disk")
    saved_tables[0].config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no engram_tables\.json, and no memory tables among"):
        EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    (tmp_path / "typo").mkdir()
    with pytest.raises(OSError, match=r"has no config\.json"):
        EngramForCausalLM.from_pretrained(tmp_path / "typo", engram_residency="mapped")
    with pytest.raises(ValueError, match="the weights come from elsewhere"):
        EngramForCausalLM.from_pretrained(
            saved_tables[1], state_dict=saved_tables[0].state_dict(), engram_residency="mapped"
        )


@pytest.mark.parametrize("place", ["nowhere", "no/where/at/all", "folder", "config.json", ""])
def test_from_pretrained_of_a_folder_without_config_raises_an_os_error(saved_tables, tmp_path, monkeypatch, place):
    """Every model of transformers raises it; weights without a config would get the default config of many gigabytes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    shutil.copy(saved_tables[1] / "model.safetensors", tmp_path / "folder")
    shutil.copy(saved_tables[1] / "config.json", tmp_path)
    with pytest.raises(OSError):
        EngramForCausalLM.from_pretrained(f"./{place}" if place else place)

"""Tables next to a model on a GPU stay in files or host memory; their rows are copied on a separate stream."""

import gc

import pytest
import torch
from peft import PeftModel
from table_models import train_rows_of
from tiny_backbones import build, random_ids

from engram_hf import EngramForCausalLM
from engram_hf.prefetch_engram import FetchedRows, ReadByDevice

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
IDS = random_ids(2, 9)


@pytest.fixture(scope="module", params=[None, "float8_e4m3fn", "int8"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build("qwen3", "v4.1", engram_table_dtype=request.param, engram_head_dim=32).save_pretrained(path)
    return path


def load(folder, residency: str) -> EngramForCausalLM:
    return EngramForCausalLM.from_pretrained(folder, engram_residency=residency, device_map={"": "cuda"}).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS.cuda()).logits


@pytest.mark.parametrize("residency", ["mapped", "pinned"])
@pytest.mark.parametrize("when", ["auto", "always", "never"])
def test_residency_keeps_the_logits(folder, residency, when):
    expected, model = logits(load(folder, "resident")), load(folder, residency)
    model.model.prefetcher.when = when
    for _ in range(3):
        assert torch.equal(logits(model), expected)
    is_fetched = model.model.prefetcher.start(model.model.prepare_memory(IDS.cuda()).row_ids) is not None
    assert is_fetched == (when != "never")
    texts = [
        each.generate(IDS.cuda(), max_new_tokens=6, do_sample=False) for each in (model, load(folder, "resident"))
    ]
    assert torch.equal(*texts)


def test_gpu_reads_pinned_rows_directly(folder):
    model = load(folder, "pinned")
    for memory in model.model.memories().values():
        source = memory.table.source
        assert source.is_visible_from(torch.device("cuda", torch.cuda.current_device()))
        assert all(table.is_pinned() for table in source.parts[0].tables)
        ids = torch.tensor([source.num_rows - 1, 0, 3, 3])
        on_host, on_device = source.fetch(ids), source.fetch(ids.cuda())
        for host, device in zip(on_host, on_device, strict=True):
            assert (host is None) == (device is None)
            assert host is None or (
                device.is_cuda and torch.equal(host.view(torch.uint8), device.cpu().view(torch.uint8))
            )
    fetched = model.model.prefetcher.start(model.model.prepare_memory(IDS.cuda()).row_ids)
    assert all(isinstance(rows, ReadByDevice) for rows in fetched)


def test_reading_pinned_rows_allocates_no_gpu_memory(folder):
    logits(load(folder, "resident"))  # Libraries allocate their own buffers in the first call.
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = load(folder, "pinned")
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    tables = sum(memory.table.source.stored.size for memory in model.model.memories().values())
    logits(model)
    assert torch.cuda.memory_allocated() - before < weights + tables // 2


def test_mapped_rows_arrive_on_the_gpu(folder):
    model = load(folder, "mapped")
    row_ids = model.model.prepare_memory(IDS.cuda()).row_ids
    for rows, ids, memory in zip(
        model.model.prefetcher.start(row_ids), row_ids, model.model.memories().values(), strict=True
    ):
        assert isinstance(rows, FetchedRows)
        values, _ = rows.fetch(ids.reshape(-1))
        assert values.is_cuda
        expected, _ = memory.table.source.fetch(ids.reshape(-1).cpu())
        assert torch.equal(values.cpu().view(torch.uint8), expected.view(torch.uint8))


def test_pinned_memory_is_released(folder):
    source = load(folder, "pinned").model.memories()[1].table.source
    table = source.parts[0].weight
    assert table.is_pinned()
    del source
    gc.collect()
    assert not table.is_pinned()


def test_auto_residency_respects_the_limit_of_a_gpu(folder, tmp_path):
    def choice(**limits):
        model = EngramForCausalLM.from_pretrained(folder, device_map="auto", offload_folder=tmp_path, **limits)
        return model.model.memories()[1].table

    assert choice().is_resident
    assert choice(max_memory={0: 100_000, "cpu": "4GB"}).source.residency == "pinned"
    assert choice(max_memory={0: 100_000, "cpu": 0}).source.residency == "mapped"


def test_cache_can_be_offloaded(folder):
    model, options = load(folder, "mapped"), {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(IDS.cuda(), **options)
    assert torch.equal(model.generate(IDS.cuda(), **options, cache_implementation="offloaded"), expected)


@pytest.mark.parametrize("residency", ["mapped", "pinned"])
def test_row_adapters_train_over_tables_of_the_host(folder, tmp_path, residency):
    """Differences are on the GPU; the adapter is saved, and loaded onto another model."""
    resident, losses = train_rows_of(load(folder, "resident"), IDS.cuda())
    model = load(folder, residency)
    before = logits(model)
    peft, found = train_rows_of(model, IDS.cuda())
    assert found[1] < found[0]
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(peft), logits(resident), rtol=1e-4, atol=1e-5)
    assert all(parameter.is_cuda for parameter in peft.parameters() if parameter.requires_grad)
    with peft.disable_adapter():
        assert torch.equal(logits(peft), before)
    peft.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(folder, residency), tmp_path)), logits(peft))

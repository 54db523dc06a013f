"""`device_map` never changes the logits, with tables among the parameters or in their own files.

The maps name whole decoder layers or more: accelerate cannot take a part of a layer from disk on any backbone.
"""

import accelerate
import pytest
import torch
from tiny_backbones import build, random_ids

from engram_hf import EngramForCausalLM

IDS = random_ids(2, 9)
OUTSIDE = [
    "model.hashing",
    "model.embed_tokens",
    "model.norm",
    "model.rotary_emb",
    "lm_head",
]
WITH_MEMORY = ["model.layers.1", "model.layers.2"]


def on_disk(*modules: str) -> dict[str, str]:
    return {name: "disk" if name in modules else "cpu" for name in [*OUTSIDE, "model.layers.0", *WITH_MEMORY]}


# These are options of `from_pretrained`, and whether the tables are on disk with them.
MAPS = {
    "cpu": ({"device_map": "cpu"}, False),
    "sequential": ({"device_map": "sequential"}, False),
    "part": ({"device_map": "auto", "max_memory": {"cpu": 300_000}}, True),
    "part with buffers": ({"device_map": "auto", "max_memory": {"cpu": 300_000}, "offload_buffers": True}, True),
    "all with buffers": ({"device_map": on_disk(*OUTSIDE, *WITH_MEMORY), "offload_buffers": True}, True),
    "memory": ({"device_map": on_disk(*WITH_MEMORY)}, True),
    "all but memory": ({"device_map": on_disk(*OUTSIDE, "model.layers.0")}, False),
}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module", params=[None, "float8_e4m3fn", "int8"])
def saved(request, tmp_path_factory):
    """Return a model and its two folders: tables among its weights, and tables in files of their own."""
    folder = tmp_path_factory.mktemp("dispatch")
    model = build("mixtral", engram_head_dim=32, engram_table_dtype=request.param)
    model.save_pretrained(folder / "together")
    mapped = EngramForCausalLM.from_pretrained(folder / "together", engram_residency="mapped")
    mapped.save_pretrained(folder / "apart")
    return model, folder


@pytest.mark.parametrize("residency", ["resident", "mapped"])
@pytest.mark.parametrize("tables", ["together", "apart"])
@pytest.mark.parametrize("where", MAPS)
def test_device_map_keeps_the_logits(saved, tmp_path, where, tables, residency):
    model, folder = saved
    options, tables_on_disk = MAPS[where]
    loaded = EngramForCausalLM.from_pretrained(
        folder / tables, engram_residency=residency, offload_folder=tmp_path / "offloaded", **options
    )
    places = set(getattr(loaded, "hf_device_map", {}).values())
    assert places == {"cpu", "disk"} or (where in ("cpu", "sequential") and "disk" not in places)
    table = loaded.model.memories()[1].table
    # A table in its own file that the map puts on disk is read from there, row by row.
    is_resident = residency == "resident" and (tables == "together" or not tables_on_disk)
    assert table.is_resident == is_resident and (not is_resident or table.weight.is_meta == tables_on_disk)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.generate(IDS, max_new_tokens=3), model.generate(IDS, max_new_tokens=3))


@pytest.mark.parametrize("residency", ["resident", "mapped"])
@pytest.mark.parametrize("tables", ["together", "apart"])
def test_save_pretrained_of_a_model_offloaded_to_disk(saved, tmp_path, tables, residency):
    model, folder = saved
    offloaded = EngramForCausalLM.from_pretrained(
        folder / tables,
        engram_residency=residency,
        device_map=on_disk(*WITH_MEMORY),
        offload_folder=tmp_path / "offloaded",
    )
    offloaded.save_pretrained(tmp_path / "again")
    again = EngramForCausalLM.from_pretrained(tmp_path / "again", engram_residency="resident")
    expected = model.state_dict()
    found = again.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.contiguous().view(torch.uint8), expected[name].contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("tables", ["together", "apart"])
def test_save_pretrained_with_one_of_two_tables_on_disk(saved, tmp_path, tables):
    """Separate files hold the tables of all layers, or of none; whatever is saved can be loaded again."""
    model, folder = saved
    split = EngramForCausalLM.from_pretrained(
        folder / tables,
        engram_residency="resident",
        device_map=on_disk("model.layers.2"),
        offload_folder=tmp_path / "offloaded",
    )
    assert [memory.table.is_resident for memory in split.model.memories().values()] == 2 * [tables == "together"]
    assert (split.model.prefetcher is None) == (tables == "together")
    assert torch.equal(logits(split), logits(model))
    split.save_pretrained(tmp_path / "saved")
    for residency in ("resident", "mapped"):
        loaded = EngramForCausalLM.from_pretrained(tmp_path / "saved", engram_residency=residency)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("limit", [300_000, "300KB"])
def test_auto_device_map_respects_max_memory(saved, tmp_path, limit):
    model, folder = saved

    def load(**options):
        return EngramForCausalLM.from_pretrained(
            folder / "apart", device_map="auto", offload_folder=tmp_path / "offloaded", **options
        )

    assert load().model.memories()[1].table.is_resident
    limited = load(max_memory={"cpu": limit})
    assert limited.model.memories()[1].table.source.residency == "mapped"
    assert torch.equal(logits(limited), logits(model))


@pytest.mark.parametrize("residency", ["resident", "mapped"])
def test_accelerate_offloads_a_loaded_model(saved, residency):
    """It offloads buffers too, and the hash needs some of them before its own forward."""
    model, folder = saved
    loaded = EngramForCausalLM.from_pretrained(folder / "together", engram_residency=residency)
    accelerate.cpu_offload(loaded, execution_device="cpu", offload_buffers=True)
    assert torch.equal(logits(loaded), logits(model))

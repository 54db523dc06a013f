"""Row adapters as a method of PEFT: only chosen rows change, and other models refuse them."""

import copy
import gc
import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from table_models import Driver, train_rows_of
from tiny_backbones import BACKBONES, LAYER_IDS, build, random_ids
from torch.utils.data import DataLoader
from training_runs import losses
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.training import EngramRowsConfig, hotswap_rows, scan_rows
from engram_hf.training.row_adapters import RowDifferences

FLOAT8 = {"engram_table_dtype": "float8_e4m3fn", "engram_head_dim": 32}
INT8 = {"engram_table_dtype": "int8", "engram_head_dim": 32}
INT2 = {"engram_table_dtype": "int2", "engram_head_dim": 8}
NVFP4 = {"engram_table_dtype": "nvfp4", "engram_head_dim": 16}
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def built() -> EngramForCausalLM:
    return build("mixtral")


@pytest.fixture
def model(built) -> EngramForCausalLM:
    return copy.deepcopy(built)


@pytest.fixture(scope="module")
def saved(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    built.save_pretrained(folder)
    return folder


@pytest.fixture
def rows(model, corpus):
    return scan_rows(DataLoader(corpus, batch_size=3), None, model)


def tables(model) -> dict[int, torch.nn.Module]:
    return {layer: memory.table for layer, memory in model.base_model.memories().items()}


def logits(model, ids=None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(random_ids(2, 9) if ids is None else ids).logits


def move(model, seed: int = 0):
    """Give every trainable difference a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".delta") and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model, rows, **kwargs) -> PeftModel:
    return get_peft_model(model, EngramRowsConfig(rows=rows), **kwargs)


def read_by(model, ids) -> dict[int, torch.Tensor]:
    return scan_rows([{"input_ids": ids}], None, model)


# --- training


def test_trainer_changes_chosen_rows_alone_and_merging_changes_no_output(model, rows, corpus, trainer):
    start = copy.deepcopy(model)
    ids = torch.stack([row["input_ids"] for row in corpus])
    before = logits(model, ids)
    peft = adapted(model, rows)
    assert torch.equal(logits(peft, ids), before)
    trained = {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 and all(name.endswith(".delta") for name in trained)
    run = trainer(peft, max_steps=10, learning_rate=0.1)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    after, elsewhere = logits(peft, ids), logits(peft)
    assert (after - before).abs().max() > 1e-2
    with peft.disable_adapter():
        assert torch.equal(logits(peft, ids), before)
    merged = peft.merge_and_unload(safe_merge=True)
    assert torch.equal(logits(merged, ids), after) and torch.equal(logits(merged), elsewhere)
    for layer, table in tables(merged).items():
        changed = (table.weight != tables(start)[layer].weight).any(1).nonzero().squeeze(1)
        assert len(changed) > 0.8 * len(rows[layer]) and set(changed.tolist()) <= set(rows[layer].tolist())
    assert set(merged.state_dict()) == set(start.state_dict())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resumed_run_equals_the_uninterrupted_one(built, rows, checkpointing, trainer):
    settings = {"learning_rate": 5e-2, "gradient_checkpointing": checkpointing}
    whole = trainer(adapted(copy.deepcopy(built), rows), save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = trainer(move(adapted(copy.deepcopy(built), rows)), **settings)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    assert torch.equal(logits(resumed.model), logits(whole.model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_is_exact_in_the_dtype_of_the_table(dtype):
    model = build("llama").to(dtype)
    before = logits(model)
    peft = move(adapted(model, read_by(model, random_ids(2, 9))))
    after = logits(peft)
    assert after.dtype == dtype and (after - before).abs().max() > 1e-2
    peft.merge_adapter()
    assert torch.equal(logits(peft), after)
    peft.unmerge_adapter()
    assert torch.equal(logits(peft), after)
    with peft.disable_adapter():
        assert torch.equal(logits(peft), before)
    assert torch.equal(logits(peft.merge_and_unload()), after)


def test_differences_have_the_gradients_of_the_table():
    rows = torch.tensor([2, 3, 7])
    adapter = RowDifferences(rows, 3, num_rows=9, width=4).double()
    torch.nn.init.normal_(adapter.delta)
    dense = torch.zeros(9, 4, dtype=torch.float64)
    dense[rows] = adapter.delta.detach()
    row_ids = torch.tensor([[[0, 2, 8], [7, 7, 3]]])
    found, where = adapter(row_ids)
    assert torch.equal(found * where, dense[row_ids]) and torch.equal(where[..., 0], torch.isin(row_ids, rows))
    found[where[..., 0]].sum().backward()
    assert adapter.delta.grad.tolist() == [[1.0] * 4, [1.0] * 4, [2.0] * 4]
    assert torch.autograd.gradcheck(
        lambda delta: torch.func.functional_call(adapter, {"delta": delta}, (row_ids,))[0], adapter.delta
    )


def test_text_that_reads_no_adapted_row_keeps_every_bit(model):
    ids, others = random_ids(2, 9), random_ids(2, 9, seed=5)
    before = logits(model, others)
    mine, theirs = read_by(model, ids), read_by(model, others)
    apart = {layer: found[~torch.isin(found, theirs[layer])] for layer, found in mine.items()}
    peft = move(adapted(model, apart))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter[0] = float("nan")  # A NaN shows any arithmetic on these rows.
    assert torch.equal(logits(peft, others), before)


@pytest.mark.parametrize("fields", [FLOAT8, INT8, INT2, NVFP4], ids=["float8", "int8", "int2", "nvfp4"])
def test_quantized_tables_are_trained_but_not_merged(fields, corpus, trainer):
    model = build("mixtral", **fields)
    bits = {layer: table.weight.view(torch.uint8).clone() for layer, table in tables(model).items()}
    before = logits(model)
    peft = adapted(model, scan_rows(corpus, None, model))
    assert torch.equal(logits(peft), before)
    run = trainer(peft, max_steps=10, learning_rate=0.1)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    after = logits(peft)
    with pytest.raises(ValueError, match="without being rounded again"):
        peft.merge_and_unload()
    assert torch.equal(logits(peft), after)
    for layer, table in tables(peft.get_base_model()).items():
        assert torch.equal(table.get_base_layer().weight.view(torch.uint8), bits[layer])


@pytest.mark.parametrize("when", ["always", "never"])
def test_mapped_table_trains_rows_but_cannot_merge_them(saved, when):
    ids = random_ids(2, 9)
    resident = EngramForCausalLM.from_pretrained(saved, engram_residency="resident")
    mapped = EngramForCausalLM.from_pretrained(saved, engram_residency="mapped")
    mapped.model.prefetcher.when = when
    found = read_by(resident, ids)
    models = [move(adapted(model, found)) for model in (resident, mapped)]
    assert torch.equal(logits(models[0], ids), logits(models[1], ids))
    models[1](ids, labels=ids).loss.backward()
    deltas = [parameter for name, parameter in models[1].named_parameters() if name.endswith(".delta")]
    assert len(deltas) == 2 and all(delta.grad.abs().sum() > 0 for delta in deltas)
    with pytest.raises(ValueError, match="engram_residency='resident'"):
        models[1].merge_and_unload()


@pytest.mark.parametrize("fields", [{}, FLOAT8], ids=["float", "float8"])
def test_rows_train_alike_wherever_the_table_is(fields, tmp_path, monkeypatch):
    """Here, only the driver that locks pages is replaced; tests/test_cuda_tables.py does the same on a GPU."""
    build("mixtral", **fields).save_pretrained(tmp_path)
    driver, ids = Driver(), random_ids(2, 9)
    models = [EngramForCausalLM.from_pretrained(tmp_path, engram_residency=at) for at in ("resident", "mapped")]
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        models.append(EngramForCausalLM.from_pretrained(tmp_path, engram_residency="pinned", device_map="cpu"))
    assert tables(models[-1])[1].source.residency == "pinned"
    found = [train_rows_of(model, ids) for model in models]
    for peft, values in found:
        assert values[1] < values[0] and torch.equal(values, found[0][1])
        assert torch.equal(logits(peft, ids), logits(found[0][0], ids))
    with pytest.raises(ValueError, match="in its file or in host memory cannot take differences"):
        found[-1][0].merge_and_unload()
    assert driver.locked
    del models, found, peft
    gc.collect()
    assert not driver.locked


@pytest.mark.skipif(
    not Path("/proc/self/smaps").is_file(), reason="the system does not tell which pages a process has"
)
def test_training_releases_the_pages_of_a_mapped_table(model, tmp_path):
    """The memory of a process does not grow with the rows that its corpus reads; other forward passes keep the pages."""

    def pages() -> int:
        kilobytes, is_shared = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, *values = line.split()
            if not name.endswith(":"):
                is_shared = values[0] == "r--s" and values[-1].startswith(
                    str(tmp_path)
                )  # transformers' maps are private.
            elif name == "Rss:" and is_shared:
                kilobytes += int(values[0])
        return kilobytes

    model.save_pretrained(tmp_path)
    ids = random_ids(2, 9)
    peft = adapted(EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped"), read_by(model, ids))
    logits(peft, ids)
    assert pages() > 0
    peft(ids, labels=ids).loss.backward()
    assert pages() == 0


def test_generation_is_that_of_the_merged_model(model):
    ids = random_ids(2, 7)
    peft = move(adapted(model, read_by(model, random_ids(8, 30, seed=2)))).eval()
    tokens = peft.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    merged = copy.deepcopy(peft).merge_and_unload()
    assert torch.equal(tokens, merged.generate(input_ids=ids, max_new_tokens=6, do_sample=False))


# --- folders


@pytest.fixture
def folder(saved, rows, tmp_path):
    """Save an adapter, and beside it the logits of its model."""
    peft = move(adapted(EngramForCausalLM.from_pretrained(saved), rows))
    peft.save_pretrained(tmp_path / "adapter")
    torch.save(logits(peft), tmp_path / "logits.pt")
    return tmp_path / "adapter"


@pytest.fixture
def expected(folder) -> torch.Tensor:
    return torch.load(folder.parent / "logits.pt")


def test_folder_has_rows_their_numbers_and_the_hash(folder, model, rows):
    tensors = load_file(folder / FILE)
    assert len(tensors) == 2 * len(LAYER_IDS)
    for layer, table in tables(model).items():
        (numbers,) = (value for key, value in tensors.items() if f".{layer}.engram." in key and key.endswith("rows"))
        (delta,) = (value for key, value in tensors.items() if f".{layer}.engram." in key and key.endswith("delta"))
        assert torch.equal(numbers, rows[layer]) and delta.shape == (len(numbers), table.width)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "ENGRAM_ROWS" and config["rows"] is None
    assert config["memory"]["1"]["multipliers"] == model.model.hashing.multipliers[0].tolist()
    assert config["memory"]["1"]["primes"] == model.model.hashing.primes[0].tolist()
    assert "import engram_hf" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "load",
    [
        lambda saved, folder: PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), folder),
        lambda saved, folder: PeftModel.from_pretrained(
            EngramForCausalLM.from_pretrained(saved), folder, low_cpu_mem_usage=True
        ),
        lambda saved, folder: PeftModel.from_pretrained(
            EngramForCausalLM.from_pretrained(saved, engram_residency="mapped"), folder
        ),
        lambda saved, folder: AutoPeftModelForCausalLM.from_pretrained(folder),
        lambda saved, folder: EngramForCausalLM.from_pretrained(folder),
        lambda saved, folder: _with_own_load_adapter(saved, folder),
    ],
    ids=["PeftModel", "low memory", "mapped", "AutoPeftModel", "from_pretrained", "load_adapter of transformers"],
)
def test_every_way_of_loading_gives_the_same_model(saved, folder, expected, load):
    assert torch.equal(logits(load(saved, folder)), expected)


def _with_own_load_adapter(saved, folder):
    model = EngramForCausalLM.from_pretrained(saved)
    model.load_adapter(str(folder))
    return model


def test_several_adapters_are_switched_and_added(saved, folder, expected, model):
    plain = logits(model)
    peft = PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), folder, adapter_name="first")
    other = read_by(model, random_ids(2, 9))
    peft.add_adapter("second", EngramRowsConfig(rows=other))
    assert torch.equal(logits(peft), expected)
    peft.set_adapter("second")
    assert torch.equal(logits(peft), plain)
    second = logits(move(peft, seed=3))
    assert (second - plain).abs().max() > 1e-2

    peft.base_model.set_adapter(["first", "second"])
    both = logits(peft)
    assert (both - second).abs().max() > 1e-3 and (both - expected).abs().max() > 1e-3
    peft.base_model.add_weighted_adapter(["first", "second"], [1.0, 1.0], "sum")
    peft.set_adapter("sum")
    torch.testing.assert_close(logits(peft), both, rtol=0, atol=1e-5)
    for table in tables(peft.get_base_model()).values():
        held = {name: set(adapter.rows.tolist()) for name, adapter in table.engram_rows_adapter.items()}
        assert held["sum"] == held["first"] | held["second"]
    peft.base_model.add_weighted_adapter(["first"], [0.0], "nothing")
    peft.set_adapter("nothing")
    assert torch.equal(logits(peft), plain)

    peft.delete_adapter("nothing")
    peft.delete_adapter("sum")
    peft.set_adapter("first")
    assert torch.equal(logits(peft), expected)
    merged = copy.deepcopy(peft)
    merged.base_model.set_adapter(["first", "second"])
    assert torch.equal(logits(merged.merge_and_unload()), both)
    assert torch.equal(logits(peft.unload()), plain)


def test_adapter_is_swapped_while_the_model_is_in_use(saved, folder, expected, model):
    peft = move(adapted(model, read_by(model, random_ids(2, 9)), adapter_name="old"), seed=4)
    assert not torch.equal(logits(peft), expected)
    peft.load_adapter(folder, "new")
    peft.set_adapter("new")
    peft.delete_adapter("old")
    assert torch.equal(logits(peft), expected)


def test_hotswap_replaces_rows_under_their_name(saved, folder, expected, model):
    """The rows are of other layers and of another number; an adapter for another hash changes nothing."""
    old = read_by(model, random_ids(2, 9))
    peft = move(adapted(model, {2: old[2]}), seed=4).train()
    hotswap_rows(peft, folder)
    assert peft.training and torch.equal(logits(peft), expected)
    assert list(peft.peft_config) == ["default"] and peft.peft_config["default"].memory.keys() == {"1", "2"}
    assert not any(parameter.requires_grad for parameter in peft.parameters())
    hotswap_rows(peft, folder, is_trainable=True)
    assert sum(parameter.requires_grad for parameter in peft.parameters()) == len(LAYER_IDS)

    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"vocab_size": ', '"vocab_size": 9'))
    with pytest.raises(ValueError, match="Load it onto the model it was trained on"):
        hotswap_rows(peft, folder)
    with pytest.raises(ValueError, match="There is no row adapter 'other' to be replaced"):
        hotswap_rows(peft, folder, "other")
    assert list(peft.peft_config) == ["default"] and torch.equal(logits(peft), expected)
    peft.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the tables"):
        hotswap_rows(peft, folder)


def test_peft_refuses_rows_in_its_mixed_model(model, folder, rows, tmp_path):
    """PEFT has a fixed list of methods, and still takes those; the message names a way that works."""
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    way = r'get_peft_model\(peft_model.get_base_model\(\), EngramRowsConfig\(rows=rows\), adapter_name="corpus"\)'
    with pytest.raises(ValueError, match=way):
        get_peft_model(copy.deepcopy(model), EngramRowsConfig(rows=rows), mixed=True)
    mixed = get_peft_model(copy.deepcopy(model), lora, mixed=True)
    with pytest.raises(ValueError, match=way):
        mixed.load_adapter(folder, "rows")
    with pytest.raises(ValueError, match="PROMPT_TUNING"):
        mixed.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=2))
    peft_model = get_peft_model(model, lora)
    both = get_peft_model(peft_model.get_base_model(), EngramRowsConfig(rows=rows), adapter_name="corpus")
    both.save_pretrained(tmp_path / "both")
    names = load_file(tmp_path / "both" / FILE).keys() | load_file(tmp_path / "both" / "corpus" / FILE).keys()
    assert {part for name in names for part in ("lora_A", "lora_B", ".delta") if part in name} == {
        "lora_A",
        "lora_B",
        ".delta",
    }


def test_lora_and_several_row_adapters_are_one_model(saved, folder, expected, model, tmp_path, trainer):
    """They are trained together, saved, loaded, disabled and merged."""
    plain = logits(model)
    lora = get_peft_model(
        EngramForCausalLM.from_pretrained(saved), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    both = PeftModel.from_pretrained(lora.get_base_model(), folder, adapter_name="law", is_trainable=True)
    assert torch.equal(logits(both), expected)
    both.add_adapter("medicine", EngramRowsConfig(rows=read_by(model, random_ids(2, 9))))
    both.base_model.set_adapter(["law", "medicine"])
    lora.set_adapter("default")  # PEFT 0.19 froze it when the rows were added.
    start = {name: value.detach().clone() for name, value in both.named_parameters() if value.requires_grad}
    trainer(both, max_steps=4).train()
    moved = {name for name, value in both.named_parameters() if name in start and not torch.equal(value, start[name])}
    assert all(any(part in name for name in moved) for part in ("lora_A", "lora_B", "law.delta", "medicine.delta"))
    after = logits(both)

    both.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), tmp_path / "both")
    again = PeftModel.from_pretrained(again.get_base_model(), tmp_path / "both" / "law", adapter_name="law")
    again.load_adapter(tmp_path / "both" / "medicine", "medicine")
    assert not torch.equal(logits(again), after)
    again.base_model.set_adapter(["law", "medicine"])
    assert torch.equal(logits(again), after)
    with again.disable_adapter():
        assert torch.equal(logits(again), plain)
    assert torch.equal(logits(again), after)
    merged = again.merge_and_unload()
    assert set(merged.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(logits(merged), after, rtol=0, atol=1e-5)  # LoRA's product is summed in another order.


def test_row_adapters_on_a_remote_code_model(built, rows, saved):
    # Its classes are not the installed ones, so nothing may depend on `isinstance`.
    remote = get_class_from_dynamic_module("modeling_engram.EngramForCausalLM", saved).from_pretrained(saved)
    assert not isinstance(remote, EngramForCausalLM)
    found = [move(adapted(model, rows)) for model in (remote, copy.deepcopy(built))]
    assert torch.equal(logits(found[0]), logits(found[1])) and not torch.equal(logits(found[1]), logits(built))


def test_copy_has_adapters_of_its_own(model, rows):
    peft = move(adapted(model, rows))
    twin = copy.deepcopy(peft)
    assert torch.equal(logits(twin), logits(peft))
    move(peft, seed=1)
    assert not torch.equal(logits(twin), logits(peft))


def test_process_without_the_package_gets_an_error(folder, run_without_the_package):
    code = f"""
from peft import PeftConfig
try:
    PeftConfig.from_pretrained({str(folder)!r})
    result = "loaded"
except KeyError as error:
    result = str(error)
print(json.dumps({{"said": result}}))
"""
    assert "ENGRAM_ROWS" in run_without_the_package(code)["said"]


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"engram_seed": 5}, "multipliers"),
        ({"engram_vocab_size": 211}, "primes"),
        ({"engram_head_dim": 16}, "width"),
        ({"engram_n_heads": 4}, "primes"),
    ],
)
def test_adapter_of_another_hash_is_refused(folder, fields, said):
    other = build("mixtral", **fields)
    before = logits(other)
    with pytest.raises(ValueError, match=f"memory with the {said} .* other n-grams"):
        PeftModel.from_pretrained(other, folder)
    with pytest.raises(ValueError, match=said):
        other.load_adapter(str(folder))
    assert torch.equal(logits(other), before)


def test_adapter_of_other_layers_is_refused(model, tmp_path):
    size = {"engram_n_heads": 2, "engram_head_dim": 8, "engram_vocab_size": 97}
    other = EngramForCausalLM(EngramConfig.for_backbone(BACKBONES["mixtral"](), layer_ids=[0], **size))
    adapted(other, read_by(other, random_ids(1, 5))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Layer 0 has no Engram memory; the layers that have are"):
        PeftModel.from_pretrained(model, tmp_path)


def test_adapter_of_another_tokenizer_is_refused(tmp_path):
    def with_map(shift: int) -> EngramForCausalLM:
        model = build("llama", engram_compressed_vocab_size=64)
        token_map = torch.arange(128) % 64
        token_map[5 : 5 + shift] = 7
        model.set_token_map(token_map)
        return model

    adapted(with_map(0), read_by(with_map(0), random_ids(1, 5))).save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(with_map(0), tmp_path) is not None
    with pytest.raises(ValueError, match="another token map"):
        PeftModel.from_pretrained(with_map(1), tmp_path)


def test_adapter_is_accepted_after_tokens_were_added(tmp_path):
    model = build("llama", engram_compressed_vocab_size=64)
    model.set_token_map(torch.arange(128) % 64)
    peft = move(adapted(copy.deepcopy(model), read_by(model, random_ids(1, 5))))
    peft.save_pretrained(tmp_path)
    model.resize_token_embeddings(130)
    again = PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(logits(again)[..., :128], logits(peft), rtol=0, atol=1e-5)


BAD_ROWS = {
    "Layer 0 has no Engram memory": {0: torch.tensor([1])},
    "a non-empty int64 vector without repetitions": {1: torch.tensor([4, 4])},
    r"got torch.float32 \[1\]": {1: torch.tensor([1.0])},
    "with 0 distinct rows": {1: torch.tensor([], dtype=torch.int64)},
    "whose table has rows 0 to": {1: torch.tensor([0, 10**9])},
    "Rows -1 to 2": {1: torch.tensor([-1, 2])},
}


@pytest.mark.parametrize("message", BAD_ROWS)
def test_bad_rows_are_refused_and_nothing_is_changed(model, message):
    with pytest.raises(ValueError, match=message):
        adapted(model, {2: torch.tensor([0]), **BAD_ROWS[message]})
    assert all(type(table).__name__ == "EngramTable" for table in tables(model).values())
    assert all(table.weight.requires_grad for table in tables(model).values())


def test_misuse_is_refused(model, rows):
    with pytest.raises(ValueError, match="has no rows"):
        get_peft_model(model, EngramRowsConfig())
    with pytest.raises(ValueError, match="Sequential has no Engram memory"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), EngramRowsConfig(rows=rows))
    peft = adapted(model, rows)
    for arguments in ([], [], "new"), (["default"], [1.0, 2.0], "new"), (["other"], [1.0], "new"):
        with pytest.raises(ValueError, match="cannot be added up"):
            peft.base_model.add_weighted_adapter(*arguments)
    with pytest.raises(ValueError, match="already"):
        peft.base_model.add_weighted_adapter(["default"], [1.0], "default")


@pytest.mark.parametrize(
    "damage",
    [
        lambda rows: rows.flip(0),
        lambda rows: rows + 10**9,
        lambda rows: torch.zeros_like(rows),
        lambda rows: rows - rows.max() - 1,
    ],
    ids=["descending", "too large", "all zero", "negative"],
)
def test_damaged_row_numbers_are_refused(saved, folder, damage):
    tensors = load_file(folder / FILE)
    key = next(key for key in tensors if key.endswith("rows"))
    save_file({**tensors, key: damage(tensors[key]).contiguous()}, folder / FILE)
    with pytest.raises(ValueError, match="row numbers of an adapter are missing or damaged"):
        PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), folder)
    with pytest.raises(ValueError, match="row numbers of an adapter are missing or damaged"):
        logits(_with_own_load_adapter(saved, folder))


@pytest.mark.parametrize("value", [{}, {"1": 5}, {"x": {}}, {"1": {"rows": 3}}, {"1": None}])
def test_damaged_description_is_refused(saved, folder, value):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "memory": value}))
    with pytest.raises(ValueError, match=r"does not say which memory|has no rows"):
        PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), folder)


def test_layer_missing_from_the_description_is_refused(saved, folder):
    """The rows of this layer would be missing, too."""
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["memory"]["1"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="describes rows of the layers"):
        PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), folder)


def test_missing_differences_are_refused(saved, folder):
    tensors = load_file(folder / FILE)
    del tensors[next(key for key in tensors if key.endswith("delta"))]
    save_file(tensors, folder / FILE)
    with pytest.raises(ValueError, match="differences of an adapter are missing"):
        PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), folder)


def test_numbers_that_were_never_loaded_are_refused(saved, folder):
    config = EngramRowsConfig.from_pretrained(folder)
    peft = get_peft_model(EngramForCausalLM.from_pretrained(saved), config)
    with pytest.raises(ValueError, match="missing or damaged"):
        logits(peft)

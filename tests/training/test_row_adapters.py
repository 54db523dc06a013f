"""Training only the rows a corpus reads: chosen rows change, no other does, and merging changes nothing."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_backbones import LAYER_IDS, build, random_ids
from torch.utils.data import DataLoader
from training_runs import losses
from transformers import DataCollatorWithFlattening
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from engram_hf import EngramForCausalLM
from engram_hf.training import RowAdapter, add_row_adapters, merge_row_adapters, saved_rows, touched_rows

FLOAT8 = {"engram_table_dtype": "float8_e4m3fn", "engram_head_dim": 32}


@pytest.fixture(scope="module")
def built() -> EngramForCausalLM:
    return build("mixtral")


@pytest.fixture
def model(built) -> EngramForCausalLM:
    return copy.deepcopy(built)


@pytest.fixture
def rows(model, corpus) -> dict[int, torch.Tensor]:
    return touched_rows(model, DataLoader(corpus, batch_size=3))


def tables(model) -> dict[int, torch.nn.Module]:
    return {layer: memory.table for layer, memory in model.base_model.memories().items()}


def logits(model, ids=None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(random_ids(2, 9) if ids is None else ids).logits


def move(model, seed: int = 0) -> None:
    """Give every difference a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".row_adapter." in name and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_touched_rows_are_those_that_get_a_gradient(model, corpus, rows):
    ids = torch.stack([row["input_ids"] for row in corpus])
    model(ids, labels=ids).loss.backward()
    assert list(rows) == LAYER_IDS
    for layer, table in tables(model).items():
        # The last position predicts nothing, so its rows may have no gradient.
        last = model.model.prepare_memory(ids).row_ids[LAYER_IDS.index(layer), :, -1].flatten()
        trained = table.weight.grad.abs().sum(1).nonzero().squeeze(1)
        assert set(trained.tolist()) <= set(rows[layer].tolist()) <= set(trained.tolist()) | set(last.tolist())
        assert 0 < len(rows[layer]) < table.num_rows


def test_touched_rows_follow_padding_packing_and_wrapping(model):
    documents = [random_ids(1, length, seed=length)[0] for length in (4, 7)]
    alone = [touched_rows(model, [{"input_ids": ids[None]}]) for ids in documents]
    expected = {layer: torch.unique(torch.cat([rows[layer] for rows in alone])) for layer in LAYER_IDS}

    padded = torch.zeros(2, 7, dtype=torch.int64)
    mask = torch.zeros(2, 7, dtype=torch.int64)
    for index, ids in enumerate(documents):
        padded[index, 7 - len(ids) :], mask[index, 7 - len(ids) :] = ids, 1
    features = [{"input_ids": ids.tolist()} for ids in documents]
    packed = DataCollatorWithFlattening(return_seq_idx=True)(features, return_tensors="pt")
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    for reader, batch in [
        (model, {"input_ids": padded, "attention_mask": mask, "labels": padded}),
        (model, packed),
        (model, {"input_ids": packed["input_ids"], "seq_idx": packed["seq_idx"]}),
        (model.model, packed),
        (peft, packed),
        (torch.nn.DataParallel(model), packed),
    ]:
        found = touched_rows(reader, [batch])
        assert all(torch.equal(found[layer], expected[layer]) for layer in LAYER_IDS)
    leaking = touched_rows(model, [{"input_ids": packed["input_ids"]}])
    assert not torch.equal(leaking[1], expected[1])


def test_only_chosen_rows_change_and_merging_changes_no_output(model, rows, corpus, trainer):
    start = copy.deepcopy(model)
    ids = torch.stack([row["input_ids"] for row in corpus])
    before = logits(model, ids)
    add_row_adapters(model, rows)
    assert torch.equal(logits(model, ids), before)
    model.requires_grad_(False)
    for table in tables(model).values():
        table.row_adapter.requires_grad_(True)
    run = trainer(model, max_steps=10, learning_rate=0.1)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    for layer, table in tables(model).items():
        assert torch.equal(table.weight, tables(start)[layer].weight)

    after, elsewhere = logits(model, ids), logits(model)
    assert (after - before).abs().max() > 1e-2
    merge_row_adapters(model)
    assert torch.equal(logits(model, ids), after) and torch.equal(logits(model), elsewhere)
    for layer, table in tables(model).items():
        changed = (table.weight != tables(start)[layer].weight).any(1).nonzero().squeeze(1)
        assert len(changed) > 0.8 * len(rows[layer]) and set(changed.tolist()) <= set(rows[layer].tolist())
        assert table.weight.requires_grad and not table._forward_hooks
    assert set(model.state_dict()) == set(start.state_dict())
    add_row_adapters(model, rows)  # and again, on top
    assert torch.equal(logits(model, ids), after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_is_exact_in_the_dtype_of_the_table(dtype):
    model = build("llama").to(dtype)
    rows = touched_rows(model, [{"input_ids": random_ids(2, 9)}])
    before = logits(model)
    add_row_adapters(model, rows)
    move(model)
    adapted = logits(model)
    assert adapted.dtype == dtype and (adapted - before).abs().max() > 1e-2
    merge_row_adapters(model)
    assert torch.equal(logits(model), adapted)


def test_differences_are_those_of_the_table_itself():
    rows = torch.tensor([2, 3, 7])
    adapter = RowAdapter(rows, 4, dtype=torch.float64)
    torch.nn.init.normal_(adapter.delta)
    dense = torch.zeros(9, 4, dtype=torch.float64)
    dense[rows] = adapter.delta.detach()
    row_ids = torch.tensor([[[0, 2, 8], [7, 7, 3]]])
    assert torch.equal(adapter(row_ids), dense[row_ids].flatten(-2))
    adapter(row_ids).sum().backward()
    assert adapter.delta.grad.tolist() == [[1.0] * 4, [1.0] * 4, [2.0] * 4]
    assert torch.autograd.gradcheck(
        lambda delta: torch.func.functional_call(adapter, {"delta": delta}, (row_ids,)), adapter.delta
    )


def test_float8_tables_are_trained_through_their_adapters(corpus, trainer):
    model = build("mixtral", **FLOAT8)
    bits = {layer: table.weight.view(torch.uint8).clone() for layer, table in tables(model).items()}
    before = logits(model)
    rows = touched_rows(model, DataLoader(corpus, batch_size=4))
    add_row_adapters(model, rows)
    assert torch.equal(logits(model), before)
    model.requires_grad_(False)
    for table in tables(model).values():
        table.row_adapter.requires_grad_(True)
    run = trainer(model, max_steps=10, learning_rate=0.1)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    assert all(torch.equal(table.weight.view(torch.uint8), bits[layer]) for layer, table in tables(model).items())
    with pytest.raises(ValueError, match="without being rounded again"):
        merge_row_adapters(model)
    assert model.bfloat16().model.memories()[1].table.row_adapter.delta.dtype == torch.float32


def adapted(model, rows, **fields) -> PeftModel:
    add_row_adapters(model, rows)
    settings = {"r": 2, "target_modules": ["q_proj", "engram.kv_proj"], "modules_to_save": ["row_adapter"], **fields}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def test_peft_trains_saves_and_reloads_them(model, rows, corpus, trainer, tmp_path):
    start = copy.deepcopy(model)
    before = logits(model)
    peft = adapted(model, rows)
    assert torch.equal(logits(peft), before)
    run = trainer(peft, max_steps=8, learning_rate=5e-2, save_strategy="steps", save_steps=4)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    after = logits(peft)
    assert (after - before).abs().max() > 1e-2
    with peft.disable_adapter():
        assert torch.equal(logits(peft), before)

    peft.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    adapter_keys = [key for key in saved if "lora_" not in key]
    assert sorted(key.rpartition(".")[2] for key in adapter_keys) == ["delta", "delta", "rows", "rows"]
    for layer, table in tables(start).items():
        (delta,) = (saved[key] for key in adapter_keys if f"layers.{layer}." in key and key.endswith("delta"))
        assert delta.shape == (len(rows[layer]), table.width)

    again = copy.deepcopy(start)
    found = saved_rows(tmp_path / "adapter")
    assert all(torch.equal(found[layer], rows[layer]) for layer in LAYER_IDS)
    add_row_adapters(again, found)
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(logits(again), after)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, rtol=0, atol=1e-5)
    merge_row_adapters(merged)
    torch.testing.assert_close(logits(merged), after, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(
        logits(EngramForCausalLM.from_pretrained(tmp_path / "merged")), after, rtol=0, atol=1e-5
    )

    # From the checkpoint of step 4 and other differences, the run ends where it did.
    resumed = adapted(copy.deepcopy(start), rows)
    move(resumed)
    second = trainer(resumed, max_steps=8, learning_rate=5e-2)
    second.train(resume_from_checkpoint=f"{run.args.output_dir}/checkpoint-4")
    assert losses(second)[-4:] == losses(run)[-4:]
    assert torch.equal(logits(resumed), after)


def test_two_adapters_have_rows_of_their_own(model, rows, tmp_path):
    start = copy.deepcopy(model)
    other = {layer: torch.arange(len(ids)) for layer, ids in rows.items()}
    expected = {}
    for name, chosen in [("first", rows), ("second", other)]:
        peft = adapted(copy.deepcopy(start), chosen)
        move(peft, seed=len(name))
        expected[name] = logits(peft)
        peft.save_pretrained(tmp_path / name)
    assert (expected["first"] - expected["second"]).abs().max() > 1e-2
    add_row_adapters(model, rows)
    both = PeftModel.from_pretrained(model, tmp_path / "first", adapter_name="first")
    both.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("second", "first"):
        both.set_adapter(name)
        torch.testing.assert_close(logits(both), expected[name], rtol=0, atol=1e-6)
    few = adapted(copy.deepcopy(start), {layer: ids[:3] for layer, ids in rows.items()})
    few.save_pretrained(tmp_path / "few")
    with pytest.raises(RuntimeError, match="size mismatch"):  # PEFT's and torch's own words
        both.load_adapter(tmp_path / "few", adapter_name="few")


def test_they_go_onto_a_remote_code_model(built, rows, tmp_path):
    built.save_pretrained(tmp_path)
    # Its classes are others than the installed ones, so nothing may depend on `isinstance`.
    remote = get_class_from_dynamic_module("modeling_engram.EngramForCausalLM", tmp_path).from_pretrained(tmp_path)
    here = copy.deepcopy(built)
    for model in (remote, here):
        add_row_adapters(model, rows)
        move(model)
    assert not isinstance(remote, EngramForCausalLM)
    assert torch.equal(logits(remote), logits(here)) and not torch.equal(logits(here), logits(built))


def test_a_copy_has_adapters_of_its_own(model, rows):
    add_row_adapters(model, rows)
    move(model)
    twin = copy.deepcopy(model)
    merge_row_adapters(twin)
    assert not any(hasattr(table, "row_adapter") for table in tables(twin).values())
    assert torch.equal(logits(twin), logits(model))
    move(model, seed=1)
    assert not torch.equal(logits(twin), logits(model))


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
        add_row_adapters(model, {2: torch.tensor([0]), **BAD_ROWS[message]})
    assert not any(hasattr(table, "row_adapter") for table in tables(model).values())
    assert all(table.weight.requires_grad for table in tables(model).values())


def test_misuse_is_refused(model, rows, tmp_path):
    with pytest.raises(ValueError, match="no row adapters to merge"):
        merge_row_adapters(model)
    peft = adapted(model, rows)
    with pytest.raises(ValueError, match="has a row adapter already"):
        add_row_adapters(model, rows)
    with pytest.raises(ValueError, match=r"merge_and_unload\(\)"):
        merge_row_adapters(peft)
    with pytest.raises(ValueError, match="Linear has no Engram memory"):
        touched_rows(torch.nn.Linear(2, 2), [])
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="holds no row adapters"):
        saved_rows(tmp_path)


def test_a_mapped_table_learns_rows_but_cannot_take_them(tmp_path):
    build("mixtral").save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    ids = random_ids(2, 9)
    before = model(ids).logits
    add_row_adapters(model, touched_rows(model, [{"input_ids": ids}]))
    assert torch.equal(model(ids).logits, before)
    model(ids, labels=ids).loss.backward()
    deltas = [p for name, p in model.named_parameters() if name.endswith("row_adapter.delta")]
    assert len(deltas) == 2 and all(delta.grad.abs().sum() > 0 for delta in deltas)
    with pytest.raises(ValueError, match="engram_residency='resident'"):
        merge_row_adapters(model)

"""Parameter groups of the paper: learning rate and weight decay of each parameter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_backbones import BACKBONES, LAYER_IDS, build, built

from engram_hf import EngramForCausalLM
from engram_hf.training import EngramRowsConfig, engram_parameter_groups


def settings(model, **kwargs) -> dict[str, tuple[float, float]]:
    """Return learning rate and decay of every parameter, by name; each is in exactly one group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in engram_parameter_groups(model, **kwargs):
        for parameter in group["params"]:
            assert names[parameter] not in found
            found[names[parameter]] = (group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v4"])
def test_tables_learn_five_times_as_fast_and_do_not_decay(name):
    model = build(name)
    found = settings(model, lr=1e-3, weight_decay=0.1)
    assert set(found) == {name for name, _ in model.named_parameters()}
    for key, (lr, decay) in found.items():
        assert lr == pytest.approx(5e-3 if ".engram.table." in key else 1e-3), key
        vector = "norm" in key or key.endswith(("bias", "sinks", "base", "scale")) or ".table." in key
        assert decay == (0.0 if vector else 0.1), key
    layer = f"model.layers.{LAYER_IDS[0]}"
    assert found[f"{layer}.engram.kv_proj.weight"] == (1e-3, 0.1) == found["lm_head.weight"]
    assert found[f"{layer}.engram.conv.weight"] == (1e-3, 0.1)
    assert found[f"{layer}.engram.q_norm.weight"] == (1e-3, 0.0) == found[f"{layer}.engram.kv_proj.bias"]


def test_tables_learn_twenty_times_as_fast_if_only_the_memory_is_trained():
    model = build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".engram." in name)
    assert {lr for key, (lr, _) in settings(model, lr=1e-3).items() if ".table." in key} == {2e-2}
    model.lm_head.requires_grad_(True)
    assert {lr for key, (lr, _) in settings(model, lr=1e-3).items() if ".table." in key} == {5e-3}


def test_learning_rate_scale_of_tables_is_an_argument():
    found = settings(build("llama"), lr=1e-3, table_lr_scale=2.0)
    assert {lr for key, (lr, _) in found.items() if ".table." in key} == {2e-3}


def test_frozen_parameters_are_left_out_and_row_adapters_count_as_tables():
    lora = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    model = get_peft_model(lora.get_base_model(), EngramRowsConfig(rows={LAYER_IDS[0]: torch.tensor([3, 5])}), "rows_")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)  # Older releases of PEFT freeze the first adapter when the second is added.
    found = settings(model, lr=1e-3, weight_decay=0.1)
    assert len(found) == 2 * BACKBONES["llama"]().num_hidden_layers + 1
    tables = {key: value for key, value in found.items() if "lora_" not in key}
    assert list(tables.values()) == [(5e-3, 0.0)]
    assert set(found.values()) == {(1e-3, 0.1), (5e-3, 0.0)}


def test_frozen_model_is_refused():
    with pytest.raises(ValueError, match="Every parameter of this model is frozen"):
        engram_parameter_groups(build("llama").requires_grad_(False), lr=1e-3)


def test_quantized_rows_are_refused():
    """Float8 parameters can require gradients in torch, but never get any."""
    model = build("llama", engram_table_dtype="float8_e4m3fn", engram_head_dim=32)
    model.model.memories()[LAYER_IDS[0]].table.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="quantized rows take no gradient: train differences of them"):
        engram_parameter_groups(model, lr=1e-3)


def test_tables_that_cannot_be_trained_are_named(tmp_path, library_log):
    """Nothing is said if the table is trained, has row adapters, or if the rest of the memory is frozen too."""
    built("llama").save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    quantized = build("llama", engram_table_dtype="float8_e4m3fn", engram_head_dim=32)
    for each, how in ((model, "in its file"), (quantized, "quantized")):
        library_log.clear()
        engram_parameter_groups(each, lr=1e-3)
        assert len(library_log) == len(LAYER_IDS)
        assert f"layers.1.engram.table is {how}" in library_log[0] and "will not be trained" in library_log[0]
    library_log.clear()
    engram_parameter_groups(built("llama"), lr=1e-3)
    rows = EngramRowsConfig(rows={layer: torch.tensor([3]) for layer in LAYER_IDS})
    engram_parameter_groups(get_peft_model(model, rows), lr=1e-3)
    engram_parameter_groups(get_peft_model(quantized, LoraConfig(target_modules=["engram.kv_proj"])), lr=1e-3)
    assert library_log == []


def test_trainer_keeps_the_ratio_while_the_rate_decays(trainer):
    model = build("llama")
    optimizer = torch.optim.AdamW(engram_parameter_groups(model, lr=1e-2, weight_decay=0.1))
    run = trainer(model, optimizers=(optimizer, None), max_steps=4, lr_scheduler_type="linear")
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 1e-2, 5e-2])
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    # A table changes by up to its own rate in a step (Adam), and did so in the first.
    start = build("llama").model.memories()[LAYER_IDS[0]].table.weight
    moved = (run.model.model.memories()[LAYER_IDS[0]].table.weight - start).abs().max().item()
    assert 5e-2 < moved < 5 * sum(rates) * 1.01

"""`EngramTrainingCallback` logs the true statistics of the memory."""

import copy

import pytest
import torch
from peft import get_peft_model
from tiny_backbones import LAYER_IDS, built
from transformers import TrainerCallback

from engram_hf.training import (
    EngramRowsConfig,
    EngramTrainingCallback,
    SparseAdamW,
    enable_sparse_gradients,
    engram_parameter_groups,
    scan_rows,
)


class Reporter(TrainerCallback):
    """A callback in the place of a service of `report_to`: it records each log in the state that reaches it."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def trained(trainer, model, optimizer=None, resume=None, **settings):
    run = trainer(model, optimizers=(optimizer, None), **settings)
    reporter = Reporter()
    run.add_callback(reporter)
    run.add_callback(EngramTrainingCallback(run))
    run.train(resume_from_checkpoint=resume)
    return run, reporter


def sparse(model):
    enable_sparse_gradients(model)
    return SparseAdamW(engram_parameter_groups(model, lr=1e-2))


def test_log_has_the_statistics_of_the_memory(trainer, corpus):
    """One step reads the whole corpus, whose rows, gates and update can be computed by hand."""
    model = copy.deepcopy(built("llama"))
    ids = torch.stack([row["input_ids"] for row in corpus])
    rows, gates = scan_rows([{"input_ids": ids}], None, model), model.engram_gates(ids)
    before = {layer: memory.table.weight.detach().clone() for layer, memory in model.model.memories().items()}
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    run, reporter = trained(trainer, model, sparse(model), **settings)
    log = run.state.log_history[0]
    assert reporter.logs[0].items() <= log.items()
    for layer in LAYER_IDS:
        found = {
            name: reporter.logs[0][f"engram/layer_{layer}/{name}"]
            for name in ("gate", "rows_per_step", "rows_touched", "rows_never_touched", "update_norm")
        }
        table = model.model.memories()[layer].table
        assert found["gate"] == pytest.approx(float(gates[layer].mean()), rel=1e-5)
        assert found["rows_per_step"] == found["rows_touched"] == rows[layer].numel()
        assert found["rows_never_touched"] == pytest.approx(1 - rows[layer].numel() / table.num_rows)
        assert found["update_norm"] == pytest.approx((table.weight - before[layer]).detach().norm().item(), rel=1e-4)
    assert not model.model.memories()[LAYER_IDS[0]]._forward_pre_hooks


def test_rows_add_up_and_resumed_runs_know_earlier_rows(trainer):
    model = copy.deepcopy(built("llama"))
    key = f"engram/layer_{LAYER_IDS[0]}/rows_touched"
    settings = {"per_device_train_batch_size": 1, "max_steps": 4}
    whole, _ = trained(trainer, model, sparse(model), save_strategy="steps", save_steps=2, **settings)
    touched = [entry[key] for entry in whole.state.log_history if key in entry]
    assert touched == sorted(touched) and len(set(touched)) == 4
    again = copy.deepcopy(built("llama"))
    resumed, _ = trained(trainer, again, sparse(again), f"{whole.args.output_dir}/checkpoint-2", **settings)
    assert [entry[key] for entry in resumed.state.log_history if key in entry] == touched


def test_callback_logs_updates_of_row_adapters(trainer, corpus):
    model = copy.deepcopy(built("llama"))
    rows = scan_rows([{"input_ids": torch.stack([row["input_ids"] for row in corpus])}], None, model)
    model = get_peft_model(model, EngramRowsConfig(rows=rows))
    _, reporter = trained(trainer, model, max_steps=1)
    deltas = [p for name, p in model.named_parameters() if name.endswith("delta")]
    for layer, delta in zip(LAYER_IDS, deltas, strict=True):
        assert reporter.logs[0][f"engram/layer_{layer}/update_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        assert delta.norm() > 0

"""Row-sparse training of whole tables: the gradients, the optimizer, a plain loop and the stock Trainer."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_backbones import LAYER_IDS, build, built, random_ids
from training_runs import losses

from engram_hf import EngramForCausalLM
from engram_hf.training import EngramRowsConfig, SparseAdamW, enable_sparse_gradients, engram_parameter_groups

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
benchmark = importlib.import_module("sparse_training")

LEARNING_RATE = 1e-2


def model_of(name="llama", *, sparse: bool, **fields):
    """Return a copy of a tiny model in which every parameter is trained."""
    model = copy.deepcopy(built(name)) if not fields else build(name, **fields)
    if sparse:
        enable_sparse_gradients(model)
    return model


def optimizer_of(model, sparse: bool, **settings):
    groups = engram_parameter_groups(model, lr=LEARNING_RATE, weight_decay=0.1)
    return (SparseAdamW if sparse else torch.optim.AdamW)(groups, **settings)


def table_of(model, layer=LAYER_IDS[0]) -> torch.nn.Parameter:
    return model.model.memories()[layer].table.weight


def backward(model, *seeds) -> torch.Tensor:
    """Accumulate the gradients of a batch for each seed."""
    for seed in seeds:
        ids = random_ids(2, 10, seed=seed)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    return loss


def assert_close(one, other, **tolerance):
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# --- gradients ---


@pytest.mark.parametrize("name", ["llama", "deepseek_v4"])
def test_sparse_gradients_are_the_dense_ones(name):
    """They are compared for duplicate rows and for two accumulated batches; a row is stored once."""
    models = [model_of(name, sparse=sparse) for sparse in (False, True)]
    outputs = [backward(model, 1, 2) for model in models]
    assert torch.equal(*outputs)
    for layer in LAYER_IDS:
        dense, sparse = (table_of(model, layer).grad for model in models)
        assert sparse.is_sparse and sparse.is_coalesced()
        assert 0 < sparse.indices().numel() < dense.shape[0]
        torch.testing.assert_close(sparse.to_dense(), dense, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", [2.0, 1.0, float("inf")])
def test_clipping_counts_a_row_once(norm):
    models = [model_of(sparse=sparse) for sparse in (False, True)]
    for model in models:
        backward(model, 1, 2)
    found = [torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3, norm_type=norm) for model in models]
    torch.testing.assert_close(*found)
    assert found[0] > 1e-2
    gradients = [[parameter.grad for parameter in model.parameters()] for model in models]
    for dense, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other.to_dense() if other.is_sparse else other, dense, rtol=1e-4, atol=1e-9)


def test_rows_that_do_not_exist_are_refused():
    table = model_of(sparse=True).model.memories()[LAYER_IDS[0]].table
    with pytest.raises(ValueError, match="but the table has rows 0"):
        table(torch.tensor([[table.num_rows]]))


# --- the optimizer ---


def every_row(model, layer=LAYER_IDS[0]):
    """Return a loss that reads every row of a table, some twice."""
    table = model.model.memories()[layer].table
    ids = torch.cat([torch.arange(table.num_rows), torch.arange(7)]).unsqueeze(1)
    return (table(ids) ** 3).sum()


def test_sparse_adamw_is_dense_adamw_where_every_row_is_read():
    models = [model_of(sparse=sparse) for sparse in (False, True)]
    for model, sparse in zip(models, (False, True), strict=True):
        groups = [{"params": [table_of(model)], "lr": 0.03}, {"params": [model.lm_head.weight], "weight_decay": 0.3}]
        optimizer = (SparseAdamW if sparse else torch.optim.AdamW)(groups, betas=(0.8, 0.95), weight_decay=0.1)
        for step in range(6):
            optimizer.zero_grad()
            (every_row(model) + (model.lm_head.weight * step).sin().sum()).backward()
            optimizer.step()
    assert_close(*models, rtol=1e-5, atol=1e-6)
    assert not torch.equal(table_of(models[0]), table_of(built("llama")))


def test_sparse_adamw_is_lazy_as_torchs_sparse_adam():
    """They agree for any order of reads, and for any number of new rows in a step."""
    models = [model_of(sparse=True) for _ in range(2)]
    tables = [table_of(model) for model in models]
    ours = SparseAdamW([tables[0]], lr=0.05, eps=1e-12, weight_decay=0.0)
    theirs = torch.optim.SparseAdam([tables[1]], lr=0.05, eps=1e-12)
    for seed in range(8):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.step()
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)
    touched = ours.rows_of(tables[0])
    assert touched.numel() == touched.unique().numel()
    changed = (tables[0] != table_of(built("llama"))).any(1).nonzero().flatten()
    assert set(changed.tolist()) <= set(touched.tolist())
    assert changed.numel() > 20


def test_sparse_adamw_state_grows_with_the_rows_that_are_read():
    model = model_of(sparse=True)
    optimizer = optimizer_of(model, True)
    sizes = []
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        (state,) = [s for s in optimizer.state_dict()["state"].values() if s.get("rows") is not None][:1]
        sizes.append(state["rows"].numel())
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (sizes[-1], 8)
        # Nothing else is saved in the file.
        assert state["exp_avg"].untyped_storage().nbytes() == state["exp_avg"].nbytes
    assert 0 < sizes[0] < sizes[1] < sizes[2] < table_of(model).shape[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_state_continues_to_the_bit(dtype, tmp_path):
    def run(model, optimizer, seeds):
        for seed in seeds:
            backward(model, seed)
            optimizer.step()
            optimizer.zero_grad()

    whole = model_of(sparse=True).to(dtype)
    optimizer = optimizer_of(whole, True)
    run(whole, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    half = copy.deepcopy(whole)
    enable_sparse_gradients(half)
    resumed = optimizer_of(half, True)
    run(half, resumed, [9])  # Loading overwrites this state.
    half.load_state_dict(whole.state_dict())
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    run(whole, optimizer, range(3, 6))
    run(half, resumed, range(3, 6))
    assert_close(half, whole, rtol=0, atol=0)


def test_hooks_and_closures_are_those_of_any_optimizer():
    model = model_of(sparse=True)
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # After this, torch's own step calls hooks too.
    optimizer, calls = optimizer_of(model, True), []
    optimizer.register_step_post_hook(lambda *_: calls.append(table_of(model).grad.is_sparse))
    loss = optimizer.step(lambda: backward(model, 1))
    assert calls == [True] and loss > 0


# --- the benchmark ---


def test_benchmark_measures_steps_in_units_of_sparse_ones(monkeypatch):
    monkeypatch.setattr(benchmark, "LENGTH", 8)
    monkeypatch.setattr(benchmark, "SMALL", 2000)
    found = benchmark.measure("dense", 40_000, 1)
    assert 40_000 * 256 < found["tables"] < 48_000 * 256 < found["beyond"] and found["step"] > 0


@pytest.mark.parametrize("python", ["/no/python", sys.executable], ids=["no interpreter", "no engram-peft"])
def test_benchmark_says_what_engram_peft_needs(python, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["", "--engram-peft", python])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert f"{python} is no interpreter of an environment with engram-peft beside engram-hf" in capsys.readouterr().err


# --- the stock Trainer ---


def trained(trainer, sparse, name="llama", **settings):
    model = model_of(name, sparse=sparse)
    run = trainer(model, optimizers=(optimizer_of(model, sparse), None), **settings)
    run.train()
    return run


SETTINGS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_first_step_in_the_trainer_equals_that_of_dense_adamw(kind, trainer):
    """The norm for clipping is logged; before any row is skipped, the two optimizers are equal."""
    settings = {"max_steps": 1, "max_grad_norm": 0.05, **SETTINGS[kind]}
    dense, sparse = (trained(trainer, flag, **settings) for flag in (False, True))
    norms = [run.state.log_history[0]["grad_norm"] for run in (dense, sparse)]
    assert norms[0] > 0.05
    assert norms == pytest.approx([norms[0]] * 2, rel=1e-5)
    # Adam's first step is the sign of a gradient, which rounding decides for gradients near zero.
    for layer in LAYER_IDS:
        one, other = (table_of(run.model, layer) for run in (dense, sparse))
        assert ((one - other).abs() > 1e-4).float().mean() < 1e-3
        assert not torch.equal(other, table_of(built("llama"), layer))


def test_trainer_learns_and_resumes_to_the_bit(trainer):
    def history(run):
        keys = ("step", "loss", "learning_rate", "grad_norm")
        return [tuple(entry[key] for key in keys) for entry in run.state.log_history if "loss" in entry]

    whole = trained(trainer, True, save_strategy="steps", save_steps=3)
    assert losses(whole)[-1] < 0.8 * losses(whole)[0]
    model = build("llama", seed=1)
    enable_sparse_gradients(model)
    resumed = trainer(model, optimizers=(optimizer_of(model, True), None))
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert history(resumed)[-3:] == history(whole)[-3:]
    assert_close(resumed.model, whole.model, rtol=0, atol=0)


def test_compiled_model_has_the_same_gradients():
    model = model_of(sparse=True)
    backward(model, 1)
    expected = [parameter.grad.to_dense() for parameter in model.parameters()]
    model.zero_grad()
    # Only one layer with memory is compiled, because this takes seconds.
    model.model.layers[LAYER_IDS[0]].compile(backend="aot_eager")
    backward(model, 1)
    for parameter, other in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.to_dense(), other, rtol=1e-4, atol=1e-6)
    assert table_of(model).grad.is_sparse


# --- bad input ---


def test_optimizer_that_cannot_take_sparse_gradients_is_refused():
    model = model_of(sparse=True)
    backward(model, 1)
    with pytest.raises(ValueError, match=r"AdamW cannot take the sparse gradients of tables; use .*SparseAdamW"):
        torch.optim.AdamW(model.parameters()).step()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def test_optimizer_without_sparse_tables_is_refused():
    with pytest.raises(ValueError, match="call enable_sparse_gradients"):
        SparseAdamW(model_of(sparse=False).parameters())


def test_optimizer_that_was_built_before_the_model_changed_is_refused():
    model = model_of(sparse=True)
    optimizer = optimizer_of(model, True)
    for layer in LAYER_IDS:
        table = model.model.memories()[layer].table
        table.weight = torch.nn.Parameter(table.weight.detach().clone())
    backward(model, 1)
    with pytest.raises(ValueError, match="built before the model was moved or wrapped"):
        optimizer.step()


def test_optimizer_with_moments_on_another_device_is_refused():
    model = model_of(sparse=True)
    optimizer = optimizer_of(model, True)
    backward(model, 1)
    optimizer.step()
    moments = optimizer.state[table_of(model)]["moments"]
    moments._exp_avg = moments._exp_avg.to("meta")
    with pytest.raises(ValueError, match="its moments are on meta"):
        optimizer.step()


def test_moments_of_another_table_are_refused():
    model, other = model_of(sparse=True), model_of(sparse=True, engram_vocab_size=11)
    optimizers = optimizer_of(model, True), optimizer_of(other, True)
    for one, optimizer in zip((model, other), optimizers, strict=True):
        backward(one, 1)
        optimizer.step()
    before = copy.deepcopy(optimizers[1].state_dict())
    with pytest.raises(ValueError, match="has no moments for rows of a table of"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    dense = torch.optim.AdamW(engram_parameter_groups(other, lr=1e-3))
    dense.load_state_dict({**dense.state_dict(), "state": {}})
    for key, value in optimizers[1].state_dict()["state"].items():
        torch.testing.assert_close(value, before["state"][key], rtol=0, atol=0)


def test_several_processes_are_refused(monkeypatch):
    """DDP's own error is about storage of sparse tensors."""
    model = model_of(sparse=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="are for one process, but there are 2"):
        backward(model, 1)


@pytest.mark.parametrize("table_dtype", ["float8_e4m3fn", "int8"])
def test_quantized_table_is_refused(table_dtype):
    model = build("llama", engram_table_dtype=table_dtype, engram_head_dim=32)
    with pytest.raises(ValueError, match=r"is quantized and cannot be trained as a whole.*EngramRowsConfig"):
        enable_sparse_gradients(model)


def test_mapped_table_is_refused(tmp_path):
    built("llama").save_pretrained(tmp_path)
    model = EngramForCausalLM.from_pretrained(tmp_path, engram_residency="mapped")
    with pytest.raises(ValueError, match=r"is in its file or in host memory and cannot be trained.*'resident'"):
        enable_sparse_gradients(model)


def test_frozen_tables_are_refused():
    model = get_peft_model(model_of(sparse=False), EngramRowsConfig(rows={LAYER_IDS[0]: torch.tensor([3])}))
    with pytest.raises(ValueError, match="Every table of this model is frozen"):
        enable_sparse_gradients(model)

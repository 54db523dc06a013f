"""A stock `transformers.Trainer` on a saved model: training, checkpoints, loss averaging, evaluation, collators."""

import copy

import pytest
import torch
from tiny_backbones import BACKBONES, LAYER_IDS, build, random_ids, randomize
from torch.nn import functional as F
from training_runs import TEXTS, losses
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.training import engram_parameter_groups

# Mixtral's tiny gradients differ between batches by the routes of their tokens, and V4 has four residual streams.
FAMILIES = ["mixtral", "deepseek_v4"]


@pytest.fixture(scope="module")
def built() -> dict[str, EngramForCausalLM]:
    return {name: build(name) for name in FAMILIES}


@pytest.fixture
def model(built) -> EngramForCausalLM:
    return copy.deepcopy(built["mixtral"])


def same_weights(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_model_trains_further_and_is_saved_again(built, name, trainer, tmp_path):
    built[name].save_pretrained(tmp_path / "start")
    model = EngramForCausalLM.from_pretrained(tmp_path / "start")
    run = trainer(model, max_steps=12)
    run.train()
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    changed = [
        key for key, before in built[name].state_dict().items() if not torch.equal(before, run.model.state_dict()[key])
    ]
    for part in ("table.weight", "kv_proj.weight", "q_norm.weight", "k_norm.weight", "conv.weight", "lm_head.weight"):
        assert any(key.endswith(part) for key in changed), part
    assert not any("hashing" in key for key in changed)
    run.save_model(tmp_path / "trained")
    again = EngramForCausalLM.from_pretrained(tmp_path / "trained")
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("own_groups", [False, True])
def test_resumed_run_equals_the_uninterrupted_one(own_groups, trainer):
    def fresh(seed):
        model = build("mixtral", seed=seed)
        groups = engram_parameter_groups(model, lr=1e-2, weight_decay=0.1) if own_groups else None
        return model, (torch.optim.AdamW(groups) if own_groups else None, None)

    def history(run):
        return [
            (e["step"], e["loss"], e["learning_rate"], e["grad_norm"]) for e in run.state.log_history if "loss" in e
        ]

    model, optimizers = fresh(seed=0)
    whole = trainer(model, optimizers=optimizers, save_strategy="steps", save_steps=3)
    whole.train()
    # The run resumes from other weights, so that each of them has to come from the checkpoint, including fused
    # experts.
    model, optimizers = fresh(seed=1)
    resumed = trainer(model, optimizers=optimizers)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert history(resumed)[-3:] == history(whole)[-3:]
    assert same_weights(resumed.model, whole.model)


def test_accumulated_steps_average_over_tokens(model, trainer):
    # The sequences have very different lengths: the mean of their mean losses is not the mean over their tokens.
    ids = random_ids(2, 12, seed=3)
    labels = ids.clone()
    labels[0, 3:] = -100
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    weights = {}
    for batch, steps in [(2, 1), (1, 2)]:
        run = trainer(
            copy.deepcopy(model),
            train_dataset=rows,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        run.train()
        weights[batch] = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(weights[1], weights[2], rtol=0, atol=1e-6)
    assert (weights[2] - start).abs().max() > 1e-3
    model.zero_grad()
    sum(model(ids[i : i + 1], labels=labels[i : i + 1]).loss / 2 for i in range(2)).backward()
    naive = start - torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (weights[2] - naive).abs().max() > 1e-3


def test_clipping_bounds_the_gradients_of_tables_too(model, trainer):
    run = trainer(copy.deepcopy(model), max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.01)
    run.train()
    moved = [(a - b).detach() for a, b in zip(run.model.parameters(), model.parameters(), strict=True)]
    assert torch.nn.utils.get_total_norm(moved).item() == pytest.approx(0.01, rel=1e-3)
    table = (run.model.model.memories()[1].table.weight - model.model.memories()[1].table.weight).norm()
    assert 0 < table < 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_changes_nothing(built, name, trainer):
    runs = [
        trainer(copy.deepcopy(built[name]), max_steps=3, optim="sgd", gradient_checkpointing=flag)
        for flag in (False, True)
    ]
    for run in runs:
        run.train()
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert runs[1].model.model.gradient_checkpointing
    assert not runs[0].model.model.gradient_checkpointing


def test_bfloat16_autocast_keeps_float32_weights(model, trainer):
    full = trainer(copy.deepcopy(model), max_steps=8)
    mixed = trainer(copy.deepcopy(model), max_steps=8, bf16=True)
    for run in (full, mixed):
        run.train()
    assert {parameter.dtype for parameter in mixed.model.parameters()} == {torch.float32}
    assert losses(mixed) != losses(full)
    assert losses(mixed) == pytest.approx(losses(full), rel=0.05)


def test_evaluation_and_prediction(model, trainer, corpus):
    run = trainer(model, per_device_eval_batch_size=4)
    ids = torch.stack([row["input_ids"] for row in corpus])
    with torch.no_grad():
        expected = model(ids, labels=ids)
    assert run.evaluate(corpus)["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    predictions = run.predict(corpus).predictions
    torch.testing.assert_close(torch.as_tensor(predictions), expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_smoothed_labels_are_those_of_the_next_tokens(built, name, trainer, corpus):
    """Trainer shifts labels only for classes that it knows as causal language models."""
    run = trainer(
        copy.deepcopy(built[name]), max_steps=1, label_smoothing_factor=0.2, per_device_eval_batch_size=len(corpus)
    )
    found = run.evaluate(corpus)["eval_loss"]
    rows = torch.stack([row["input_ids"] for row in corpus])
    with torch.no_grad():
        logits = built[name](rows).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, rows[:, 1:].flatten(), label_smoothing=0.2)
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.fixture
def text_model(tokenizer) -> EngramForCausalLM:
    config = EngramConfig.for_backbone(
        BACKBONES["mixtral"](),
        tokenizer,
        layer_ids=LAYER_IDS,
        engram_n_heads=2,
        engram_head_dim=8,
        engram_vocab_size=97,
    )
    model = randomize(EngramForCausalLM(config)).eval()
    model.set_token_map(tokenizer)
    return model


def token_mean(model, documents: list[torch.Tensor]) -> float:
    """Return the loss over all predicted tokens of documents that were run separately."""
    with torch.no_grad():
        parts = [(model(ids[None], labels=ids[None]).loss * (len(ids) - 1), len(ids) - 1) for ids in documents]
    return (sum(loss for loss, _ in parts) / sum(count for _, count in parts)).item()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_of_the_tokenizer_have_the_loss_of_their_texts(text_model, tokenizer, side, trainer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    features = [tokenizer(text) for text in TEXTS]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator(features)
    assert (batch["labels"] == -100).any()
    # With left padding, a text's first token would be predicted from a pad, which is not a token of the text.
    first = batch["attention_mask"].argmax(1, keepdim=True)
    batch["labels"].scatter_(1, first, -100)
    with torch.no_grad():
        loss = text_model(**batch).loss.item()
    assert loss == pytest.approx(token_mean(text_model, [torch.tensor(f["input_ids"]) for f in features]), rel=1e-5)
    run = trainer(text_model, train_dataset=features, data_collator=collator)
    run.train()
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("fields", [{}, {"return_seq_idx": True}])
def test_packed_batches_have_the_loss_of_separate_documents(model, fields, trainer):
    documents = [random_ids(1, length, seed=length)[0] for length in (5, 9, 2, 7)]
    features = [{"input_ids": ids.tolist()} for ids in documents]
    collator = DataCollatorWithFlattening(**fields)
    packed = collator(copy.deepcopy(features), return_tensors="pt")
    expected = token_mean(model, documents)
    # Trainer does the same: with a cache, transformers takes position ids for those of a continuation.
    model.config.use_cache = False
    with torch.no_grad():
        assert model(**packed).loss.item() == pytest.approx(expected, rel=1e-5)
        unmarked = model(packed["input_ids"], labels=packed["labels"]).loss.item()
    assert abs(unmarked - expected) > 1e-3
    run = trainer(model, train_dataset=features, data_collator=collator, max_steps=1)
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-4)

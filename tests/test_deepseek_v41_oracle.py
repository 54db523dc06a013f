"""The DeepSeek-V4.1 text backbone against the golden activations of the miniature, in one forward and in chunks.

The golden data contain Engram, so `deepseek_v41_reference` puts a plain implementation of it before the listed layers.
"""

import pytest
import torch
from deepseek_v41_models import CHUNKS, as_mask, in_chunks, padded, tokens, worst
from deepseek_v41_reference import (
    InjectedMemory,
    dequantize,
    golden_fixtures,
    our_name,
    read_text_config,
    row_ids,
    text_state_dict,
)
from transformers import DynamicCache

from engram_hf import modeling_deepseek_v41 as modeling
from engram_hf.causal_lm_deepseek_v41 import DeepseekV41TextForCausalLM
from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
from engram_hf.modeling_deepseek_v41 import round_fp8, round_mxfp4, round_nvfp4

pytestmark = pytest.mark.any_version

CASES = ("full", "padded", "long", "image")


folder, answers, release = golden_fixtures("deepseek_v41_tiny", "golden.safetensors")


@pytest.fixture(scope="module")
def release_config(folder):
    return read_text_config(folder)


def miniature(release, release_config) -> DeepseekV41TextForCausalLM:
    config = DeepseekV41TextConfig(**release_config)
    model = DeepseekV41TextForCausalLM(config).eval()
    model.load_state_dict(text_state_dict(release, config), strict=True)
    return model


@pytest.fixture
def model(release, release_config):
    """Return the miniature's backbone, without memory."""
    return miniature(release, release_config)


@pytest.fixture
def remembering(release, release_config):
    """Return the miniature's backbone with its memory, and the memory."""
    model = miniature(release, release_config)
    return model, InjectedMemory(model.model.layers, model.config.engram_layer_ids, release)


@pytest.fixture
def precise(remembering):
    """Return both in float64: the rounding of caches is a step function, and on some processors float32 noise shows as
    a step.
    """
    model, memory = remembering
    model.double().set_experts_implementation("eager")  # Grouped matrix products do not support float64.
    memory.release = {name: t.double() if t.is_floating_point() else t for name, t in memory.release.items()}
    return model, memory


# --- whole --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, function", [("fp8", round_fp8), ("mxfp4", round_mxfp4), ("nvfp4", round_nvfp4)])
def test_rounding_is_exact_and_straight_through(answers, name, function):
    x = answers["rounding.input"]
    assert torch.equal(function(x), answers[f"rounding.{name}"])
    assert not torch.equal(function(x), x)
    leaf = x.clone().requires_grad_()
    rounded = function(leaf)
    assert torch.equal(rounded, answers[f"rounding.{name}"])
    weights = torch.randn_like(x)
    (rounded * weights).sum().backward()
    assert torch.equal(leaf.grad, weights)
    assert torch.equal(function(x.bfloat16()).float(), function(x.bfloat16().float()))  # The values fit bfloat16.


def test_reference_loader_decodes_the_release(answers, release):
    names = [name for name in answers if name.startswith("dequantized.")]
    assert len(names) == 5
    for name in names:
        assert torch.equal(release[name.removeprefix("dequantized.")], answers[name])


def observe(model, seen: dict):
    """Record the inputs and outputs of the layers of `model` into `seen`, under the golden names."""

    def enters(index, args):
        seen[f"layers.{index}.streams"], seen[f"layers.{index}.pre"] = args[0], args[1]

    def leaves(output):
        seen["streams"], seen["pre"] = output[0], output[1]

    def attends(index, output):
        seen[f"layers.{index}.attention"] = output[0]
        seen[f"layers.{index}.selected"], seen[f"layers.{index}.candidates"] = output[1].selected, output[1].candidates

    def routes(index, output):
        _, seen[f"layers.{index}.expert_weights"], seen[f"layers.{index}.experts"] = output

    def mixes(index, output):
        seen[f"layers.{index}.moe"] = output

    for index, layer in enumerate(model.model.layers):
        # This hook runs before the memory's: the golden streams enter a layer before its Engram.
        layer.register_forward_pre_hook(lambda _, args, index=index: enters(index, args), prepend=True)
        layer.register_forward_hook(lambda _, __, output: leaves(output))
        layer.self_attn.register_forward_hook(lambda _, __, output, index=index: attends(index, output))
        layer.mlp.register_forward_hook(lambda _, __, output, index=index: mixes(index, output))
        layer.mlp.gate.register_forward_hook(lambda _, __, output, index=index: routes(index, output))


def feed(memory: InjectedMemory, answers, case: str, chunk: slice = slice(None)):
    """Prepare the memory for the golden case, for the tokens in `chunk`."""
    mask = answers[f"{case}.attention_mask"].bool()
    if f"{case}.image_mask" in answers:
        mask = mask & ~answers[f"{case}.image_mask"].bool()
    memory.valid = mask[:, chunk]
    memory.rows = {layer: answers[f"{case}.layers.{layer}.engram.rows"][:, chunk] for layer in (1, 4)}


def run_case(model, memory, answers, case: str) -> torch.Tensor:
    feed(memory, answers, case)
    image = answers.get(f"{case}.image_mask")
    return model(
        answers[f"{case}.input_ids"],
        attention_mask=answers[f"{case}.attention_mask"],
        image_mask=None if image is None else image.bool(),
    ).logits


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_activation_matches_the_oracle(remembering, answers, case):
    model, memory = remembering
    seen = memory.seen
    observe(model, seen)
    logits = run_case(model, memory, answers, case)
    real = answers[f"{case}.attention_mask"].bool()
    stages = [f"layers.{layer}.{stage}" for layer in range(9) for stage in ("streams", "pre", "attention", "moe")] + [
        f"layers.{layer}.engram.{stage}" for layer in (1, 4) for stage in ("gate", "streams")
    ]
    for stage in (*stages, "streams", "pre"):
        assert worst(seen[stage][real], answers[f"{case}.{stage}"][real]) < 1e-4, stage
    assert worst(logits[real], answers[f"{case}.logits"][real]) < 1e-4


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_selection_matches_the_oracle(remembering, answers, case):
    model, memory = remembering
    observe(model, memory.seen)
    run_case(model, memory, answers, case)
    real = answers[f"{case}.attention_mask"].bool()
    for layer in range(9):
        chosen, order = memory.seen[f"layers.{layer}.experts"].unflatten(0, real.shape).sort(-1)
        expected, expected_order = answers[f"{case}.layers.{layer}.experts"].sort(-1)
        assert torch.equal(chosen[real], expected[real])
        weights = memory.seen[f"layers.{layer}.expert_weights"].unflatten(0, real.shape).gather(-1, order)
        expected = answers[f"{case}.layers.{layer}.expert_weights"].gather(-1, expected_order)
        assert worst(weights[real], expected[real]) < 1e-4
    for layer in (2, 4, 5, 7):
        expected = answers[f"{case}.layers.{layer}.selected"].bool()
        selected = as_mask(memory.seen[f"layers.{layer}.selected"], 1, expected.shape[-1])
        assert torch.equal(selected[real], expected[real])
    expected = answers[f"{case}.layers.5.candidates"].bool()
    candidates = as_mask(memory.seen["layers.5.candidates"], 4, expected.shape[-1]).tril()
    assert torch.equal(candidates[real], expected[real])
    assert torch.equal(memory.seen["layers.7.candidates"], memory.seen["layers.5.candidates"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_unrounded_logits_match_and_rounding_matters(remembering, answers, case):
    model, memory = remembering
    model.config.cache_rounding = False
    real = answers[f"{case}.attention_mask"].bool()
    logits = run_case(model, memory, answers, case)[real]
    assert worst(logits, answers[f"{case}.unrounded.logits"][real]) < 1e-4
    assert worst(logits, answers[f"{case}.logits"][real]) > 0.05


@torch.no_grad()
def test_final_hidden_state_matches(remembering, answers):
    model, memory = remembering
    feed(memory, answers, "full")
    hidden = model.model(answers["full.input_ids"]).last_hidden_state
    assert worst(hidden, answers["full.final_hidden"]) < 1e-4


@pytest.mark.parametrize(
    "mistake",
    [
        lambda model: [layer.self_attn.sinks.data.fill_(-1e9) for layer in model.model.layers],
        lambda model: setattr(model.config, "sliding_window", 9),
        lambda model: [layer.mlp.gate.e_score_correction_bias.zero_() for layer in model.model.layers],
        lambda model: setattr(model.model.layers[5].self_attn.indexer, "is_candidate_source", False),
        lambda model: [setattr(layer.mlp.experts, "limit", 1e9) for layer in model.model.layers],
    ],
    ids=["no sink", "window one too long", "no router bias", "candidates ignored", "experts not clamped"],
)
@torch.no_grad()
def test_oracle_detects_a_single_mistake(remembering, answers, mistake):
    model, memory = remembering
    mistake(model)
    assert worst(run_case(model, memory, answers, "long"), answers["long.logits"]) > 1e-2


@torch.no_grad()
def test_greedy_continuation_matches(remembering, answers):
    model, memory = remembering
    ids, cache, start = answers["generate.input_ids"], DynamicCache(config=model.config), 0
    for _ in range(16):
        rows = {layer: row_ids(ids, index, answers)[:, start:] for index, layer in enumerate((1, 4))}
        memory.rows, memory.valid = rows, torch.ones_like(ids[:, start:], dtype=torch.bool)
        logits = model(ids[:, start:], past_key_values=cache, use_cache=True).logits
        start = ids.shape[1]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, answers["generate.sequences"])


def release_gradients(model, release) -> dict[str, torch.Tensor]:
    """Return gradients under release names: the model's parameters, experts unstacked, and the memory's own tensors."""
    ours = {name.removeprefix("model."): parameter.grad for name, parameter in model.named_parameters()}
    found = {name: ours.get(our_name(name)) for name in release if our_name(name)}
    for layer in range(model.config.num_hidden_layers):
        for expert, grad in enumerate(ours[f"layers.{layer}.mlp.experts.down_proj"]):
            found[f"layers.{layer}.ffn.experts.{expert}.w2.weight"] = grad
    return found | {name: tensor.grad for name, tensor in release.items() if ".engram." in name}


@pytest.mark.parametrize(
    "checkpointing",
    [None, {"use_reentrant": False}, {"use_reentrant": True}],
    ids=["plain", "checkpointed", "reentrant"],
)
def test_loss_and_gradients_match(release, release_config, answers, checkpointing, monkeypatch):
    # The blocks have a window's length, so that their own recomputation is part of the comparison.
    monkeypatch.setattr(modeling, "_SMALLEST_BLOCK", 1)
    release = {name: t.clone().requires_grad_(".engram." in name) for name, t in release.items()}
    model = miniature(release, release_config).train()
    memory = InjectedMemory(model.model.layers, model.config.engram_layer_ids, release)
    if checkpointing is not None:
        # The supported releases of transformers differ in this name.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable(checkpointing)
    feed(memory, answers, "full")
    ids = answers["full.input_ids"]
    loss = model(ids, labels=ids).loss
    assert worst(loss, answers["full.loss"]) < 1e-4
    loss.backward()
    found = release_gradients(model, release)
    expected = {name.removeprefix("full.gradients."): t for name, t in answers.items() if ".gradients." in name}
    assert len(expected) == 144
    for name, gradient in expected.items():
        assert worst(found[name], gradient) < 1e-3 * gradient.abs().max(), name
    indexers = [p for name, p in model.named_parameters() if ".indexer." in name]
    assert indexers and all(parameter.grad is None for parameter in indexers)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_experts_implementations_agree(remembering, answers, implementation):
    model, memory = remembering
    model.set_experts_implementation(implementation)
    # Case `full` is left out: one window channel there lies within float noise of a rounding tie.
    assert worst(run_case(model, memory, answers, "long"), answers["long.logits"]) < 1e-4


def test_dequantize_reference_reads_low_nibble_first():
    packed = torch.tensor([[0x21, 0xF9 - 256]], dtype=torch.int8)
    scale = torch.ones(1, 1).to(torch.float8_e8m0fnu)
    assert dequantize(packed, scale).tolist() == [[0.5, 1.0, -0.5, -6.0]]


# --- in chunks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("case", ["full", "long"])
@torch.no_grad()
def test_golden_cases_in_chunks(precise, answers, case, size):
    model, memory = precise
    ids = answers[f"{case}.input_ids"]
    logits = in_chunks(model, ids, size, prepare=lambda chunk: feed(memory, answers, case, chunk))
    assert worst(logits, answers[f"{case}.logits"]) < 1e-4


@pytest.mark.parametrize("size", CHUNKS)
@torch.no_grad()
def test_golden_rows_left_padded_in_chunks(precise, answers, size):
    model, memory = precise
    lengths = answers["padded.attention_mask"].sum(-1).tolist()
    ids, mask = padded(answers["padded.input_ids"], lengths, "left")

    def to_left(x):
        return torch.stack([row.roll(len(row) - length, 0) for row, length in zip(x, lengths, strict=True)])

    rows = {layer: to_left(answers[f"padded.layers.{layer}.engram.rows"]) for layer in (1, 4)}

    def prepare(chunk):
        memory.rows, memory.valid = {k: v[:, chunk] for k, v in rows.items()}, mask[:, chunk].bool()

    logits = in_chunks(model, ids, size, mask, prepare=prepare)
    assert worst(logits[mask.bool()], to_left(answers["padded.logits"])[mask.bool()]) < 1e-4


@pytest.mark.parametrize("size", CHUNKS)
@torch.no_grad()
def test_random_tokens_in_chunks_on_the_miniature(model, size):
    """Tolerances are relative to the largest logit: nine layers and logits up to 5 give a float32 noise of 2e-5."""
    model.config.cache_rounding = False
    ids = tokens(model, 3, 50)
    expected = model(ids, use_cache=False).logits
    assert worst(in_chunks(model, ids, size), expected) < 1e-5 * expected.abs().max()

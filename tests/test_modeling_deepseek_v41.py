"""The DeepSeek-V4.1 text backbone against the golden activations, and against itself in every way it can be called.

The golden data contain Engram, so `deepseek_v41_reference` puts a plain rendition of it in front of the listed layers.
Where inputs are random, the cache rounding is off: it is a step function, and there float noise shows as large steps.
"""

import json
import subprocess
import sys

import pytest
import torch
from deepseek_v41_reference import InjectedMemory, dequantize, load_release, our_name, row_ids, text_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from engram_hf import modeling_deepseek_v41 as modeling
from engram_hf.cache_deepseek_v41 import DeepseekV41CacheLayer
from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
from engram_hf.modeling_deepseek_v41 import DeepseekV41TextForCausalLM, DeepseekV41TextModel, largest
from engram_hf.rounding_deepseek_v41 import round_fp8, round_mxfp4, round_nvfp4

CASES = ("full", "padded", "long", "image")
CHUNKS = (1, 2, 3, 7, 1000)


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "deepseek_v41_tiny"


@pytest.fixture(scope="module")
def answers(folder):
    return load_file(folder / "golden.safetensors")


@pytest.fixture(scope="module")
def release(folder):
    return load_release(folder)


@pytest.fixture(scope="module")
def release_config(folder):
    return json.loads((folder / "config.json").read_text())["text_config"]


def miniature(release, release_config) -> DeepseekV41TextForCausalLM:
    config = DeepseekV41TextConfig(**release_config)
    model = DeepseekV41TextForCausalLM(config).eval()
    model.load_state_dict(text_state_dict(release, config), strict=True)
    return model


@pytest.fixture
def model(release, release_config):
    """The miniature's backbone, without memory."""
    return miniature(release, release_config)


@pytest.fixture
def remembering(release, release_config):
    """The miniature's backbone with its memory, and the memory."""
    model = miniature(release, release_config)
    return model, InjectedMemory(model.model.layers, model.config.engram_layer_ids, release)


def tiny_config(**overrides) -> DeepseekV41TextConfig:
    """Six layers that have every kind of layer: window alone, both ratios, shared sources, candidates."""
    fields = {
        "vocab_size": 97, "hidden_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 6,
        "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 8, "q_lora_rank": 24, "o_lora_rank": 8, "o_groups": 2,
        "sliding_window": 5, "compress_ratios": [0, 3, 3, 1, 1, 1], "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3, 5], "index_n_heads": 4, "index_head_dim": 32, "index_topk": 4,
        "candidate_source_layer_id": 3, "candidate_topk_blocks": 3, "candidate_block_size": 3, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "hc_mult": 3, "initializer_range": 0.1, "cache_rounding": False, "pad_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    return DeepseekV41TextConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides) -> DeepseekV41TextForCausalLM:
    torch.manual_seed(seed)
    model = DeepseekV41TextForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():  # zero sinks and biases would hide a mistake
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("sinks", "correction_bias", "bias_vl")):
                tensor.normal_()
    return model


def tokens(model, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().max().item()


def in_chunks(model, ids, size: int, mask=None, positions=None, prepare=lambda chunk: None) -> torch.Tensor:
    """Logits of `ids` `[B, S]` fed `size` tokens at a time; `prepare` is told the slice before each call."""
    cache, logits = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1], size):
        chunk = slice(start, min(start + size, ids.shape[1]))
        prepare(chunk)
        logits.append(
            model(
                ids[:, chunk],
                attention_mask=None if mask is None else mask[:, : chunk.stop],
                position_ids=None if positions is None else positions[:, chunk],
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
    return torch.cat(logits, dim=1)


def padded(ids: torch.Tensor, lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `lengths[b]` tokens of each row of `ids`, padded on one side; and the mask."""
    width = max(lengths)
    out, mask = torch.full((len(lengths), width), 2), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        out[row, place], mask[row, place] = ids[row, :length], 1
    return out, mask


# --- against the golden data ----------------------------------------------------------------------------------------


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
    assert torch.equal(function(x.bfloat16()).float(), function(x.bfloat16().float()))  # values fit bfloat16


def test_reference_loader_decodes_the_release(answers, release):
    names = [name for name in answers if name.startswith("dequantized.")]
    assert len(names) == 5
    for name in names:
        assert torch.equal(release[name.removeprefix("dequantized.")], answers[name])


def observe(model, seen: dict):
    """Record into `seen`, under the golden names, what the layers of `model` take and give."""

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
        # In front of the memory's hook: the golden streams enter a layer before its Engram.
        layer.register_forward_pre_hook(lambda _, args, index=index: enters(index, args), prepend=True)
        layer.register_forward_hook(lambda _, __, output: leaves(output))
        layer.self_attn.register_forward_hook(lambda _, __, output, index=index: attends(index, output))
        layer.mlp.register_forward_hook(lambda _, __, output, index=index: mixes(index, output))
        layer.mlp.gate.register_forward_hook(lambda _, __, output, index=index: routes(index, output))


def feed(memory: InjectedMemory, answers, case: str, chunk: slice = slice(None)):
    """Set the memory up for the golden case, for the tokens in `chunk`."""
    mask = answers[f"{case}.attention_mask"].bool()
    if f"{case}.image_mask" in answers:
        mask = mask & ~answers[f"{case}.image_mask"].bool()
    memory.alive = mask[:, chunk]
    memory.rows = {layer: answers[f"{case}.layers.{layer}.engram.rows"][:, chunk] for layer in (1, 4)}


def run_case(model, memory, answers, case: str) -> torch.Tensor:
    feed(memory, answers, case)
    image = answers.get(f"{case}.image_mask")
    return model(
        answers[f"{case}.input_ids"],
        attention_mask=answers[f"{case}.attention_mask"],
        image_mask=None if image is None else image.bool(),
    ).logits


def as_mask(indices: torch.Tensor, size: int, width: int) -> torch.Tensor:
    """`[B, S, K]` ids of blocks of `size`, -1 for none, to a boolean mask `[B, S, width]`."""
    blocks = -(-width // size)
    indices = torch.where(indices < 0, blocks, indices.long())
    mask = torch.zeros(*indices.shape[:2], blocks + 1, dtype=torch.bool).scatter_(2, indices, True)
    return mask[..., :blocks].repeat_interleave(size, dim=-1)[..., :width]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_stage_matches_the_oracle(remembering, answers, case):
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
def test_every_choice_matches_the_oracle(remembering, answers, case):
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
def test_the_oracle_notices_a_single_mistake(remembering, answers, mistake):
    model, memory = remembering
    mistake(model)
    assert worst(run_case(model, memory, answers, "long"), answers["long.logits"]) > 1e-2


@torch.no_grad()
def test_greedy_continuation_matches(remembering, answers):
    model, memory = remembering
    ids, cache, start = answers["generate.input_ids"], DynamicCache(config=model.config), 0
    for _ in range(16):
        rows = {layer: row_ids(ids, index, answers)[:, start:] for index, layer in enumerate((1, 4))}
        memory.rows, memory.alive = rows, torch.ones_like(ids[:, start:], dtype=torch.bool)
        logits = model(ids[:, start:], past_key_values=cache, use_cache=True).logits
        start = ids.shape[1]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(ids, answers["generate.sequences"])


def release_gradients(model, release) -> dict[str, torch.Tensor]:
    """Gradients under release names: parameters of the model, experts unstacked, and the memory's own tensors."""
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
    # Blocks of a window's length, so that the blocks' own recomputation is part of what is compared.
    monkeypatch.setattr(modeling, "_SMALLEST_BLOCK", 1)
    release = {name: t.clone().requires_grad_(".engram." in name) for name, t in release.items()}
    model = miniature(release, release_config).train()
    memory = InjectedMemory(model.model.layers, model.config.engram_layer_ids, release)
    if checkpointing is not None:
        # Renamed between the transformers releases that are supported.
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


# --- incremental decoding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("case", ["full", "long"])
@torch.no_grad()
def test_golden_cases_in_chunks(remembering, answers, case, size):
    model, memory = remembering
    ids = answers[f"{case}.input_ids"]
    logits = in_chunks(model, ids, size, prepare=lambda chunk: feed(memory, answers, case, chunk))
    assert worst(logits, answers[f"{case}.logits"]) < 1e-4


@pytest.mark.parametrize("size", CHUNKS)
@torch.no_grad()
def test_golden_rows_left_padded_in_chunks(remembering, answers, size):
    model, memory = remembering
    lengths = answers["padded.attention_mask"].sum(-1).tolist()
    ids, mask = padded(answers["padded.input_ids"], lengths, "left")

    def to_left(x):
        return torch.stack([row.roll(len(row) - length, 0) for row, length in zip(x, lengths, strict=True)])

    rows = {layer: to_left(answers[f"padded.layers.{layer}.engram.rows"]) for layer in (1, 4)}

    def prepare(chunk):
        memory.rows, memory.alive = {k: v[:, chunk] for k, v in rows.items()}, mask[:, chunk].bool()

    logits = in_chunks(model, ids, size, mask, prepare=prepare)
    assert worst(logits[mask.bool()], to_left(answers["padded.logits"])[mask.bool()]) < 1e-4


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_random_tokens_in_chunks(size, seed):
    model = tiny_model(seed)
    ids = tokens(model, 3, 41, seed=seed)
    expected = model(ids, use_cache=False).logits
    assert worst(in_chunks(model, ids, size), expected) < 1e-5
    assert worst(in_chunks(model, ids, size), in_chunks(model, ids.flip(0), size)) > 0.1


@pytest.mark.parametrize("size", CHUNKS)
@torch.no_grad()
def test_random_tokens_in_chunks_on_the_miniature(model, size):
    """Nine layers and logits up to 5: float32 noise alone is 2e-5 there, so relative to the largest logit."""
    model.config.cache_rounding = False
    ids = tokens(model, 3, 50)
    expected = model(ids, use_cache=False).logits
    assert worst(in_chunks(model, ids, size), expected) < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [None, *CHUNKS])
@torch.no_grad()
def test_a_padded_row_equals_the_row_alone(side, size):
    model, lengths = tiny_model(), [37, 20, 7, 4, 1]
    ids = tokens(model, len(lengths), max(lengths))
    batch, mask = padded(ids, lengths, side)
    logits = model(batch, attention_mask=mask).logits if size is None else in_chunks(model, batch, size, mask)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, :length]).logits[0]
        assert worst(logits[row][mask[row].bool()], alone) < 1e-5


@torch.no_grad()
def test_tokens_after_right_padding_and_holes_in_the_mask():
    model, (first, then) = tiny_model(), (13, 9)
    ids = tokens(model, 2, first + then)
    batch, mask = padded(ids, [first, 8], "right")
    cache = DynamicCache(config=model.config)
    model(batch, attention_mask=mask, past_key_values=cache)
    mask = torch.cat([mask, torch.ones(2, then, dtype=torch.long)], dim=1)
    more = model(ids[:, -then:], attention_mask=mask, past_key_values=cache).logits
    whole = model(torch.cat([batch, ids[:, -then:]], dim=1), attention_mask=mask).logits
    alone = model(torch.cat([ids[1:, :8], ids[1:, -then:]], dim=1)).logits[0, -then:]
    assert worst(more[1], alone) < 1e-5
    assert worst(whole[1, -then:], alone) < 1e-5


@pytest.mark.parametrize("size", [None, 1, 4, 11])
@torch.no_grad()
def test_packed_rows_equal_their_sequences(size):
    model, lengths = tiny_model(), [14, 3, 1, 22]
    ids = tokens(model, 2, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].repeat(2, 1)
    expected = torch.cat([model(piece).logits for piece in ids.split(lengths, dim=1)], dim=1)
    if size is None:
        logits = model(ids, position_ids=positions).logits
    else:
        logits = in_chunks(model, ids, size, positions=positions)
    assert worst(logits, expected) < 1e-5
    assert worst(logits, model(ids).logits) > 0.1


def test_packed_rows_do_not_leak_gradients():
    model = tiny_model()
    embeds = torch.randn(1, 20, model.config.hidden_size, requires_grad=True)
    positions = torch.cat([torch.arange(11), torch.arange(9)])[None]
    model(inputs_embeds=embeds, position_ids=positions).logits[:, 11:].sum().backward()
    assert embeds.grad[:, :11].abs().max() == 0 < embeds.grad[:, 11:].abs().min(dim=-1).values.max()


@torch.no_grad()
def test_cache_follows_its_rows():
    model = tiny_model()
    ids, more = tokens(model, 3, 17), tokens(model, 6, 5, seed=1)
    batch, mask = padded(ids, [17, 9, 4], "left")

    def after(operation, rows):
        cache = DynamicCache(config=model.config)
        model(batch, attention_mask=mask, past_key_values=cache)
        operation(cache)
        full = torch.cat([mask[rows], torch.ones(len(rows), 5, dtype=torch.long)], dim=1)
        logits = model(more[: len(rows)], attention_mask=full, past_key_values=cache).logits
        whole = torch.cat([batch[rows], more[: len(rows)]], dim=1)
        return worst(logits, model(whole, attention_mask=full).logits[:, -5:])

    assert after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]) < 1e-5
    assert after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [0, 1, 2]) > 0.1
    assert after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]) < 1e-5
    assert after(lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]) < 1e-5


@pytest.mark.parametrize("removed", [1, 2, 5, 12])
@torch.no_grad()
def test_cache_rolls_back(removed):
    model = tiny_model()
    batch, mask = padded(tokens(model, 2, 30), [30, 23], "left")
    expected = model(batch, attention_mask=mask).logits
    cache = DynamicCache(config=model.config)
    model(batch[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
    cache.activate_past_recording()
    wrong = tokens(model, 2, removed, seed=1)
    extended = torch.cat([mask[:, :9], torch.ones(2, removed, dtype=torch.long)], dim=1)
    model(wrong, attention_mask=extended, past_key_values=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == 9
    logits = model(batch[:, 9:], attention_mask=mask, past_key_values=cache).logits
    assert worst(logits, expected[:, 9:]) < 1e-5


@torch.no_grad()
def test_cache_that_did_not_record_refuses_to_roll_back():
    model, cache = tiny_model(), DynamicCache(config=tiny_config())
    model(tokens(model, 1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(5)
    right = DynamicCache(config=tiny_config())
    batch, mask = padded(tokens(model, 2, 4), [4, 2], "right")
    model(batch, attention_mask=mask, past_key_values=right)
    with pytest.raises(ValueError, match="padded on the right"):
        right.crop(-1)


@torch.no_grad()
def test_cache_resets_and_stays_small():
    model = tiny_model()
    ids, cache = tokens(model, 2, 40), DynamicCache(config=tiny_config())
    first = model(ids, past_key_values=cache).logits
    layer = cache.layers[1]
    assert all(isinstance(layer, DeepseekV41CacheLayer) for layer in cache.layers)
    assert layer.keys.shape[2] == layer.tail.shape[1] == model.config.sliding_window - 1
    assert layer.latents.shape[1] == 40 // 3 and cache.layers[3].latents.shape[1] == 40
    assert cache.layers[2].latents is None and cache.layers[0].get_mask_sizes(2) == (42, 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(ids, past_key_values=cache).logits, first)


# --- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
        {"prefill_chunk_size": 4},
    ],
    ids=["greedy", "beams", "several beams", "sampling", "chunked prefill"],
)
def test_generation_with_cache_equals_without(how):
    model = tiny_model()
    batch, mask = padded(tokens(model, 3, 11), [11, 6, 2], "left")
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        arguments = {key: value for key, value in how.items() if use_cache or key != "prefill_chunk_size"}
        outputs.append(
            model.generate(
                batch, attention_mask=mask, max_new_tokens=14, pad_token_id=2, use_cache=use_cache, **arguments
            )
        )
    assert outputs[0].shape[1] == 25 and torch.equal(*outputs)


def test_generation_of_a_left_padded_batch_equals_each_row():
    model, lengths = tiny_model(), [11, 6, 2]
    ids = tokens(model, 3, 11)
    batch, mask = padded(ids, lengths, "left")
    together = model.generate(batch, attention_mask=mask, max_new_tokens=14, pad_token_id=2)
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, :length], max_new_tokens=14, pad_token_id=2)
        assert torch.equal(together[row, 11:], alone[0, length:])


@pytest.mark.parametrize(
    "how", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": True}], ids=["lookup", "assistant"]
)
def test_assisted_generation_equals_greedy(how):
    model = tiny_model()
    ids = tokens(model, 1, 5).repeat(1, 3)
    if "assistant_model" in how:
        how = {"assistant_model": tiny_model(seed=1)}
    greedy = model.generate(ids, max_new_tokens=25, pad_token_id=2)
    assert torch.equal(model.generate(ids, max_new_tokens=25, pad_token_id=2, **how), greedy)


def test_generation_after_an_image():
    model = tiny_model()
    ids = tokens(model, 2, 9)
    image = torch.zeros(2, 9, dtype=torch.bool)
    image[:, 2:6] = True
    generated = model.generate(ids, image_mask=image, max_new_tokens=6, pad_token_id=2, num_beams=2)
    again = model.generate(ids, image_mask=image, max_new_tokens=6, pad_token_id=2, num_beams=2, use_cache=False)
    assert torch.equal(generated, again)
    assert worst(model(ids, image_mask=image).logits, model(ids).logits) > 0.1


def test_static_cache_is_refused():
    model = tiny_model()
    with pytest.raises(ValueError, match="no static cache"):
        model.generate(tokens(model, 1, 5), max_new_tokens=2, cache_implementation="static")


# --- cost -----------------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return result


@torch.no_grad()
def test_no_tensor_grows_with_the_square_of_the_length(monkeypatch):
    monkeypatch.setattr(modeling, "_BLOCK_ELEMENTS", 1 << 16)
    model, sizes = tiny_model().model, {}
    for length in (512, 1024, 2048):
        with LargestTensor() as largest_tensor:
            model(tokens(model, 1, length))
        sizes[length] = largest_tensor.size
    assert sizes[2048] <= 2.1 * sizes[1024] <= 4.5 * sizes[512]
    assert sizes[2048] < 2048 * 2048 / 4


@torch.no_grad()
def test_block_length_changes_nothing(monkeypatch):
    model = tiny_model()
    ids = tokens(model, 2, 70)
    expected = model(ids).logits
    for elements in (1, 5000):
        monkeypatch.setattr(modeling, "_BLOCK_ELEMENTS", elements)
        assert worst(model(ids).logits, expected) < 1e-5


@torch.no_grad()
def test_candidates_bind_even_where_everything_could_be_selected():
    model, chosen = tiny_model(index_topk=60), []
    for index in (3, 5):
        model.model.layers[index].self_attn.register_forward_hook(lambda _, __, output: chosen.append(output[1]))
    model(tokens(model, 2, 40))
    source, later = chosen
    assert (source.selected[:, -1] >= 0).sum(-1).tolist() == [40, 40]
    assert (later.selected[:, -1] >= 0).sum(-1).max() <= 9
    inside = as_mask(source.candidates, 3, 40)
    assert not (as_mask(later.selected, 1, 40) & ~inside).any()


def test_largest_takes_the_first_of_equals():
    scores = torch.tensor([[0.0, -0.0, 2.0, 0.0, -1.0, float("-inf")]])
    assert sorted(largest(scores, 3)[0].tolist()) == [0, 1, 2]
    assert sorted(largest(scores, 4)[0].tolist()) == [0, 1, 2, 3]
    random = torch.randn(5, 300)
    assert torch.equal(largest(random, 40).sort(-1).values, random.topk(40).indices.sort(-1).values)


# --- a good citizen of transformers ---------------------------------------------------------------------------------


def test_auto_classes_save_and_load(tmp_path):
    model = tiny_model()
    ids = tokens(model, 1, 12)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is DeepseekV41TextConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (
        type(loaded) is DeepseekV41TextForCausalLM
        and type(AutoModel.from_pretrained(tmp_path)) is DeepseekV41TextModel
    )
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_transformers_release_of_its_own_keeps_its_place():
    code = """
from transformers import AutoConfig, AutoModel, PreTrainedConfig
class Theirs(PreTrainedConfig):
    model_type = "deepseek_v41_text"
AutoConfig.register("deepseek_v41_text", Theirs)
from engram_hf.modeling_deepseek_v41 import DeepseekV41TextModel
from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
assert type(AutoConfig.for_model("deepseek_v41_text")) is Theirs
ours = DeepseekV41TextConfig(
    vocab_size=8, hidden_size=32, num_hidden_layers=1, head_dim=32, qk_rope_head_dim=8, n_routed_experts=8,
    moe_intermediate_size=32, q_lora_rank=8, o_lora_rank=8, index_head_dim=32,
)
assert type(AutoModel.from_config(ours)) is DeepseekV41TextModel
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_float32_stays_where_the_release_has_it(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    float32 = {
        name.split(".", 3)[-1] for name, tensor in tensors if tensor.dtype == torch.float32 and "layers" in name
    }
    assert float32 == {
        *(f"{where}_hc.{what}" for where in ("attn", "ffn") for what in ("fn", "base", "scale")),
        "self_attn.sinks", "mlp.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias_vl",
        "self_attn.rotary_emb.main_inv_freq", "self_attn.rotary_emb.main_original_inv_freq",
        "self_attn.rotary_emb.compress_inv_freq", "self_attn.rotary_emb.compress_original_inv_freq",
    }  # fmt: skip
    assert model(tokens(model, 1, 9)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_generates(tmp_path, dtype):
    tiny_model(initializer_range=0.05).save_pretrained(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    ids = tokens(model, 2, 20)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert torch.isfinite(out.loss) and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # In the mean: at single positions another expert or compressed position is chosen.
    assert (out.logits.float() - exact(ids).logits).abs().mean() < 0.02
    assert model.generate(ids, max_new_tokens=3, pad_token_id=2).shape == (2, 23)


def test_autocast_keeps_the_mixers_and_the_router_exact():
    model, seen = tiny_model(), []
    ids = tokens(model, 1, 12)
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    model.model.layers[0].attn_hc.register_forward_hook(lambda _, __, output: seen.append(output[2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids, labels=ids).loss.isfinite()
    assert all(tensor.dtype == torch.float32 for tensor in seen)
    model(ids)
    assert worst(seen[0], seen[2]) == 0  # the first mixer saw the same streams


def test_recorded_outputs():
    model = tiny_model()
    ids = tokens(model, 2, 10)
    out = model(ids, output_hidden_states=True, output_router_logits=True, labels=ids)
    assert len(out.hidden_states) == 7 and len(out.router_logits) == 6
    assert all(state.shape == (2, 10, 3, 48) for state in out.hidden_states[:-1])
    assert out.hidden_states[-1].shape == (2, 10, 48) and out.router_logits[0].shape == (20, 4)
    assert out.attentions is None and out.aux_loss.isfinite()


def test_unknown_keywords_reach_the_layers():
    model, seen = tiny_model(), []
    model.model.layers[2].register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["flag"]), with_kwargs=True
    )
    model(tokens(model, 1, 4), flag="here")
    assert seen == ["here"]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@torch.no_grad()
def test_experts_implementations_agree(remembering, answers, implementation):
    model, memory = remembering
    model.set_experts_implementation(implementation)
    # Not case `full`: one window channel there lies within float noise of a rounding tie.
    assert worst(run_case(model, memory, answers, "long"), answers["long.logits"]) < 1e-4


@torch.no_grad()
def test_compiled_model_gives_the_same():
    schedule = {"kv_source_layer_ids": [1], "index_source_layer_ids": [1], "candidate_source_layer_id": None}
    model = tiny_model(num_hidden_layers=2, compress_ratios=[0, 3], **schedule)
    batch, mask = padded(tokens(model, 2, 14), [14, 9], "left")
    compiled = torch.compile(model, backend="aot_eager")
    expected = model(batch, attention_mask=mask).logits
    assert worst(compiled(batch, attention_mask=mask).logits[mask.bool()], expected[mask.bool()]) < 1e-5
    positions = torch.cat([torch.arange(8), torch.arange(6)])[None].expand(2, -1)
    packed = model(batch, position_ids=positions).logits
    assert worst(compiled(batch, position_ids=positions).logits, packed) < 1e-5


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
    "scale_fmt": "ue8m0",
    "expert_dtype": "fp4",
}


def quantized_checkpoint(folder, release, target, config):
    """The miniature under our names, every matrix with a module of its own as the release stores it."""
    state = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                scale = name.endswith(".scale")
                ours = our_name(name.replace(".scale", ".weight"))
                if ours is not None:
                    ours = ours.replace(".weight", ".weight_scale_inv") if scale else ours
                    state[ours if ours.startswith("lm_head") else f"model.{ours}"] = shard.get_tensor(name)
    # Stacked experts are decoded: on a machine without GPU transformers decodes only tensors called `weight`.
    decoded = text_state_dict(release, config)
    state.update({name: tensor.bfloat16() for name, tensor in decoded.items() if ".experts." in name})
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config, config.dtype = FP8, "bfloat16"
    config.architectures = ["DeepseekV41TextForCausalLM"]
    config.save_pretrained(target)


@torch.no_grad()
def test_quantized_weights_load(folder, release, release_config, tmp_path):
    """Without a GPU transformers decodes to bfloat16 while loading; every weight must come out as the release's."""
    config = DeepseekV41TextConfig(**release_config)
    quantized_checkpoint(folder, release, tmp_path, config)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = text_state_dict(release, config)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor.float(), expected[name].to(tensor.dtype).float()), name


def test_fp8_replaces_what_the_release_quantizes():
    from transformers.integrations.finegrained_fp8 import FP8Experts, FP8Linear, replace_with_fp8_linear
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.utils.quantization_config import FineGrainedFP8Config

    with torch.device("meta"):
        model = DeepseekV41TextForCausalLM(
            tiny_config(
                compress_ratios=[0, *[3] * 5],
                kv_source_layer_ids=[1],
                index_source_layer_ids=[1],
                candidate_source_layer_id=None,
            )
        )
    kept = [*get_keys_to_not_convert(model), *model._keep_in_fp32_modules]
    options = {key: value for key, value in FP8.items() if key not in ("fmt", "quant_method")}
    replace_with_fp8_linear(model, kept, FineGrainedFP8Config(**options), pre_quantized=True)
    replaced = {
        name for name, module in model.model.layers[1].named_modules() if isinstance(module, FP8Linear | FP8Experts)
    }
    assert replaced == {
        *(f"self_attn.{name}_proj" for name in ("q_a", "q_b", "kv", "o_a", "o_b")),
        *(f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")),
        "self_attn.indexer.q_b_proj",
        "mlp.experts",
    }
    assert type(model.lm_head) is torch.nn.Linear
    assert model.model.layers[1].mlp.experts.limit == model.config.swiglu_limit


def test_state_dict_names():
    """The contract with the converter: what a KV source that is an index source holds."""
    names = [name.removeprefix("model.layers.1.") for name in tiny_model().state_dict() if "layers.1." in name]
    assert names == [
        "self_attn.sinks",
        *(f"self_attn.{name}.weight" for name in ("q_a_proj", "q_a_norm", "q_b_proj", "kv_proj", "kv_norm", "o_a_proj", "o_b_proj")),
        *(f"self_attn.compressor.{name}.weight" for name in ("kv_proj", "gate_proj", "kv_norm")),
        *(f"self_attn.indexer.{name}.weight" for name in ("q_b_proj", "weights_proj", "k_proj", "k_norm")),
        "mlp.gate.weight", "mlp.gate.e_score_correction_bias", "mlp.gate.e_score_correction_bias_vl",
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj",
        *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
        "input_layernorm.weight", "post_attention_layernorm.weight",
        *(f"{where}_hc.{what}" for where in ("attn", "ffn") for what in ("fn", "base", "scale")),
    ]  # fmt: skip


def test_shapes_of_the_default_config_are_the_release():
    """`spec/deepseek_v41.md`, the table of tensors."""
    with torch.device("meta"):
        model = DeepseekV41TextForCausalLM(DeepseekV41TextConfig())
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["embed_tokens.weight"] == shapes["lm_head.weight"] == (129280, 5120)
    layer = {name.removeprefix("layers.20."): shape for name, shape in shapes.items() if name.startswith("layers.20.")}
    expected = {
        "attn_hc.fn": (24, 20480), "attn_hc.base": (24,), "attn_hc.scale": (3,), "self_attn.q_a_proj.weight": (1280, 5120),
        "self_attn.q_b_proj.weight": (32768, 1280), "self_attn.kv_proj.weight": (512, 5120),
        "self_attn.o_a_proj.weight": (8192, 4096), "self_attn.o_b_proj.weight": (5120, 8192), "self_attn.sinks": (64,),
        "self_attn.indexer.q_b_proj.weight": (4096, 1280), "self_attn.indexer.weights_proj.weight": (32, 5120),
        "self_attn.indexer.k_proj.weight": (128, 512), "self_attn.indexer.k_norm.weight": (128,),
        "mlp.gate.weight": (384, 5120), "mlp.gate.e_score_correction_bias_vl": (384,),
        "mlp.experts.gate_up_proj": (384, 4608, 5120), "mlp.experts.down_proj": (384, 5120, 2304),
        "mlp.shared_experts.gate_proj.weight": (2304, 5120), "mlp.shared_experts.down_proj.weight": (5120, 2304),
    }  # fmt: skip
    assert {name: layer[name] for name in expected} == expected

    def having(part):
        return [index for index in range(40) if any(name.startswith(f"layers.{index}.{part}") for name in shapes)]

    assert having("self_attn.compressor.kv_proj") == having("self_attn.indexer.k_proj") == [2, 8, 14, 20]
    assert having("self_attn.compressor.gate_proj") == [2, 8, 14]
    assert having("self_attn.indexer.q_b_proj") == [2, 8, 14, 20, 24, 28, 32, 36]


def test_experts_plans_name_existing_modules():
    config, model = tiny_config(), tiny_model()
    names = {name for name, _ in model.model.named_modules()} | {name for name, _ in model.model.named_parameters()}
    plans = [plan for plan in (config.base_model_tp_plan, config.base_model_ep_plan) if plan]
    assert plans  # transformers 5.17 has one of the two for DeepSeek-V4, 5.23 both
    for plan in plans:
        assert "layers.*.mlp.experts" in plan and all(rule.replace("*", "0") in names for rule in plan)


# --- configuration --------------------------------------------------------------------------------------------------


def test_config_keeps_what_it_does_not_read(release_config):
    config = DeepseekV41TextConfig(**release_config)
    again = DeepseekV41TextConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    for name in (
        "engram_layer_ids",
        "dspark_markov_rank",
        "num_nextn_predict_layers",
        "compress_ratios",
        "topk_method",
    ):
        assert getattr(again, name) == release_config[name]
    assert again.upstream_rope_scaling == release_config["rope_scaling"]
    assert (
        again.rope_parameters["main"]["rope_theta"] == 10000
        and again.rope_parameters["compress"]["rope_theta"] == 160000
    )


def test_config_defaults_are_the_release():
    config = DeepseekV41TextConfig()
    assert [config.compress_ratios.count(ratio) for ratio in (0, 2, 1)] == [2, 18, 20]
    assert config.kv_source_layer_ids == [2, 8, 14, 20] and config.candidate_source_layer_id == 20
    assert config.upstream_rope_scaling["original_max_position_embeddings"] == 65536
    prefix = DeepseekV41TextConfig(num_hidden_layers=10)
    assert prefix.index_source_layer_ids == [2, 8] and prefix.candidate_source_layer_id is None
    assert DeepseekV41TextConfig(rope_scaling=None).upstream_rope_scaling is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hidden_size": 0}, "`hidden_size` must be a positive integer"),
        ({"index_topk": 2.5}, "`index_topk` must be a positive integer"),
        ({"o_groups": 3}, "`num_attention_heads` must be a multiple of `o_groups`"),
        ({"qk_rope_head_dim": 7}, "`qk_rope_head_dim` must be even"),
        ({"qk_rope_head_dim": 34}, "not exceed `head_dim`"),
        ({"head_dim": 40}, "`head_dim` must be a multiple of 32"),
        ({"num_experts_per_tok": 5}, "not exceed `n_routed_experts`"),
        ({"scoring_func": "softmax"}, "`scoring_func` must be 'sqrtsoftplus'"),
        ({"n_shared_experts": 2}, "`n_shared_experts` must be 1"),
        ({"compress_ratios": [0, 3]}, "`compress_ratios` must give each of 6 layers"),
        ({"kv_source_layer_ids": [3, 1]}, "`kv_source_layer_ids` must be ascending"),
        ({"index_source_layer_ids": [1, 3, 6]}, "`index_source_layer_ids` must be ascending layers below"),
        ({"kv_source_layer_ids": [0, 1, 3]}, "with a compress ratio above 0"),
        ({"index_source_layer_ids": [3, 5]}, "must be in `index_source_layer_ids` too"),
        ({"kv_source_layer_ids": [3]}, "Layer 1 has compress ratio 3"),
        ({"candidate_source_layer_id": 4}, "`candidate_source_layer_id` must be one of"),
        ({"candidate_source_layer_id": 1}, "with no KV source"),
        ({"rope_scaling": {"type": "yarn", "factor": 16}}, "needs \\['original_max_position_embeddings'\\]"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "'default' or 'yarn'"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**fields)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"inputs_embeds": torch.zeros(2, 6, 48)}, "exactly one of `input_ids` and `inputs_embeds`"),
        ({"attention_mask": torch.ones(2, 5)}, "`attention_mask` must be"),
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, "never forms"),
        ({"attention_mask": {"full_attention": None}}, "`attention_mask` must be"),
        ({"position_ids": torch.tensor([[0, 1, 3, 4, 5, 6]])}, "count up by one"),
        ({"position_ids": torch.arange(3, 9)[None]}, "from 0 or from the last cached position"),
        ({"position_ids": torch.zeros(3, 6, dtype=torch.long)}, "`position_ids` must be \\[2, 6\\]"),
        ({"image_mask": torch.zeros(2, 5, dtype=torch.bool)}, "`image_mask` must have one entry per token"),
        ({"past_key_values": DynamicCache()}, "DynamicCache\\(config=model.config\\)"),
    ],
)
def test_bad_input(arguments, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        model(tokens(model, 2, 6), **arguments)


def test_dequantize_reference_reads_low_nibble_first():
    packed = torch.tensor([[0x21, 0xF9 - 256]], dtype=torch.int8)
    scale = torch.ones(1, 1).to(torch.float8_e8m0fnu)
    assert dequantize(packed, scale).tolist() == [[0.5, 1.0, -0.5, -6.0]]

"""A cache changes no token and no score, in every decoding strategy of `generate`, backbone and variant.

transformers' own generation tests are not part of its source distribution, so this file repeats their checks. Where a
backbone by itself gives other tokens with a cache than without, or refuses a strategy, the model on it may do the
same. `test_generation.py` covers greedy search, the static cache, prompts in chunks and assistants for the variant
with a convolution; this file covers them for the other variant.
"""

import functools
import inspect
from collections.abc import Mapping

import pytest
import torch
from test_generation import GREEDY, LEFT_PADDED, ROLLED_BACK, STATIC, pad_left, repetitive_ids
from tiny_backbones import BACKBONES, as_able_as, bare, built, random_ids, randomize
from transformers import AutoModelForCausalLM, MixtralModel

VARIANTS = ["paper", "v4.1"]
# transformers 5.24 renamed the cache's field.
CACHE = "cache" if "cache" in inspect.signature(MixtralModel.forward).parameters else "past_key_values"
SHORT = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
SAMPLING = {**SHORT, "do_sample": True}
BEAMS = {**SHORT, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
STRATEGIES = {
    "sampling, several sequences": {**SAMPLING, "num_return_sequences": 2},
    "sampling from few tokens": {**SAMPLING, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "sampling typical tokens": {**SAMPLING, "typical_p": 0.8, "epsilon_cutoff": 1e-3},
    "beams": BEAMS,
    "beams that stop early": {**BEAMS, "early_stopping": True, "length_penalty": 2.0, "eos_token_id": [5, 6, 7, 8, 9]},
    "sampled beams": {**BEAMS, "do_sample": True},
    "penalties": {**SHORT, "do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "forced and forbidden tokens": {
        **SHORT,
        "do_sample": False,
        "forced_eos_token_id": 2,
        "suppress_tokens": list(range(3, 60)),
        "sequence_bias": [[[100, 101], 5.0]],
    },
    "rows that end at different steps": {
        **SHORT,
        "do_sample": False,
        "max_new_tokens": 12,
        "eos_token_id": list(range(3, 30)),
    },
    "guidance": {**SHORT, "do_sample": False, "guidance_scale": 1.5},
}

# Logits of these random models reach 20; single steps and one forward sum in different orders.
CLOSE = {"rtol": 0, "atol": 1e-4}

on_every_backbone = pytest.mark.parametrize("name", BACKBONES)
in_both_variants = pytest.mark.parametrize("variant", VARIANTS)


@functools.cache
def host(name: str):
    """Return the backbone without memory."""
    return bare(name)


def decode(model, options: dict, ids: torch.Tensor | None = None, **inputs) -> torch.Tensor:
    """Return the tokens of `generate`, with the same seed in each call."""
    torch.manual_seed(0)
    return model.generate(random_ids(2, 9) if ids is None else ids, **options, **inputs)


def agrees(model, options: dict, **inputs) -> bool:
    """Return whether a cache changes nothing."""
    return torch.equal(decode(model, options, **inputs), decode(model, options, **inputs, use_cache=False))


@on_every_backbone
@in_both_variants
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cache_changes_no_token(name, variant, strategy):
    options = STRATEGIES[strategy]
    with as_able_as(lambda: decode(host(name), options)):
        assert agrees(built(name, variant), options) or not agrees(host(name), options)


@pytest.mark.parametrize("name", LEFT_PADDED)
@in_both_variants
@pytest.mark.parametrize("strategy", ["beams", "penalties", "rows that end at different steps"])
def test_left_padded_prompts_continue_as_without_a_cache(name, variant, strategy):
    padded = pad_left([random_ids(1, length, seed=length) for length in (3, 9)])
    ids, mask, options = padded["input_ids"], padded["attention_mask"], STRATEGIES[strategy]
    model = built(name, variant)
    assert agrees(model, options, ids=ids, attention_mask=mask)
    unmasked = decode(model, {**options, "eos_token_id": None}, ids=ids, attention_mask=torch.ones_like(mask))
    masked = decode(model, {**options, "eos_token_id": None}, ids=ids, attention_mask=mask)
    assert not torch.equal(masked, unmasked)  # A text that ends at its first token could be equal by chance.


@on_every_backbone
@in_both_variants
def test_scores_equal_those_of_one_forward(name, variant):
    """Each step's logits equal those of one forward over the whole text at that position."""
    model, ids = built(name, variant), random_ids(2, 9)
    output = model.generate(ids, **GREEDY, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        whole = model(output.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, 1), whole, **CLOSE)


@on_every_backbone
@in_both_variants
@pytest.mark.parametrize("strategy", ["sampling, several sequences", "beams"])
def test_generate_outputs_have_the_same_parts_as_the_backbones(name, variant, strategy):
    options = {**STRATEGIES[strategy], "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    options |= {"output_hidden_states": True, "output_attentions": True}
    model, expected = eager(name, variant), eager(name, None)
    with as_able_as(lambda: decode(expected, options)):
        got, wanted = decode(model, options), decode(expected, options)
        assert type(got) is type(wanted)
        assert shapes(got) == shapes(wanted)


@functools.cache
def eager(name: str, variant: str | None):
    """Return a model that gives attentions; it is the bare backbone if there is no variant."""
    config = BACKBONES[name]() if variant is None else built(name, variant).config
    torch.manual_seed(0)
    return randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()


def shapes(output):
    """Return the shape of every tensor in nested outputs, without the cache."""
    if isinstance(output, Mapping):
        return {key: shapes(value) for key, value in output.items() if key not in ("cache", "past_key_values")}
    if isinstance(output, (tuple, list)):
        return [shapes(part) for part in output]
    return tuple(output.shape) if isinstance(output, torch.Tensor) else output


@on_every_backbone
@in_both_variants
def test_generate_continues_from_the_cache_it_returned(name, variant):
    def in_two_calls(model):
        first = decode(model, {**GREEDY, "max_new_tokens": 3, "return_dict_in_generate": True})
        # `generate` would guess that generated pads are padding; they are tokens like others.
        inputs = {"attention_mask": torch.ones_like(first.sequences), CACHE: first[CACHE]}
        return decode(model, {**GREEDY, "max_new_tokens": 3}, ids=first.sequences, **inputs)

    model, whole = built(name, variant), {**GREEDY, "max_new_tokens": 6}
    continued = torch.equal(in_two_calls(model), decode(model, whole))
    assert continued or not torch.equal(in_two_calls(host(name)), decode(host(name), whole))


@on_every_backbone
@in_both_variants
@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_beside_ids_give_the_tokens_of_the_ids(name, variant, beams):
    model, ids, options = built(name, variant), random_ids(2, 9), {**SHORT, "do_sample": False, "num_beams": beams}
    embeddings = model.get_input_embeddings()(ids)

    def from_embeddings(model, **inputs):
        return model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options, **inputs)

    with as_able_as(lambda: from_embeddings(host(name))):
        assert torch.equal(decode(model, options, ids=ids, inputs_embeds=embeddings), decode(model, options, ids=ids))


@on_every_backbone
@in_both_variants
def test_quantized_cache_deviates_no_more_than_the_backbones(name, variant):
    """The history is not quantized: with eight-bit keys and values, the first steps choose the same tokens."""
    pytest.importorskip("optimum.quanto", reason="quantized caches need optimum-quanto")
    options = {**GREEDY, "max_new_tokens": 3, "cache_implementation": "quantized"}
    options["cache_config"] = {"backend": "quanto", "nbits": 8, "residual_length": 128}
    with as_able_as(lambda: decode(host(name), options)):
        assert torch.equal(decode(built(name, variant), options), decode(built(name, variant), GREEDY)[:, :12])


# --- in the variant without a convolution


@pytest.mark.parametrize("name", STATIC)
def test_static_cache_changes_no_token(name):
    padded = pad_left([random_ids(1, 4), random_ids(1, 9)])
    model, ids, mask = built(name, "v4.1"), padded["input_ids"], padded["attention_mask"]
    static = decode(model, {**GREEDY, "cache_implementation": "static"}, ids=ids, attention_mask=mask)
    assert torch.equal(static, decode(model, GREEDY, ids=ids, attention_mask=mask))


@pytest.mark.parametrize("name", ROLLED_BACK)
@pytest.mark.parametrize("by", ["prompt lookup", "an assistant"])
def test_assisted_decoding_changes_no_token(name, by):
    model, ids = built(name, "v4.1"), repetitive_ids()
    options = {"prompt_lookup_num_tokens": 3} if by == "prompt lookup" else {"assistant_model": built(name, "paper")}
    assert torch.equal(decode(model, GREEDY, ids=ids, **options), decode(model, GREEDY, ids=ids))


@pytest.mark.parametrize("name", ROLLED_BACK)
@in_both_variants
def test_sampled_assisted_decoding_is_independent_of_the_cache(name, variant):
    """Sampling consumes random numbers in another order, so only the effect of the cache is compared."""
    model, ids = built(name, variant), repetitive_ids()
    options = {**SAMPLING, "prompt_lookup_num_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    output = decode(model, options, ids=ids)
    with torch.no_grad():
        whole = model(output.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, 1), whole, **CLOSE)


@on_every_backbone
@pytest.mark.parametrize("size", [1, 4])
def test_prompt_read_in_chunks_changes_no_token(name, size):
    model = built(name, "v4.1")
    assert torch.equal(decode(model, {**GREEDY, "prefill_chunk_size": size}), decode(model, GREEDY))

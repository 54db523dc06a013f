"""What must hold on every backbone that reads images: all ways to feed a prompt with images give the same logits."""

import copy

import pytest
import torch
from tiny_backbones import LAYER_IDS
from tiny_vision_language import IMAGE, KINDS, bare_vl, built_vl, prompt

from engram_hf import EngramForConditionalGeneration

EXACT = {"rtol": 0, "atol": 2e-5}
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

on_every_kind = pytest.mark.parametrize("kind", KINDS)


def silenced(model):
    """The same model whose memory adds nothing."""
    model = copy.deepcopy(model)
    for memory in model.memory_model.memories().values():
        memory.zero_value_projection()
    return model


@torch.no_grad()
def logits_of(model, inputs, **kwargs) -> torch.Tensor:
    return model(**inputs, **kwargs).logits


def left_padded(inputs: dict[str, torch.Tensor], count: int = 3) -> dict[str, torch.Tensor]:
    """The same batch behind `count` positions of padding."""
    padded = dict(inputs)
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            padded[name] = torch.nn.functional.pad(inputs[name], (count, 0))
    return padded


@on_every_kind
def test_a_new_memory_changes_no_logit(kind):
    bare, inputs = bare_vl(kind), prompt(kind)
    before, names = logits_of(bare, inputs), set(bare.state_dict())
    model = EngramForConditionalGeneration.from_backbone(bare, layer_ids=LAYER_IDS, engram_vocab_size=97)
    assert torch.equal(logits_of(model, inputs), before)
    added = set(model.state_dict()) - names
    assert names < set(model.state_dict()) and all(".engram." in name or ".hashing." in name for name in added)


@on_every_kind
def test_positions_of_images_have_no_memory(kind):
    model, inputs = built_vl(kind), prompt(kind)
    images = inputs["input_ids"] == IMAGE
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    for gates in model.engram_gates(inputs["input_ids"], **rest).values():
        assert (gates[images] == 0).all() and (gates[~images] > 0).all()
    # Nor does a look-back cross them: the text after an image reads the rows that it reads by itself.
    told = {"image_mask": images}
    behind = inputs["input_ids"][:, 8:]
    rows = model.memory_model.prepare_memory(inputs["input_ids"], **told).row_ids[:, :, 8:]
    assert torch.equal(rows, model.memory_model.prepare_memory(behind).row_ids)
    change = (logits_of(model, inputs) - logits_of(silenced(model), inputs)).abs().amax(-1)
    assert change[:, 8:].min() > 1e-4


@on_every_kind
def test_the_text_of_a_prompt_is_heard(kind):
    """The rows of the noted ids are read, not those of another call."""
    model, inputs = built_vl(kind, "v4.1"), prompt(kind)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 0] += 1
    own, embeds = logits_of(model, inputs), model.get_input_embeddings()(inputs["input_ids"])
    del other["pixel_values"]
    text = {"attention_mask": inputs["attention_mask"], "inputs_embeds": embeds}
    as_embeds = [logits_of(model, {**text, "input_ids": ids["input_ids"]}) for ids in (inputs, other)]
    assert (as_embeds[0] - as_embeds[1]).abs().max() > 1e-3
    assert own.isfinite().all()


@on_every_kind
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_is_generation_without(kind, cache):
    model, inputs = built_vl(kind), left_padded(prompt(kind))
    static = {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    cached = model.generate(**inputs, **GREEDY, **static)
    assert torch.equal(cached, model.generate(**inputs, **GREEDY, use_cache=False))
    assert not torch.equal(cached, silenced(model).generate(**inputs, **GREEDY))


@on_every_kind
def test_cached_logits_are_those_of_the_whole(kind):
    model, inputs = built_vl(kind), left_padded(prompt(kind))
    options = {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, **GREEDY, **options)
    whole = model.generate(**inputs, **GREEDY, **options, use_cache=False)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(whole.logits), **EXACT)


@on_every_kind
def test_left_padding_changes_nothing(kind):
    model, inputs = built_vl(kind), prompt(kind)
    alone = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    padded = left_padded(inputs)
    assert torch.equal(model.generate(**padded, **GREEDY)[:, padded["input_ids"].shape[1] :], alone)


@on_every_kind
def test_beams_are_the_same_with_a_cache_and_without(kind):
    model, inputs = built_vl(kind), left_padded(prompt(kind))
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(**inputs, **beams), model.generate(**inputs, **beams, use_cache=False))

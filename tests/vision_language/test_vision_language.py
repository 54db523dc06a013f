"""Requirements on every backbone that reads images: all ways to feed a prompt with images give the same logits."""

import copy
import inspect
import threading

import pytest
import torch
from tiny_backbones import LAYER_IDS
from tiny_vision_language import IMAGE, KINDS, bare_vl, built_vl, prompt
from transformers import DynamicCache

from engram_hf import EngramForConditionalGeneration

EXACT = {"rtol": 0, "atol": 2e-5}
GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}

on_every_kind = pytest.mark.parametrize("kind", KINDS)


def zeroed(model):
    """Return the same model with a zero value projection."""
    model = copy.deepcopy(model)
    for memory in model.memory_model.memories().values():
        memory.zero_value_projection()
    return model


@torch.no_grad()
def logits_of(model, inputs, **kwargs) -> torch.Tensor:
    return model(**inputs, **kwargs).logits


def left_padded(inputs: dict[str, torch.Tensor], count: int = 3) -> dict[str, torch.Tensor]:
    """Return the same batch behind `count` positions of padding."""
    padded = dict(inputs)
    for name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            padded[name] = torch.nn.functional.pad(inputs[name], (count, 0))
    return padded


@on_every_kind
def test_new_memory_changes_no_logit(kind):
    bare, inputs = bare_vl(kind), prompt(kind)
    before, names = logits_of(bare, inputs), set(bare.state_dict())
    model = EngramForConditionalGeneration.from_backbone(bare, layer_ids=LAYER_IDS, engram_vocab_size=97)
    assert torch.equal(logits_of(model, inputs), before)
    added = set(model.state_dict()) - names
    assert names < set(model.state_dict()) and all(".engram." in name or ".hashing." in name for name in added)


@on_every_kind
def test_image_positions_have_no_memory(kind):
    model, inputs = built_vl(kind), prompt(kind)
    images = inputs["input_ids"] == IMAGE
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    for gates in model.engram_gates(inputs["input_ids"], **rest).values():
        assert (gates[images] == 0).all() and (gates[~images] > 0).all()
    # A look-back does not cross them either: the text after an image reads the rows of the text alone.
    given = {"image_mask": images}
    behind = inputs["input_ids"][:, 8:]
    rows = model.memory_model.prepare_memory(inputs["input_ids"], **given).row_ids[:, :, 8:]
    assert torch.equal(rows, model.memory_model.prepare_memory(behind).row_ids)
    change = (logits_of(model, inputs) - logits_of(zeroed(model), inputs)).abs().amax(-1)
    assert change[:, 8:].min() > 1e-4


@on_every_kind
def test_text_of_a_prompt_reads_its_rows(kind):
    """The rows of the recorded ids are read, not those of another call."""
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
def test_cache_and_left_padding_change_no_logit(kind):
    model, inputs = built_vl(kind), prompt(kind)
    padded, options = left_padded(inputs), {"return_dict_in_generate": True, "output_logits": True}
    cached = model.generate(**padded, **GREEDY, **options)
    for others, settings in ((padded, {"use_cache": False}), (inputs, {})):
        output = model.generate(**others, **GREEDY, **options, **settings)
        torch.testing.assert_close(torch.stack(output.logits), torch.stack(cached.logits), **EXACT)
    assert not torch.equal(cached.sequences, zeroed(model).generate(**padded, **GREEDY))


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_static_cache_changes_no_logit(kind):
    """It converts the prompt's mask into masks of another shape, which do not show padding."""
    model, inputs = built_vl(kind), left_padded(prompt(kind))
    static = model.generate(**inputs, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, model.generate(**inputs, **GREEDY))


@on_every_kind
def test_beam_search_with_and_without_a_cache(kind):
    model, inputs = built_vl(kind), left_padded(prompt(kind))
    beams = {**GREEDY, "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(**inputs, **beams), model.generate(**inputs, **beams, use_cache=False))


def test_prompt_in_two_chunks_equals_one_call():
    """The second chunk continues with the history in the cache, through an image."""
    model, inputs = built_vl("llava"), prompt("llava", rows=1)
    cache = DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    first = {key: value[:, :10] if key in ("input_ids", "attention_mask") else value for key, value in inputs.items()}
    second = {"input_ids": inputs["input_ids"][:, 10:], "attention_mask": inputs["attention_mask"]}
    pieces = [logits_of(model, {**piece, name: cache}) for piece in (first, second)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits_of(model, inputs, use_cache=False), **EXACT)


def test_threads_do_not_affect_each_other():
    model, inputs = built_vl("llava", "v4.1"), [prompt("llava", seed=seed) for seed in range(3)]
    expected, found = [logits_of(model, one) for one in inputs], {}

    def run(index: int) -> None:
        for _ in range(3):
            found[index] = logits_of(model, inputs[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, logits in enumerate(expected):
        torch.testing.assert_close(found[index], logits, **EXACT)

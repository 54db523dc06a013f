"""The DeepSeek-V4.1 text backbone, fed in chunks, padded, packed and generating, equals one plain forward."""

import pytest
import torch
from deepseek_v41_models import CHUNKS, in_chunks, padded, tiny_config, tiny_model, tokens, worst
from transformers import DynamicCache

from engram_hf.cache_deepseek_v41 import DeepseekV41CacheLayer


@pytest.mark.parametrize("size", CHUNKS)
@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_random_tokens_in_chunks(size, seed):
    model = tiny_model(seed)
    ids = tokens(model, 3, 41, seed=seed)
    expected = model(ids, use_cache=False).logits
    assert worst(in_chunks(model, ids, size), expected) < 1e-5
    assert worst(in_chunks(model, ids, size), in_chunks(model, ids.flip(0), size)) > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [None, *CHUNKS])
@torch.no_grad()
def test_padded_row_equals_the_row_alone(side, size):
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


# --- generation ---------------------------------------------------------------------------------------------------


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

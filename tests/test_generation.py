"""`generate` in all its modes: tokens equal those of the model without a cache, or of each prompt alone."""

import copy

import pytest
import torch
from tiny_backbones import (
    BACKBONES,
    LAYER_IDS,
    VOCAB,
    bare,
    built,
    engram_config,
    random_ids,
    randomize,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, DynamicCache, Phi3Config, StaticCache, pipeline

from engram_hf import EngramForCausalLM

# DeepSeek-V4 compresses keys in windows that start at the first position, padded or not.
LEFT_PADDED = [name for name in BACKBONES if name != "deepseek_v4"]
# DeepSeek-V4 is stateful: transformers refuses assisted decoding with it. It has no static cache either.
ROLLED_BACK = STATIC = LEFT_PADDED
NEW = {"max_new_tokens": 12, "eos_token_id": None}
GREEDY = {**NEW, "do_sample": False}

on_every_backbone = pytest.mark.parametrize("name", BACKBONES)


@pytest.fixture
def model(name) -> EngramForCausalLM:
    return built(name)


@pytest.fixture
def mixtral() -> EngramForCausalLM:
    return built("mixtral")


@torch.no_grad()
def greedy_by_hand(model, ids: torch.Tensor, count: int = 12) -> torch.Tensor:
    """Decode greedily by reading the whole text again for every token."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


def pad_left(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    longest = max(prompt.shape[1] for prompt in prompts)
    missing = [longest - prompt.shape[1] for prompt in prompts]
    ids = [
        torch.cat([torch.zeros(1, gap, dtype=torch.long), prompt], 1)
        for gap, prompt in zip(missing, prompts, strict=True)
    ]
    mask = [torch.tensor([[0] * gap + [1] * (longest - gap)]) for gap in missing]
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}


def repetitive_ids() -> torch.Tensor:
    """Return a prompt that repeats itself, so that prompt lookup finds candidates."""
    return random_ids(1, 5).repeat(1, 4)


@on_every_backbone
@pytest.mark.parametrize("variant", ["paper", "v4.1"])
def test_greedy_generate_equals_greedy_by_hand(name, variant):
    model, ids = built(name, variant), random_ids(2, 9)
    assert torch.equal(model.generate(ids, **GREEDY), greedy_by_hand(model, ids))


def test_generate_depends_on_the_memory(mixtral):
    zeroed, ids = copy.deepcopy(mixtral), random_ids(2, 9)
    for memory in zeroed.model.memories().values():
        memory.zero_value_projection()
    assert not torch.equal(mixtral.generate(ids, **GREEDY), zeroed.generate(ids, **GREEDY))


@pytest.mark.parametrize("name", LEFT_PADDED)
def test_left_padded_prompts_continue_as_each_alone(model):
    prompts = [random_ids(1, length, seed=length) for length in (3, 9, 6)]
    together = model.generate(**pad_left(prompts), **GREEDY)[:, -12:]
    alone = torch.cat([model.generate(prompt, **GREEDY)[:, -12:] for prompt in prompts])
    assert torch.equal(together, alone)


def beams_need_no_cache(model) -> bool:
    ids, beams = random_ids(2, 9), {**GREEDY, "num_beams": 4, "num_return_sequences": 3}
    return torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))


@on_every_backbone
def test_beam_search_reorders_the_history(name, model):
    # In transformers 5.17, DeepSeek-V4 by itself loses some of its state when beams are reordered.
    assert beams_need_no_cache(model) or not beams_need_no_cache(bare(name))


@on_every_backbone
def test_sampled_sequences_keep_their_own_history(model):
    ids, sampling = random_ids(2, 9), {**NEW, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(0)
    cached = model.generate(ids, **sampling)
    torch.manual_seed(0)
    assert torch.equal(cached, model.generate(ids, **sampling, use_cache=False))
    assert len({tuple(row) for row in cached.tolist()}) > 2


@pytest.mark.parametrize("name", ROLLED_BACK)
def test_prompt_lookup_rolls_back_rejected_tokens(model):
    ids = repetitive_ids()
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), model.generate(ids, **GREEDY))


@pytest.mark.parametrize("name", ROLLED_BACK)
def test_assistant_changes_no_token(model):
    """The assistant is the model with a little noise, so most of its tokens are accepted and some are not."""
    assistant, ids = copy.deepcopy(model), random_ids(1, 9)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=assistant), model.generate(ids, **GREEDY))


def test_backbone_can_assist_and_be_assisted(mixtral):
    ids = random_ids(1, 9)
    bare = randomize(AutoModelForCausalLM.from_config(BACKBONES["mixtral"]()).eval())
    assert torch.equal(mixtral.generate(ids, **GREEDY, assistant_model=bare), mixtral.generate(ids, **GREEDY))
    assert torch.equal(bare.generate(ids, **GREEDY, assistant_model=mixtral), bare.generate(ids, **GREEDY))


@pytest.mark.parametrize("layers", [1, 2])
def test_generate_assisted_by_the_models_first_layers(mixtral, layers):
    """The first memory is in layer 1, so an assistant of one layer has none."""
    ids = random_ids(1, 9)
    assert torch.equal(mixtral.generate(ids, **GREEDY, assistant_early_exit=layers), mixtral.generate(ids, **GREEDY))


@pytest.mark.parametrize("name", STATIC)
def test_static_cache_changes_no_token(model):
    padded = pad_left([random_ids(1, 4), random_ids(1, 9)])
    static = model.generate(**padded, **GREEDY, cache_implementation="static")
    assert torch.equal(static, model.generate(**padded, **GREEDY))


@torch.no_grad()
def test_mask_may_be_as_long_as_a_static_cache():
    """Loops written for fixed shapes pass such masks: they extend beyond the positions of a call."""
    model, ids = built("llama"), random_ids(2, 12)
    cache, positions, parts = StaticCache(config=model.config, max_cache_len=16), torch.arange(16), []
    for start, stop in [(0, 8), *((at, at + 1) for at in range(8, 12))]:
        mask = (positions < stop).long().expand(2, -1)
        parts.append(model(ids[:, start:stop], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits, rtol=0, atol=1e-5)


def test_host_that_drops_its_cache_and_reads_the_text_again():
    """Phi-3 changes its rotation beyond its first context length, and recomputes all keys when it gets there."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 8.0, 16.0, 32.0],
    }
    size = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "pad_token_id": 0}
    config = Phi3Config(
        **size,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=16,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
    )
    torch.manual_seed(0)
    host, ids = randomize(AutoModelForCausalLM.from_config(config)).eval(), random_ids(2, 10)
    greedy = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    expected = host.generate(ids, **greedy)
    fields = {"engram_vocab_size": 97, "engram_n_heads": 2, "engram_head_dim": 8}
    model = EngramForCausalLM.from_backbone(host, layer_ids=LAYER_IDS, **fields)
    assert torch.equal(model.generate(ids, **greedy), expected)


@pytest.mark.parametrize("size", [1, 2, 4, 50])
def test_prompt_read_in_chunks_changes_no_token(mixtral, size):
    padded = pad_left([random_ids(1, 4), random_ids(1, 9)])
    assert torch.equal(
        mixtral.generate(**padded, **GREEDY, prefill_chunk_size=size), mixtral.generate(**padded, **GREEDY)
    )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generate_continues_a_conversation_from_its_cache(mixtral, kind):
    config = mixtral.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)
    first = mixtral.generate(random_ids(1, 6), **GREEDY, past_key_values=cache)
    second = torch.cat([first, random_ids(1, 5, seed=2)], 1)
    continued = mixtral.generate(second, **GREEDY, past_key_values=cache)
    assert torch.equal(continued, greedy_by_hand(mixtral, second))


@pytest.mark.parametrize("use_cache", [True, False])
def test_embeddings_beside_the_ids_are_used_for_the_prompt(mixtral, use_cache):
    ids, arguments = random_ids(2, 9), {**GREEDY, "use_cache": use_cache}
    own = mixtral.get_input_embeddings()(ids)
    assert torch.equal(
        mixtral.generate(input_ids=ids, inputs_embeds=own, **arguments), mixtral.generate(ids, **GREEDY)
    )
    others = mixtral.generate(input_ids=ids, inputs_embeds=own.flip(1), **arguments)
    assert not torch.equal(others, mixtral.generate(ids, **GREEDY))


def test_embeddings_alone_are_refused(mixtral):
    with pytest.raises(ValueError, match="looks memory up by token id, so input_ids is needed"):
        mixtral.generate(inputs_embeds=mixtral.get_input_embeddings()(random_ids(1, 5)), **GREEDY)


@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}, {"num_beams": 3}, {"prefill_chunk_size": 4}])
def test_image_positions_have_no_memory_in_generate(mixtral, arguments):
    ids = random_ids(1, 10)
    image = torch.zeros(1, 10, dtype=torch.bool)
    image[:, 5:8] = True
    expected = ids
    with torch.no_grad():
        for grown in range(12):
            mask = torch.nn.functional.pad(image, (0, grown))
            last = mixtral(expected, image_mask=mask, use_cache=False).logits[:, -1:]
            expected = torch.cat([expected, last.argmax(-1)], 1)
    if "num_beams" in arguments:
        expected = mixtral.generate(ids, image_mask=image, **GREEDY, **arguments, use_cache=False)
    assert torch.equal(mixtral.generate(ids, image_mask=image, **GREEDY, **arguments), expected)
    assert not torch.equal(mixtral.generate(ids, **GREEDY, **arguments), expected)


def test_pipeline_completes_text():
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = engram_config("llama", engram_compressed_vocab_size=tokenizer.compressed_vocab_size)
    model = randomize(EngramForCausalLM(config)).eval()
    model.resize_token_embeddings(len(tokenizer))
    model.set_token_map(tokenizer)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["word1 Word2 word3", "Word9"]
    completed = generator(texts, max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False)
    for text, [output] in zip(texts, completed, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert output["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)

"""Requests that are batched continuously get the tokens that `generate` gives each of them alone."""

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_backbones import VOCAB, bare, build, built, random_ids
from transformers import ContinuousBatchingConfig, GenerationConfig

BATCHED = ["mixtral", "llama", "gpt_oss", "glm4_moe"]
GREEDY = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def prompts_of(count: int, longest: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens; every third one begins with the same `shared` tokens."""
    draw = torch.Generator().manual_seed(seed)
    prefix = random_ids(1, shared, seed=99)[0].tolist() if shared else []
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [
        (prefix if i % 3 == 0 else []) + torch.randint(3, VOCAB, (length,), generator=draw).tolist()
        for i, length in enumerate(lengths)
    ]


def batched(model, prompts: list[list[int]], new: int, changes: dict | None = None, **config) -> list[list[int]]:
    settings = ContinuousBatchingConfig(**{"page_size": 8, "num_blocks": 64, "max_batch_tokens": 32, **config})
    generation = GenerationConfig(**{**GREEDY, "max_new_tokens": new, **(changes or {})})
    outputs = model.generate_batch(prompts, generation_config=generation, continuous_batching_config=settings)
    assert not [output.error for output in outputs.values() if output.error]
    return [output.generated_tokens for output in outputs.values()]


def alone(model, prompts: list[list[int]], new: int) -> list[list[int]]:
    return [
        model.generate(torch.tensor([p]), generation_config=GenerationConfig(**GREEDY, max_new_tokens=new))[0, len(p) :].tolist()
        for p in prompts
    ]


@pytest.mark.parametrize("variant", ["paper", "v4.1"])
@pytest.mark.parametrize("name", BATCHED)
def test_equals_generate(name, variant):
    """Chunked prefill (prompts are longer than a batch), prefill and decoding in one batch, shared prefixes."""
    model, prompts = build(name, variant), prompts_of(9, 24, shared=17)
    assert batched(model, prompts, 6, max_batch_tokens=16) == alone(model, prompts, 6)

"""Provide a small model, its tokenizer, and windows of random words, in which some n-grams are frequent."""

import random

import pytest
from tiny_backbones import build
from tiny_tokenizer import make_tokenizer

from engram_hf.analysis import cut_windows


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """Return a function that builds a model on a backbone and hashes this tokenizer's compressed ids."""

    def make(name: str, variant: str = "paper", **fields):
        model = build(name, variant, engram_compressed_vocab_size=tokenizer.compressed_vocab_size, **fields)
        model.set_token_map(tokenizer)
        return model

    return make


@pytest.fixture(scope="session")
def model(make_model):
    model = make_model("llama")
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="session")
def windows(tokenizer):
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(12)}" for _ in range(length)) for length in (40, 33, 7, 2)]
    return cut_windows([*texts, "the café " * 8], tokenizer, length=16)

"""Fixtures that every test folder shares, and NaN in uninitialized memory, so that it cannot pass for zeros."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deprecations import own_deprecations_fail
from table_models import DTYPES
from tiny_backbones import build

from engram_hf import EngramForCausalLM

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the folder of the golden data: known answers, the miniature V4.1 checkpoint, chat strings."""
    return GOLDEN


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def saved_tables(request, tmp_path_factory):
    """Return a model, a folder with its tables among the weights, and a folder with its tables in files of their own."""
    model = build("qwen3", engram_table_dtype=request.param, engram_head_dim=32)
    for memory in model.model.memories().values():
        memory.table.reset_parameters(1.0)  # Random bytes would not be valid scales.
    plain, mapped = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("mapped")
    model.save_pretrained(plain)
    EngramForCausalLM.from_pretrained(plain, engram_residency="mapped").save_pretrained(mapped)
    return model, plain, mapped


@pytest.fixture
def library_log() -> Iterator[list[str]]:
    """Collect the messages that transformers logs, each once.

    Records reach pytest's `caplog` only if the logger propagates, which depends on `CI` in transformers.
    """
    messages: list[str] = []
    logger, handler = logging.getLogger("transformers"), logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory():
    """Fill `torch.empty` with NaN: a parameter that was neither initialized nor loaded must not look like a small
    number.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _own_deprecations():
    """Fail the test if our code uses something that a library is about to remove."""
    with own_deprecations_fail():
        yield

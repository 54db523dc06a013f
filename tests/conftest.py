"""What every test room shares: the golden data, and uninitialized memory that cannot pass for zeros."""

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
    """Folder of the golden data: known answers, the miniature V4.1 checkpoint, chat strings."""
    return GOLDEN


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def saved_tables(request, tmp_path_factory):
    """A model, the folder it is saved in as ordinary weights, and one that was saved with its tables mapped."""
    model = build("qwen3", engram_table_dtype=request.param, engram_head_dim=32)
    for memory in model.model.memories().values():
        memory.table.reset_parameters(1.0)  # random bytes would be no valid scales
    plain, mapped = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("mapped")
    model.save_pretrained(plain)
    EngramForCausalLM.from_pretrained(plain, engram_residency="mapped").save_pretrained(mapped)
    return model, plain, mapped


@pytest.fixture
def library_log() -> Iterator[list[str]]:
    """What transformers' logger is told, each message once.

    Its records reach pytest's `caplog` only where the logger propagates, which transformers makes depend on `CI`.
    """
    messages: list[str] = []
    logger, handler = logging.getLogger("transformers"), logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory():
    """Fill `torch.empty` with NaN: a parameter nobody initialized or loaded must not look like a small number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _own_deprecations():
    """What our code uses and a library is about to remove fails the test."""
    with own_deprecations_fail():
        yield

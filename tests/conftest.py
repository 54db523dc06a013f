"""What every test room shares: the golden data, and uninitialized memory that cannot pass for zeros."""

from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden data: known answers, the miniature V4.1 checkpoint, chat strings."""
    return GOLDEN


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory():
    """Fill `torch.empty` with NaN: a parameter nobody initialized or loaded must not look like a small number."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)

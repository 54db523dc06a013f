"""Fixtures every test room shares."""

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden data: known answers, the miniature V4.1 checkpoint, chat strings."""
    return GOLDEN

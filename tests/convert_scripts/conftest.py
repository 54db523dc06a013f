"""A copy of the miniature checkpoint to convert, and its finished conversion."""

import shutil
from pathlib import Path

import pytest
from checkpoint_tools import EditableCheckpoint
from deepseek_v41_reference import copy_release

from engram_hf.convert_scripts import convert_deepseek_v41


@pytest.fixture(scope="session")
def tiny(golden, tmp_path_factory) -> Path:
    """The miniature checkpoint alone, as a release folder."""
    return copy_release(golden / "deepseek_v41_tiny", tmp_path_factory.mktemp("upstream") / "tiny")


@pytest.fixture(scope="session")
def converted(tiny, tmp_path_factory) -> Path:
    """Its conversion with default options."""
    target = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert_deepseek_v41.main([str(tiny), str(target)]) == 0
    return target


@pytest.fixture
def checkpoint(tiny, tmp_path) -> EditableCheckpoint:
    folder = tmp_path / "upstream"
    shutil.copytree(tiny, folder)
    return EditableCheckpoint(folder)

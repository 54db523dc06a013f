"""Provide a copy of the miniature checkpoint, and its finished conversion."""

import shutil
from pathlib import Path

import pytest
from checkpoint_tools import EditableCheckpoint
from deepseek_v41_reference import copy_release

from engram_hf.convert_scripts import convert_deepseek_v41


@pytest.fixture(scope="session")
def tiny(golden, tmp_path_factory) -> Path:
    """Copy the release's own files of the miniature to a folder."""
    return copy_release(golden / "deepseek_v41_tiny", tmp_path_factory.mktemp("upstream") / "tiny")


@pytest.fixture(scope="session")
def converted(tiny, tmp_path_factory) -> Path:
    """Convert the miniature with default options."""
    target = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert_deepseek_v41.main([str(tiny), str(target)]) == 0
    return target


@pytest.fixture
def checkpoint(tiny, tmp_path) -> EditableCheckpoint:
    folder = tmp_path / "upstream"
    shutil.copytree(tiny, folder)
    return EditableCheckpoint(folder)

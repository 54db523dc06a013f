"""`engram inspect` on DeepSeek-V4.1: it reports which of text, images and drafts a folder supports."""

import json
import shutil

import pytest
from deepseek_v41_reference import copy_release
from safetensors import safe_open
from safetensors.torch import save_file

from engram_hf.convert_scripts import convert_deepseek_v41

pytestmark = pytest.mark.any_version


@pytest.fixture(scope="module")
def release(golden, tmp_path_factory):
    return copy_release(golden / "deepseek_v41_tiny_vl", tmp_path_factory.mktemp("release") / "tiny")


@pytest.fixture(scope="module")
def converted(release, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert_deepseek_v41.main([str(release), str(folder)]) == 0
    return folder


@pytest.mark.parametrize("kind", ["release", "converted"])
def test_text_images_and_drafts(engram, request, kind):
    folder = request.getfixturevalue(kind)
    assert json.loads(engram("inspect", folder, "--json"))["holds"] == ["text", "images", "drafts"]
    assert "holds           text, images, drafts" in engram("inspect", folder).splitlines()


def without(folder, target, prefix: str):
    """Copy a folder without the tensors of this prefix, which are removed from the index, too."""
    shutil.copytree(folder, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    gone = {name for name in index["weight_map"] if name.startswith(prefix)}
    for file in {index["weight_map"].pop(name) for name in gone}:
        with safe_open(target / file, "pt") as shard:
            left = {name: shard.get_tensor(name) for name in shard.keys() if name not in gone}  # noqa: SIM118
        save_file(left, target / file, metadata={"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize(
    "prefix, holds",
    [
        ("model.vision_tower.", ["text", "drafts"]),
        ("draft.", ["text", "images"]),
        ("model.vision_tower.layers.1.", ["text", "images (1 of 3 layers missing)", "drafts"]),
        ("draft.layers.2.", ["text", "images", "drafts (1 of 3 layers missing)"]),
    ],
)
def test_inspect_leaves_out_missing_parts(engram, converted, tmp_path, prefix, holds):
    folder = without(converted, tmp_path / "copy", prefix)
    assert json.loads(engram("inspect", folder, "--json"))["holds"] == holds


def test_drafts_without_the_layers_that_they_read_are_not_listed(engram, release, tmp_path):
    """A model of the first layers passes its draft layers through for the export, but cannot draft."""
    assert convert_deepseek_v41.main([str(release), str(tmp_path / "first"), "--layers", "5"]) == 0
    assert json.loads(engram("inspect", tmp_path / "first", "--json"))["holds"] == ["text", "images"]


def test_other_backbones_are_text_models(engram, saved):
    assert json.loads(engram("inspect", saved, "--json"))["holds"] == ["text"]

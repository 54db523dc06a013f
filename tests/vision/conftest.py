"""Provide the miniature with images: its golden tensors, its tensors by release name, and its models."""

import json

import pytest
import torch
from deepseek_v41_reference import copy_release, golden_fixtures, text_state_dict
from reference_weights import model_name, tower_state_dict

from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
from engram_hf.convert_scripts import convert_deepseek_v41
from engram_hf.multimodal_deepseek_v41 import DeepseekV41ForConditionalGeneration
from engram_hf.vision_deepseek_v41 import DeepseekV41VisionModel

folder, answers, release = golden_fixtures("deepseek_v41_tiny_vl", "golden_vl.safetensors")


@pytest.fixture(scope="session")
def config_fields(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture
def config(config_fields):
    return DeepseekV41TextConfig(
        **config_fields["text_config"],
        vision_config=config_fields["vision_config"],
        image_token_id=config_fields["image_token_id"],
    )


@pytest.fixture
def tower(release, config):
    model = DeepseekV41VisionModel(config.vision_config).eval()
    model.load_state_dict(tower_state_dict(release), strict=True)
    return model


@pytest.fixture
def model(release, config):
    """Return the miniature without memory: text model, tower, delimiters."""
    model = DeepseekV41ForConditionalGeneration(config).eval()
    vision = {f"model.{model_name(name)}": tensor for name, tensor in release.items() if model_name(name)}
    model.load_state_dict({**text_state_dict(release, config), **vision}, strict=True)
    return model


@pytest.fixture(scope="session")
def upstream(folder, tmp_path_factory):
    """Return the release's folder."""
    return copy_release(folder, tmp_path_factory.mktemp("upstream") / "tiny")


def converted_as(upstream, target, *options: str):
    assert convert_deepseek_v41.main([str(upstream), str(target), *options]) == 0
    return target


@pytest.fixture(scope="session")
def float32(upstream, tmp_path_factory):
    """Convert it with dequantized weights."""
    return converted_as(upstream, tmp_path_factory.mktemp("float32") / "tiny", "--dtype", "float32")


@pytest.fixture(scope="session")
def kept(upstream, tmp_path_factory):
    """Convert it with quantized weights."""
    return converted_as(upstream, tmp_path_factory.mktemp("kept") / "tiny")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

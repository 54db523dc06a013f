"""The miniature's draft layers, and its golden drafts."""

import json

import pytest
import torch
from deepseek_v41_reference import load_release, text_state_dict
from draft_weights import draft_state_dict
from safetensors.torch import load_file

from engram_hf.causal_lm_deepseek_v41 import DeepseekV41TextForCausalLM
from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
from engram_hf.draft_deepseek_v41 import DeepseekV41DraftModel


@pytest.fixture(scope="session")
def folder(golden):
    return golden / "deepseek_v41_tiny_vl"


@pytest.fixture(scope="session")
def answers(folder):
    return load_file(folder / "golden_vl.safetensors")


@pytest.fixture(scope="session")
def release(folder):
    return load_release(folder)


@pytest.fixture
def config(folder):
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return DeepseekV41TextConfig(**fields["text_config"])


@pytest.fixture
def draft(release, config):
    model = DeepseekV41DraftModel(config).eval()
    model.load_state_dict(draft_state_dict(release, layers=3, experts=4), strict=True)
    return model


@pytest.fixture
def text(release, config):
    """The text model without memory."""
    model = DeepseekV41TextForCausalLM(config).eval()
    model.load_state_dict(text_state_dict(release, config), strict=True)
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

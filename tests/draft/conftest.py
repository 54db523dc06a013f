"""Provide the miniature's draft layers, and its golden drafts."""

import pytest
import torch
from deepseek_v41_reference import golden_fixtures, read_text_config, text_state_dict
from draft_weights import draft_state_dict

from engram_hf.causal_lm_deepseek_v41 import DeepseekV41TextForCausalLM
from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig
from engram_hf.draft_deepseek_v41 import DeepseekV41DraftModel

folder, answers, release = golden_fixtures("deepseek_v41_tiny_vl", "golden_vl.safetensors")


@pytest.fixture
def config(folder):
    return DeepseekV41TextConfig(**read_text_config(folder))


@pytest.fixture
def draft(release, config):
    model = DeepseekV41DraftModel(config).eval()
    model.load_state_dict(draft_state_dict(release, layers=3, experts=4), strict=True)
    return model


@pytest.fixture
def text(release, config):
    """Return the text model without memory."""
    model = DeepseekV41TextForCausalLM(config).eval()
    model.load_state_dict(text_state_dict(release, config), strict=True)
    return model


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

"""Provide folders of tiny models of other projects, saved once."""

import other_tiny_models as tiny
import pytest
from transformers import AutoModelForCausalLM

MODELS = {
    "qwen4_exp": tiny.qwen4_exp,
    "qwen4_exp float8": tiny.qwen4_exp_float8,
    "gemma3n": tiny.gemma3n,
    "gemma4": tiny.gemma4,
    "gemma4 int4": tiny.gemma4_quantized,
    "gemma4 int2": lambda: tiny.gemma4_quantized(2),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Return a function that gives a model's folder by its name in `MODELS`; it is made when first requested."""
    made = {}

    def folder(name: str):
        if name not in made:
            made[name] = tiny.save(MODELS[name](), tmp_path_factory.mktemp(name.replace(" ", "-")))
        return made[name]

    return folder


@pytest.fixture(scope="module", params=[name for name in MODELS if "int2" not in name])
def folder(request, folders):
    """Return the folder of each of the models."""
    return folders(request.param)


@pytest.fixture(scope="module")
def stock(folder):
    """Load the model with transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder)

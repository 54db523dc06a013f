"""Bare configs and configs with memory for transformers' tests, and initial weights with which the memory matters."""

import torch
from tiny_backbones import BACKBONES, engram_config
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from engram_hf import EngramConfig, EngramForCausalLM, EngramModel
from engram_hf.table_engram import EngramTable

NAMES = ("mixtral", "llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "deepseek_v4")
# Weights of 0.02, the default, leave so little of a model of 32 dimensions that mistakes would pass as rounding.
INITIALIZER_RANGE = 0.1


def bare_config(name: str):
    """Return the backbone's own config."""
    config = BACKBONES[name]()
    config.initializer_range = INITIALIZER_RANGE
    return config


def memory_config(name: str):
    """Return the config of the same backbone with memory, with a convolution."""
    config = engram_config(name, "paper")
    config.text_config.initializer_range = INITIALIZER_RANGE
    return config


def bare_classes(name: str) -> tuple[type, type]:
    """Return the backbone's classes without and with a head."""
    config_class = type(bare_config(name))
    return AutoModel._model_mapping[config_class], AutoModelForCausalLM._model_mapping[config_class]


def memory_classes(name: str) -> tuple[type, type]:
    """Return the classes of our models, without and with a head: the requirements of a class depend on the backbone."""
    return type(EngramModel(memory_config(name))), type(EngramForCausalLM(memory_config(name)))


def named_classes(classes: tuple[type, type]) -> tuple[type, type]:
    """Return the classes that a module has by name, of which models become instances of `classes`."""
    return (EngramModel, EngramForCausalLM) if issubclass(classes[0], EngramModel) else classes


def wake() -> None:
    """Initialize new memories with random convolutions and large rows, where a convolution starts as zero otherwise."""
    # The common tests compute no loss of classes that are named here: of models without a head.
    MODEL_MAPPING_NAMES.setdefault(EngramConfig.model_type, EngramModel.__name__)
    for owner in {_owner_of_initialization(kind) for kind in (EngramModel, EngramForCausalLM)}:
        owner._init_weights = _waking(owner._init_weights)


def _owner_of_initialization(model_class: type) -> type:
    return next(kind for kind in model_class.__mro__ if "_init_weights" in vars(kind))


def _waking(original):
    @torch.no_grad()
    def initialize(self, module):
        original(self, module)
        if isinstance(module, EngramTable) and module.weight is not None:
            init.normal_(module.weight, std=1.0)
        elif isinstance(module, nn.Conv1d):
            init.normal_(module.weight, std=0.3)

    return initialize

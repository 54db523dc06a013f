"""Memory on a backbone that is quantized: the memory stays in floats, and what is saved says so."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


def inherit_quantization(model: PreTrainedModel, host: PreTrainedModel) -> None:
    """Say of a model on a quantized host what it is: transformers saves, and PEFT adapts, such layers in their own way.

    Loading such a model quantizes every layer that its config does not name as left out, so all that are not are named.

    Args:
        model: an `EngramForCausalLM`; changed in place.
        host: the causal language model that lent it its layers.

    Raises:
        ValueError: the host is quantized in a way that cannot leave anything out.
    """
    if getattr(host, "hf_quantizer", None) is None:
        return
    config = copy.deepcopy(host.hf_quantizer.quantization_config)
    names = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
    skipped = next((name for name in names if hasattr(config, name)), None)
    if skipped is None:
        raise ValueError(
            f"A {type(config).__name__} cannot leave the memory out of what it quantizes; add memory to the backbone "
            "before it is quantized."
        )
    setattr(config, skipped, _unquantized_modules(model.model) + ["lm_head"] * _is_unquantized(model.lm_head))
    for flag in ("is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(host, flag):
            setattr(model, flag, getattr(host, flag))
    model.hf_quantizer = copy.copy(host.hf_quantizer)
    model.hf_quantizer.quantization_config = model.config.quantization_config = config
    del host.config.quantization_config  # of the backbone alone, and no longer true of it


def _unquantized_modules(model: PreTrainedModel) -> list[str]:
    # Patterns, from the root of a model with head or without: not every quantizer takes the end of a name.
    return [f"(model.)?{name}" for name, module in model.named_modules() if _is_unquantized(module)]


def _is_unquantized(module: nn.Module) -> bool:
    """Whether a linear layer, or one of stacked experts, has only matrices of ordinary floats."""
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    is_candidate = isinstance(module, nn.Linear) or any(matrix.dim() > 2 for matrix in matrices)
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return is_candidate and all(type(matrix) is nn.Parameter and matrix.dtype in floats for matrix in matrices)

"""The compared models by name: backbones with memory, their twins without, ablations and controls.

Shape letters: B batch, S positions, T heads of all n-gram orders, W channels of a row.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PreTrainedModel, Qwen2MoeConfig, set_seed
from transformers.models.auto import AutoModelForCausalLM

from engram_hf import EngramConfig, EngramForCausalLM, EngramTokenizer
from engram_hf.analysis.worth import OneRow, Shuffled
from engram_hf.hashing_engram import row_offsets

from .learned_addresses import LearnedAddresses
from .presets import Preset

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from twin_models import count_parameters

_ACTIVE_EXPERTS = 2
# These are the shares of the sparse budget that memory gets, in percent.
SHARES = (0, 10, 20, 30, 40, 60)

# In these fields, the memory of a variant differs from the reference's.
MEMORIES: dict[str, dict[str, Any]] = {
    "memory": {},
    "gate open": {},
    "plain addition": {"engram_conv_kernel_size": 0},
    "one row": {},
    "shuffled rows": {},
    "raw ids": {"engram_compressed_vocab_size": None},
    "learned addresses": {},
    "1 head": {"engram_n_heads": 1},
    "2 heads": {"engram_n_heads": 2},
    "8 heads": {"engram_n_heads": 8},
    # This reads as many channels as the reference's two orders.
    "bigrams only": {"engram_max_ngram_size": 2},
    "every layer": {},
}
TWINS = ("twin", "twin of equal time", "twin of all parameters")


class OpenGate(nn.Module):
    """A gate that is always open."""

    def forward(self, dot: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Return ones `[B, S, G]`, and zero where `valid` `[B, S]` is False."""
        gate = torch.ones_like(dot)
        return gate if valid is None else gate * valid.unsqueeze(-1)


def build(variant: str, preset: Preset, tokenizer: EngramTokenizer, seed: int) -> PreTrainedModel:
    """Build the model of a variant, with weights drawn from the seed."""
    if variant.startswith("share "):
        return _shared(int(variant.removeprefix("share ")), preset, tokenizer, seed)
    if variant in TWINS:
        return _twin(variant == "twin of all parameters", preset, tokenizer, seed)
    fields = MEMORIES[variant]
    layers, rows = list(preset.memory_layers), preset.rows
    if variant == "every layer":
        rows, layers = rows * len(layers) // preset.layers, list(range(preset.layers))
    if variant == "bigrams only":
        fields = {**fields, "engram_n_heads": 2 * preset.memory_heads}
    model = _with_memory(_dense(preset, tokenizer, preset.mlp_width), preset, tokenizer, seed, layers, rows, fields)
    _change(model, variant, seed)
    return model


def _change(model: EngramForCausalLM, variant: str, seed: int) -> None:
    engram = model.model
    if variant in ("gate open", "plain addition"):
        for memory in engram.memories().values():
            memory.gate = OpenGate()
    elif variant == "one row":
        always(model, OneRow(row_offsets(engram.hashing.primes).flatten(1)))
    elif variant == "shuffled rows":
        always(model, Shuffled(seed))
    elif variant == "learned addresses":
        model.addresses = LearnedAddresses(engram)
        always(model, model.addresses)


def always(model: PreTrainedModel, edit: Callable) -> None:
    """Let `edit` (see `engram_hf.analysis.Edit`) change the rows that memory reads in every call without another edit,
    in training too.
    """

    def before(_module, args, kwargs):
        if isinstance(edit, LearnedAddresses):
            edit.read(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        kwargs.setdefault("engram_edit", edit)
        return args, kwargs

    model.register_forward_pre_hook(before, with_kwargs=True)


def _dense(preset: Preset, tokenizer: EngramTokenizer, mlp_width: int) -> LlamaConfig:
    return LlamaConfig(
        **_common(preset, tokenizer), num_hidden_layers=preset.layers, head_dim=32, intermediate_size=mlp_width
    )


def _moe(preset: Preset, tokenizer: EngramTokenizer, experts: int, shared_width: int) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        **_common(preset, tokenizer),
        num_hidden_layers=preset.moe_layers,
        num_experts=experts,
        num_experts_per_tok=_ACTIVE_EXPERTS,
        moe_intermediate_size=preset.expert_width,
        shared_expert_intermediate_size=shared_width,
        norm_topk_prob=True,
        output_router_logits=True,  # The loss in training then balances the experts.
        experts_implementation="grouped_mm",
    )


def _common(preset: Preset, tokenizer: EngramTokenizer) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": preset.hidden_size,
        "num_attention_heads": preset.hidden_size // 32,
        "num_key_value_heads": preset.hidden_size // 32,
        "max_position_embeddings": 4 * preset.block,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _with_memory(
    backbone, preset: Preset, tokenizer: EngramTokenizer, seed: int, layers: list[int], rows: int, fields: dict
) -> EngramForCausalLM:
    set_seed(seed)
    fields = {"engram_n_heads": preset.memory_heads, "engram_head_dim": preset.memory_width, **fields}
    is_raw = "engram_compressed_vocab_size" in fields
    fields.setdefault("engram_pad_token_id", tokenizer.pad_token_id)
    config = EngramConfig.for_backbone(backbone, None if is_raw else tokenizer, layer_ids=layers, rows=rows, **fields)
    model = EngramForCausalLM(config)
    if not is_raw:
        model.set_token_map(tokenizer)
    return model


def _without(config, seed: int) -> PreTrainedModel:
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def _fit(count: Callable[[int], int], target: int, width: int) -> int:
    """Return the width for which `count`, which is linear in it, comes closest to `target`."""
    here, next_to = count(width), count(width + 1)
    return max(1, width + round((target - here) / (next_to - here)))


def _twin(of_all: bool, preset: Preset, tokenizer: EngramTokenizer, seed: int) -> PreTrainedModel:
    """Return the dense backbone, with MLPs widened until it has as many active parameters (or all parameters) as the
    reference.
    """
    target = count_parameters(build("memory", preset, tokenizer, seed))[int(of_all)]
    width = _fit(
        lambda width: count_parameters(_without(_dense(preset, tokenizer, width), seed))[0], target, preset.mlp_width
    )
    return _without(_dense(preset, tokenizer, width), seed)


def _shared(share: int, preset: Preset, tokenizer: EngramTokenizer, seed: int) -> PreTrainedModel:
    """Return routed experts, with a share of their inactive parameters given to memory; active and total parameters
    stay equal.

    The active parameters of the memory are taken from the shared experts' width.
    """
    whole = _without(_moe(preset, tokenizer, preset.experts, preset.shared_width), seed)
    if share == 0:
        return whole
    active, total = count_parameters(whole)
    experts = preset.experts - round((preset.experts - _ACTIVE_EXPERTS) * share / 100)
    layers = list(preset.moe_memory_layers)

    def made(shared_width: int, rows: int) -> EngramForCausalLM:
        backbone = _moe(preset, tokenizer, experts, shared_width)
        return _with_memory(backbone, preset, tokenizer, seed, layers, rows, {})

    width = _fit(lambda width: count_parameters(made(width, 1000))[0], active, preset.shared_width)
    small = made(width, 1000)
    held = sum(memory.table.weight.numel() for memory in small.model.memories().values())
    rows = (total - count_parameters(small)[1] + held) // (preset.memory_width * len(layers))
    return made(width, rows)


def size_of(model: PreTrainedModel, block: int) -> dict[str, int]:
    """Return the parameters that a token uses and all of them, the FLOPs of a token's forward, and the bytes that one
    token reads.
    """
    active, total = count_parameters(model)
    if hasattr(model, "addresses"):  # Addresses from a code read one row for each look-back.
        codes = [code for code in model.addresses.modules() if isinstance(code, nn.Embedding)]
        active -= sum(code.weight.numel() - code.embedding_dim for code in codes)
    ids = torch.zeros((1, block), dtype=torch.int64, device=model.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return {
        "active": active,
        "total": total,
        "flops": counter.get_total_flops() // block,
        "bytes": active * model.dtype.itemsize,
    }

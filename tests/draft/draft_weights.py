"""Our names for the miniature's draft tensors, written independently of the converter."""

import re

import torch
from deepseek_v41_reference import LAYER_NAMES

HEADS = {
    "main_proj.weight": "main_proj.weight",
    "main_norm.weight": "main_norm.weight",
    "norm.weight": "final_norm.weight",
    "markov_head.embed.weight": "markov_embed.weight",
    "markov_head.head.weight": "markov_head.weight",
    "confidence_head.proj.weight": "confidence_head.weight",
}


def draft_state_dict(release: dict[str, torch.Tensor], layers: int, experts: int) -> dict[str, torch.Tensor]:
    """Return the state dict of `DeepseekV41DraftModel` in float32 from the release's tensors by name."""
    state = {}
    for name, tensor in release.items():
        match = re.fullmatch(r"mtp\.(\d+)\.(.+)", name)
        if match and match[2] in HEADS:
            state[HEADS[match[2]]] = tensor
        elif match and match[2] in LAYER_NAMES:
            state[f"layers.{match[1]}.{LAYER_NAMES[match[2]]}"] = tensor
    for layer in range(layers):
        names = [f"mtp.{layer}.ffn.experts.{expert}" for expert in range(experts)]
        state[f"layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([release[f"{name}.w1.weight"], release[f"{name}.w3.weight"]]) for name in names]
        )
        state[f"layers.{layer}.mlp.experts.down_proj"] = torch.stack([release[f"{name}.w2.weight"] for name in names])
    return state

"""Our names for the miniature's vision tensors, written independently of the converter."""

import re

import torch

TOWER_NAMES = {
    "vision.patch_embed.proj.weight": "patch_embedding.weight",
    "vision.patch_embed.proj.bias": "patch_embedding.bias",
    "vision.norm.weight": "post_layernorm.weight",
    "aligner.w1.weight": "aligner.linear_1.weight",
    "aligner.w1.bias": "aligner.linear_1.bias",
    "aligner.w2.weight": "aligner.linear_2.weight",
    "aligner.w2.bias": "aligner.linear_2.bias",
}
BLOCK_NAMES = {
    "norm1.weight": "layer_norm1.weight",
    "norm2.weight": "layer_norm2.weight",
    "attn.wqkv.weight": "self_attn.qkv_proj.weight",
    "attn.wqkv.bias": "self_attn.qkv_proj.bias",
    "attn.wo.weight": "self_attn.out_proj.weight",
    "attn.wo.bias": "self_attn.out_proj.bias",
    "mlp.w1.weight": "mlp.gate_up_proj.weight",
    "mlp.w2.weight": "mlp.down_proj.weight",
}


def tower_name(name: str) -> str | None:
    """Return the name in `DeepseekV41VisionModel` of a release tensor, or None."""
    match = re.fullmatch(r"vision\.blocks\.(\d+)\.(.+)", name)
    return f"layers.{match[1]}.{BLOCK_NAMES[match[2]]}" if match else TOWER_NAMES.get(name)


def tower_state_dict(release: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict of `DeepseekV41VisionModel` in float32 from the release's tensors by name."""
    return {tower_name(name): tensor for name, tensor in release.items() if tower_name(name)}


def model_name(name: str) -> str | None:
    """Return the name in `DeepseekV41Model` of a release tensor of the vision part, or None."""
    if name.startswith("image_"):
        return name
    return f"vision_tower.{tower_name(name)}" if tower_name(name) else None

"""Attention with memory and without: its entropy, and how far it looks back.

Shape letters: B batch, H heads, S positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..safetensors_engram import EngramError
from .evaluation import Edit, Measurement, Off, run
from .texts import Windows


@dataclass
class AttentionFreed(Measurement):
    """Attention by layer, averaged over heads and positions; layers that return no attentions are left out.

    Args:
        entropy, entropy_off: in nats, with memory and without.
        distance, distance_off: mean distance in tokens from a position to those it attends to.
    """

    entropy: dict[int, float]
    entropy_off: dict[int, float]
    distance: dict[int, float]
    distance_off: dict[int, float]


def measure_attention(model: PreTrainedModel, windows: Windows, *, batch: int = 4) -> AttentionFreed:
    """Measure entropy and distance of attention with memory and without.

    Args:
        model: an Engram model in evaluation mode, loaded with `attn_implementation="eager"`.
        windows: see [`cut_windows`].
        batch: windows per forward.

    Raises:
        ValueError: the backbone returns no attentions.
    """
    entropy, distance = _measure(model, windows, batch, None)
    entropy_off, distance_off = _measure(model, windows, batch, Off())
    return AttentionFreed(entropy, entropy_off, distance, distance_off)


@torch.no_grad()
def _measure(
    model: PreTrainedModel, windows: Windows, batch: int, edit: Edit | None
) -> tuple[dict[int, float], dict[int, float]]:
    sums: dict[int, torch.Tensor] = {}
    positions = 0
    title = "Attention" if edit is None else "Attention without memory"
    for inputs, outputs in run(model, windows, batch=batch, edit=edit, title=title, output_attentions=True):
        real = inputs["attention_mask"].bool()
        positions += int(real.sum())
        for layer, weights in _attentions(model, outputs):
            sums[layer] = sums.get(layer, torch.zeros(2, dtype=torch.float64)) + _entropy_and_distance(weights, real)
    means = {layer: (total / positions).tolist() for layer, total in sums.items()}
    return {layer: mean[0] for layer, mean in means.items()}, {layer: mean[1] for layer, mean in means.items()}


def _attentions(model: PreTrainedModel, outputs: Any) -> list[tuple[int, torch.Tensor]]:
    found = [(layer, part) for layer, part in enumerate(outputs.attentions or ()) if part is not None]
    found = [(layer, part) for layer, part in found if part.dim() == 4 and part.shape[-1] >= part.shape[-2]]
    if not found:
        raise EngramError(
            f"{type(model).__name__} returns no attentions; load it with attn_implementation='eager', if its backbone has them."
        )
    return found


def _entropy_and_distance(weights: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return sums over valid positions of entropy and distance, each the mean of the heads: float64 `[2]`."""
    length = real.shape[1]
    weights = weights[..., :length].float()  # Attention sinks may follow the keys.
    entropy = torch.special.entr(weights).sum(-1).mean(1)  # [B, S]
    place = torch.arange(length, device=weights.device)
    distance = (weights * (place[:, None] - place).abs()).sum(-1).mean(1)
    return torch.stack([entropy[real].double().sum(), distance[real].double().sum()]).cpu()

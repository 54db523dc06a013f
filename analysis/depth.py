"""Effective depth: how early the layers of a model predict what its last one does (arXiv 2601.07372, its figures on
depth).

Shape letters: N windows, S positions, B batch, G residual streams, D hidden size, P sampled positions.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..safetensors_engram import EngramError
from ..training.memory import find_engram
from .evaluation import Edit, Measurement, run
from .texts import Windows


@dataclass
class EffectiveDepth(Measurement):
    """LogitLens: the distance of each layer's states, read by the model's own norm and head, from its final
    prediction.

    Args:
        positions: the number of positions.
        divergence: mean KL divergence, in nats, from the final distribution to that of the states after each layer,
            the first layer first; the last entry is 0.
    """

    positions: int
    divergence: list[float]


@dataclass
class LayerSimilarity(Measurement):
    """Linear CKA between the layers of two models on the same text (arXiv 1905.00414, equation 5).

    Args:
        positions: the number of positions.
        similarity: `[layer of the first][layer of the second]`, between 0 and 1.
    """

    positions: int
    similarity: list[list[float]]


@torch.no_grad()
def measure_depth(
    model: PreTrainedModel, windows: Windows, *, batch: int = 8, edit: Edit | None = None
) -> EffectiveDepth:
    """Compare the prediction of every layer with the model's.

    States of several residual streams are averaged before the norm.

    Args:
        model: a causal language model in evaluation mode, with memory or without.
        windows: see [`cut_windows`].
        batch: windows per forward.
        edit: changes the memory, for example [`Off`].

    Raises:
        ValueError: the model has no norm before its head, or does not return hidden states.
    """
    norm, head = _final_norm(model), model.get_output_embeddings()
    total, positions = torch.zeros(0, dtype=torch.float64), 0
    for inputs, outputs in run(
        model, windows, batch=batch, edit=edit, title="Reading layers", output_hidden_states=True
    ):
        real = inputs["attention_mask"].bool()
        *layers, last = _layer_states(outputs)
        final = head(last[real]).float().log_softmax(-1)
        found = [_divergence(final, head(norm(states[real]))) for states in layers] + [0.0]
        total = torch.tensor(found, dtype=torch.float64) + (total if len(total) else 0)
        positions += len(final)
    return EffectiveDepth(positions, (total / positions).tolist())


def compare_layers(
    first: PreTrainedModel, second: PreTrainedModel, windows: Windows, *, batch: int = 8, limit: int = 4096
) -> LayerSimilarity:
    """Compare the layers of two models of one vocabulary and depth.

    Args:
        first, second: causal language models in evaluation mode; the first has memory.
        windows: see [`cut_windows`].
        batch: windows per forward.
        limit: the number of positions whose states of all layers are kept in memory.

    Raises:
        ValueError: their vocabularies or depths differ.
    """
    for name in ("vocab_size", "num_hidden_layers"):
        sizes = [getattr(model.config.get_text_config(), name) for model in (first, second)]
        if sizes[0] != sizes[1]:
            raise EngramError(f"The models differ in {name}, {sizes[0]} and {sizes[1]}; compare models of one size.")
    states = [_collect(model, windows, batch, limit) for model in (first, second)]
    similarity = [[_linear_cka(a, b) for b in states[1]] for a in states[0]]
    return LayerSimilarity(len(states[0][0]), similarity)


@torch.no_grad()
def _collect(model: PreTrainedModel, windows: Windows, batch: int, limit: int) -> list[torch.Tensor]:
    """Return the states after each layer, float64 `[P, D]`."""
    parts: list[list[torch.Tensor]] = []
    count = 0
    for inputs, outputs in run(model, windows, batch=batch, title="Reading layers", output_hidden_states=True):
        real = inputs["attention_mask"].bool()
        parts.append([states[real].double().cpu() for states in _layer_states(outputs)])
        count += int(real.sum())
        if count >= limit:
            break
    return [torch.cat(layer)[:limit] for layer in zip(*parts, strict=True)]


def _layer_states(outputs: Any) -> list[torch.Tensor]:
    """Return the states `[B, S, D]` after each layer; transformers returns the embeddings first, and the last ones
    normalized.
    """
    states = outputs.hidden_states
    if not states:
        raise EngramError(
            "The model returns no hidden states, so its layers cannot be compared; use a backbone that returns them."
        )
    return [part.mean(2) if part.dim() == 4 else part for part in states[1:]]


def _final_norm(model: PreTrainedModel) -> nn.Module:
    try:
        base: nn.Module = find_engram(model)
    except EngramError:
        base = model.base_model  # This is a twin without memory.
    width = model.config.get_text_config().hidden_size
    norms = [part for part in base.children() if getattr(getattr(part, "weight", None), "shape", None) == (width,)]
    if not norms:
        raise EngramError(
            f"{type(base).__name__} has no norm behind its layers, by which their states could be read; use a backbone that has one."
        )
    return norms[-1]


def _divergence(final: torch.Tensor, logits: torch.Tensor) -> float:
    return float(F.kl_div(logits.float().log_softmax(-1), final, reduction="sum", log_target=True))


def _linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).square().sum() / scale) if scale > 0 else 0.0

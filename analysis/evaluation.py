"""Forward passes over windows, with the memory unchanged and changed, and intervals of the differences.

Changes are arguments of each call (`engram_edit`): they do not affect other threads that use the same model.

Shape letters: N windows, S positions, B batch, T heads of all n-gram orders, W channels of a row, V vocabulary.
"""

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..safetensors_engram import EngramError
from ..training.memory import find_engram
from .texts import Windows

if TYPE_CHECKING:
    from ..layer_engram import EngramInputs, EngramMemory

# This is the quantile of a two-sided interval of 95 %.
_NORMAL = 1.96


class Edit(Protocol):
    """Changes what a memory reads, for one call of a model."""

    def __call__(self, memory: "EngramMemory", rows: torch.Tensor, inputs: "EngramInputs") -> torch.Tensor | None:
        """Return rows `[B, S, T * W]` to replace those that were read; None to run this layer without memory."""


class Off:
    """Runs layers without their memory.

    Args:
        indices: positions of the layers among those with memory; None for all.
    """

    def __init__(self, indices: Collection[int] | None = None):
        self.indices = indices

    def __call__(self, memory: "EngramMemory", rows: torch.Tensor, inputs: "EngramInputs") -> torch.Tensor | None:
        """Return None for the chosen layers, and the rows for others; see [`Edit`]."""
        return None if self.indices is None or memory.index in self.indices else rows


@dataclass
class Measurement:
    """Plain data of a measurement."""

    def to_json(self) -> str:
        """Return the result as one JSON document."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)


@dataclass
class Estimate:
    """A mean, and its 95 % confidence interval over samples of windows.

    Args:
        value, low, high: the mean and the ends of its interval; the ends are None for a single window.
    """

    value: float
    low: float | None
    high: float | None


def estimate(values: torch.Tensor, valid: torch.Tensor) -> Estimate:
    """Return the mean of `values` `[N, S]` where `valid`, each window taken as one observation of dependent tokens."""
    counts = valid.sum(1).double()
    sums = values.double().where(valid, 0).sum(1)
    mean = float(sums.sum() / counts.sum())
    windows = int((counts > 0).sum())
    if windows < 2:
        return Estimate(mean, None, None)
    # This is the ratio estimator of cluster sampling.
    spread = float((sums - mean * counts).square().sum().sqrt() / counts.sum())
    reach = _NORMAL * spread * math.sqrt(windows / (windows - 1))
    return Estimate(mean, mean - reach, mean + reach)


@torch.no_grad()
def run(
    model: PreTrainedModel,
    windows: Windows,
    *,
    edit: Edit | None = None,
    batch: int = 8,
    title: str = "Reading",
    **options,
) -> Iterator[tuple[dict[str, torch.Tensor], Any]]:
    """Yield every batch of windows with the model's outputs for it; `options` are passed to the model's forward.

    Raises:
        ValueError: the model is in training mode, or has no memory to change.
    """
    if model.training:
        raise EngramError(
            "The model is in training mode, where dropout would be measured too; call model.eval() first."
        )
    if edit is not None:
        find_engram(model)
        options["engram_edit"] = edit
    device = next(model.parameters()).device
    steps = math.ceil(len(windows) / batch)
    for inputs in logging.tqdm(windows.batches(batch), desc=title, total=steps, delay=1):
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        yield inputs, model(**inputs, use_cache=False, **options)


def token_losses(model: PreTrainedModel, windows: Windows, **options: Any) -> torch.Tensor:
    """Return the loss in nats of every token given those before it: float32 `[N, S - 1]`, on the CPU; 0 at padding."""
    losses = torch.zeros(windows.input_ids.shape[0], windows.input_ids.shape[1] - 1)
    first = 0
    for inputs, outputs in run(model, windows, **options):
        ids = inputs["input_ids"]
        logits = outputs.logits[:, :-1].float().transpose(1, 2)
        losses[first : first + len(ids), : ids.shape[1] - 1] = F.cross_entropy(
            logits, ids[:, 1:], reduction="none"
        ).cpu()
        first += len(ids)
    return losses.where(windows.valid[:, 1:], 0)

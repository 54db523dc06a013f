"""How far the memory's gates open, by layer and stream, by token class, and by the frequency of the n-gram.

Shape letters: N windows, S positions, B batch, G residual streams.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..training.memory import find_engram
from .evaluation import Measurement, run
from .frequency import FREQUENCIES, frequency_classes
from .texts import TOKEN_CLASSES, Windows

_BINS = 20


@dataclass
class Gates(Measurement):
    """Gates between 0 and 1 over a corpus, by decoder layer.

    Args:
        positions: the number of positions.
        by_stream: mean gate of each residual stream.
        by_class: mean gate by token class; classes that do not occur are left out.
        by_frequency: mean gate by how often the position's longest n-gram occurs in the corpus.
        histogram: share of the gates in each twentieth from 0 to 1.
    """

    positions: int
    by_stream: dict[int, list[float]]
    by_class: dict[int, dict[str, float]]
    by_frequency: dict[int, dict[str, float]]
    histogram: dict[int, list[float]]


def measure_gates(model: PreTrainedModel, windows: Windows, *, batch: int = 8) -> Gates:
    """Measure the gates on a corpus.

    Args:
        model: an Engram model in evaluation mode.
        windows: the windows of the corpus; see [`cut_windows`].
        batch: windows per forward.
    """
    engram = find_engram(model)
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in engram.memories()}
    layers = list(engram.config.engram_layer_ids)
    collected: dict[int, torch.Tensor] = {}
    for inputs, _ in run(model, windows, batch=batch, title="Reading gates", engram_gate_values=collected):
        real = inputs["attention_mask"].bool().cpu()
        for index, layer in enumerate(layers):
            found[layer].append(collected[index].float().cpu()[real])
    gates = {layer: torch.cat(parts) for layer, parts in found.items()}  # [positions, G]
    classes = windows.classes[windows.valid]
    frequencies = frequency_classes(engram, windows)[windows.valid]
    return Gates(
        positions=len(classes),
        by_stream={layer: values.mean(0).tolist() for layer, values in gates.items()},
        by_class={layer: _means(values, classes, TOKEN_CLASSES) for layer, values in gates.items()},
        by_frequency={layer: _means(values, frequencies, FREQUENCIES) for layer, values in gates.items()},
        histogram={
            layer: (torch.histc(values, _BINS, 0, 1) / values.numel()).tolist() for layer, values in gates.items()
        },
    )


def _means(values: torch.Tensor, groups: torch.Tensor, names: Any) -> dict[str, float]:
    return {
        name: float(values[groups == index].mean())
        for index, name in enumerate(names)
        if bool((groups == index).any())
    }

"""The value of memory: the loss without it, and with controls that separate memory from added computation.

Shape letters: N windows, S positions, B batch, T heads of all n-gram orders, W channels of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedModel

from ..hashing_engram import row_offsets
from ..training.memory import find_engram, heads_of_orders, read_rows_of
from .evaluation import Edit, Estimate, Measurement, Off, estimate, token_losses
from .frequency import FREQUENCIES, frequency_classes
from .texts import TOKEN_CLASSES, Windows

if TYPE_CHECKING:
    from ..layer_engram import EngramInputs, EngramMemory
    from ..modeling_engram import EngramModel


@dataclass
class Group:
    """The loss of some of a corpus's tokens, in nats per token.

    Args:
        tokens: the number of tokens.
        loss: the loss with memory.
        increase: how much larger the loss is without memory.
    """

    tokens: int
    loss: float
    increase: Estimate


@dataclass
class MemoryWorth(Measurement):
    """The loss after changes to memory, in nats per token, with 95 % intervals over windows.

    Args:
        tokens: the number of predicted tokens.
        loss: the loss with unchanged memory.
        increase: the increase of the loss by change. `memory off` and `layer L off` run layers without memory. `order
            K unknown` gives the heads of this n-gram order their mean row. Three changes are controls: `addresses
            shuffled` reads the rows of other positions, `mean row` gives every head the mean of its rows in this
            corpus, and `one row` the first row of its part of the table. If a control costs nothing, the benefit does
            not come from memory.
        by_class: by the class of the predicted token.
        by_frequency: by how often the longest n-gram before the predicted token occurs in this corpus.
    """

    tokens: int
    loss: float
    increase: dict[str, Estimate]
    by_class: dict[str, Group]
    by_frequency: dict[str, Group]


class MeanRows:
    """Gives heads the mean of the rows that they read.

    Args:
        means: by position of the layer, `[T * W]`.
        heads: positions of the heads among T; None for all.
    """

    def __init__(self, means: dict[int, torch.Tensor], heads: Sequence[int] | None = None):
        self.means, self.heads = means, heads

    def __call__(self, memory: "EngramMemory", rows: torch.Tensor, inputs: "EngramInputs") -> torch.Tensor:
        """Return the rows with the mean row in the chosen heads; see [`Edit`]."""
        mean = self.means[memory.index].to(rows.device, rows.dtype).expand_as(rows)
        if self.heads is None:
            return mean
        chosen = torch.zeros(len(mean[0, 0]) // memory.table.width, dtype=torch.bool, device=rows.device)
        chosen[list(self.heads)] = True
        return torch.where(chosen.repeat_interleave(memory.table.width), mean, rows)


class Shuffled:
    """Reads the rows of another position of the batch at every position with memory.

    Args:
        seed: the seed of the permutations.
    """

    def __init__(self, seed: int = 0):
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, memory: "EngramMemory", rows: torch.Tensor, inputs: "EngramInputs") -> torch.Tensor:
        """Return the rows in another order of positions; see [`Edit`]."""
        everywhere = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
        valid = everywhere if inputs.valid is None else inputs.valid.expand_as(everywhere)
        read, changed = rows[valid], rows.clone()
        changed[valid] = read[torch.randperm(len(read), generator=self.random).to(rows.device)]
        return changed


class OneRow:
    """Reads the first row of each head's part of the table at every position.

    Args:
        offsets: by position of the layer, the first row of each head, int64 `[T]`.
    """

    def __init__(self, offsets: torch.Tensor):
        self.offsets = offsets

    def __call__(self, memory: "EngramMemory", rows: torch.Tensor, inputs: "EngramInputs") -> torch.Tensor:
        """Return the first row of each head at every position; see [`Edit`]."""
        first = self.offsets[memory.index].to(rows.device).view(1, 1, -1)
        return memory.table(first, dtype=rows.dtype).expand_as(rows)


def measure_worth(model: PreTrainedModel, windows: Windows, *, batch: int = 8, seed: int = 0) -> MemoryWorth:
    """Measure the loss with memory, without it, by layer and order, and with the three controls.

    The corpus is read once for each condition: 6, and one for every layer and order.

    Args:
        model: an Engram causal language model in evaluation mode.
        windows: windows of a corpus that the model has not seen; see [`cut_windows`].
        batch: windows per forward.
        seed: the seed of the shuffled addresses.
    """
    engram = find_engram(model)
    valid = windows.valid[:, 1:]
    base = token_losses(model, windows, batch=batch, title="with memory")
    changed = {
        name: token_losses(model, windows, batch=batch, title=name, edit=edit)
        for name, edit in _conditions(engram, _mean_rows(engram, windows, batch), seed).items()
    }
    off = changed["memory off"] - base
    frequencies = frequency_classes(engram, windows)[
        :, :-1
    ]  # These are the frequencies of n-grams that end before the predicted token.
    return MemoryWorth(
        tokens=int(valid.sum()),
        loss=estimate(base, valid).value,
        increase={name: estimate(losses - base, valid) for name, losses in changed.items()},
        by_class=_groups(base, off, valid, windows.classes[:, 1:], TOKEN_CLASSES),
        by_frequency=_groups(base, off, valid, frequencies, FREQUENCIES),
    )


def _conditions(engram: "EngramModel", means: dict[int, torch.Tensor], seed: int) -> dict[str, Edit]:
    layers = engram.config.engram_layer_ids
    orders = range(2, engram.hashing.max_ngram + 1)
    return {
        "memory off": Off(),
        **{f"layer {layer} off": Off([index]) for index, layer in enumerate(layers) if len(layers) > 1},
        **{f"order {order} unknown": MeanRows(means, heads_of_orders(engram, [order])) for order in orders},
        "addresses shuffled": Shuffled(seed),
        "mean row": MeanRows(means),
        "one row": OneRow(row_offsets(cast(torch.Tensor, engram.hashing.primes)).flatten(1)),
    }


@torch.no_grad()
def _mean_rows(engram: "EngramModel", windows: Windows, batch: int) -> dict[int, torch.Tensor]:
    """Return the mean `[T * W]` of the rows that the heads read in a corpus, by the position of the layer."""
    sums: dict[int, torch.Tensor] = {}
    positions = 0
    for inputs in windows.batches(batch):
        read = read_rows_of(engram, inputs)
        positions += int(read.valid.sum())
        for memory in engram.memories().values():
            rows = memory.table(read.row_ids[memory.index][read.valid].to(memory.kv_proj.weight.device))
            sums[memory.index] = sums.get(memory.index, 0) + rows.double().sum(0)
    return {index: total / max(positions, 1) for index, total in sums.items()}


def _groups(
    base: torch.Tensor, off: torch.Tensor, valid: torch.Tensor, groups: torch.Tensor, names: Sequence[str]
) -> dict[str, Group]:
    found = {}
    for index, name in enumerate(names):
        chosen = valid & (groups == index)
        if chosen.any():
            found[name] = Group(int(chosen.sum()), float(base[chosen].mean()), estimate(off, chosen))
    return found

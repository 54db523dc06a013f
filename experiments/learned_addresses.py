"""Addresses that are learned instead of hashed: a low-rank code of the last tokens chooses rows by product keys.

The code resembles that of Lngram (arXiv 2605.24869), the choice that of product-key memories (arXiv 1907.05242): a sum
of low-rank embeddings of the last tokens, one for each distance, is compared with two sets of sub-keys per head; the
best pairs are read, weighted by their softmax, through which gradients reach the code.

Shape letters: B batch, S positions, H heads of an order, M sub-keys of a half, C channels of a code, K best of a half.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from engram_hf.analysis import Windows
from engram_hf.hashing_engram import row_offsets

if TYPE_CHECKING:
    from engram_hf.layer_engram import EngramInputs, EngramMemory
    from engram_hf.modeling_engram import EngramModel

_RANK = 16
_BEST = 2


class LearnedAddresses(nn.Module):
    """Chooses rows of a model's tables by its last tokens; it is an `engram_hf.analysis.Edit`.

    Args:
        engram: the memory whose tables are read, with as many rows and heads as its hash has.
    """

    def __init__(self, engram: "EngramModel"):
        super().__init__()
        hashing = engram.hashing
        vocabulary = hashing.hash_vocab_size + 1  # The last entry stands for no token.
        self.codes = nn.ModuleList()
        self.mixes = nn.ModuleList()
        self.keys = nn.ParameterList()
        for index in range(len(hashing.layer_ids)):
            for order in range(2, hashing.max_ngram + 1):
                self.codes += [nn.Embedding(vocabulary, _RANK) for _ in range(order)]
                self.mixes.append(nn.Linear(_RANK, hashing.heads * 2 * _RANK))
                side = int(hashing.primes[index, order - 2].min() ** 0.5)
                self.keys.append(nn.Parameter(torch.randn(hashing.heads, 2, side, _RANK) * _RANK**-0.5))
        self.heads, self.orders = hashing.heads, hashing.max_ngram - 1
        self.register_buffer("offsets", row_offsets(hashing.primes), persistent=False)
        self._compress = hashing.compress
        self._ids: list[torch.Tensor] = []

    def read(self, input_ids: torch.Tensor) -> None:
        """Store the tokens `[B, S]` of the call that follows."""
        ids = self._compress(input_ids)
        missing = self.codes[0].num_embeddings - 1
        ids = ids.where(ids >= 0, missing)
        length = ids.shape[1]
        self._ids = [F.pad(ids, (distance, 0), value=missing)[:, :length] for distance in range(self.orders + 1)]

    def forward(self, memory: "EngramMemory", rows: torch.Tensor, inputs: "EngramInputs") -> torch.Tensor:
        """Return the rows `[B, S, T * W]` at the learned addresses."""
        parts = [self._of_order(memory, order) for order in range(self.orders)]
        return torch.cat(parts, dim=-1).to(rows.dtype)

    def addresses(self, index: int, order: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows int64 `[B, S, H, K * K]` of a head's part of the table, and their weights."""
        first = index * (self.orders * (self.orders + 3) // 2) + order * (order + 3) // 2
        code = sum(self.codes[first + distance](self._ids[distance]) for distance in range(order + 2))
        number = index * self.orders + order
        halves = self.mixes[number](F.gelu(F.layer_norm(code, (_RANK,)))).unflatten(-1, (self.heads, 2, _RANK))
        keys = self.keys[number]
        score, place = torch.einsum("bshxc,hxmc->bshxm", halves, keys).topk(_BEST, dim=-1)
        rows = place[..., 0, :, None] * keys.shape[2] + place[..., 1, None, :]
        weights = (score[..., 0, :, None] + score[..., 1, None, :]).flatten(-2).softmax(-1)
        return rows.flatten(-2), weights

    @torch.no_grad()
    def rows_read(self, windows: Windows) -> int:
        """Return how many rows of all tables the windows read, with any weight."""
        found: dict[tuple[int, int], list[torch.Tensor]] = {}
        for inputs in windows.batches(32):
            self.read(inputs["input_ids"].to(self.offsets.device))
            for index in range(len(self.offsets)):
                for order in range(self.orders):
                    rows = self.addresses(index, order)[0] + self.offsets[index, order, :, None]
                    found.setdefault((index, order), []).append(rows.unique())
        return sum(len(torch.cat(parts).unique()) for parts in found.values())

    def _of_order(self, memory: "EngramMemory", order: int) -> torch.Tensor:
        rows, weights = self.addresses(memory.index, order)
        rows = rows + self.offsets[memory.index, order, :, None]
        read = memory.table(rows.flatten(2)).unflatten(-1, (*rows.shape[2:], memory.table.width))
        return (read * weights.unsqueeze(-1)).sum(-2).flatten(2)

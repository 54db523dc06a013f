"""The rows of the tables that a corpus reads: how many, how often, and shared by how many n-grams.

Shape letters: N windows, S positions, T heads of all n-gram orders, R rows of a head's part of the table.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..hashing_engram import row_offsets
from ..safetensors_engram import EngramError
from ..training.memory import find_engram, read_rows_of
from .evaluation import Measurement
from .frequency import ngrams
from .texts import Windows

if TYPE_CHECKING:
    from ..layer_engram import EngramMemory
    from ..modeling_engram import EngramModel

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# The number of rows whose norms are measured.
_SAMPLE = 4096


@dataclass
class HeadTraffic:
    """The reads of one head.

    Args:
        layer, order, head: the indices of the head.
        rows: R, the rows of its part of the table.
        read: distinct rows that are read.
        ngrams: distinct n-grams of the corpus.
        shared, shared_expected: the share of n-grams whose row another one reads too; counted, and expected from a
            uniform hash.
        traffic, traffic_expected: the same, with each n-gram weighted by how often it occurs.
    """

    layer: int
    order: int
    head: int
    rows: int
    read: int
    ngrams: int
    shared: float
    shared_expected: float
    traffic: float
    traffic_expected: float


@dataclass
class RowTraffic(Measurement):
    """The rows that a corpus reads.

    Args:
        positions: the number of positions that read memory.
        heads: one entry for each head of each layer.
        never_read: by layer, the share of the table's rows that the corpus never reads.
        zipf: by layer, `[rank, reads]` of rows from the most frequent one on, at ranks that double.
        hit_rate: by layer, `[rows, share of reads]` of a cache of the most frequent rows.
        norms: by layer, quantiles (5, 25, 50, 75, 95 %) of the norms of rows that are read, and of others.
    """

    positions: int
    heads: list[HeadTraffic]
    never_read: dict[int, float]
    zipf: dict[int, list[list[int]]]
    hit_rate: dict[int, list[list[float]]]
    norms: dict[int, dict[str, list[float]]]


@torch.no_grad()
def measure_traffic(model: PreTrainedModel, windows: Windows, *, batch: int = 32, seed: int = 0) -> RowTraffic:
    """Count the rows that a corpus reads, from token ids alone, without running the backbone.

    Args:
        model: an Engram model.
        windows: see [`cut_windows`].
        batch: windows per step.
        seed: the seed for choosing the rows whose norms are measured.

    Raises:
        ValueError: no position of the corpus reads memory.
    """
    engram = find_engram(model)
    reads, positions = _read_all(engram, windows, batch)
    if not positions:
        raise EngramError("No position of the texts reads memory; pass other texts.")
    random = torch.Generator().manual_seed(seed)
    result = RowTraffic(positions, _heads(engram, windows, batch), {}, {}, {}, {})
    for layer, memory in engram.memories().items():
        rows, counts = reads[memory.index].flatten().unique(return_counts=True)
        ranked = counts.sort(descending=True).values
        ranks = torch.tensor(sorted({min(1 << power, len(ranked)) for power in range(len(ranked).bit_length() + 1)}))
        covered = ranked.cumsum(0).double() / ranked.sum()
        result.never_read[layer] = 1 - len(rows) / memory.table.num_rows
        result.zipf[layer] = torch.stack([ranks, ranked[ranks - 1]], 1).tolist()
        result.hit_rate[layer] = torch.stack([ranks.double(), covered[ranks - 1]], 1).tolist()
        result.norms[layer] = _norms(memory, rows, random)
    return result


def _read_all(engram: "EngramModel", windows: Windows, batch: int) -> tuple[torch.Tensor, int]:
    """Return the row ids of every position that reads, int64 `[L, positions, T]`."""
    parts = []
    for inputs in logging.tqdm(list(windows.batches(batch)), desc="Reading rows", delay=1):
        read = read_rows_of(engram, inputs)
        parts.append(read.row_ids[:, read.valid])
    found = torch.cat(parts, dim=1)
    return found, found.shape[1]


def _heads(engram: "EngramModel", windows: Windows, batch: int) -> list[HeadTraffic]:
    hashing, found = engram.hashing, []
    primes = cast(torch.Tensor, hashing.primes).cpu()
    offsets = row_offsets(primes)
    grids = [read_rows_of(engram, inputs).row_ids for inputs in windows.batches(batch)]  # [L, B, S, T]
    length = windows.input_ids.shape[1]
    row_ids = torch.cat([torch.nn.functional.pad(grid, (0, 0, 0, length - grid.shape[2])) for grid in grids], dim=1)
    for order in range(2, min(hashing.max_ngram, length) + 1):
        numbers, counts = ngrams(engram, windows, order)
        whole = numbers >= 0
        for index, layer in enumerate(hashing.layer_ids):
            for head in range(hashing.heads):
                rows = row_ids[index, ..., (order - 2) * hashing.heads + head][whole] - offsets[index, order - 2, head]
                size = int(primes[index, order - 2, head])
                found.append(_head(layer, order, head, size, numbers[whole], counts, rows))
    return found


def _head(
    layer: int, order: int, head: int, size: int, numbers: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor
) -> HeadTraffic:
    """Summarize one head.

    Args:
        numbers, rows: the n-gram `[reads]` and the row `[reads]` of each read.
        counts: how often each n-gram occurs `[distinct]`.
    """
    row_of = torch.zeros(len(counts), dtype=torch.int64).scatter_(0, numbers, rows)
    _, place, users = torch.unique(row_of, return_inverse=True, return_counts=True)
    is_shared = users[place] > 1
    distinct, total = len(counts), max(int(counts.sum()), 1)
    expected = 1 - (1 - 1 / size) ** (distinct - 1) if distinct else 0.0
    return HeadTraffic(
        layer=layer,
        order=order,
        head=head,
        rows=size,
        read=len(users),
        ngrams=distinct,
        shared=float(is_shared.double().mean()) if distinct else 0.0,
        shared_expected=expected,
        traffic=int(counts[is_shared].sum()) / total,
        traffic_expected=expected,  # Which n-grams share a row does not depend on how often they occur.
    )


def _norms(memory: "EngramMemory", rows: torch.Tensor, random: torch.Generator) -> dict[str, list[float]]:
    device = memory.kv_proj.weight.device
    read = rows[torch.randperm(len(rows), generator=random)[:_SAMPLE]]
    others = torch.randint(memory.table.num_rows, (_SAMPLE,), generator=random)
    others = others[~torch.isin(others, rows)]
    found = {}
    for name, chosen in (("read", read), ("never read", others)):
        if len(chosen):
            chosen_rows = memory.table(chosen.unsqueeze(1).to(device), dtype=torch.float32)
            norms = chosen_rows.float().norm(dim=-1).cpu()  # Rows of a float table keep their dtype.
            found[name] = norms.quantile(torch.tensor(_QUANTILES)).tolist()
    return found

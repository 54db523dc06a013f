"""N-grams of a corpus in compressed ids: which one ends at a position, and how often it occurs.

Shape letters: N windows, S positions, K order of an n-gram.
"""

from typing import TYPE_CHECKING, cast

import torch

from .texts import Windows

if TYPE_CHECKING:
    from ..modeling_engram import EngramModel

# These classes count how often an n-gram occurs in a corpus; the first class has positions with too few tokens before
# them.
FREQUENCIES = ("no n-gram", "once", "2-3", "4-15", "16-63", "64 and more")
_FIRST_OF_CLASS = (1, 2, 4, 16, 64)


def compressed_ids(engram: "EngramModel", windows: Windows) -> torch.Tensor:
    """Return the ids that are hashed, int64 `[N, S]` on the CPU; negative for tokens without one."""
    device = cast(torch.Tensor, engram.hashing.multipliers).device
    return engram.hashing.compress(windows.input_ids.to(device)).cpu()


def ngrams(engram: "EngramModel", windows: Windows, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the n-gram of compressed ids that ends at every position.

    Returns:
        A number for each distinct n-gram, int64 `[N, S]`, -1 where a window does not have that many tokens yet; and
        how often each number occurs, int64 `[distinct]`.
    """
    ids = compressed_ids(engram, windows)
    spans = ids.unfold(1, order, 1)  # [N, S - K + 1, K]
    valid = windows.valid.unfold(1, order, 1).all(-1) & (spans >= 0).all(-1)
    numbers = torch.full(ids.shape, -1)
    if not valid.any():
        return numbers, torch.empty(0, dtype=torch.int64)
    _, found, counts = torch.unique(spans[valid], dim=0, return_inverse=True, return_counts=True)
    numbers[:, order - 1 :][valid] = found
    return numbers, counts


def frequency_classes(engram: "EngramModel", windows: Windows) -> torch.Tensor:
    """Return the index in `FREQUENCIES` of each position's n-gram of the largest order, int64 `[N, S]`."""
    order = engram.hashing.max_ngram
    if windows.input_ids.shape[1] < order:
        return torch.zeros_like(windows.input_ids)
    numbers, counts = ngrams(engram, windows, order)
    occurs = counts[numbers.clamp_min(0)] if len(counts) else torch.zeros_like(numbers)
    classes = torch.bucketize(occurs, torch.tensor(_FIRST_OF_CLASS), right=True)
    return classes.where(numbers >= 0, 0)

"""Fetching hashed rows ahead: the row ids follow from token ids, so they are known before the layer that reads them runs.

The model's own code computes them, once more, on a copy of its module that notes the ids instead of reading rows.
"""

import copy
from typing import Any, cast

import torch
from torch import nn

from ..prefetch_engram import Prefetcher
from ..row_sources_engram import PinnedRows
from .row_embedding import TableReader


class _NoteIds(nn.Module):
    """Stands in for a table and keeps the ids that are looked up."""

    def __init__(self):
        super().__init__()
        self.weight = torch.empty(0, device="meta")
        self.ids: torch.Tensor | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = ids
        return ids.unsqueeze(-1)


class _ReadOnlyCache:
    """A cache as it is now; what is written to it is dropped."""

    def __init__(self, cache: Any):
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_conv_state(self, *args, **kwargs) -> None:
        """Nothing: the forward itself will do it."""


class Lookahead:
    """A hook before the first decoder layer that begins to fetch the rows which later layers read.

    Args:
        parents: modules that hash token ids and hold a table each.
        leaf: the name of the table in them.
        when: see [`~prefetch_engram.Prefetcher`].
    """

    def __init__(self, parents: list[nn.Module], leaf: str, when: str = "auto"):
        self.parents, self.leaf = parents, leaf
        self.prefetcher = Prefetcher(self._readers(), when)

    def _readers(self) -> list[TableReader]:
        return [getattr(parent, self.leaf).readers["weight"] for parent in self.parents]

    @torch.compiler.disable
    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """As hooks of torch are called; does nothing where it does not pay, or the layer is called without token ids."""
        ids, cache = kwargs.get("ple_input_ids"), kwargs.get("cache", kwargs.get("past_key_values"))
        if ids is None or not self.prefetcher.pays(ids.is_cuda) or self._are_read_by_device(ids.device):
            return
        readers = self.prefetcher.tables = self._readers()  # casts of the model make new ones
        rows = self.prefetcher.start(torch.stack([self.row_ids(parent, ids, cache) for parent in self.parents]))
        for reader, some in zip(readers, rows or (), strict=False):
            reader.offer(some)

    def _are_read_by_device(self, device: torch.device) -> bool:
        sources = [reader.source for reader in self.prefetcher.tables]
        return all(isinstance(source, PinnedRows) and source.is_visible_from(device) for source in sources)

    @torch.no_grad()
    def row_ids(self, parent: nn.Module, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """What `parent` will look up for token `ids` `[B, S]` after what is in `cache`, which stays as it is."""
        notes = _NoteIds()
        twin = copy.deepcopy(parent, {id(getattr(parent, self.leaf)): notes})
        twin.forward(ids, None if cache is None else _ReadOnlyCache(cache))
        return cast(torch.Tensor, notes.ids)

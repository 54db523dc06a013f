"""Prefetching of hashed rows: the row ids depend on token ids, so they are known before the layer that reads them.

The model's own code computes them a second time, on a copy of its module that records the ids instead of reading rows.
"""

import copy
from typing import Any, cast

import torch
from torch import nn

from ..prefetch_engram import Prefetcher
from ..row_sources_engram import PinnedRows
from .row_embedding import TableReader


class _NoteIds(nn.Module):
    """Replaces a table and records the ids that are looked up."""

    def __init__(self):
        super().__init__()
        self.weight = torch.empty(0, device="meta")
        self.ids: torch.Tensor | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.ids = ids
        return ids.unsqueeze(-1)


class _ReadOnlyCache:
    """A read-only view of a cache; writes to it are dropped."""

    def __init__(self, cache: Any):
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update_conv_state(self, *args, **kwargs) -> None:
        """Do nothing: the forward itself will update the state."""


class Lookahead:
    """A hook before the first decoder layer that begins to fetch the rows which later layers read.

    Args:
        parents: modules that hash token ids and have a table each.
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
        """Run as a torch hook; do nothing if fetching saves no time, or the layer is called without token ids."""
        ids, cache = kwargs.get("ple_input_ids"), kwargs.get("cache", kwargs.get("past_key_values"))
        if ids is None or not self.prefetcher.pays(ids.is_cuda) or self._are_read_by_device(ids.device):
            return
        readers = self.prefetcher.tables = self._readers()  # Casting the model makes new modules.
        rows = self.prefetcher.start(torch.stack([self.row_ids(parent, ids, cache) for parent in self.parents]))
        for reader, some in zip(readers, rows or (), strict=False):
            reader.offer(some)

    def _are_read_by_device(self, device: torch.device) -> bool:
        sources = [reader.source for reader in self.prefetcher.tables]
        return all(isinstance(source, PinnedRows) and source.is_visible_from(device) for source in sources)

    @torch.no_grad()
    def row_ids(self, parent: nn.Module, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        """Return the ids that `parent` will look up for token `ids` `[B, S]` after the content of `cache`, which is
        not changed.
        """
        notes = _NoteIds()
        twin = copy.deepcopy(parent, {id(getattr(parent, self.leaf)): notes})
        twin.forward(ids, None if cache is None else _ReadOnlyCache(cache))
        return cast(torch.Tensor, notes.ids)

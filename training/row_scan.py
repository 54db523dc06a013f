"""Find the rows of memory that a corpus reads, and their counts: `scan_rows`."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.utils import logging

from ..safetensors_engram import EngramError
from .memory import (
    check_layers,
    check_orders,
    find_engram,
    heads_of_orders,
    read_rows_of,
    require_tokenizer_of,
    rows_of_orders,
)

if TYPE_CHECKING:
    from ..modeling_engram import EngramModel

_BATCH = 32
# This many reads are collected before they are merged into the sorted counts.
_PENDING = 1 << 20


class _Counter:
    """Counts of row numbers. Its memory grows with the rows that were seen, not with the table."""

    def __init__(self) -> None:
        self.rows = torch.empty(0, dtype=torch.int64)
        self.counts = torch.empty(0, dtype=torch.int64)
        self._pending: list[torch.Tensor] = []
        self._size = 0

    def add(self, rows: torch.Tensor) -> None:
        """Count every number of `rows` `[n]` once more."""
        self._pending.append(rows)
        self._size += rows.numel()
        # The buffer grows with the counts, so that each read is sorted only a few times, however long the corpus is.
        if self._size > max(_PENDING, self.rows.numel()):
            self.settle()

    def settle(self) -> None:
        """Sort the pending reads into `rows` `[n]`, ascending, and `counts` `[n]`."""
        waiting, more = torch.unique(torch.cat([*self._pending, self.rows[:0]]), return_counts=True)
        self.rows, place = torch.unique(torch.cat([self.rows, waiting]), return_inverse=True)
        counts = torch.cat([self.counts, more])
        self.counts = torch.zeros_like(self.rows).index_add_(0, place, counts)
        self._pending, self._size = [], 0


@dataclass(eq=False)
class RowScan(Mapping):
    """Rows that a corpus reads, by decoder layer: a mapping that [`EngramRowsConfig`] takes as `rows`.

    Layers without a remaining row are not in it. `print` shows a table.

    Args:
        rows: the rows by layer, int64 `[n]`, ascending.
        counts: the number of reads of each row, by layer, int64 `[n]`.
        positions: the number of scanned positions.
        summary: for every layer and order, the numbers of rows that were read, that were kept, and that the table has.
    """

    rows: dict[int, torch.Tensor]
    counts: dict[int, torch.Tensor]
    positions: int
    summary: list[dict[str, int]]

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.rows[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = ["layer  order         read         kept     of table"]
        for part in self.summary:
            lines.append(
                f"{part['layer']:>5}  {part['order']:>5} {part['read']:>12,} {part['kept']:>12,} "
                f"{part['kept'] / max(part['table'], 1):>11.3%}"
            )
        return "\n".join([f"{self.positions:,} positions", *lines])

    __repr__ = __str__


def scan_rows(
    data: Iterable[Any],
    tokenizer: Any,
    model: nn.Module,
    *,
    min_count: int = 1,
    orders: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
    exclude: Mapping[int, torch.Tensor] | None = None,
) -> RowScan:
    """Find the rows that a corpus reads: a pure function of its token ids, so no layer of the backbone runs.

    Args:
        data: a `DataLoader` or any other iterable of batches, a `datasets.Dataset` with a column `input_ids` or `text`, or
            a list of strings.
        tokenizer: the tokenizer of texts; it may be None for token ids.
        model: an Engram model, plain or wrapped.
        min_count: leave out rows that are read less often.
        orders: n-gram orders; None for all.
        layers: decoder layers; None for all that have memory.
        exclude: rows to leave out, by layer, such as another scan.

    Returns:
        The rows by layer.

    Raises:
        ValueError: there are no tokens, no row is left, or layers or orders are not those of the model.
    """
    engram = find_engram(model)
    require_tokenizer_of(engram, tokenizer)
    chosen_layers, chosen_orders = check_layers(engram, layers), check_orders(engram, orders)
    if type(min_count) is not int or min_count < 1:
        raise EngramError(f"min_count is {min_count!r}; it must be a whole number, at least 1.")
    positions, counters = _count(engram, Batches(data, tokenizer), chosen_layers, chosen_orders)
    if positions == 0:
        raise EngramError("There are no tokens in the data to be scanned; pass texts or token ids.")
    scan = RowScan({}, {}, positions, [])
    for layer in chosen_layers:
        counter = counters[layer]
        kept = counter.counts >= min_count
        if exclude is not None and layer in exclude:
            kept &= ~torch.isin(counter.rows, torch.as_tensor(exclude[layer]).cpu())
        if kept.any():
            scan.rows[layer], scan.counts[layer] = counter.rows[kept], counter.counts[kept]
        scan.summary += _summary(engram, layer, chosen_orders, counter.rows, counter.rows[kept])
    if not scan.rows:
        raise EngramError(
            f"None of the rows that were read is left with min_count={min_count}"
            f"{'' if exclude is None else ' and without the excluded ones'}; lower min_count or exclude less."
        )
    return scan


def _count(
    engram: "EngramModel", batches: Iterable[Mapping[str, torch.Tensor]], layers: list[int], orders: list[int]
) -> tuple[int, dict[int, _Counter]]:
    heads = heads_of_orders(engram, orders)
    counters = {layer: _Counter() for layer in layers}
    positions = 0
    for batch in batches:
        read = read_rows_of(engram, batch)
        positions += int(read.valid.sum())
        for layer, counter in counters.items():
            row_ids = read.row_ids[engram.hashing.layer_ids.index(layer)][read.valid]
            counter.add(row_ids[:, heads].flatten())
    for counter in counters.values():
        counter.settle()
    return positions, counters


def _summary(
    engram: "EngramModel", layer: int, orders: list[int], read: torch.Tensor, kept: torch.Tensor
) -> list[dict[str, int]]:
    parts = []
    for order in orders:
        first, stop = rows_of_orders(engram, layer)[order]
        read_here, kept_here = (int(((rows >= first) & (rows < stop)).sum()) for rows in (read, kept))
        parts.append({"layer": layer, "order": order, "read": read_here, "kept": kept_here, "table": stop - first})
    return parts


class Batches:
    """Batches of token ids from any container of texts or tokens; see `data` of [`scan_rows`].

    A progress bar counts the items of the container, which are not always batches.

    Raises:
        ValueError: `data` is one string, or has neither texts nor tokens.
    """

    def __init__(self, data: Iterable[Any], tokenizer: Any):
        if isinstance(data, (str, bytes, Mapping)):
            raise EngramError(
                f"The data is one {type(data).__name__}; pass a list of strings, a dataset or a DataLoader."
            )
        self.data, self.tokenizer = data, tokenizer

    def __iter__(self) -> Iterator[Mapping[str, torch.Tensor]]:
        texts: list[Any] = []
        for item in logging.tqdm(self.data, desc="Scanning rows", delay=1):
            if _is_batch(item):
                yield item
                continue
            ids = self._token_ids(item)
            if ids.numel():
                texts.append(ids)
            if len(texts) == _BATCH:
                yield _as_batch(texts)
                texts = []
        if texts:
            yield _as_batch(texts)

    def _token_ids(self, item: Any) -> torch.Tensor:
        if isinstance(item, Mapping) and item.get("input_ids") is not None:
            return torch.as_tensor(item["input_ids"], dtype=torch.int64)
        text = item.get("text") if isinstance(item, Mapping) else item
        if not isinstance(text, str):
            raise EngramError(
                f"An item of the data is {_describe(item)}; it must be a string, or have a column 'input_ids' or 'text'."
            )
        if self.tokenizer is None:
            raise EngramError("The data holds texts, but no tokenizer was passed; pass the model's own.")
        return torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.int64)


def _is_batch(item: Any) -> bool:
    ids = item.get("input_ids") if isinstance(item, Mapping) else None
    return isinstance(ids, torch.Tensor) and ids.dim() == 2


def _describe(item: Any) -> str:
    return f"a mapping with {sorted(item)}" if isinstance(item, Mapping) else f"a {type(item).__name__}"


def _as_batch(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` `[B, S]`, padded on the right."""
    pad = torch.nn.utils.rnn.pad_sequence
    masks = [torch.ones_like(ids) for ids in rows]
    return {"input_ids": pad(rows, batch_first=True), "attention_mask": pad(masks, batch_first=True)}

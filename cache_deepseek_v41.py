"""The cache of DeepSeek-V4.1's attention: the layout of a batch's tokens, and the cache layer that stores their
latents.

Letters used for shapes: B rows, S tokens of this call, T cached tokens, W the sliding window, r tokens pooled into one
compressed position, G compressed positions, D channels of a latent.

Rows of a batch may have different lengths (padding on either side) and hence different phases inside a compression
group. Both classes therefore work on *compacted* rows: real tokens first, in order, then padding. A token's position
is its place among its sequence's own tokens, whatever the padding.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .configuration_deepseek_v41 import LAYER_TYPE
from .safetensors_engram import EngramError


def gather_rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `x[b, index[b, ...]]` for `x` `[B, N, ...]` and `index` `[B, ...]`."""
    rows = torch.arange(x.shape[0], device=x.device)
    return x[rows.view(-1, *[1] * (index.dim() - 1)), index]


class RowLayout(NamedTuple):
    """The layout of the tokens of one call; it is the same for every layer.

    `positions` and `real` are in compacted order; `order` and `inverse` are None when no token is padding. `packed`
    says that some row has several sequences, so that its compressed positions need an offset.
    """

    positions: torch.Tensor  # [B, S] place in the token's own sequence
    real: torch.Tensor  # [B, S] bool
    order: torch.Tensor | None  # [B, S] compacted place -> place in the input
    inverse: torch.Tensor | None  # [B, S] place in the input -> compacted place
    packed: bool

    def compact(self, x: torch.Tensor) -> torch.Tensor:
        """Reorder `[B, S, ...]` from input order to compacted order."""
        return x if self.order is None else gather_rows(x, self.order)

    def restore(self, x: torch.Tensor) -> torch.Tensor:
        """Reorder `[B, S, ...]` from compacted order to input order."""
        return x if self.inverse is None else gather_rows(x, self.inverse)

    @property
    def lengths(self) -> torch.Tensor:
        """The number of real tokens of each row, `[B]`."""
        return self.real.sum(-1)


def row_layout(
    x: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past: "DeepseekV41CacheLayer | None",
) -> RowLayout:
    """Return the layout of a call's tokens.

    Args:
        x: `[B, S, ...]`, only for its shape and device.
        attention_mask: `[B, T + S]` (or `[B, S]`), nonzero where a token is real. None: all are.
        position_ids: `[B, S]` or `[1, S]`; counts up by one inside a sequence. A 0 starts a new sequence in the same
            row. None: each row is one sequence.
        past: the first layer's cache, if there is one.

    Raises:
        ValueError: for a mask of another shape, and for position ids that skip.
    """
    batch, length = x.shape[:2]
    mask = _chunk_mask(attention_mask, batch, length, past)
    start = x.new_zeros(batch, dtype=torch.long) if past is None or past.next_position is None else past.next_position
    places = torch.arange(length, device=x.device).expand(batch, -1)
    order = inverse = None
    real = torch.ones_like(places, dtype=torch.bool)
    # Compiled code takes the general path; eager code tests the mask, because a full one is the usual case.
    if mask is not None and (torch.compiler.is_compiling() or not bool(mask.all())):
        order = mask.logical_not().to(torch.int8).argsort(dim=-1, stable=True)
        inverse = order.argsort(dim=-1)
        real = places < mask.sum(-1, keepdim=True)
    counted = start[:, None] + places
    packed = past is not None and past.packed
    if position_ids is None:
        return RowLayout(counted, real, order, inverse, packed)
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        raise EngramError(f"`position_ids` must be [{batch}, {length}], got shape {list(position_ids.shape)}.")
    positions = position_ids.to(torch.long).expand(batch, -1)
    positions = positions if order is None else gather_rows(positions, order)
    return _read_positions(positions, counted, RowLayout(counted, real, order, inverse, packed))


def _chunk_mask(attention_mask, batch: int, length: int, past) -> torch.Tensor | None:
    if attention_mask is None:
        return None
    seen = 0 if past is None else past.get_seq_length()
    shape = tuple(getattr(attention_mask, "shape", ()))
    if shape not in ((batch, seen + length), (batch, length)):
        raise EngramError(
            f"`attention_mask` must be [batch, tokens] with {length} new tokens or {seen + length} with the cached "
            f"ones, for a batch of {batch}; got shape {list(shape)}. A mask of another kind is not supported, because "
            "this attention never forms a [tokens, tokens] matrix."
        )
    return attention_mask[:, -length:].bool()


def _read_positions(positions: torch.Tensor, counted: torch.Tensor, layout: RowLayout) -> RowLayout:
    """Check `positions` `[B, S]` (compacted) and return whether sequences are packed."""
    previous = torch.cat([counted[:, :1] - 1, positions[:, :-1]], dim=1)
    restarts = (positions == 0) & (counted > 0) & layout.real
    if torch.compiler.is_compiling():
        return layout._replace(positions=torch.where(layout.real, positions, 0), packed=True)
    if bool(((positions != previous + 1) & (positions != 0) & layout.real).any()):
        raise EngramError(
            "`position_ids` must count up by one inside a sequence, from 0 or from the last cached position: tokens are "
            "pooled by position, so a gap has no meaning. Leave them out to count the unmasked tokens; for `generate`, pad a "
            'batch on the left (`padding_side="left"`), or it counts on behind the padding.'
        )
    packed = layout.packed or bool(restarts.any())
    return layout._replace(positions=torch.where(layout.real, positions, 0), packed=packed)


class ClosedGroups(NamedTuple):
    """Compression groups that complete in one call; n is the maximum number in a row."""

    last: torch.Tensor  # [B, n] compacted place of the group's last token
    slots: torch.Tensor  # [B, n] where its compressed latent goes; G for none
    first: torch.Tensor | None  # [B, S] slot of the first compressed position of each token's sequence; None: 0


class DeepseekV41CacheLayer(DynamicLayer):
    """The cache of one decoder layer.

    Every layer stores its window latents. A KV source also stores its compressed latents, their index keys, and the
    last projected tokens, from which their group is pooled when it completes. The number of stored tokens follows from
    the first update, since transformers constructs cache layers of a new type without arguments.

    Rolling back works as for sliding windows elsewhere in transformers: `activate_past_recording()` first, then
    `crop(-n)`. It requires the last `n` tokens of a row to be real ones, so it is refused after right padding.
    """

    _layer_type = LAYER_TYPE
    is_sliding = True

    # These have a batch dimension; `keys` and `values` are one tensor, so `values` follows `keys`.
    _states = ("keys", "tail", "latents", "index_keys", "next_position", "closed")

    def __init__(self, **kwargs):
        super().__init__()
        self.record_past = False
        self._forget()

    def _forget(self):
        self.keys = self.values = None  # [B, 1, T, D] window latents, the newest last
        self.tail: torch.Tensor | None = None  # [B, T, 2D] values and gates to be pooled, the newest last
        self.latents: torch.Tensor | None = None  # [B, G, D]
        self.index_keys: torch.Tensor | None = None  # [B, G, index_head_dim]
        self.next_position: torch.Tensor | None = None  # [B] position of the row's next token
        self.closed: torch.Tensor | None = None  # [B] compressed positions of the row so far
        self.is_initialized = False
        self.cumulative_length = 0
        self.ratio = 0  # tokens pooled into one, if this layer is a KV source
        self.capacity = 0  # G
        self.history = 0  # tokens a forward looks back on
        self.packed = False
        self.ends_in_padding = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        """Open an empty window for latents like `key_states` `[B, 1, S, D]`."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self.values = key_states[:, :, :0]
        self.next_position = torch.zeros(key_states.shape[0], dtype=torch.long, device=self.device)
        self.closed = torch.zeros_like(self.next_position)
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor | None = None,
        *args,
        layout: RowLayout,
        history: int,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append window latents `[B, 1, S, D]` (keys and values are the same) and return the window with them.

        `history` is how many earlier tokens later calls will need. Returns `[B, 1, T + S, D]` twice.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        self.history = history
        full = torch.cat([self.keys, key_states], dim=2)
        self.keys = self.values = self._newest(full.squeeze(1), layout).unsqueeze(1)
        self.cumulative_length += key_states.shape[2]
        last = layout.positions.gather(1, (layout.lengths[:, None] - 1).clamp(min=0)).squeeze(1)
        self.next_position = torch.where(layout.lengths > 0, last + 1, self.next_position)
        self.packed = layout.packed
        if layout.inverse is not None and not torch.compiler.is_compiling():
            self.ends_in_padding |= not bool(layout.restore(layout.real)[:, -1].all())
        return full, full

    def update_tail(self, projected: torch.Tensor, layout: RowLayout) -> torch.Tensor:
        """Append tokens to pool, `[B, S, C]`, after `update`; return `[B, T + S, C]`."""
        full = projected if self.tail is None else torch.cat([self.tail, projected], dim=1)
        self.tail = self._newest(full, layout)
        return full

    def close_groups(self, layout: RowLayout, ratio: int) -> "ClosedGroups":
        """Find the groups of `ratio` tokens that complete in this call, and count them; after `update`."""
        length = layout.positions.shape[1]
        closes = (layout.positions % ratio == ratio - 1) & layout.real
        count = closes.cumsum(-1)  # [B, S]
        most = -(-length // ratio)  # closings among S tokens, whatever the phase
        places = torch.arange(length, device=closes.device).expand_as(closes)
        # Closing tokens are in order; all others go to an additional column, which is cut off.
        last = places.new_zeros(len(closes), most + 1).scatter_(1, torch.where(closes, count - 1, most), places)
        rank = torch.arange(most, device=closes.device)
        self.capacity = self.cumulative_length // ratio
        slots = torch.where(rank < count[:, -1:], self.closed[:, None] + rank, self.capacity)
        first = self.closed[:, None] + count - (layout.positions + 1) // ratio if layout.packed else None
        self.ratio, self.closed = ratio, self.closed + count[:, -1]
        return ClosedGroups(last[:, :most], slots, first)

    def append(self, name: str, entries: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Write `entries` `[B, n, C]` at `slots` `[B, n]` of `latents` or `index_keys`; return `[B, G, C]`.

        Rows have different numbers of entries, so G is the maximum for a row of this length. A slot of G drops its
        entry.
        """
        stored = getattr(self, name)
        # A rollback leaves entries behind that are cut off here or overwritten.
        stored = entries[:, :0] if stored is None else stored[:, : self.capacity]
        grown = pad(stored, (0, 0, 0, self.capacity + 1 - stored.shape[1]))
        updated = grown.scatter(1, slots[..., None].expand_as(entries), entries)[:, : self.capacity]
        setattr(self, name, updated)
        return updated

    def _newest(self, full: torch.Tensor, layout: RowLayout) -> torch.Tensor:
        """Return the tokens of `full` `[B, T + S, C]` to store: each row's newest real ones, at the right edge."""
        total, added = full.shape[1], layout.positions.shape[1]
        keep = total if self.record_past else min(total, self.history)
        if layout.order is None:
            return full[:, total - keep :]
        ends = total - added + layout.lengths
        index = ends[:, None] - keep + torch.arange(keep, device=full.device)
        return gather_rows(full, index.clamp(min=0))

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, padding included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """Return -1: the number of compressed positions has no limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the mask's length and offset: it covers every token so far, padding included."""
        return self.cumulative_length + query_length, 0

    def activate_past_recording(self):
        """Store every token from now on, so that `crop` can roll back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of every row, and drop tokens that no later call needs.

        Raises:
            ValueError: when the tokens before them are no longer there, or when the rows do not end in real tokens of
                one sequence.
        """
        if tokens_to_remove > 0:
            raise EngramError(
                f"`crop` takes the number of tokens to remove as a negative number, got {tokens_to_remove}."
            )
        if not self.is_initialized:
            return
        removed = min(-tokens_to_remove, self.cumulative_length)
        left = self.keys.shape[2] - removed
        self._check_crop(removed, left)
        position = (self.next_position - removed).clamp(min=0)  # a left-padded row may be shorter than `removed`
        if self.ratio:
            self.closed = self.closed - self.next_position // self.ratio + position // self.ratio
        self.next_position = position
        self.cumulative_length -= removed
        start = left - min(left, self.history)
        self.keys = self.values = self.keys[:, :, start:left]
        self.tail = None if self.tail is None else self.tail[:, start:left]

    def _check_crop(self, removed: int, left: int):
        if left < min(self.history, self.cumulative_length - removed):
            raise EngramError(
                f"The cache cannot take {removed} tokens back: the window of {self.history} tokens before them is gone. Call "
                "`activate_past_recording()` on the cache before the tokens are processed."
            )
        if removed and (self.packed or self.ends_in_padding):
            raise EngramError(
                "The cache cannot take tokens back from rows that were padded on the right or hold several sequences: it is "
                "not known which tokens would go. Pad on the left, and give one sequence a row."
            )

    def _map_states(self, function):
        for name in self._states:
            if (state := getattr(self, name)) is not None:
                setattr(self, name, function(state))
        self.values = self.keys

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace row `b` by row `beam_idx[b]`."""
        self._map_states(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, one after the other."""
        self._map_states(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices`."""
        self._map_states(lambda state: state[torch.as_tensor(indices, device=state.device)])

    def reset(self) -> None:
        """Forget everything."""
        self._forget()


class DeepseekV41StaticCacheLayer(StaticLayer):
    """Refuses `cache_implementation="static"`, which transformers would otherwise answer with a `KeyError`."""

    _layer_type = LAYER_TYPE

    def __init__(self, *args, **kwargs):
        raise EngramError(
            "DeepSeek-V4.1 has no static cache, because how many compressed positions a row has depends on its own "
            'length. Leave `cache_implementation` out, or set it to "dynamic".'
        )


def layer_cache(cache: Cache | None, layer_idx: int) -> DeepseekV41CacheLayer | None:
    """Return the layer's part of `cache`.

    Raises:
        ValueError: `cache` was made for another model.
    """
    if cache is None:
        return None
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    # The name is compared, not the class: a model loaded as remote code has its own class of the same name.
    if getattr(layer, "_layer_type", None) != LAYER_TYPE:
        raise EngramError(
            f"The cache holds {type(layer).__name__} at layer {layer_idx}, not a DeepSeek-V4.1 cache layer. "
            "Create it with `DynamicCache(config=model.config)`, or leave it out."
        )
    return layer

"""The memory's history in a transformers `Cache`: the past ids and convolution inputs that the next tokens need.

Shape letters: B batch, S positions of a call, R positions that a look-back reaches, G residual streams, D hidden size.
"""

import copyreg
import functools
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, StaticLayer

from .configuration_engram import EngramConfig
from .hashing_engram import NO_ID, Compaction
from .safetensors_engram import EngramError

# This number of convolution inputs is stored beyond the next token's needs: they can be cropped at any
# time, as a DynamicCache of most backbones allows, without storing `[B, S, G, D]` for a whole text.
SPARE_POSITIONS = 64
# This marks a padding position in the log of past positions; look-backs skip it.
_PADDING = -2


class EngramHistory:
    """The past positions that the memory needs before a call, without their padding.

    A call stages its additions, and commits them after the backbone's forward: a call that raises changes nothing.
    With a convolution, more than the last 64 positions can be cropped only if they came after
    `activate_past_recording()`, as with sliding-window layers.

    Args:
        owner: what must agree for a cache to be reused; see [`attach_history`].
        reach: R, the longest look-back of hash and convolution.

    Attributes:
        ids, documents: int64 `[B, R]`, ids and document numbers of the last text; None before the first call.
        counts: int64 `[B, 1]`, tokens of text so far.
        conv_inputs: by Engram layer and pass, `[B, R + spare, G, D]`.
        is_numbered: whether the caller numbers the documents, instead of positions.
    """

    is_croppable = True

    def __init__(self, owner: tuple, reach: int):
        self.owner, self.reach = owner, reach
        self.record_past = False
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.ids: torch.Tensor | None = None
        self.documents: torch.Tensor | None = None
        self.counts: torch.Tensor | None = None
        self.is_numbered = False
        self.conv_inputs: dict[tuple[int, int], torch.Tensor] = {}
        self._log: tuple[torch.Tensor, torch.Tensor] | None = None  # ids and documents [B, past], for `crop`
        self.discard()

    def discard(self) -> None:
        """Discard staged additions."""
        self._staged: tuple | None = None
        self._staged_conv: dict[tuple[int, int], torch.Tensor] = {}

    def require_batch(self, batch: int) -> None:
        """Refuse a call with another number of sequences than the cache has.

        Raises:
            ValueError: the message has both numbers.
        """
        if self.ids is not None and self.ids.shape[0] != batch:
            raise EngramError(
                f"The cache holds {self.ids.shape[0]} sequences, but this call brings {batch}; pass the cache of the same "
                "batch, or None to start afresh."
            )

    def before(self, current: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and documents `[B, R]` before `current` `[B, S]`."""
        if self.ids is None:
            return nothing_before(current, self.reach)
        return self.ids.to(current.device), self.documents.to(current.device)

    def text_before(self, current: torch.Tensor) -> torch.Tensor | int:
        """Return the number of text tokens before `current` `[B, S]`, int64 `[B, 1]`."""
        return 0 if self.counts is None else self.counts.to(current.device)

    def stage(self, ids: torch.Tensor, documents: torch.Tensor, compaction: Compaction, is_numbered: bool) -> None:
        """Stage ids and documents `[B, S]` of a call."""
        self._staged = (ids, documents, compaction, self.is_numbered or is_numbered)

    def stage_conv(self, layer: int, inputs: torch.Tensor, compaction: Compaction) -> torch.Tensor:
        """Stage convolution inputs `[B, S, G, D]` of an Engram layer; return the `[B, R, G, D]` before them.

        A layer that runs more than once in a forward has separate inputs for every pass.
        """
        key = (layer, sum(layer == staged for staged, _ in self._staged_conv))
        kept = self.conv_inputs.get(key)
        if kept is None:
            kept = inputs.new_zeros((inputs.shape[0], self.reach, *inputs.shape[2:]))
        kept = kept.to(inputs.device)
        joined = compaction.join(kept, inputs)
        self._staged_conv[key] = joined if self.record_past else self._trimmed(joined)
        return _last(kept, self.reach)

    def _trimmed(self, states: torch.Tensor) -> torch.Tensor:
        kept = _last(states, self.reach + SPARE_POSITIONS)
        # A slice of a prompt would keep the whole prompt in memory.
        return kept.clone() if kept.shape[1] < states.shape[1] // 2 else kept

    def commit(self) -> None:
        """Commit staged additions."""
        ids, documents, compaction, self.is_numbered = self._staged
        before = self.before(ids)
        self.ids, self.documents = (
            _last(compaction.join(past, new), self.reach) for past, new in zip(before, (ids, documents), strict=True)
        )
        self.counts = self.text_before(ids) + _count(ids, compaction)
        self._append_to_log(ids, documents, compaction)
        self.conv_inputs.update(self._staged_conv)
        self.discard()

    def _append_to_log(self, ids: torch.Tensor, documents: torch.Tensor, compaction: Compaction) -> None:
        if compaction.is_text is not None:
            ids = ids.where(compaction.is_text, _PADDING)
        past = self._log or (ids[:, :0], documents[:, :0])
        self._log = tuple(
            torch.cat([old.to(new.device), new], dim=1) for old, new in zip(past, (ids, documents), strict=True)
        )

    def activate_past_recording(self) -> None:
        """Store all convolution inputs until the next `crop`, however many it removes."""
        self.record_past = True

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Refuse an impossible crop before anything is changed.

        Raises:
            ValueError: for a positive number, or if the convolution inputs before the positions are no longer stored.
        """
        if tokens_to_remove > 0:
            raise EngramError(f"crop takes minus the number of positions to forget, got {tokens_to_remove}.")
        if -tokens_to_remove >= self.get_seq_length() or not self.conv_inputs:
            return
        remove = int(self._text_in_last(-tokens_to_remove).max())
        spare = min(kept.shape[1] for kept in self.conv_inputs.values()) - self.reach
        if remove > spare:
            raise EngramError(
                f"This cache can forget at most {spare} positions, not {remove}: what the memory's convolution saw before them "
                "was dropped. Call activate_past_recording() on the cache before the positions that are to be forgotten."
            )

    def _text_in_last(self, count: int) -> torch.Tensor:
        """Return the number of text tokens among the last `count` positions, int64 `[B, 1]`."""
        ids = self._log[0]
        return (ids[:, ids.shape[1] - count :] != _PADDING).sum(1, keepdim=True)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions; see `require_croppable`."""
        if self._log is None:
            return
        if -tokens_to_remove >= self.get_seq_length():
            self.reset()
            return
        removed = self._text_in_last(-tokens_to_remove)
        self.conv_inputs = {
            layer: self._trimmed(_without_last(kept, removed, self.reach)) for layer, kept in self.conv_inputs.items()
        }
        remaining = self.get_seq_length() + tokens_to_remove
        ids, documents = self._log = tuple(log[:, :remaining] for log in self._log)
        compaction = Compaction(ids != _PADDING)
        self.ids, self.documents = (
            _last(compaction.join(start, log), self.reach)
            for start, log in zip(nothing_before(ids, self.reach), (ids, documents), strict=True)
        )
        self.counts = _count(ids, compaction)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Replace the rows of the batch by `beam_idx`."""
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of the batch."""
        self._map(lambda state: state[indices.to(state.device), ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def _map(self, change) -> None:
        if self.ids is None:
            return
        self.ids, self.documents, self.counts = change(self.ids), change(self.documents), change(self.counts)
        self._log = None if self._log is None else tuple(map(change, self._log))
        self.conv_inputs = {layer: change(state) for layer, state in self.conv_inputs.items()}

    def get_seq_length(self) -> int:
        """Return the number of positions so far, padding included."""
        return 0 if self._log is None else self._log[0].shape[1]


class StaticEngramHistory(EngramHistory):
    """The memory's history beside static cache layers: tensors of fixed shape, written in place.

    It stores no more than the next token needs, so that a compiled forward is not recompiled as the text grows; like
    the static layers it cannot be cropped.
    """

    is_croppable = False

    def reset(self) -> None:
        """Forget everything in place: compiled code refers to its tensors."""
        if getattr(self, "ids", None) is None:
            super().reset()
            return
        self.ids.fill_(NO_ID)
        self.is_numbered = False
        for state in (self.documents, self.counts, *self.conv_inputs.values()):
            state.zero_()
        self.discard()

    def _trimmed(self, states: torch.Tensor) -> torch.Tensor:
        return _last(states, self.reach)

    def commit(self) -> None:
        """Commit staged additions in place."""
        ids, documents, compaction, self.is_numbered = self._staged
        if self.ids is None:
            self.ids, self.documents = map(_fixed, nothing_before(ids, self.reach))
            self.counts = _fixed(ids.new_zeros((ids.shape[0], 1)))
        for state, new in ((self.ids, ids), (self.documents, documents)):
            state.copy_(_last(compaction.join(state, new), self.reach))
        self.counts.add_(_count(ids, compaction))
        for layer, state in self._staged_conv.items():
            if layer not in self.conv_inputs:
                self.conv_inputs[layer] = _fixed(torch.zeros_like(state))
            self.conv_inputs[layer].copy_(state.detach())
        self.discard()

    def require_croppable(self, tokens_to_remove: int) -> None:
        """Refuse every crop.

        Raises:
            ValueError: always, unless there is nothing to remove.
        """
        if tokens_to_remove:
            raise EngramError("A static cache cannot forget positions; use a DynamicCache for that.")

    def crop(self, tokens_to_remove: int) -> None:
        """Do nothing; see `require_croppable`."""


def nothing_before(current: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (`NO_ID`) and documents (0), int64 `[B, reach]` each, before the beginning of `current` `[B, S]`."""
    start = current.new_full((current.shape[0], reach), NO_ID, dtype=torch.int64)
    return start, torch.zeros_like(start)


def _count(ids: torch.Tensor, compaction: Compaction) -> torch.Tensor:
    """Return the number of text tokens in `ids` `[B, S]`, int64 `[B, 1]`."""
    if compaction.is_text is None:
        return torch.full_like(ids[:, :1], ids.shape[1])
    return compaction.is_text.sum(1, keepdim=True)


def _fixed(state: torch.Tensor) -> torch.Tensor:
    """Return `state`, marked as static: CUDA graphs only write to tensors with a constant address."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(state)
    return state


def _last(states: torch.Tensor, count: int) -> torch.Tensor:
    """Return the last `count` positions of `[B, S, ...]` (all, if there are fewer)."""
    return states[:, max(states.shape[1] - count, 0) :]


def _without_last(states: torch.Tensor, removed: torch.Tensor, least: int) -> torch.Tensor:
    """Return `states` `[B, S, ...]` without the last `removed` `[B, 1]` of each row, with all rows of equal length."""
    removed = removed.to(states.device)
    length = max(states.shape[1] - int(removed.max()), least)
    places = torch.arange(states.shape[1] - length, states.shape[1], device=states.device) - removed
    rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
    return states[rows, places]


class RuntimeSubclass:
    """A mix-in before a class that is known at run time only, such as the decoder layer of any backbone.

    An object that a backbone made becomes an instance of the extended class and remains one of its own: `isinstance`,
    output recording, plans and settings of its class keep working. Pickle rebuilds the class from its two bases.
    """

    _extends: tuple[type, type] | None = None

    @classmethod
    def extending(cls, base: type) -> type:
        """Return the subclass of `cls` and `base`, in this order; it is created once."""
        return _extended(cls, base)

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        """Return the attributes that the extended class defines itself."""
        return {"__module__": base.__module__, "__name__": f"Engram{base.__name__}"}

    def __reduce_ex__(self, protocol):
        if self._extends is None:
            return super().__reduce_ex__(protocol)
        return _rebuild, self._extends, self.__getstate__()


@functools.cache
def _extended(front: type[RuntimeSubclass], base: type) -> type:
    members = {**front._members(base), "_extends": (front, base)}
    return type(members.pop("__name__"), (front, base), members)


def _rebuild(front: type[RuntimeSubclass], base: type) -> object:
    return copyreg.__newobj__(front.extending(base))


class CacheWithHistory(RuntimeSubclass):
    """A transformers cache that also crops, reorders and resets the memory's history.

    The history is not a layer of the cache: iterating over its layers gives those of the backbone.
    """

    engram_history: EngramHistory

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can restore the whole cache."""
        return super().is_croppable and self.engram_history.is_croppable

    def crop(self, tokens_to_remove: int) -> None:
        """Crop as in transformers; raise before anything is changed if the memory's history cannot follow."""
        self.engram_history.require_croppable(tokens_to_remove)
        super().crop(tokens_to_remove)
        self.engram_history.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Do as in transformers, for the history, too."""
        super().activate_past_recording()
        self.engram_history.activate_past_recording()

    def reset(self) -> None:
        """Do as in transformers, for the history, too."""
        super().reset()
        self.engram_history.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Do as in transformers, for the history, too."""
        super().reorder_cache(beam_idx)
        self.engram_history.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Do as in transformers, for the history, too."""
        super().batch_repeat_interleave(repeats)
        self.engram_history.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Do as in transformers, for the history, too."""
        super().batch_select_indices(indices)
        self.engram_history.batch_select_indices(indices)


_DynamicCacheWithHistory = CacheWithHistory.extending(DynamicCache)


def begin_cache(config: EngramConfig) -> Cache:
    """Return an empty `DynamicCache` with a history; unlike `attach_history`, a compiler can trace this."""
    cache = _DynamicCacheWithHistory(config=config.text_config)
    cache.engram_history = EngramHistory(_owner(config), lookback_reach(config))
    return cache


def attach_history(cache: Cache, config: EngramConfig) -> EngramHistory:
    """Return the memory's history in `cache`, creating it if there is none; `cache` becomes a [`CacheWithHistory`].

    Raises:
        ValueError: the cache was filled without this memory, or by another model.
    """
    if not isinstance(getattr(cache, "layers", None), list):
        raise EngramError(f"The cache is a {type(cache).__name__}; Engram needs a transformers Cache with layers.")
    if not isinstance(cache, CacheWithHistory):
        history_class = StaticEngramHistory if _is_static(cache) else EngramHistory
        _require_same_past(cache, 0)
        cache.__class__ = CacheWithHistory.extending(type(cache))
        cache.engram_history = history_class(_owner(config), lookback_reach(config))
    history = cache.engram_history
    if history.owner != _owner(config):
        raise EngramError(
            "The cache belongs to another Engram model (its layers, n-grams or vocabulary differ); pass this model's own "
            "cache, or None to start afresh."
        )
    history.discard()
    if not isinstance(history, StaticEngramHistory):  # a static one would synchronize with the device at every step
        _require_same_past(cache, history.get_seq_length())
    return history


def _is_static(cache: Cache) -> bool:
    return any(isinstance(layer, StaticLayer) for layer in cache.layers)


def lookback_reach(config: EngramConfig) -> int:
    """Return R: the number of earlier tokens that hash and convolution need."""
    conv_reach = max(config.engram_conv_kernel_size - 1, 0) * config.engram_max_ngram_size
    return max(config.engram_max_ngram_size - 1, conv_reach)


def _owner(config: EngramConfig) -> tuple:
    """Return what two models must share for one to continue from the other's state."""
    return (
        tuple(config.engram_layer_ids),
        config.engram_max_ngram_size,
        config.engram_compressed_vocab_size,
        config.engram_conv_kernel_size,
        config.engram_streams * config.hidden_size,
        config.num_hidden_layers,
    )


def _require_same_past(cache: Cache, seen: int) -> None:
    held = int(cache.get_seq_length())
    if seen != held:
        raise EngramError(
            f"The cache holds {held} positions, of which this model's memory saw {seen} (another model, such as the bare "
            "backbone, or a tuned prefix filled it, or cropped it); pass this model's own cache, or None to start afresh."
        )

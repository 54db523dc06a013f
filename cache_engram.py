"""The memory's state in a transformers `Cache`: what the next tokens need of the past ones.

Shape letters: B batch, S positions of a call, G residual streams, D hidden size.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from .configuration_engram import EngramConfig
from .hashing_engram import DEAD

# Convolution inputs kept beyond what the next token needs: so many positions can be cropped away at any time, as a
# DynamicCache of most backbones allows, without holding `[B, S, G, D]` for a whole text.
SPARE_POSITIONS = 64


class EngramHistoryLayer(CacheLayerMixin):
    """The memory's state, kept as one more layer of the backbone's `Cache`.

    It holds the compressed ids and sequence ids of all past positions (16 bytes each) and, for the convolution, the
    last inputs of every Engram layer. Being a cache layer, it is reordered, expanded, cropped and reset with the rest.
    With a convolution, more than the last 64 positions can be cropped away only if they came after
    `activate_past_recording()`, as with sliding-window layers.

    Args:
        owner: what must agree for a cache to be reused; see [`attach_history`].
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, owner: tuple):
        super().__init__()
        self.owner = owner
        self.record_past = False
        self.ids: torch.Tensor | None = None  # [B, past]
        self.sequence_ids: torch.Tensor | None = None  # [B, past]
        self.is_numbered = False  # whether sequence ids were the caller's, not told from positions
        self.conv_inputs: dict[int, torch.Tensor] = {}  # layer -> [B, kept, G, D]
        self.conv_reach = 0

    def remember_ids(self, ids: torch.Tensor, sequence_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append compressed ids and sequence ids `[B, S]`; returns those before them, `[B, past]` each."""
        if self.ids is None:
            self.ids, self.sequence_ids = ids[:, :0], sequence_ids[:, :0]
        self._require_batch(ids)
        past = self.ids.to(ids.device), self.sequence_ids.to(ids.device)
        self.ids = torch.cat([past[0], ids], dim=1)
        self.sequence_ids = torch.cat([past[1], sequence_ids], dim=1)
        return past

    def last_sequence_ids(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Sequence ids `[B, 1]` of the last position before `ids` `[B, S]`; None before the first."""
        if self.ids is None:
            return None
        self._require_batch(ids)
        return self.sequence_ids[:, -1:].to(ids.device)

    def _require_batch(self, ids: torch.Tensor) -> None:
        if self.ids.shape[0] != ids.shape[0]:
            raise ValueError(
                f"past_key_values holds {self.ids.shape[0]} sequences, but this call brings {ids.shape[0]}; pass the "
                "cache of the same batch, or None to start afresh."
            )

    def remember_conv_inputs(self, layer: int, inputs: torch.Tensor, reach: int) -> torch.Tensor:
        """Append convolution inputs `[B, S, G, D]` of an Engram layer; returns the `reach` before them."""
        self.conv_reach = reach
        if layer not in self.conv_inputs:
            self.conv_inputs[layer] = inputs.new_zeros((inputs.shape[0], reach, *inputs.shape[2:]))
        kept = self.conv_inputs[layer].to(inputs.device)
        joined = torch.cat([kept, inputs], dim=1)
        self.conv_inputs[layer] = joined if self.record_past else self._trimmed(joined)
        return _last(kept, reach)

    def _trimmed(self, states: torch.Tensor) -> torch.Tensor:
        kept = _last(states, self.conv_reach + SPARE_POSITIONS)
        # A slice of a prompt would hold all of it in memory.
        return kept.clone() if kept.shape[1] < states.shape[1] // 2 else kept

    def activate_past_recording(self) -> None:
        """Keep all convolution inputs until the next `crop`, however far that goes back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` positions.

        Raises:
            ValueError: for a positive number, or if the convolution inputs before them are no longer held.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of positions to forget, got {tokens_to_remove}.")
        if self.ids is None:
            return
        remaining = self.ids.shape[1] + tokens_to_remove
        if remaining <= 0:
            self.reset()
            return
        self.conv_inputs = {
            layer: self._crop_conv(kept, -tokens_to_remove) for layer, kept in self.conv_inputs.items()
        }
        self.ids, self.sequence_ids = self.ids[:, :remaining], self.sequence_ids[:, :remaining]

    def _crop_conv(self, kept: torch.Tensor, remove: int) -> torch.Tensor:
        spare = kept.shape[1] - self.conv_reach
        if remove > spare:
            raise ValueError(
                f"This cache can forget at most {spare} positions, not {remove}: what the memory's convolution saw "
                "before them was dropped. Call activate_past_recording() on the cache before the positions that are to "
                "be forgotten."
            )
        return self._trimmed(kept[:, : kept.shape[1] - remove])

    def reset(self) -> None:
        """Forget everything."""
        self.ids = self.sequence_ids = None
        self.is_numbered = False
        self.conv_inputs = {}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Take the rows `beam_idx` of the batch."""
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
        self.ids, self.sequence_ids = change(self.ids), change(self.sequence_ids)
        self.conv_inputs = {layer: change(state) for layer, state in self.conv_inputs.items()}

    def get_seq_length(self) -> int:
        """Positions seen so far."""
        return 0 if self.ids is None else self.ids.shape[1]

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As for a full-attention layer: all positions, from the first."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """There are no keys and values to initialize."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Not a layer for keys and values.

        Raises:
            TypeError: always; the backbone has more layers than its config says.
        """
        raise TypeError("The memory's history layer of this cache was asked to store keys and values.")


class StaticEngramHistoryLayer(EngramHistoryLayer):
    """The memory's state beside static cache layers: tensors of fixed shape, written in place.

    It keeps no more than the next token needs, so that a compiled forward is not recompiled as the text grows; like
    the static layers it cannot be cropped.

    Args:
        owner: as in [`EngramHistoryLayer`].
        reach: longest look-back of hash and convolution.
    """

    is_croppable = False
    is_compileable = True

    def __init__(self, owner: tuple, reach: int):
        super().__init__(owner)
        self.reach = reach
        self.length: torch.Tensor | None = None  # positions seen, a scalar

    def remember_ids(self, ids: torch.Tensor, sequence_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As in [`EngramHistoryLayer`], but what is returned is `[B, reach]`, `DEAD` before the beginning."""
        if self.ids is None:
            self.ids = _fixed(ids.new_full((ids.shape[0], self.reach), DEAD))
            self.sequence_ids = _fixed(torch.full_like(self.ids, DEAD))
            self.length = _fixed(ids.new_zeros(()))
        self._require_batch(ids)
        past = self.ids.clone(), self.sequence_ids.clone()
        _roll_in(self.ids, ids)
        _roll_in(self.sequence_ids, sequence_ids)
        self.length.add_(ids.shape[1])
        return past

    def remember_conv_inputs(self, layer: int, inputs: torch.Tensor, reach: int) -> torch.Tensor:
        """As in [`EngramHistoryLayer`]."""
        if layer not in self.conv_inputs:
            self.conv_inputs[layer] = _fixed(inputs.new_zeros((inputs.shape[0], reach, *inputs.shape[2:])))
        past = self.conv_inputs[layer].clone()
        _roll_in(self.conv_inputs[layer], inputs)
        return past

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible.

        Raises:
            ValueError: always, unless there is nothing to remove.
        """
        if tokens_to_remove:
            raise ValueError("A static cache cannot forget positions; use a DynamicCache for that.")

    def reset(self) -> None:
        """Forget everything, in place: compiled code keeps its tensors."""
        if self.ids is None:
            return
        self.ids.fill_(DEAD)
        self.sequence_ids.fill_(DEAD)
        self.is_numbered = False
        self.length.zero_()
        for state in self.conv_inputs.values():
            state.zero_()

    def get_seq_length(self) -> "int | torch.Tensor":
        """Positions seen so far."""
        return 0 if self.length is None else self.length


def _fixed(state: torch.Tensor) -> torch.Tensor:
    """`state`, marked as staying where it is: CUDA graphs only write to tensors that do."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(state)
    return state


def _last(states: torch.Tensor, count: int) -> torch.Tensor:
    """The last `count` positions of `[B, S, ...]` (all, if there are fewer)."""
    return states[:, max(states.shape[1] - count, 0) :]


def _roll_in(state: torch.Tensor, new: torch.Tensor) -> None:
    """Push `new` `[B, S, ...]` into `state` `[B, reach, ...]`, in place."""
    reach = state.shape[1]
    state.copy_(_last(torch.cat([state, _last(new.detach(), reach).to(state.dtype)], dim=1), reach))


def attach_history(cache: Cache, config: EngramConfig) -> EngramHistoryLayer:
    """The history layer of `cache`, appended behind the backbone's layers if it is not there yet.

    Raises:
        ValueError: the cache was filled without this memory, or by another model.
    """
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}; Engram needs a transformers Cache with layers."
        )
    found = [layer for layer in layers if isinstance(layer, EngramHistoryLayer)]
    history = found[0] if found else _append_history(cache, config)
    if history.owner != _owner(config) or history is not layers[config.text_config.num_hidden_layers]:
        raise ValueError(
            "past_key_values belongs to another Engram model (its layers, n-grams or vocabulary differ); pass this "
            "model's own cache, or None to start afresh."
        )
    _require_same_past(cache, history)
    if getattr(cache, "offloading", False):
        _fetch_first(cache)
    return history


def _fetch_first(cache: Cache) -> None:
    """Bring the first layer that is away to its device.

    A cache that offloads its layers does so at the end of the last one, after which it finds the history instead.
    """
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.device != layer.device:
            layer.prefetch()
            return


def _append_history(cache: Cache, config: EngramConfig) -> EngramHistoryLayer:
    num_layers = config.text_config.num_hidden_layers
    if cache.layer_class_to_replicate is not None:
        # Such a cache adds layers as they are used; ours must come after all of them.
        while len(cache.layers) < num_layers:
            cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) != num_layers:
        raise ValueError(
            f"past_key_values has {len(cache.layers)} layers, but the backbone has {num_layers}; build it from this "
            "model's config, for example DynamicCache(config=model.config)."
        )
    history = EngramHistoryLayer(_owner(config))
    if any(isinstance(layer, StaticLayer) for layer in cache.layers):
        conv_reach = max(config.engram_conv_kernel_size - 1, 0) * config.engram_max_ngram_size
        history = StaticEngramHistoryLayer(_owner(config), max(config.engram_max_ngram_size - 1, conv_reach))
    cache.layers.append(history)
    return history


def _owner(config: EngramConfig) -> tuple:
    """What two models must share for one to go on from the other's state."""
    return (
        tuple(config.engram_layer_ids),
        config.engram_max_ngram_size,
        config.engram_compressed_vocab_size,
        config.engram_conv_kernel_size,
        config.engram_streams * config.text_config.hidden_size,
    )


def _require_same_past(cache: Cache, history: EngramHistoryLayer) -> None:
    seen, held = history.get_seq_length(), cache.get_seq_length()
    if isinstance(seen, torch.Tensor):
        return  # a static cache that this memory has seen; comparing would wait for the device at every step
    if seen != held:
        raise ValueError(
            f"past_key_values holds {int(held)} positions, of which this model's memory saw {seen} (another model, such as "
            "the bare backbone, or a tuned prefix filled it, or cropped it); pass this model's own cache, or None to start "
            "afresh."
        )

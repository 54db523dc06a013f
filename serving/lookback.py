"""Keyword arguments by which an engine with its own cache passes the tokens before each sequence of a call.

Shape letters: B batch, S positions of a call, n sequences of a call, N the longest n-gram, K taps of the convolution,
R positions that a look-back reaches, G residual streams, D hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from ..cache_engram import lookback_reach
from ..hashing_engram import NO_ID, Compaction
from ..modeling_engram import CACHE_NAMES, LOOKBACK_NAMES, EngramModel
from ..safetensors_engram import EngramError


def read_lookback(model: EngramModel, inputs: dict[str, Any]) -> "LookbackHistory":
    """Remove the look-back keywords of an engine from `inputs` and return them; the engine's own cache remains there.

    The keywords of `forward` have one row for each sequence of the call, in their order:

    - `lookback_token_ids`: integers `[n, N - 1]`, the tokens right before, the latest at the end; -1 before the
      beginning of the sequence. n is B, or more if rows are packed: a sequence begins with each row and wherever
      position ids do not increase by one, or, if the call has it, as `cu_seq_lens_q` `[n + 1]` says.
    - `lookback_conv_inputs`, if the memory has a convolution: by decoder layer, its inputs `[n, (K - 1) * N, G, D]`
      at the positions right before, with zeros before the beginning; an empty dictionary if no sequence has begun.
    - `engram_conv_inputs`: a dictionary that the call fills with its inputs `[B, S, G, D]`, by decoder layer.

    Raises:
        ValueError: something is missing, or has another shape, dtype or device; or a transformers cache, which stores
            all of this, is passed.
    """
    ids, kept, collected = (inputs.pop(name, None) for name in LOOKBACK_NAMES)
    config, device = model.config, model.hashing.multipliers.device
    _require_ids(ids, config.engram_max_ngram_size - 1)
    if bool(config.engram_conv_kernel_size) and (kept is None or collected is None):
        raise EngramError(
            "The convolution of this memory needs more than lookback_token_ids: give its inputs at the positions before as "
            "lookback_conv_inputs (an empty dictionary if there are none) and a dictionary engram_conv_inputs, which is filled with "
            "those of this call."
        )
    if inputs.get("use_cache") or any(isinstance(inputs.get(name), Cache) for name in CACHE_NAMES):
        raise EngramError(
            "lookback_token_ids is for an engine that keeps a cache of its own, but this call has a transformers cache, which holds "
            "the look-back already; leave one of them out, and pass use_cache=False."
        )
    inputs["use_cache"] = False
    reach = lookback_reach(config)
    _require_conv_inputs(kept or {}, config.engram_layer_ids, ids.shape[0], reach)
    ids = model.hashing.compress(ids.to(device))
    ids = torch.nn.functional.pad(ids, (reach - ids.shape[1], 0), value=NO_ID)
    return LookbackHistory(
        ids, kept or {}, {} if collected is None else collected, config.engram_layer_ids, inputs.get("cu_seq_lens_q")
    )


class LookbackHistory:
    """The history of one call, from an engine's keywords.

    Args:
        ids: int64 `[n, R]`, compressed ids before each sequence, `NO_ID` before its beginning.
        conv_inputs: by decoder layer, `[n, R, G, D]`; missing layers have no earlier inputs.
        collected: filled with the convolution inputs `[B, S, G, D]` of this call, by decoder layer.
        layer_ids: decoder layers with memory.
        bounds: int `[n + 1]`, the boundaries of sequences; None to derive them from positions.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        conv_inputs: dict[int, torch.Tensor],
        collected: dict[int, torch.Tensor],
        layer_ids: Sequence[int],
        bounds: torch.Tensor | None,
    ):
        self.ids, self.conv_inputs, self.collected = ids, conv_inputs, collected
        self.layer_ids, self.bounds = layer_ids, bounds
        collected.clear()

    def arrange(
        self,
        input_ids: torch.Tensor,
        compaction: Compaction,
        position_ids: torch.Tensor | None,
        sequence_ids: torch.Tensor | None,
    ) -> tuple["Compaction | Packing", torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Return how to insert look-backs before the sequences of `input_ids` `[B, S]`, each position's sequence, and
        the look-backs.

        Raises:
            ValueError: there are more or fewer sequences than look-backs, or a packed row is padded.
        """
        count = self.ids.shape[0]
        if self.bounds is not None:
            numbers = self._numbers_by_bounds(input_ids)
            return Packing(numbers, count), numbers, self._before(input_ids)
        begins = _sequence_starts(input_ids, compaction.is_text, position_ids, sequence_ids)
        if _can_ask(begins) and int(begins.sum()) != count:
            raise EngramError(
                f"lookback_token_ids has {count} rows, but this call has {int(begins.sum())} sequences: one begins with each row, and "
                "wherever position ids do not go on by one. Give a row for each, and cu_seq_lens_q where the positions of two "
                "sequences follow each other."
            )
        if count == input_ids.shape[0]:
            numbers = torch.arange(count, device=input_ids.device).unsqueeze(1).expand_as(input_ids)
            return compaction, numbers, self._before(input_ids)
        if compaction.is_text is not None:
            raise EngramError(
                "A row that packs several sequences with lookback_token_ids has no padding; leave attention_mask out."
            )
        numbers = begins.flatten().cumsum(0).view_as(input_ids) - 1
        return Packing(numbers, count), numbers, self._before(input_ids)

    def _numbers_by_bounds(self, input_ids: torch.Tensor) -> torch.Tensor:
        count, bounds = self.ids.shape[0], self.bounds.to(input_ids.device)
        if bounds.dim() != 1 or bounds.numel() != count + 1:
            raise EngramError(
                f"lookback_token_ids has {count} rows, but cu_seq_lens_q is {list(bounds.shape)}; it needs [{count + 1}], where each "
                "sequence begins, and the end of the last one."
            )
        index = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        # Positions after the last sequence are padding, whose outputs are not used.
        return torch.searchsorted(bounds[1:].to(index), index, right=True).clamp_max(count - 1)

    def _before(self, current: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and numbers of sequences `[n, R]` before those of `current`."""
        numbers = torch.arange(self.ids.shape[0], device=current.device)
        return self.ids.to(current.device), numbers.unsqueeze(1).expand_as(self.ids)

    def stage_conv(self, layer: int, inputs: torch.Tensor, compaction: "Compaction | Packing") -> torch.Tensor:
        """Collect convolution inputs `[B, S, G, D]` of the memory of this index; return the `[n, R, G, D]` before
        them.

        Raises:
            ValueError: the layer runs twice in a call, or the engine passed another shape.
        """
        layer = self.layer_ids[layer]
        if layer in self.collected:
            raise EngramError(
                f"Decoder layer {layer} runs several times in one forward, which lookback_conv_inputs cannot tell apart; call "
                "generate instead."
            )
        self.collected[layer] = inputs
        shape = (*self.ids.shape, *inputs.shape[2:])
        kept = self.conv_inputs.get(layer)
        if kept is None:
            return inputs.new_zeros(shape)
        if tuple(kept.shape) != shape:
            raise EngramError(
                f"lookback_conv_inputs of decoder layer {layer} are {list(kept.shape)}, but this memory needs {list(shape)}, as "
                "engram_conv_inputs had them at the positions before each sequence."
            )
        return kept.to(inputs)


class Packing:
    """Inserts the look-back of each sequence before it, where sequences follow each other in one row.

    It does for sequences what `Compaction` does for the rows of a batch, and has the same methods.

    Args:
        sequences: int64 `[B, S]`, the number of each position's sequence, counted over all rows: it never decreases.
        count: n, the number of sequences.
    """

    is_text = None

    def __init__(self, sequences: torch.Tensor, count: int):
        self._sequences, self._numbers = sequences, torch.arange(count, device=sequences.device)
        self._index = torch.arange(sequences.numel(), device=sequences.device)

    def join(self, past: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """Return `past` `[n, P, ...]`, each before its sequence of `current` `[B, S, ...]`, as `[1, n * P + B * S,
        ...]`.
        """
        reach, flat = past.shape[1], self._sequences.flatten()
        joined = current.new_empty((past.shape[0] * reach + flat.numel(), *current.shape[2:]))
        first = torch.searchsorted(flat, self._numbers) + self._numbers * reach
        joined[first.unsqueeze(1) + torch.arange(reach, device=flat.device)] = past.to(joined.dtype)
        joined[self._index + (flat + 1) * reach] = current.flatten(0, 1)
        return joined.unsqueeze(0)

    def restore(self, moved: torch.Tensor) -> torch.Tensor:
        """Return `[B, S, ...]` from a joined `[1, n * P + B * S, ...]` without its first P positions."""
        reach = (moved.shape[1] - self._index.numel()) // max(self._numbers.numel() - 1, 1)
        return moved[0, self._index + self._sequences.flatten() * reach].view(*self._sequences.shape, *moved.shape[2:])


def _can_ask(states: torch.Tensor) -> bool:
    """Return whether a value may be read from the device: not while a graph is traced or recorded."""
    return not (torch.compiler.is_compiling() or (states.is_cuda and torch.cuda.is_current_stream_capturing()))


def _require_ids(ids: Any, width: int) -> None:
    is_integer = isinstance(ids, torch.Tensor) and not (
        ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    )
    if not is_integer or ids.dim() != 2 or ids.shape[1] != width or ids.is_meta:
        found = (
            f"{ids.dtype} {list(ids.shape)} on {ids.device}"
            if isinstance(ids, torch.Tensor)
            else f"a {type(ids).__name__}"
        )
        raise EngramError(
            f"lookback_token_ids is {found}; give integers [sequences, {width}], the ids of the {width} tokens before each sequence of "
            "this call, and -1 where it had not begun."
        )


def _require_conv_inputs(kept: dict[int, torch.Tensor], layer_ids: Sequence[int], count: int, reach: int) -> None:
    if kept and (
        sorted(kept) != sorted(layer_ids) or not all(isinstance(part, torch.Tensor) for part in kept.values())
    ):
        raise EngramError(
            f"lookback_conv_inputs has entries for {sorted(kept)}, but the decoder layers with memory are {sorted(layer_ids)}; give a "
            f"tensor [{count}, {reach}, streams, hidden size] for each, or an empty dictionary if no sequence has begun."
        )


def _sequence_starts(
    input_ids: torch.Tensor,
    is_text: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
) -> torch.Tensor:
    """Return the starts of sequences in `[B, S]`, bool: at every row, and where positions do not increase by one."""
    begins = torch.zeros_like(input_ids, dtype=torch.bool)
    begins[:, 0] = True
    given = sequence_ids
    if given is None and position_ids is not None and position_ids.dim() == 2:
        text = torch.ones_like(input_ids) if is_text is None else is_text.long()
        given = text.cumsum(1) - position_ids.to(text.device)
        if is_text is not None:  # The positions of padding have no meaning.
            given = given.where(is_text, given.gather(1, is_text.byte().argmax(1, keepdim=True)))
    if given is not None:
        given = given.to(begins.device).expand_as(input_ids)
        begins[:, 1:] = given[:, 1:] != given[:, :-1]
    return begins

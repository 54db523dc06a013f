"""N-gram hashing: which table rows a position reads, as a pure function of token ids.

The layout (prime bucket sizes, multipliers) follows "Conditional Memory via Scalable Lookup" (arXiv 2601.07372), its
public demo and the DeepSeek-V4.1-Flash release. Shape letters used below:

    B  batch (any leading shape)       L  Engram layers, in the order of `engram_layer_ids`
    S  positions of this call          N  largest n-gram order; orders run 2..N
    H  heads per order                 T  heads of all orders, (N - 1) * H, order-major
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .safetensors_engram import EngramError
from .table_format_engram import NO_ID, draw_multipliers, draw_primes

# The logger is a child of transformers', so that the verbosity that is set for transformers applies here, too.
logger = logging.get_logger(f"transformers.{__name__}")


def hash_ngrams(
    compressed_ids: torch.Tensor,
    multipliers: torch.Tensor,
    primes: torch.Tensor,
    pad_id: int,
    sequence_ids: torch.Tensor | None = None,
    past_ids: torch.Tensor | None = None,
    past_sequence_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the row ids of every position, for all layers together.

    `mix_k = c[p] * m_0 ^ c[p-1] * m_1 ^ ... ^ c[p-k] * m_k` in wrapping int64; the heads of order k + 1 read row
    `mix_k mod prime + offset`. The first look-back that leaves the sequence, reaches a position without an id or
    leaves the packed document counts as `pad_id`, and so do all longer ones; without an id at the position, all do.

    Args:
        compressed_ids: int64 `[B, S]`, `NO_ID` where there is none.
        multipliers: int64 `[L, N]`.
        primes: int64 `[L, N - 1, H]`.
        pad_id: compressed id that replaces a truncated look-back.
        sequence_ids: `[B, S]`, equal within a packed document; None for one document per row.
        past_ids: int64 `[B, P]`, the compressed ids right before these (P may be anything); None at a start.
        past_sequence_ids: `[B, P]`, needed if both `sequence_ids` and `past_ids` are given.

    Returns:
        int64 `[L, B, S, T]`, rows of each layer's own table.

    Raises:
        ValueError: `past_ids` and `sequence_ids` are given without `past_sequence_ids`.
    """
    if past_ids is not None and sequence_ids is not None and past_sequence_ids is None:
        raise EngramError(
            "past_ids and sequence_ids came without past_sequence_ids, so the document of the past is not known; give "
            "all three."
        )
    reach, length, lead = primes.shape[1], compressed_ids.shape[-1], [1] * compressed_ids.dim()
    ids = _with_past(compressed_ids, past_ids, reach, NO_ID)
    documents = None if sequence_ids is None else _with_past(sequence_ids, past_sequence_ids, reach, NO_ID)
    factors = multipliers.unflatten(1, (reach + 1, *lead))  # [L, N, 1...]
    moduli = primes.unflatten(1, (reach, *lead))  # [L, N - 1, 1..., H]

    cut = compressed_ids < 0
    mix = torch.where(cut, pad_id, compressed_ids) * factors[:, 0]
    buckets = []
    for distance in range(1, reach + 1):
        before = slice(reach - distance, reach - distance + length)
        earlier = ids[..., before]
        cut = cut | (earlier < 0)
        if documents is not None:
            cut = cut | (documents[..., before] != sequence_ids)
        mix = mix ^ (torch.where(cut, pad_id, earlier) * factors[:, distance])
        buckets.append(torch.remainder(mix.unsqueeze(-1), moduli[:, distance - 1]))
    offsets = row_offsets(primes).flatten(1).unflatten(1, (*lead, -1))
    return torch.cat(buckets, dim=-1).add_(offsets)


def row_offsets(primes: torch.Tensor) -> torch.Tensor:
    """Return the first row of every head, int64 `[L, N - 1, H]`: the running sum of its layer's earlier bucket sizes."""
    flat = primes.flatten(1)
    return (flat.cumsum(1) - flat).view_as(primes)


def _with_past(current: torch.Tensor, past: torch.Tensor | None, reach: int, fill: int) -> torch.Tensor:
    """Return `current` `[B, S]` after exactly `reach` earlier positions, with `fill` before the sequence begins."""
    if past is None:
        past = current.new_empty((*current.shape[:-1], 0))
    past = past[..., max(past.shape[-1] - reach, 0) :]
    missing = current.new_full((*current.shape[:-1], reach - past.shape[-1]), fill)
    return torch.cat([missing, past, current], dim=-1)


class Compaction:
    """Moves the padding of each row before its text, so that a look-back finds the preceding text.

    Padding between two parts of a row (a right-padded first turn before a second one) is skipped; padding at either
    end of a row changes nothing. Without padding, all positions keep their places.

    Args:
        is_text: bool `[B, S]`, False at padding; None if there is none.
    """

    def __init__(self, is_text: torch.Tensor | None):
        self.is_text = is_text
        if is_text is not None and is_text.shape[1] > 1:
            number = is_text.long().cumsum(1)  # number of each text position in its row
            first = is_text.shape[1] - number[:, -1:]
            self._rows = torch.arange(is_text.shape[0], device=is_text.device).unsqueeze(1)
            self._places = (first + number - 1).clamp_min(0)  # [B, S], where each position goes

    def join(self, past: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        """Return `past` `[B, P, ...]`, which has no padding, before `current` `[B, S, ...]`: `[B, P + S, ...]`."""
        joined = torch.cat([past, current], dim=1)
        if self.is_text is None:
            return joined
        if self.is_text.shape[1] == 1:  # a shortcut for decoding steps
            moved = torch.cat([current, past], dim=1)
            return torch.where(self.is_text.view(-1, *[1] * (joined.dim() - 1)), joined, moved)
        is_text = F.pad(self.is_text, (past.shape[1], 0), value=True)
        return joined[self._rows, is_text.byte().argsort(dim=1, stable=True)]

    def restore(self, moved: torch.Tensor) -> torch.Tensor:
        """Return the last S positions of a joined `[B, S, ...]` in their places; values at padding have no meaning."""
        return moved if self.is_text is None or self.is_text.shape[1] == 1 else moved[self._rows, self._places]


# It makes an `EngramTokenizer` from another fast tokenizer; None in a model folder, which works without compression.
_compress_tokenizer: Callable[[Any], Any] | None = None


def register_compression(compress: Callable[[Any], Any]) -> None:
    """Let `as_token_map` compress the vocabulary of plain tokenizers; the package `engram_hf` calls this when it is imported."""
    global _compress_tokenizer
    _compress_tokenizer = compress


def as_token_map(source) -> torch.Tensor:
    """Return the token map of `source` as an int64 tensor `[V]`: entry `i` is the compressed id of token `i`.

    Args:
        source: an `EngramTokenizer`, another fast tokenizer (its vocabulary is compressed here, which needs
            `engram_hf` installed), a processor with either, or the map itself as a tensor, array or list.

    Raises:
        ValueError: for a slow tokenizer, or a map that is not a surjection onto `0..C-1`.
    """
    if not hasattr(source, "is_fast") and hasattr(source, "save_pretrained"):
        if not hasattr(getattr(source, "tokenizer", None), "is_fast"):
            raise EngramError(
                f"A {type(source).__name__} has no tokenizer whose vocabulary can be compressed; pass the model's fast tokenizer, "
                "or None to hash token ids as they are."
            )
        source = source.tokenizer
    if hasattr(source, "is_fast"):
        source = _token_map_of_tokenizer(source)
    token_map = torch.as_tensor(source, device="cpu")
    if token_map.dim() != 1 or token_map.numel() == 0 or token_map.is_floating_point():
        raise EngramError(
            f"A token map is an integer vector with one entry for each token id, got {token_map.dtype} of shape "
            f"{list(token_map.shape)}; take it from EngramTokenizer.token_map."
        )
    token_map = token_map.long()
    used = torch.unique(token_map)
    size = used.numel()
    if used[0] != 0 or used[-1] != size - 1:
        raise EngramError(
            f"A token map uses every compressed id from 0 to its largest, but this one has {size} distinct values "
            f"between {int(used[0])} and {int(used[-1])}. Take it from EngramTokenizer.token_map."
        )
    return token_map


def _token_map_of_tokenizer(tokenizer) -> torch.Tensor:
    if not tokenizer.is_fast:
        raise EngramError(
            f"{type(tokenizer).__name__} is a slow (pure Python) tokenizer; vocabulary compression reads the Rust "
            "tokenizer. Load a fast one, for example with AutoTokenizer.from_pretrained."
        )
    if not hasattr(tokenizer, "token_map"):
        if _compress_tokenizer is None:
            raise EngramError(
                f"{type(tokenizer).__name__} has no token_map: pass an EngramTokenizer, for example "
                "EngramTokenizer.from_tokenizer(tokenizer) of the package engram-hf."
            )
        tokenizer = _compress_tokenizer(tokenizer)
    return tokenizer.token_map


class NgramHasher(nn.Module):
    """Maps token ids to row ids. Its buffers are the part of the hash that is saved with the weights.

    Buffers:
        token_map: int64 `[V]`, compressed id of every token id, `NO_ID` where a token has none; None without
            vocabulary compression.
        multipliers: int64 `[L, N]`.
        primes: int64 `[L, N - 1, H]`.

    Args:
        layer_ids: decoder layers with memory.
        max_ngram: N.
        bucket_counts: base bucket count of each order 2..N.
        heads: H.
        vocab_size: V, the model's vocabulary.
        compressed_vocab_size: size the multipliers are drawn for; None for no compression (then V).
        pad_token_id: token that replaces a truncated look-back.
        seed: seed of the multipliers.
    """

    def __init__(
        self,
        *,
        layer_ids: Sequence[int],
        max_ngram: int,
        bucket_counts: Sequence[int],
        heads: int,
        vocab_size: int,
        compressed_vocab_size: int | None,
        pad_token_id: int,
        seed: int = 0,
    ):
        super().__init__()
        self.layer_ids = tuple(layer_ids)
        self.max_ngram = max_ngram
        self.bucket_counts = tuple(bucket_counts)
        self.heads = heads
        self.hash_vocab_size = vocab_size if compressed_vocab_size is None else compressed_vocab_size
        self.pad_token_id = pad_token_id
        self.seed = seed
        has_map = compressed_vocab_size is not None
        self.register_buffer("token_map", torch.full((vocab_size,), NO_ID) if has_map else None)
        # They are zeros until `derive_constants` or a checkpoint fills them: the meta device has no values.
        self.register_buffer("multipliers", torch.zeros((len(layer_ids), max_ngram), dtype=torch.int64))
        self.register_buffer("primes", torch.zeros((len(layer_ids), max_ngram - 1, heads), dtype=torch.int64))
        self.stored_dtype: torch.dtype | None = None  # of buffers that a checkpoint has cast; see `settle`
        self._settled: list[tuple[torch.Tensor, int]] | None = None
        self._exact: dict[str, torch.Tensor] = {}
        self._has_token_map = False
        self.register_load_state_dict_pre_hook(_undo_casts)
        self.register_load_state_dict_post_hook(_settle)

    @classmethod
    def from_config(cls, config) -> "NgramHasher":
        """Return the hash of an `EngramConfig`, with buffers that are not filled yet."""
        return cls(
            layer_ids=config.engram_layer_ids,
            max_ngram=config.engram_max_ngram_size,
            bucket_counts=config.bucket_counts,
            heads=config.engram_n_heads,
            vocab_size=config.vocab_size,
            compressed_vocab_size=config.engram_compressed_vocab_size,
            pad_token_id=config.engram_pad_token_id,
            seed=config.engram_seed,
        )

    @functools.cached_property
    def _derived(self) -> dict[str, torch.Tensor]:
        with torch.device("cpu"):
            return {
                "multipliers": torch.from_numpy(
                    draw_multipliers(self.layer_ids, self.max_ngram, self.hash_vocab_size, self.seed)
                ),
                "primes": torch.tensor(draw_primes(len(self.layer_ids), self.bucket_counts, self.heads)),
            }

    def derive_constants(self) -> dict[str, torch.Tensor]:
        """Return the multipliers and primes that the configuration implies, on the CPU."""
        return {name: constant.clone() for name, constant in self._derived.items()}

    def verify_constants(self) -> None:
        """Compare the stored multipliers and primes with those that the configuration implies.

        Raises:
            ValueError: they differ, so that the tables would be read as noise.
        """
        for name, expected in self._derived.items():
            if not torch.equal(getattr(self, name).cpu(), expected):
                raise EngramError(
                    f"The hash {name} stored with the weights are not those that the config implies (layers "
                    f"{list(self.layer_ids)}, vocabulary {self.hash_vocab_size}, buckets {list(self.bucket_counts)}, "
                    f"seed {self.seed}): weights and config.json are not of one model. Restore the config.json that "
                    "was saved with these weights."
                )

    def settle(self) -> None:
        """Restore the buffers as exact integers, check them, and store copies of them.

        This must be called after every intended change. A tool that casts or averages all tensors of a model changes
        them unintentionally; the next forward notices that, and undoes it.

        Raises:
            ValueError: they are not those that the configuration implies, or a cast has lost the token map.
        """
        for name, buffer in list(self.named_buffers()):
            if self.stored_dtype is not None:  # `from_pretrained` found floats, and truncated them
                buffer = buffer.to(self.stored_dtype)
            if buffer.is_floating_point():
                setattr(self, name, self._as_integers(name, buffer))
        self.stored_dtype = None
        self.verify_constants()
        self._exact = {name: buffer.cpu().clone() for name, buffer in self.named_buffers()}
        self._has_token_map = self.token_map is None or bool((self.token_map >= 0).any())
        self._settled = self._stamps()

    def _as_integers(self, name: str, cast: torch.Tensor) -> torch.Tensor:
        """Return the integers that were cast to floating point on the way into this model."""
        if name in self._derived:
            exact = self._derived[name]
            if torch.equal(exact.to(cast.dtype), cast.cpu()):
                return exact.to(cast.device)
        elif cast.dtype in (torch.float32, torch.float64):  # exact for every id below 2^24
            return cast.round().long()
        raise EngramError(
            f"The hash {name} arrived as {cast.dtype}, which cannot hold them: a tool has cast all tensors of the checkpoint, "
            "integers included. Take hashing.* from the original checkpoint."
        )

    def _stamps(self) -> list[tuple[torch.Tensor, int]]:
        """Return what shows whether a buffer was replaced or written to; a tensor of inference mode counts no writes."""
        return [(buffer, 0 if buffer.is_inference() else buffer._version) for buffer in self.buffers()]

    def _require_settled(self) -> None:
        """Undo the changes of a tool that treated the buffers as weights."""
        before, now = self._settled, self._stamps()
        if before is not None and all(a is b and m == n for (a, m), (b, n) in zip(before, now, strict=True)):
            return
        if before is None or self._exact.keys() != dict(self.named_buffers()).keys():
            return self.settle()
        for name, exact in self._exact.items():
            buffer = getattr(self, name)
            if buffer.dtype != exact.dtype or not torch.equal(buffer.cpu(), exact):
                logger.warning_once(
                    f"The hash {name} of this model were changed like weights (cast, averaged or overwritten); they are exact "
                    "integers, and are used as they were."
                )
                setattr(self, name, exact.to(buffer.device))
        self._settled = self._stamps()

    @property
    def has_token_map(self) -> bool:
        """Whether token ids can be compressed: the map is set, or none is needed."""
        self._require_settled()
        return self._has_token_map

    def compress(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return compressed ids, int64, of `input_ids` (any integer dtype and shape), `NO_ID` for unknown ids.

        Raises:
            ValueError: the model has no token map yet.
        """
        if not torch.compiler.is_compiling() and not self.has_token_map:
            raise EngramError(
                "This model has no token map yet: call model.set_token_map(tokenizer) with the EngramTokenizer whose "
                "compressed vocabulary the config names, or load the model with from_pretrained."
            )
        ids = input_ids.long()
        size = self.hash_vocab_size if self.token_map is None else self.token_map.numel()
        is_known = (ids >= 0) & (ids < size)
        if self.token_map is not None:
            ids = self.token_map.to(ids.device)[ids.where(is_known, 0)]
        return ids.where(is_known, NO_ID)

    def forward(
        self,
        compressed_ids: torch.Tensor,
        sequence_ids: torch.Tensor | None = None,
        past_ids: torch.Tensor | None = None,
        past_sequence_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return row ids `[L, B, S, T]` of compressed ids `[B, S]` (`NO_ID` where there is none); see [`hash_ngrams`]."""
        device = compressed_ids.device
        pad = self.pad_token_id if self.token_map is None else self.token_map[self.pad_token_id].to(device)
        return hash_ngrams(
            compressed_ids,
            self.multipliers.to(device),
            self.primes.to(device),
            pad,
            sequence_ids,
            past_ids,
            past_sequence_ids,
        )


def _undo_casts(hasher: NgramHasher, state_dict: dict[str, torch.Tensor], prefix: str, *_) -> None:
    """Restore integers before `load_state_dict`, which would silently truncate floats to integers."""
    for name, _ in hasher.named_buffers():
        loaded = state_dict.get(prefix + name)
        if loaded is not None and loaded.is_floating_point():
            state_dict[prefix + name] = hasher._as_integers(name, loaded)


def _settle(hasher: NgramHasher, _incompatible_keys) -> None:
    if not any(buffer.is_meta for buffer in hasher.buffers()):
        hasher.settle()

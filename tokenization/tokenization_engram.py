"""`EngramTokenizer`: any fast tokenizer, with the compressed ids of Engram's n-grams."""

import copy
import inspect
import os
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto
from transformers.utils import hub

from .vocabulary_compression import (
    TOKEN_MAP_FILE,
    CompressionSummary,
    build_token_map,
    read_token_map,
    refusal,
    summarize,
    write_token_map,
)

# These arguments tell `from_pretrained` where files are; every lookup of a file needs them.
LOCATION_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)

# A tokenizer class may give these settings as class attributes (Llama pads on the left). They are saved explicitly,
# because the class that reloads them is this one.
CLASS_SETTINGS = (
    "clean_up_tokenization_spaces",
    "model_input_names",
    "padding_side",
    "split_special_tokens",
    "truncation_side",
)

# In these methods, a tokenizer class builds or saves its Rust tokenizer. The finished Rust tokenizer is used, so that
# they are not needed; any other Python override changes the tokenizer and would be lost silently.
BUILDING_METHODS = {"__init__", "__getstate__", "__setstate__", "_post_init", "save_pretrained", "save_vocabulary"}

# A tokenizer class builds its Rust tokenizer from vocabulary and merges, which are large and of no further use.
BUILDING_STATE = ("_vocab", "_merges")


class EngramTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer that also maps its token ids to the compressed ids of its vocabulary.

    Encoding, decoding, special and added tokens, chat template, padding and truncation are those of the tokenizer it
    was made from. `len(tokenizer)` ids map onto `compressed_vocab_size` ids, by the algorithm of the Engram paper
    (arXiv 2601.07372, "tokenizer compression"): ids that decode to the same text up to case, accents, width and
    surrounding spaces share one.

        >>> from engram_hf.tokenization import EngramTokenizer
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = models.WordLevel({"the": 0, "The": 1, "café": 2, "CAFE": 3, "?": 4}, unk_token="?")
        >>> plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
        >>> tokenizer = EngramTokenizer.from_tokenizer(plain)
        >>> tokenizer.token_map
        tensor([0, 0, 1, 1, 2])
        >>> tokenizer.compress([[1, 3], [2]])
        [[0, 1], [1]]
        >>> tokenizer.compressed_tokens(1)
        ['café', 'CAFE']

    The map grows with the tokenizer: a token added later joins the group of equal tokens or gets the next free
    compressed id, and no earlier id changes. `save_pretrained` stores the map, with digests, as
    `engram_token_map.safetensors`; loading verifies it and never builds another one in its place.
    """

    _token_map: np.ndarray | None = None  # It is int64 [ids], and None until its first use.
    _mapped_tokens = 0  # It is `len(self)` when `_token_map` was made, to notice tokens added since.

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "EngramTokenizer":
        """Return an `EngramTokenizer` that behaves like `tokenizer`; `tokenizer` itself is not changed.

        An `EngramTokenizer` is returned unchanged. Raises `ValueError` for a tokenizer that is not fast, or whose
        class overrides encoding or decoding in Python: only the work of the Rust tokenizer can be kept.
        """
        if any(base.__name__ == EngramTokenizer.__name__ for base in type(tokenizer).__mro__):
            # The names are compared: the class of a saved folder is another object.
            return cast(EngramTokenizer, tokenizer)
        _check_can_be_wrapped(tokenizer)
        wrapped = cls.__new__(cls)
        # `cls(**init_kwargs)` would rebuild the post-processor and forget later changes.
        state = {name: value for name, value in vars(tokenizer).items() if name not in BUILDING_STATE}
        vars(wrapped).update(copy.deepcopy(state))
        wrapped.SPECIAL_TOKENS_ATTRIBUTES = list(tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
        wrapped.init_kwargs.update({name: getattr(wrapped, name) for name in CLASS_SETTINGS})
        wrapped._update_token_map()
        return wrapped

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *init_inputs: Any, **kwargs: Any
    ) -> "EngramTokenizer":
        """Load a saved `EngramTokenizer`, or any other fast tokenizer and wrap it.

        The arguments are those of `AutoTokenizer.from_pretrained`. Raises `ValueError` if a saved token map is damaged
        or missing or does not belong to the tokenizer beside it.
        """
        location = {name: kwargs[name] for name in LOCATION_ARGUMENTS if name in kwargs}
        # The function is called through its module: `datasets` hashes a tokenizer of remote code with all functions that its
        # methods refer to, and would recurse without end.
        declared = tokenization_auto.get_tokenizer_config(pretrained_model_name_or_path, **location).get(
            "tokenizer_class"
        )
        is_ours = declared in (cls.__name__, EngramTokenizer.__name__)
        # `_from_auto`: `AutoTokenizer` has already chosen this class, and calling it again would recurse.
        if is_ours or kwargs.get("_from_auto", False):
            tokenizer = super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
        else:
            plain = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)
            tokenizer = cls.from_tokenizer(plain)
        tokenizer._load_token_map(pretrained_model_name_or_path, location, required=is_ours)
        return tokenizer

    @property
    def token_map(self) -> torch.Tensor:
        """The compressed id of every token id, int64 `[len(tokenizer)]`, as a copy.

        If ids are missing in the vocabulary, the map has entries up to its largest id; a missing id counts as the
        empty text.
        """
        return torch.from_numpy(self._current_token_map().copy())

    @property
    def compressed_vocab_size(self) -> int:
        """The number of compressed ids, which are `0..compressed_vocab_size-1`."""
        return int(self._current_token_map().max(initial=-1)) + 1

    def compress(self, ids: Any) -> Any:
        """Return the compressed ids of `ids`, in the same type and shape.

        `ids` is an integer, a list or tuple (of any nesting, also ragged), a NumPy array or a torch tensor of any
        shape and integer dtype; the result keeps dtype and device. Raises `ValueError` for ids that this tokenizer
        does not have, and for values that are not integers.
        """
        return _look_up(self._current_token_map(), ids)

    def compressed_tokens(self, compressed_id: int) -> list[str]:
        """Return the vocabulary strings of all tokens with this compressed id, by token id (see
        `convert_tokens_to_ids`).
        """
        token_map = self._current_token_map()
        if not 0 <= compressed_id < self.compressed_vocab_size:
            raise refusal(
                f"There is no compressed id {compressed_id}: they are 0 to {self.compressed_vocab_size - 1}; "
                "tokenizer.compress(token_id) gives the one of a token."
            )
        tokens = self.convert_ids_to_tokens(np.flatnonzero(token_map == compressed_id).tolist())
        return [token for token in tokens if token is not None]

    def compression_summary(self, examples: int = 5) -> CompressionSummary:
        """Return how far the vocabulary shrinks, and the `examples` largest groups of tokens with one compressed id."""
        return summarize(self.backend_tokenizer, self._current_token_map(), examples)

    def _current_token_map(self) -> np.ndarray:
        if self._token_map is None or len(self) != self._mapped_tokens:
            return self._update_token_map()
        return self._token_map

    def _update_token_map(self) -> np.ndarray:
        self._token_map = build_token_map(self.backend_tokenizer, self._token_map)
        self._mapped_tokens = len(self)
        return self._token_map

    def _load_token_map(self, name_or_path: str | os.PathLike, location: dict[str, Any], required: bool) -> None:
        path = hub.cached_file(
            name_or_path,
            TOKEN_MAP_FILE,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **location,
        )
        if path is not None:
            # Loading itself adds special tokens that the configuration or the caller names; they extend the map.
            self._token_map = read_token_map(path, self.backend_tokenizer, may_be_new=self.all_special_tokens)
            self._mapped_tokens = len(self)
        elif required:
            raise refusal(
                f"{name_or_path} holds an EngramTokenizer without its {TOKEN_MAP_FILE}: put that file back, or load "
                "the folder with PreTrainedTokenizerFast and make a new map with EngramTokenizer.from_tokenizer."
            )

    # The map is not written in `save_pretrained`: `push_to_hub` uploads files that change while this method runs.
    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        saved = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, prefix + TOKEN_MAP_FILE)
        write_token_map(path, self._current_token_map(), self.backend_tokenizer)
        return (*saved, path)


def _check_can_be_wrapped(tokenizer: Any) -> None:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise refusal(
            f"EngramTokenizer wraps fast tokenizers (transformers.PreTrainedTokenizerFast), got {type(tokenizer).__name__}: "
            "load the fast version of this tokenizer, or convert it to a tokenizer.json first."
        )
    overrides = _python_overrides(type(tokenizer))
    if overrides:
        raise refusal(
            f"{type(tokenizer).__name__} does part of its work in Python ({', '.join(overrides)}), which a wrapper of "
            "its Rust tokenizer would lose: if you can do without, wrap what PreTrainedTokenizerFast.from_pretrained loads."
        )


def _python_overrides(tokenizer_class: type) -> list[str]:
    """Return methods of `PreTrainedTokenizerFast` that `tokenizer_class` overrides, other than to build or save
    itself.
    """
    subclasses = tokenizer_class.__mro__[: tokenizer_class.__mro__.index(PreTrainedTokenizerFast)]
    defined = {name for cls in subclasses for name, value in vars(cls).items() if inspect.isfunction(value)}
    return sorted(name for name in defined - BUILDING_METHODS if hasattr(PreTrainedTokenizerFast, name))


def _look_up(token_map: np.ndarray, ids: Any) -> Any:
    if isinstance(ids, torch.Tensor):
        _check_integer(not ids.is_floating_point() and ids.dtype != torch.bool, ids.dtype)
        found = _look_up(token_map, ids.cpu().numpy())
        return torch.from_numpy(found).to(ids.device)
    if isinstance(ids, (list, tuple)):
        if any(isinstance(item, (list, tuple, np.ndarray, torch.Tensor)) for item in ids):
            return type(ids)([_look_up(token_map, item) for item in ids])
        return type(ids)(_look_up(token_map, np.asarray(ids)).tolist()) if ids else ids
    array = np.asarray(ids)
    _check_ids(array, len(token_map))
    # A compressed id is never larger than its token id, so the dtype of the ids always holds it.
    found = np.asarray(token_map[array], dtype=array.dtype)
    return found if isinstance(ids, np.ndarray) else found.item()


def _check_integer(is_integer: bool, dtype: Any) -> None:
    if not is_integer:
        raise refusal(f"compress takes integer token ids, got {dtype}: pass tokenizer(...)['input_ids'].")


def _check_ids(ids: np.ndarray, count: int) -> None:
    _check_integer(ids.dtype.kind in "iu", ids.dtype)
    if ids.size and not (ids.min() >= 0 and ids.max() < count):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise refusal(
            f"Token ids of this tokenizer are 0 to {count - 1}, got {wrong}: compress takes input ids, "
            "without the -100 of labels, of this very tokenizer."
        )


EngramTokenizer.register_for_auto_class("AutoTokenizer")

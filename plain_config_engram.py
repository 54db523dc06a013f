"""The config.json of a model with memory, and the hash stored beside its weights, without transformers and torch.

Importing these takes seconds, which a command that runs no model saves. The functions only accept fields that are all
present and valid. Otherwise they return None, and the caller reads the config with the model's own classes, which know
defaults of backbones and fields of earlier versions, and report what is wrong.
"""

import functools
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from .safetensors_engram import VERSION, FileFormatError, TensorSpan, are_counts, read_json, reading
from .table_format_engram import QUANTIZED_FORMATS, MemorySizes, draw_multipliers, draw_primes

# The two published forms of Engram differ in these fields: arXiv 2601.07372 with its demo, and DeepSeek-V4.1-Flash.
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {
        "engram_max_ngram_size": 3,
        "engram_n_heads": 8,
        "engram_head_dim": 64,
        "engram_bias": True,
        "engram_conv_kernel_size": 4,
        "engram_norm_eps": None,
        "engram_zero_gate_sign": 0,
    },
    "v4.1": {
        "engram_max_ngram_size": 4,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_vocab_size": 16_000_000,
        "engram_bias": False,
        "engram_conv_kernel_size": 0,
        "engram_norm_eps": 1e-20,
        "engram_zero_gate_sign": 1,
    },
}
# The other fields have these defaults in `EngramConfig`.
DEFAULTS: dict[str, Any] = {
    "engram_added_tokens": 0,
    "engram_compressed_vocab_size": None,
    "engram_conv_norm_eps": 1e-5,
    "engram_format_version": 2,
    "engram_pad_token_id": 2,
    "engram_seed": 0,
    "engram_table_dtype": None,
}

_FIELDS = {
    "engram_added_tokens",
    "engram_bias",
    "engram_compressed_vocab_size",
    "engram_conv_kernel_size",
    "engram_conv_norm_eps",
    "engram_format_version",
    "engram_head_dim",
    "engram_layer_ids",
    "engram_max_ngram_size",
    "engram_n_heads",
    "engram_norm_eps",
    "engram_num_embeddings",
    "engram_pad_token_id",
    "engram_seed",
    "engram_table_dtype",
    "engram_vocab_size",
    "engram_zero_gate_sign",
}
# These are the other members of a saved config, with their types.
_OTHERS = {
    "architectures": list,
    "auto_map": dict,
    "dtype": str,
    "engram_hf_version": str,
    "model_type": str,
    "quantization_config": dict,
    "text_config": dict,
    "transformers_version": str,
}
# These are the known versions of the fields; the second one renamed the model's parameters.
_FORMAT_VERSIONS = (1, 2)
_MOST_ORDERS, _MOST_HEADS = 64, 1024
# A child of transformers' logger, so that the verbosity that is set for transformers applies here, too.
_logger = logging.getLogger(f"transformers.{__name__}")


@dataclass(frozen=True)
class StoredHash:
    """The constants of an `NgramHasher` after loading, as arrays.

    Args:
        layer_ids: decoder layers with memory.
        pad_token_id: token that replaces a truncated look-back.
        hash_vocab_size: size of the (compressed) vocabulary that the multipliers were drawn for.
        primes: int64 `[L, N - 1, H]`.
        multipliers: int64 `[L, N]`.
        token_map: int64 `[V]`; None without vocabulary compression.
    """

    layer_ids: tuple[int, ...]
    pad_token_id: int
    hash_vocab_size: int
    primes: np.ndarray
    multipliers: np.ndarray
    token_map: np.ndarray | None


class PlainConfig(MemorySizes, SimpleNamespace):
    """The fields of config.json under their names in an `EngramConfig`, and likewise those of `text_config`."""

    is_composite = False


def parameters_beside_table(config: Any) -> int:
    """Return the number of parameters of one layer's memory without its table.

    Args:
        config: an `EngramConfig`, or a [`PlainConfig`].
    """
    hidden, streams = config.text_config.hidden_size, config.engram_streams
    projection = (config.engram_row_width + int(config.engram_bias)) * hidden * (streams + 1)
    norms = 2 * streams * hidden
    conv = streams * hidden * (config.engram_conv_kernel_size + 1) if config.engram_conv_kernel_size else 0
    return projection + norms + conv


def warn_of_newer_version(saved_by: object) -> None:
    """Warn once if a config was saved by a later minor version than this one; an earlier one, or none, is accepted.

    Args:
        saved_by: `engram_hf_version` of the config.
    """
    if isinstance(saved_by, str):
        _warn_of_newer_version(saved_by)


@functools.cache
def _warn_of_newer_version(saved_by: str) -> None:
    found, own = (tuple(map(int, re.findall(r"\d+", version)[:2])) for version in (saved_by, VERSION))
    if found > own:
        _logger.warning(
            f"This model was saved by engram-hf {saved_by}, but this is {VERSION}, which may not know all that its config says; "
            "upgrade engram-hf."
        )


def read_plain_config(folder: Path) -> PlainConfig | None:
    """Return the config.json of a model folder; None if it is not completely valid."""
    try:
        fields = read_json(folder / "config.json", constants=True)
    except FileFormatError:
        return None
    return as_plain_config(fields)


def as_plain_config(fields: Mapping[str, Any]) -> PlainConfig | None:
    """Return the members of a config.json as an object; None if they are not all valid."""
    others = {name: value for name, value in fields.items() if name not in _FIELDS}
    if not all(type(value) is _OTHERS.get(name) for name, value in others.items()) or not fields.keys() >= _FIELDS:
        return None
    text = fields.get("text_config", {})
    if fields.get("model_type") != "engram":
        return None
    vision = text.get("vision_config")
    if vision is not None and not (isinstance(vision, dict) and type(vision.get("num_hidden_layers")) is int):
        return None
    text_config = SimpleNamespace(**{**text, "vision_config": None if vision is None else SimpleNamespace(**vision)})
    config = PlainConfig(**{**fields, "text_config": text_config, "backbone": text_config})
    if not (_is_backbone(text) and _is_hash(config, text_config) and _is_fusion(config)):
        return None
    warn_of_newer_version(fields.get("engram_hf_version"))
    return config if config.engram_num_embeddings == [sum(map(sum, orders)) for orders in _primes(config)] else None


def _is_backbone(text: Mapping[str, Any]) -> bool:
    sizes = [text.get(name) for name in ("num_hidden_layers", "hidden_size", "vocab_size")]
    drafts = text.get("num_nextn_predict_layers")
    return isinstance(text.get("model_type"), str) and are_counts(sizes) and (drafts is None or are_counts([drafts]))


def _is_hash(config: Any, text_config: Any) -> bool:
    """Return whether the fields of the hash have the types and bounds that `EngramConfig` requires."""
    layers, vocab_size = config.engram_layer_ids, text_config.vocab_size
    orders, heads, pad = config.engram_max_ngram_size, config.engram_n_heads, config.engram_pad_token_id
    compressed, added = config.engram_compressed_vocab_size, config.engram_added_tokens
    counted = [orders, heads, pad, added, config.engram_seed, *([] if compressed is None else [compressed])]
    if not are_counts(counted) or not 2 <= orders <= _MOST_ORDERS or not are_counts(layers):
        return False
    if type(config.engram_vocab_size) not in (int, list):
        return False
    return (
        0 < len(layers) == len(set(layers))
        and max(layers) < text_config.num_hidden_layers
        and 0 < heads <= _MOST_HEADS
        and are_counts(list(config.bucket_counts))
        and len(config.bucket_counts) == orders - 1
        and min(config.bucket_counts) > 0
        and pad < vocab_size
        and (compressed is None or 0 < compressed <= vocab_size - added)
    )


def _is_fusion(config: Any) -> bool:
    """Return whether the fields of the gated fusion and of the tables have the types and bounds that `EngramConfig`
    requires.
    """
    width, dtype = config.engram_head_dim, config.engram_table_dtype
    epsilons = config.engram_norm_eps, config.engram_conv_norm_eps
    if not are_counts([width, config.engram_conv_kernel_size]) or dtype not in (None, *QUANTIZED_FORMATS):
        return False
    return (
        config.engram_format_version in _FORMAT_VERSIONS
        and width > 0
        and (dtype is None or width % QUANTIZED_FORMATS[dtype].multiple == 0)
        and all(eps is None or (type(eps) is float and 0 < eps < math.inf) for eps in epsilons)
        and isinstance(config.engram_bias, bool)
        and config.engram_zero_gate_sign in (0, 1)
    )


def _primes(config: Any) -> list[list[list[int]]]:
    return draw_primes(len(config.engram_layer_ids), config.bucket_counts, config.engram_n_heads)


def draw_hash(config: Any, token_map: np.ndarray | None = None) -> StoredHash:
    """Return the hash that a config implies.

    Args:
        config: an `EngramConfig`, or a [`PlainConfig`].
        token_map: int64 `[V]`, which a config does not imply; None without vocabulary compression, or if it is not
            needed.
    """
    layers, compressed = tuple(config.engram_layer_ids), config.engram_compressed_vocab_size
    size = config.text_config.vocab_size if compressed is None else compressed
    multipliers = draw_multipliers(layers, config.engram_max_ngram_size, size, config.engram_seed)
    return StoredHash(layers, config.engram_pad_token_id, size, np.array(_primes(config)), multipliers, token_map)


def read_plain_hash(config: Any, spans: Mapping[str, TensorSpan]) -> StoredHash | None:
    """Return the hash in `spans`, by `"primes"`, `"multipliers"` and `"token_map"`, if it is the one that the config
    implies.

    Args:
        config: an `EngramConfig`, or a [`PlainConfig`].
    """
    expected = draw_hash(config)
    shapes = {"primes": expected.primes.shape, "multipliers": expected.multipliers.shape}
    if config.engram_compressed_vocab_size is not None:
        shapes["token_map"] = (config.text_config.vocab_size,)
    if {name: (span.dtype, span.shape) for name, span in spans.items()} != {n: ("I64", s) for n, s in shapes.items()}:
        return None
    found = {name: _read(span) for name, span in spans.items()}
    if not all(np.array_equal(found[name], getattr(expected, name)) for name in ("primes", "multipliers")):
        return None
    return replace(expected, token_map=found.get("token_map"))


def _read(span: TensorSpan) -> np.ndarray:
    with reading(span.path):
        return np.fromfile(span.path, "<i8", math.prod(span.shape), offset=span.offset).reshape(span.shape)

"""Other models with a large lookup table: one entry for each kind of table.

A new model is a new entry here. Everything else (shape, dtype, shards, scales) is read from the model and its files.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _one_row(config: Mapping[str, Any]) -> int:
    return 1


@dataclass(frozen=True)
class TableKind:
    """A kind of table whose rows are addressed by ids alone.

    Args:
        name: the name for users.
        module: the end of the name of its module, and of its tensors without their last part.
        depends_on: fields of the text config that determine the row of an id. Tables from another place must agree.
        rows_per_token: returns the number of rows that a token reads, by the text config.
        is_hashed: whether row numbers are a hash that the module's parent computes, so that they are known before it
            runs.
    """

    name: str
    module: re.Pattern[str]
    depends_on: tuple[str, ...] = ("vocab_size",)
    rows_per_token: Callable[[Mapping[str, Any]], int] = _one_row
    is_hashed: bool = False


KINDS = (
    TableKind(
        "n-grams of Qwen4-Exp",
        re.compile(r"(?:^|\.)ple\.ple_embedding\.ngram_embedding$"),
        ("vocab_size", "seed", "ngram_size", "heads_per_ngram", "ngram_vocab_size_base", "ple_layer_ids"),
        # A config.json may leave fields out; these defaults are those of the model's config class.
        lambda config: (config.get("ngram_size", 3) - 1) * config.get("heads_per_ngram", 8),
        is_hashed=True,
    ),
    TableKind(
        "per-layer inputs of Gemma",
        re.compile(r"(?:^|\.)embed_tokens_per_layer$"),
        ("vocab_size", "vocab_size_per_layer_input", "hidden_size_per_layer_input", "num_hidden_layers"),
    ),
    TableKind("n-grams of LongCat-Flash-Lite", re.compile(r"(?:^|\.)ngram_embeddings\.embedders\.\d+$")),
)


# `EngramForCausalLM` loads the tables of this package; they are listed here to complete the list of a checkpoint's
# tables.
MEMORY = TableKind(
    "Engram memory",
    re.compile(r"(?:^|\.)layers\.\d+\.engram\.(?:table|embed)$"),
    rows_per_token=lambda config: (config.get("engram_max_ngram_size", 3) - 1) * config.get("engram_n_heads", 8),
)


def kind_of(name: str) -> TableKind | None:
    """Return the kind of table that a module of this name is, or None."""
    return next((kind for kind in KINDS if kind.module.search(name)), None)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a parsed config.json that describes the text model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config

"""The rules on every field of a memory: what a new [`EngramConfig`] has to obey.

The config of a saved model has passed them, so its folder does not carry them.
"""

import itertools
import math
from collections.abc import Iterator

from .configuration_engram import EngramConfig
from .table_engram import QUANTIZED_FORMATS

# Far beyond any use; more would take minutes to check.
_MOST_ORDERS, _MOST_HEADS = 64, 1024


def rules(config: EngramConfig) -> Iterator[tuple[bool, str]]:
    """Whether `config` obeys each rule, and what to say if not: the field, its value and what it should be."""
    return itertools.chain(_hash_rules(config), _fusion_rules(config))


def _hash_rules(config: EngramConfig) -> Iterator[tuple[bool, str]]:
    layers, ids = config.text_config.num_hidden_layers, config.engram_layer_ids
    yield len(ids) > 0, "engram_layer_ids is empty; name at least one decoder layer."
    yield (
        all(0 <= layer < layers for layer in ids),
        f"engram_layer_ids {ids} must lie in 0..{layers - 1}, the backbone's {layers} decoder layers (0-based).",
    )
    yield len(set(ids)) == len(ids), f"engram_layer_ids {ids} names a layer twice; name each once."
    largest = config.engram_max_ngram_size
    yield (
        2 <= largest <= _MOST_ORDERS,
        f"engram_max_ngram_size is {largest}, but n-grams have 2 to {_MOST_ORDERS} tokens; give 2 or more.",
    )
    heads = config.engram_n_heads
    yield 0 < heads <= _MOST_HEADS, f"engram_n_heads is {heads}; it must be positive, and at most {_MOST_HEADS}."
    counts = config.bucket_counts
    yield (
        len(counts) == largest - 1,
        f"engram_vocab_size lists {len(counts)} bucket counts, but orders 2..{largest} need {largest - 1}; give "
        "one number, or one for each order.",
    )
    yield min(counts) > 0, f"engram_vocab_size is {config.engram_vocab_size}; it must be positive."
    vocab_size = config.text_config.vocab_size
    yield (
        0 <= config.engram_pad_token_id < vocab_size,
        f"engram_pad_token_id is {config.engram_pad_token_id}, outside the vocabulary of {vocab_size} ids; name an "
        "id of the tokenizer.",
    )
    compressed, added = config.engram_compressed_vocab_size, config.engram_added_tokens
    yield added >= 0, f"engram_added_tokens is {added}; it must be 0 or more."
    yield (
        compressed is None or 0 < compressed <= vocab_size - added,
        f"engram_compressed_vocab_size is {compressed} (+ {added} added), but it must lie in 1..{vocab_size}, the "
        "backbone's vocabulary; take it from EngramTokenizer.compressed_vocab_size.",
    )
    yield config.engram_seed >= 0, f"engram_seed is {config.engram_seed}; it must be 0 or more."


def _fusion_rules(config: EngramConfig) -> Iterator[tuple[bool, str]]:
    width, kernel = config.engram_head_dim, config.engram_conv_kernel_size
    yield width > 0, f"engram_head_dim is {width}; it must be positive."
    yield kernel >= 0, f"engram_conv_kernel_size is {kernel}; give a number of taps, 0 for no convolution."
    for name in ("engram_norm_eps", "engram_conv_norm_eps"):
        # Zero is no epsilon: a position without memory is all zeros, and its norm would be NaN.
        eps = getattr(config, name)
        yield eps is None or 0 < eps < math.inf, f"{name} is {eps}; it must be positive, and finite."
    yield (
        config.engram_zero_gate_sign in (0, 1),
        f"engram_zero_gate_sign is {config.engram_zero_gate_sign}; it must be 0 (the demo) or 1 (V4.1).",
    )
    table_dtype = config.engram_table_dtype
    yield (
        table_dtype is None or table_dtype in QUANTIZED_FORMATS,
        f"engram_table_dtype is {table_dtype!r}; it must be None (the model's dtype), "
        f"{' or '.join(map(repr, QUANTIZED_FORMATS))}.",
    )
    multiple = QUANTIZED_FORMATS[table_dtype].multiple if table_dtype in QUANTIZED_FORMATS else 1
    yield (
        width % multiple == 0,
        f"engram_head_dim is {width}, which {table_dtype} rows cannot have; make it a multiple of {multiple}.",
    )

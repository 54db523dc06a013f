"""Model folders with memory tables of any size, for the other benchmarks of this folder."""

import os
from pathlib import Path

import torch
from transformers import Qwen3Config

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.hashing_engram import NgramHasher
from engram_hf.loading_engram import FoundTables
from engram_hf.saving_engram import manifest_entry, table_file_name, write_manifest
from engram_hf.table_format_engram import describe_table, read_tables
from engram_hf.table_writer_engram import TableWriter, quantize_rows

WIDTH, HEADS, LAYER, VOCAB = 256, 8, 1, 1000


def make_model_folder(folder: Path, gigabytes: float, *, filled: bool, layers: int = 2, hidden: int = 128) -> None:
    """Save a small Qwen3 with one float8 memory table of a given size: normal noise, or (if not `filled`) zeros."""
    config = EngramConfig.for_backbone(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=hidden // 8,
        ),
        layer_ids=[LAYER],
        variant="v4.1",
        engram_vocab_size=int(gigabytes * 1e9 / (WIDTH * 33 / 32) / (3 * HEADS)),
        engram_table_dtype="float8_e4m3fn",
    )
    folder.mkdir(parents=True, exist_ok=True)
    hasher = make_hasher(config.bucket_counts, config.engram_pad_token_id)
    description = describe_table(hasher, 0, width=WIDTH, dtype="F8_E4M3")
    name = table_file_name(LAYER)
    with TableWriter(folder / name, description) as writer:
        for first in range(0, description.num_rows, 1 << 16) if filled else ():
            count = min(1 << 16, description.num_rows - first)
            writer.write(first, *quantize_rows(torch.randn(count, WIDTH) * 0.02, "float8_e4m3fn"))
    with (folder / name).open("rb") as file:
        os.fsync(file.fileno())
    write_manifest(folder, {LAYER: manifest_entry([(name, description.rows, description.tensors)])})
    EngramForCausalLM(config, engram_tables=FoundTables(read_tables(folder), "mapped")).save_pretrained(folder)


def make_hasher(buckets: int | list[int], pad: int = 0) -> NgramHasher:
    """Return the hash of one layer's table.

    Args:
        buckets: the buckets of a model's config, or the approximate number of rows of the table.
    """
    hasher = NgramHasher(
        layer_ids=[LAYER],
        max_ngram=4,
        bucket_counts=[buckets // (3 * HEADS)] * 3 if isinstance(buckets, int) else buckets,
        heads=HEADS,
        vocab_size=VOCAB,
        compressed_vocab_size=None,
        pad_token_id=pad,
    )
    for name, constant in hasher.derive_constants().items():
        getattr(hasher, name).copy_(constant)
    return hasher


def drop_from_page_cache(path: Path) -> None:
    """Drop the cached pages of a file that no process maps."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

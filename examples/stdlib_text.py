"""Text that every Python has: the sources of its standard library, their tokenizer, and blocks of tokens."""

import sysconfig
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engram_hf import EngramTokenizer

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

# Not the standard library, tests of it, or generated tables: the near-copies in `encodings` would flatter a memory.
SKIPPED = {
    "__pycache__",
    "dist-packages",
    "encodings",
    "idle_test",
    "idlelib",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
HELD_OUT_SHARE = 20  # every so many-th file, by a checksum of its path


def read_sources() -> tuple[list[str], list[str]]:
    """Sources to train on and sources held out, the same split on every machine with this Python.

    Raises:
        ValueError: this Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED.intersection(name.parts) or name.name.startswith("_sysconfigdata"):
            continue
        is_held_out = zlib.crc32(name.as_posix().encode()) % HELD_OUT_SHARE == 0
        (held_out if is_held_out else train).append(path.read_text(encoding="utf-8", errors="replace"))
    if not train or not held_out:
        raise ValueError(f"{root} holds no Python sources to train on; run this with a Python that has its .py files.")
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> EngramTokenizer:
    """A byte-level BPE tokenizer trained on `texts`, with the compressed vocabulary that memory is addressed by."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    plain = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=PAD)
    return EngramTokenizer.from_tokenizer(plain)


def token_blocks(
    tokenizer: EngramTokenizer, texts: list[str], length: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """Examples of `length` tokens each, in an order drawn from `seed`; an end-of-text token closes every file."""
    encoded = tokenizer([text + END_OF_TEXT for text in texts])["input_ids"]
    tokens = torch.cat([torch.tensor(ids) for ids in encoded])
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": block, "labels": block} for block in blocks[order]]

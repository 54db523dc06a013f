"""Text that every Python has: the sources of its standard library, their tokenizer, and blocks of tokens."""

import ast
import sysconfig
import warnings
import zlib
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engram_hf import EngramTokenizer

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"

# Packages, tests and generated tables are left out: the near-copies in `encodings` would make a memory look too good.
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
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
HELD_OUT_SHARE = 20  # One file in this many is held out, by a checksum of its path.


def read_sources() -> tuple[list[str], list[str]]:
    """Return sources to train on and held-out sources, with the same split on every machine with this Python.

    Raises:
        ValueError: this Python came without its sources.
    """
    return split([(name, path.read_text(encoding="utf-8", errors="replace")) for name, path in source_files()])


def read_documentation() -> tuple[list[str], list[str]]:
    """Return English about Python, split in the same way: the docstrings of each file, and the topics that `help()`
    knows.
    """
    texts = []
    for name, path in source_files():
        with warnings.catch_warnings(action="ignore"):  # Some old sources have escapes that Python now warns of.
            tree = ast.parse(path.read_bytes())
        nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        docstrings = dict.fromkeys(text for node in nodes if (text := ast.get_docstring(node)))
        if docstrings:
            texts.append((name, "\n\n".join(docstrings)))
    texts += [(f"topics/{name}", text) for name, text in sorted(topics.items())]
    return split(texts)


def source_files() -> list[tuple[str, Path]]:
    """Return names and paths of the standard library's files."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [(path.relative_to(root), path) for path in sorted(root.rglob("*.py"))]
    found = [
        (name.as_posix(), path)
        for name, path in files
        if not SKIPPED.intersection(name.parts) and not name.name.startswith("_sysconfigdata")
    ]
    if not found:
        raise ValueError(f"{root} holds no Python sources to train on; run this with a Python that has its .py files.")
    return found


def split(texts: list[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Return named texts to train on and held-out ones, split by a checksum of their names."""
    train: list[str] = []
    held_out: list[str] = []
    for name, text in texts:
        (train if zlib.crc32(name.encode()) % HELD_OUT_SHARE else held_out).append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int) -> EngramTokenizer:
    """Train a byte-level BPE tokenizer on `texts`, with the compressed vocabulary of the memory."""
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
    """Return examples of `length` tokens each, in an order drawn from `seed`; an end-of-text token ends every file."""
    encoded = tokenizer([text + END_OF_TEXT for text in texts])["input_ids"]
    tokens = torch.cat([torch.tensor(ids) for ids in encoded])
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": block, "labels": block} for block in blocks[order]]

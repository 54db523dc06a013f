"""`engram compress`: show how vocabulary compression changes a tokenizer."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import is_hub_id, require_folder
from .output import print_json

if TYPE_CHECKING:
    from engram_hf.tokenization import CompressionSummary

# transformers loads tokenizers of these classes from tokenizer.json without changes.
_OURS = "EngramTokenizer"
_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    compress = commands.add_parser(
        "compress",
        help="how far vocabulary compression shrinks a tokenizer",
        description="Group the tokens of a tokenizer that are equal up to case, accents, width and surrounding spaces, and "
        "show how many ids are left.",
    )
    compress.add_argument("tokenizer", help="folder or Hub id of a fast tokenizer")
    compress.add_argument("--examples", type=int, default=5, metavar="N", help="largest groups to show (default: 5)")
    compress.add_argument("--json", action="store_true", help="print one JSON document")
    compress.set_defaults(run=run_compress, runs_no_model=True)


def run_compress(options: argparse.Namespace) -> None:
    """Print the summary of `options.tokenizer`."""
    name = options.tokenizer
    folder = (
        require_folder(name, only=["tokenizer*.json", "engram_token_map.safetensors"])
        if is_hub_id(name)
        else Path(name)
    )
    summary = _summarize_plain(folder, options.examples)
    if summary is None:
        summary = _summarize(name, options.examples)
    if options.json:
        print_json({**asdict(summary), "reduction": round(summary.reduction, 4)})
        return
    print(summary)


def _summarize(name: str, examples: int) -> "CompressionSummary":
    """Return the summary of a folder or Hub id from which transformers loads a tokenizer."""
    from engram_hf import EngramTokenizer

    try:
        tokenizer = EngramTokenizer.from_pretrained(name)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name} gives no tokenizer: {error}") from error
    return tokenizer.compression_summary(examples)


def _summarize_plain(folder: Path, examples: int) -> "CompressionSummary | None":
    """Return the summary of a folder's tokenizer.json; None if transformers would load more than this file, or change
    it.
    """
    from engram_hf.safetensors_engram import FileFormatError, read_json

    try:
        config = read_json(folder / "tokenizer_config.json")
        tokens = {entry["content"]: entry["id"] for entry in read_json(folder / "tokenizer.json")["added_tokens"]}
    except (FileFormatError, OSError, KeyError, TypeError):
        return None
    # Other classes rebuild the tokenizer from its vocabulary, and transformers adds named tokens that are missing.
    declared = config.get("tokenizer_class")
    if declared not in (_OURS, *_GENERIC_CLASSES) or not _named_tokens(config) <= tokens.keys():
        return None
    return _summarize_file(folder, declared == _OURS, examples)


def _named_tokens(config: dict[str, Any]) -> set[Any]:
    """Return the special tokens that a tokenizer_config.json names; None is among them if some are not given as plain
    texts.
    """
    lists = [
        config.get(name) for name in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder")
    ]
    named = [value for name, value in config.items() if name.rpartition("_")[2] == "token" and value is not None]
    return {token if isinstance(token, str) else None for token in named} | ({None} if any(lists) else set())


def _summarize_file(folder: Path, is_ours: bool, examples: int) -> "CompressionSummary | None":
    from tokenizers import Tokenizer

    from engram_hf.tokenization.vocabulary_compression import (
        TOKEN_MAP_FILE,
        build_token_map,
        read_token_map,
        summarize,
    )

    path = folder / TOKEN_MAP_FILE
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        token_map = build_token_map(tokenizer) if not (is_ours or path.exists()) else read_token_map(path, tokenizer)
    except Exception:  # The Rust library raises plain exceptions.
        return None
    return summarize(tokenizer, token_map, examples)

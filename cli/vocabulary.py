"""`engram compress`: what vocabulary compression does to a tokenizer."""

import argparse
from dataclasses import asdict
from typing import Any

from .output import print_json


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
    compress.set_defaults(run=run_compress)


def run_compress(options: argparse.Namespace) -> None:
    """Print the summary of `options.tokenizer`."""
    from engram_hf.tokenization import EngramTokenizer

    try:
        tokenizer = EngramTokenizer.from_pretrained(options.tokenizer)
    except (ValueError, OSError) as error:
        raise ValueError(f"{options.tokenizer} gives no tokenizer: {error}") from error
    summary = tokenizer.compression_summary(options.examples)
    if options.json:
        print_json({**asdict(summary), "reduction": round(summary.reduction, 4)})
        return
    print(summary)

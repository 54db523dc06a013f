"""`engram lookup`: the rows of each table that a text reads."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import check_model, read_whole_config, require_folder, require_tokenizer
from .output import print_json

if TYPE_CHECKING:
    import torch

    from engram_hf.configuration_engram import EngramConfig
    from engram_hf.hashing_engram import NgramHasher
    from engram_hf.plain_config_engram import StoredHash
    from engram_hf.table_format_engram import StoredTable


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    lookup = commands.add_parser(
        "lookup",
        help="which rows a text reads: tokens, compressed ids, n-grams, row ids and norms",
        description="Tokenize a text and show what each position reads from memory. Only those rows are read from disk.",
    )
    lookup.add_argument("folder", help="a saved model with its tokenizer, or a Hub id")
    lookup.add_argument("text", help="the text that is read")
    lookup.add_argument("--json", action="store_true", help="print one JSON document")
    lookup.set_defaults(run=run_lookup)


def run_lookup(options: argparse.Namespace) -> None:
    """Print the rows that `options.text` reads."""
    positions = look_up(require_folder(options.folder), options.text)
    if options.json:
        print_json(positions)
        return
    for index, position in enumerate(positions):
        same = " ".join(map(repr, position["same"]))
        print(f"{index}  {position['token']!r}  id {position['id']}, compressed {position['compressed']} ({same})")
        for ngram in position["ngrams"]:
            print(f"   {ngram['order']}-gram  {' '.join('(cut)' if t is None else repr(t) for t in ngram['tokens'])}")
            for layer in ngram["layers"]:
                rows = "  ".join(f"{row:,}" for row in layer["rows"])
                norms = "  ".join(f"{norm:.3g}" for norm in layer["norms"])
                print(f"      layer {layer['layer']:<3} rows {rows}   norms {norms}")


def look_up(folder: Path, text: str) -> list[dict[str, Any]]:
    """Return the ids of every token of `text`, and its n-grams with the rows that they read in every layer, one a
    head.

    A token of an n-gram is None where the n-gram begins before the text; the hash reads the pad id there.

    Raises:
        ValueError: the folder has no complete model with its tokenizer, or they do not belong together.
    """
    import torch

    from engram_hf.tokenization import EngramTokenizer

    config = read_whole_config(folder)
    stored_hash, tables = check_model(folder)
    hasher = _as_module(stored_hash, config)
    require_tokenizer(folder)
    tokenizer = EngramTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ValueError("The text has no tokens; give at least one word.")
    compressed = hasher.compress(torch.tensor([ids]))
    row_ids = hasher(compressed)[:, 0]
    norms = _row_norms(tables, row_ids)
    # The shape is [layer, position, order, head].
    by_head = (*row_ids.shape[:2], config.engram_max_ngram_size - 1, config.engram_n_heads)
    row_ids, norms = row_ids.view(by_head), norms.view(by_head)
    tokens = [str(tokenizer.decode([token])) for token in ids]
    return [
        {
            "token": tokens[at],
            "id": ids[at],
            "compressed": int(compressed[0, at]),
            "same": _same_tokens(tokenizer, hasher, int(compressed[0, at]), ids[at]),
            "ngrams": [
                {"order": order + 2, "tokens": _window(tokens, at, order + 2)}
                | {"layers": _reads(config, row_ids[:, at, order], norms[:, at, order])}
                for order in range(by_head[2])
            ],
        }
        for at in range(len(ids))
    ]


def _as_module(stored_hash: "StoredHash", config: "EngramConfig") -> "NgramHasher":
    import torch

    from engram_hf.hashing_engram import NgramHasher

    hasher = NgramHasher.from_config(config)
    arrays = {name: getattr(stored_hash, name) for name, _ in hasher.named_buffers()}
    hasher.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return hasher


def _window(tokens: list[str], at: int, order: int) -> list[str | None]:
    """Return the last `order` tokens up to position `at`; None before the beginning."""
    return [tokens[index] if index >= 0 else None for index in range(at - order + 1, at + 1)]


def _reads(config: "EngramConfig", row_ids: "torch.Tensor", norms: "torch.Tensor") -> list[dict[str, Any]]:
    """Return rows and norms `[L, H]` of one n-gram, by layer."""
    layers = zip(config.engram_layer_ids, row_ids.tolist(), norms.tolist(), strict=True)
    return [{"layer": layer, "rows": rows, "norms": values} for layer, rows, values in layers]


def _row_norms(tables: "dict[int, StoredTable]", row_ids: "torch.Tensor") -> "torch.Tensor":
    """Return the Euclidean norms `[L, S, T]` of the rows `row_ids` `[L, S, T]`."""
    import torch

    from engram_hf.row_sources_engram import MappedRows
    from engram_hf.table_engram import read_rows

    norms = []
    for table, rows in zip(tables.values(), row_ids, strict=True):
        norms.append(read_rows(MappedRows(table), rows).unflatten(-1, (-1, table.width)).norm(dim=-1))
    return torch.stack(norms)


def _same_tokens(tokenizer, hasher: "NgramHasher", compressed: int, token_id: int) -> list[str]:
    """Return up to eight tokens with this compressed id."""
    if hasher.token_map is None:
        return [str(tokenizer.decode([token_id]))]
    same = hasher.token_map.eq(compressed).nonzero().flatten()[:8].tolist()
    return [tokenizer.decode([token]) for token in same]

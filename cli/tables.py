"""`engram check`: table files, the format they follow and the model they belong to."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import is_model, read_config, read_stored_tables, require_folder
from .lookup import read_hasher

if TYPE_CHECKING:
    from engram_hf.hashing_engram import NgramHasher
    from engram_hf.table_format_engram import StoredTable


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    check = commands.add_parser(
        "check",
        help="verify tables against the table format and the model they belong to",
        description="Verify the table files of a folder (manifest, headers, row ranges, hash constants, scales, token map), "
        "and that they fit the model beside them.",
    )
    check.add_argument("folder", help="a saved model, or a folder with engram_tables.json")
    check.add_argument(
        "--rows", action="store_true", help="read all rows of table files too, for values that are no numbers"
    )
    check.set_defaults(run=run_check)


def run_check(options: argparse.Namespace) -> None:
    """Check `options.folder`: its table files, and that they fit the model if there is one."""
    from engram_hf.table_check_engram import check_folder
    from engram_hf.table_format_engram import MANIFEST_NAME

    folder = require_folder(options.folder)
    has_model, has_files = is_model(folder), (folder / MANIFEST_NAME).exists()
    if has_model:
        check_model(folder)
    if has_files or not has_model:
        print(*check_folder(folder, options.rows), sep="\n")
    if has_model:
        where = "" if has_files else "; tables lie among the weights"
        print(f"config, hash constants and tables belong together{where}")
    print(f"{folder}: all well")


def check_model(folder: Path) -> "tuple[NgramHasher, dict[int, StoredTable]]":
    """Compare the tables and the stored hash of the model in `folder` with its config.

    Returns:
        The hash, and the table of every layer that the config lists, in its order.

    Raises:
        ValueError: something is missing, or they are not of one model.
    """
    from engram_hf.table_format_engram import require_same_hash

    config, stored, tables = read_config(folder), read_stored_tables(folder), {}
    hasher = read_hasher(folder, config)
    for index, (layer, rows) in enumerate(zip(config.engram_layer_ids, config.engram_num_embeddings, strict=True)):
        if layer not in stored:
            raise ValueError(f"{folder} has no table for layer {layer}; complete it (a shard may be absent).")
        table = tables[layer] = stored[layer]
        if (table.num_rows, table.width) != (rows, config.engram_head_dim):
            raise ValueError(
                f"The table of layer {layer} has {table.num_rows} rows of {table.width} channels, but the config asks for "
                f"{rows} of {config.engram_head_dim}; tables and config.json are not of one model."
            )
        if table.description is not None:
            require_same_hash(table.description, hasher, index)
    return hasher, tables

"""`engram check`: check table files against the table format and the model that they belong to."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import check_model, is_model, require_folder, require_shards
from .output import print_json

if TYPE_CHECKING:
    from engram_hf.table_format_engram import StoredTable


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    check = commands.add_parser(
        "check",
        help="verify tables against the table format and the model they belong to",
        description="Verify the table files of a folder (manifest, headers, row ranges, hash constants, scales, token map), "
        "and that they fit the model beside them.",
    )
    check.add_argument("folder", help="a saved model, a folder with engram_tables.json, or a Hub id")
    check.add_argument(
        "--rows", action="store_true", help="read all rows of table files too, to find values that are no numbers"
    )
    check.add_argument("--json", action="store_true", help="print one JSON document")
    check.set_defaults(run=run_check, runs_no_model=True)


def run_check(options: argparse.Namespace) -> None:
    """Check `options.folder`: its table files, and whether they fit the model if there is one."""
    from engram_hf.table_check_engram import check_folder
    from engram_hf.table_format_engram import MANIFEST_NAME

    folder = require_folder(options.folder)
    has_model, has_files = is_model(folder), (folder / MANIFEST_NAME).exists()
    if has_model:
        require_shards(folder)
        _, tables = check_model(folder)
        if has_files:
            _require_one_of_each(folder, tables)
    found = [str(table) for table in check_folder(folder, options.rows)] if has_files or not has_model else []
    if has_model:
        where = "" if has_files else "; tables lie among the weights"
        found.append(f"config, hash constants and tables belong together{where}")
    if options.json:
        print_json({"folder": str(folder), "checked": found, "is_sound": True})
        return
    print(*found, f"{options.folder}: all well", sep="\n")


def _require_one_of_each(folder: Path, tables: "dict[int, StoredTable]") -> None:
    """Refuse table files that an earlier save left beside weights with tables in them."""
    from engram_hf.table_format_engram import MANIFEST_NAME, read_tables

    left = [layer for layer, table in read_tables(folder).items() if layer in tables and tables[layer] != table]
    if left:
        raise ValueError(
            f"{folder} has the tables of layers {left} twice: among the weights, which are what a model loads, and in files "
            f"of an earlier save; delete {MANIFEST_NAME} and the files it names."
        )

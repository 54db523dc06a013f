"""`engram check` and `engram quantize`: table files and the format they follow."""

import argparse
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import is_model, read_config, read_stored_tables, require_folder
from .lookup import read_hasher
from .output import columns, size

if TYPE_CHECKING:
    from engram_hf.residency_engram import MappedRows
    from engram_hf.table_format_engram import TableDescription

DTYPES = ("float8_e4m3fn", "int8")


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
    quantize = commands.add_parser(
        "quantize",
        help="store the tables of a model in one byte a number",
        description="Write a model, or a folder of tables, again with its float tables quantized, and report the error. "
        "Tables pass through memory a few megabytes at a time; the rest of a model is loaded and saved.",
    )
    quantize.add_argument("folder", help="a saved model, or a folder with engram_tables.json")
    quantize.add_argument("target", type=Path, help="new folder for the result")
    quantize.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="float8_e4m3fn: a power-of-two scale per 32 channels, as DeepSeek-V4.1 (default); int8: a scale per row",
    )
    quantize.set_defaults(run=run_quantize)


def run_check(options: argparse.Namespace) -> None:
    """Check `options.folder`: its table files, and that they fit the model if there is one."""
    from engram_hf.table_check_engram import check_folder
    from engram_hf.table_format_engram import MANIFEST_NAME

    folder = require_folder(options.folder)
    has_model, has_files = is_model(folder), (folder / MANIFEST_NAME).exists()
    if has_files or not has_model:
        print(*check_folder(folder, options.rows), sep="\n")
    if has_model:
        check_model(folder)
        print(
            f"config, hash constants and tables belong together{'' if has_files else '; tables lie among the weights'}"
        )
    print(f"{folder}: all well")


def check_model(folder: Path) -> None:
    """Compare the tables and the stored hash of the model in `folder` with its config.

    Raises:
        ValueError: something is missing, or they are not of one model.
    """
    config, tables = read_config(folder), read_stored_tables(folder)
    read_hasher(folder, config)
    for layer, rows in zip(config.engram_layer_ids, config.engram_num_embeddings, strict=True):
        if layer not in tables:
            raise ValueError(f"{folder} has no table for layer {layer}; complete it (a shard may be absent).")
        found = tables[layer].num_rows, tables[layer].width
        if found != (rows, config.engram_head_dim):
            raise ValueError(
                f"The table of layer {layer} has {found[0]} rows of {found[1]} channels, but the config asks for {rows} "
                f"of {config.engram_head_dim}; tables and config.json are not of one model."
            )


def run_quantize(options: argparse.Namespace) -> None:
    """Write `options.folder` to `options.target` with quantized tables."""
    from engram_hf.table_format_engram import MANIFEST_NAME

    folder, target = require_folder(options.folder), options.target
    if any((target / name).exists() for name in ("config.json", MANIFEST_NAME)):
        raise ValueError(f"{target} holds a model or tables already; name a new folder.")
    (quantize_model if is_model(folder) else quantize_folder)(folder, target, options.dtype)
    print(f"{target}: written")


def quantize_model(folder: Path, target: Path, dtype: str) -> None:
    """Save the model in `folder`, and its tokenizer, to `target` with tables of `dtype`.

    Raises:
        ValueError: there is no model with float tables in it, or they cannot have this dtype.
    """
    from engram_hf import EngramForCausalLM, EngramModel, EngramTokenizer
    from engram_hf.residency_engram import MappedRows
    from engram_hf.table_format_engram import describe_table, read_tables

    config = read_config(folder)
    model_class = EngramModel if config.architectures == ["EngramModel"] else EngramForCausalLM
    model = model_class.from_pretrained(folder, dtype="auto", engram_residency="mapped")
    hasher = model.base_model.hashing
    tables = {layer: memory.table for layer, memory in model.base_model.memories().items()}
    sources = {}
    for index, (layer, table) in enumerate(tables.items()):
        stored = table.source.stored
        sources[layer] = table.source, describe_table(hasher, index, width=stored.width, dtype=stored.dtype)
    _write_quantized(sources, target, dtype)
    for layer, stored in read_tables(target).items():
        tables[layer].table_dtype = dtype
        tables[layer].mount(MappedRows(stored))
    model.config.engram_table_dtype = dtype
    model.save_pretrained(target)
    if (folder / "tokenizer_config.json").exists():
        EngramTokenizer.from_pretrained(folder).save_pretrained(target)


def quantize_folder(folder: Path, target: Path, dtype: str) -> None:
    """Write the tables of a folder without a model to `target` with `dtype`, and the token map beside them.

    Raises:
        ValueError: there are no float tables in it, or they do not say how they are hashed.
    """
    from engram_hf.residency_engram import MappedRows
    from engram_hf.table_format_engram import TOKEN_MAP_NAME

    sources = {}
    for layer, stored in read_stored_tables(folder).items():
        if stored.description is None:
            raise ValueError(
                f"The table of layer {layer} in {folder} does not describe its hash; name a model's folder."
            )
        sources[layer] = MappedRows(stored), replace(stored.description, tensors=stored.parts[0].names)
    _write_quantized(sources, target, dtype)
    if (folder / TOKEN_MAP_NAME).exists():
        shutil.copyfile(folder / TOKEN_MAP_NAME, target / TOKEN_MAP_NAME)


def _write_quantized(sources: "dict[int, tuple[MappedRows, TableDescription]]", target: Path, dtype: str) -> None:
    """Write a file for every layer, then the manifest, and print the error each quantization makes."""
    from engram_hf.table_files_engram import manifest_entry, quantize_table, table_file_name, write_manifest
    from engram_hf.table_format_engram import file_description, read_header

    target.mkdir(parents=True, exist_ok=True)
    entries, report = {}, []
    for layer, (source, description) in sources.items():
        name = table_file_name(layer)
        error = quantize_table(source, target / name, description, dtype)
        written = file_description(read_header(target / name))
        entries[layer] = manifest_entry([(name, written.rows, written.tensors)])
        sizes = size(source.stored.size), size((target / name).stat().st_size)
        report.append([layer, source.num_rows, *sizes, f"{error.relative:.2%}", f"{error.largest:.3g}"])
    write_manifest(target, entries)
    print(columns(["layer", "rows", "before", "after", "relative error", "largest error"], report))

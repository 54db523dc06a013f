"""`engram quantize`: copy a model, or a folder of tables, with its tables in eight, four or two bits a number."""

import argparse
import contextlib
import copy
import importlib
import itertools
import math
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .folders import (
    check_model,
    find_index,
    is_model,
    read_stored_tables,
    read_whole_config,
    require_folder,
    require_shards,
    weight_files,
)
from .measurement import Loss, measure, read_blocks
from .output import columns, print_json, size

if TYPE_CHECKING:
    from engram_hf.row_sources_engram import MappedRows
    from engram_hf.safetensors_engram import FileHeader, TensorSpan
    from engram_hf.table_format_engram import StoredTable, TableDescription
    from engram_hf.table_writer_engram import QuantizationError, StoredRounding

DTYPES = {
    "float8_e4m3fn": "a power-of-two scale per 32 channels, as DeepSeek-V4.1 (default)",
    "int8": "a scale per row",
    "int4": "16 levels and a scale per row, by least squares",
    "int2": "4 levels and a scale per row, by least squares",
    "nvfp4": "4-bit floats with a float8 scale per 16 channels, as compressed-tensors has them",
}
# Tables are written in this folder inside the target, so that a killed command can continue with them.
WORK_NAME = ".engram-quantize"
# Tables of this many bytes in all are quantized by compiled code: compiling takes some seconds, which smaller ones do not
# regain.
COMPILED_BYTES = 2 << 30
# This manifest describes the source of every file of a conversion; after quantization, it would be wrong.
CONVERSION_RECORD = "conversion_manifest.json"


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    quantize = commands.add_parser(
        "quantize",
        help="store the tables of a model in eight, four or two bits a number",
        description="Write a model, or a folder of tables, again with its tables quantized, and report the error. Tables of floats "
        "or of eight bits pass through memory a few megabytes at a time; all other weights are linked, or copied where a file "
        "holds tables too. If it is interrupted, the same command goes on where it was.",
    )
    quantize.add_argument("folder", help="a saved model, a folder with engram_tables.json, or a Hub id")
    quantize.add_argument("target", type=Path, help="new folder for the result")
    quantize.add_argument(
        "--dtype",
        choices=DTYPES,
        default=next(iter(DTYPES)),
        help="; ".join(f"{dtype}: {what}" for dtype, what in DTYPES.items()),
    )
    quantize.add_argument(
        "--measure",
        type=Path,
        metavar="FILE",
        help="a text that the model was not trained on: print its loss before, after, and without memory",
    )
    quantize.add_argument("--json", action="store_true", help="print one JSON document")
    quantize.set_defaults(run=run_quantize)


class QuantizedTable(NamedTuple):
    """The sizes and the error of a quantized table.

    Args:
        layer: decoder layer, counted from 0.
        rows: rows of the table.
        before: bytes of its tensors.
        after: bytes of its new file.
        error: the error of quantization.
    """

    layer: int
    rows: int
    before: int
    after: int
    error: "QuantizationError"


def run_quantize(options: argparse.Namespace) -> None:
    """Write `options.folder` to `options.target` with quantized tables."""
    from engram_hf.claimed_saving_engram import ClaimedFolderWriter
    from engram_hf.claiming_engram import FolderClaim
    from engram_hf.table_format_engram import MANIFEST_NAME

    folder, target = require_folder(options.folder), options.target
    blocks = None if options.measure is None else read_blocks(folder, options.measure)
    with (
        FolderClaim(target),
        ClaimedFolderWriter(target) as written,
        _kept_for_another_try(target / WORK_NAME) as work,
    ):
        if any((target / name).exists() for name in ("config.json", MANIFEST_NAME)):
            raise ValueError(f"{target} holds a model or tables already; name a new folder.")
        if is_model(folder):
            tables = quantize_model(folder, written.path, work, options.dtype, left_out=target)
        else:
            tables = quantize_folder(folder, written.path, work, options.dtype)
        written.publish(last=MANIFEST_NAME, is_claimed=True)
        shutil.rmtree(work)
    if not options.json:
        print(_for_people(tables), f"{target}: written", sep="\n")
    loss = None if blocks is None else measure(folder, target, blocks)
    if options.json:
        print_json(_for_programs(options, tables, loss))
    elif loss is not None:
        print(f"\n{loss}")


def _for_people(tables: "list[QuantizedTable]") -> str:
    rows = [
        [
            table.layer,
            table.rows,
            size(table.before),
            size(table.after),
            f"{table.error.relative:.2%}",
            f"{table.error.largest:.3g}",
        ]
        for table in tables
    ]
    report = columns(["layer", "rows", "before", "after", "relative error", "largest error"], rows)
    sampled = [table for table in tables if table.error.rows < table.rows]
    if sampled:
        compared, rows = (sum(some) for some in zip(*((t.error.rows, t.rows) for t in sampled), strict=True))
        report += f"\nThe errors of large tables are those of {compared:,} of {rows:,} rows, evenly spread."
    return f"{report}\n\n{_histogram({table.layer: table.error.histogram for table in tables})}"


def _for_programs(options: argparse.Namespace, tables: "list[QuantizedTable]", loss: Loss | None) -> dict[str, Any]:
    from engram_hf.table_writer_engram import ERROR_EDGES

    found = [
        {
            "layer": table.layer,
            "rows": table.rows,
            "rows_compared": table.error.rows,
            "bytes_before": table.before,
            "bytes": table.after,
            "relative_error": table.error.relative,
            "largest_error": table.error.largest,
            "rows_by_relative_error": table.error.histogram,
        }
        for table in tables
    ]
    return {
        "folder": str(options.folder),
        "target": str(options.target),
        "dtype": options.dtype,
        "relative_error_edges": [0, *ERROR_EDGES],
        "tables": found,
        "loss": None if loss is None else {**loss._asdict(), "lost_share_of_worth": loss.share},
    }


@contextlib.contextmanager
def _kept_for_another_try(work: Path) -> Iterator[Path]:
    """Yield the folder of incomplete tables; remove it after an error in the input, which a second try cannot repair."""
    try:
        yield work
    except ValueError:
        shutil.rmtree(work, ignore_errors=True)
        raise
    except OSError as error:
        if not work.exists():
            raise
        message = f"{error.strerror}; what is done is kept in {work}, and the same command goes on with it"
        raise OSError(error.errno, message, error.filename) from error


def quantize_model(folder: Path, target: Path, work: Path, dtype: str, left_out: Path) -> list[QuantizedTable]:
    """Write the model in `folder` to `target` with tables of `dtype`, and all other files beside it.

    The weights of the backbone are linked or copied by the system and not read.

    Args:
        work: folder on the same disk, in which tables are written.
        left_out: files in this folder are not part of the model, even if it lies inside of `folder`.

    Raises:
        ValueError: the folder has no model with float tables, or the tables cannot have this dtype.
    """
    from engram_hf.row_sources_engram import MappedRows
    from engram_hf.safetensors_engram import read_header, read_json, write_json
    from engram_hf.saving_engram import is_table_file, record_digests, write_manifest
    from engram_hf.table_format_engram import describe_table

    require_shards(folder)
    hasher, tables = check_model(folder)
    sources = {}
    for index, (layer, stored) in enumerate(tables.items()):
        sources[layer] = MappedRows(stored), describe_table(hasher, index, width=stored.width, dtype=stored.dtype)
    moved = _table_tensors(tables)
    # Table files that the model does not use are from an earlier save.
    paths = [path for path in weight_files(folder) if path in moved or not is_table_file(path.name)]
    shards = [read_header(path) for path in paths]
    total = sum(span.size for shard in shards for span in shard.tensors.values())
    with _progress(total + _read_again(sources, dtype)) as bar:
        entries, report = _write_quantized(sources, target, work, dtype, bar.update)
        for shard in shards:
            _pass_on_weights(shard, target, moved.get(shard.path, {}), bar.update)
    _copy_documents(folder, target, left_out)
    _renew_code(target)
    _rewrite_card(folder, target, dtype)
    weight_index = find_index(folder)
    if weight_index is not None:
        write_json(target / weight_index.name, _index_without(weight_index, moved))
    write_manifest(target, entries)
    record_digests(target)
    write_json(
        target / "config.json", {**read_json(folder / "config.json", constants=True), "engram_table_dtype": dtype}
    )
    return report


def quantize_folder(folder: Path, target: Path, work: Path, dtype: str) -> list[QuantizedTable]:
    """Write the tables of a folder without a model to `target` with `dtype`, and the token map beside them.

    Args:
        work: folder on the same disk, in which tables are written.

    Raises:
        ValueError: the folder has no float tables, or their files lack the hash.
    """
    from engram_hf.row_sources_engram import MappedRows
    from engram_hf.saving_engram import write_manifest
    from engram_hf.table_format_engram import TOKEN_MAP_NAME

    sources = {}
    for layer, stored in read_stored_tables(folder).items():
        if stored.description is None:
            raise ValueError(
                f"The table of layer {layer} in {folder} does not describe its hash; name a model's folder."
            )
        sources[layer] = MappedRows(stored), replace(stored.description, tensors=stored.parts[0].names)
    with _progress(sum(source.stored.size for source, _ in sources.values()) + _read_again(sources, dtype)) as bar:
        entries, report = _write_quantized(sources, target, work, dtype, bar.update)
    if (folder / TOKEN_MAP_NAME).exists():
        shutil.copyfile(folder / TOKEN_MAP_NAME, target / TOKEN_MAP_NAME)
    write_manifest(target, entries)
    return report


def _progress(total: int) -> Any:
    from tqdm import tqdm

    # With `disable=None`, no bar is shown unless the error stream is a terminal.
    return tqdm(total=total, unit="B", unit_scale=True, disable=None)


def _read_again(sources: "dict[int, tuple[MappedRows, TableDescription]]", dtype: str) -> int:
    """Return the bytes of tables that are read once more, first, to find the scale of the whole table."""
    return sum(source.stored.size for source, _ in sources.values()) if dtype == "nvfp4" else 0


def _write_quantized(
    sources: "dict[int, tuple[MappedRows, TableDescription]]",
    target: Path,
    work: Path,
    dtype: str,
    advance: Callable[[int], object],
) -> tuple[dict[int, dict], list[QuantizedTable]]:
    """Write a file for every layer; return their entries of the manifest, and size and error of each table."""
    from engram_hf.safetensors_engram import read_header
    from engram_hf.saving_engram import manifest_entry, table_file_name
    from engram_hf.table_format_engram import file_description
    from engram_hf.table_writer_engram import quantize_table

    target.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    entries, report = {}, []
    compiles = sum(source.stored.size for source, _ in sources.values()) >= COMPILED_BYTES and _has_numba()
    for layer, (source, description) in sources.items():
        name = table_file_name(layer)
        rounding = _compiled_rounding(description, dtype) if compiles else None
        error = quantize_table(
            source, work / name, description, dtype, advance, work / f"{layer}.json", rounding=rounding
        )
        # The file keeps both names until the folder is complete, because a later step may also fail.
        _link_or_move(work / name, target / name)
        written = file_description(read_header(target / name))
        entries[layer] = manifest_entry([(name, written.rows, written.tensors)])
        report.append(
            QuantizedTable(layer, source.num_rows, source.stored.size, (target / name).stat().st_size, error)
        )
    return entries, report


def _has_numba() -> bool:
    """Return whether numba is installed; name it otherwise."""
    try:
        importlib.import_module("numba")
    except ImportError:
        print("With numba (pip install 'engram-hf[quantize]'), large tables take less time.", file=sys.stderr)
        return False
    return True


def _compiled_rounding(description: "TableDescription", dtype: str) -> "StoredRounding | None":
    """Return compiled code for a table; None for stored rows that have none."""
    from engram_hf.convert_scripts.compiled_quantization import CompiledRounding, is_compilable

    if not is_compilable(description.dtype, description.width):
        return None
    return CompiledRounding(description.dtype, dtype, description.width)


def _link_or_move(path: Path, target: Path) -> None:
    try:
        target.hardlink_to(path)
    except OSError:  # The file system has no links.
        path.replace(target)


def _histogram(counts: dict[int, list[int]]) -> str:
    """Return a histogram: the share of each layer's rows by their relative error."""
    from engram_hf.table_writer_engram import ERROR_EDGES

    edges = [f"{edge:.3g}" for edge in (0, *(100 * edge for edge in ERROR_EDGES))]
    labels = [f"{low} to {high}%" for low, high in itertools.pairwise(edges)] + [f"{edges[-1]}% and more"]
    rows = []
    for label, *some in zip(labels, *counts.values(), strict=True):
        shares = [count / max(1, sum(all_counts)) for count, all_counts in zip(some, counts.values(), strict=True)]
        if any(some):
            rows.append([label, *(f"{share:6.1%} {'#' * round(20 * share)}" for share in shares)])
    return columns(["relative error of a row", *(f"layer {layer}" for layer in counts)], rows)


def _table_tensors(tables: "dict[int, StoredTable]") -> "dict[Path, dict[str, TensorSpan]]":
    """Return the tensors that hold tables, by file and name."""
    found: dict[Path, dict[str, Any]] = {}
    for part in (part for table in tables.values() for part in table.parts):
        found.setdefault(part.file.path, {}).update({span.name: span for span in part.spans.values()})
    return found


def _pass_on_weights(
    shard: "FileHeader", target: Path, moved: Collection[str], advance: Callable[[int], object]
) -> None:
    """Link or copy the tensors of a file that have not `moved` to `target`; the bytes do not pass through this
    process.
    """
    from engram_hf.safetensors_engram import FileWriter, header_bytes, link_or_copy

    kept = sorted((s for s in shard.tensors.values() if s.name not in moved), key=lambda span: span.offset)
    with shard.path.open("rb") as source:
        if not moved:
            link_or_copy(source.fileno(), shard.path, target / shard.path.name)
        elif kept:
            head = header_bytes(((span.name, span.dtype, span.shape) for span in kept), shard.metadata)
            with FileWriter(target / shard.path.name, head) as writer:
                for span in kept:
                    writer.copy(span.name, span, source.fileno())
    advance(sum(span.size for span in kept))


def _index_without(path: Path, moved: "Mapping[Path, Mapping[str, TensorSpan]]") -> dict[str, Any]:
    """Return the index of a checkpoint's shards, without the tensors that have `moved`."""
    from engram_hf.safetensors_engram import read_json, read_weight_map

    index, weight_map = read_json(path), read_weight_map(path)
    tables = {file: moved.get(path.parent / file, {}) for file in weight_map.values()}
    gone = {name: tables[file][name] for name, file in weight_map.items() if name in tables[file]}
    metadata = index.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    for total, count in (("total_size", lambda span: span.size), ("total_parameters", lambda s: math.prod(s.shape))):
        if isinstance(metadata.get(total), int):
            metadata[total] -= sum(map(count, gone.values()))
    return {**index, "metadata": metadata, "weight_map": {n: file for n, file in weight_map.items() if n not in gone}}


def _copy_documents(folder: Path, target: Path, left_out: Path) -> None:
    """Copy the files that are neither weights nor rewritten: tokenizer, code, templates, model card, licence."""
    from engram_hf.table_format_engram import MANIFEST_NAME

    written = {"config.json", MANIFEST_NAME, CONVERSION_RECORD}
    weights = set(weight_files(folder))
    for path in _visible_files(folder):
        is_written = path.parent == folder and (path.name in written or path.name.endswith(".safetensors.index.json"))
        if not is_written and path not in weights and not path.resolve().is_relative_to(left_out.resolve()):
            copied = target / path.relative_to(folder)
            copied.parent.mkdir(parents=True, exist_ok=True)
            # Documents are not linked, because people edit them in place.
            shutil.copyfile(path, copied)


def _renew_code(target: Path) -> None:
    """Replace copied remote code: an older version may not be able to read the new rows."""
    from engram_hf.convert_scripts.remote_code import code_files

    for entry in ("modeling_engram", "auto_deepseek_v41"):
        if (target / f"{entry}.py").exists():
            for path in code_files(entry):
                shutil.copyfile(path, target / path.name)


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yield all files below `folder` except hidden ones and the checkpoints of a trainer, which are models of their
    own.
    """
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith((".", "checkpoint-")) for part in parts):
            yield path


def _rewrite_card(folder: Path, target: Path, dtype: str) -> None:
    """Update the lines about tables in a model card that `push_to_hub` wrote; lines that a person wrote stay."""
    from engram_hf.card_engram import model_card

    path, before = target / "README.md", read_whole_config(folder)
    if not path.exists():
        return
    # The file is read as bytes, because it may have any encoding and line ends.
    after, text = copy.deepcopy(before), path.read_bytes()
    after.engram_table_dtype = dtype
    for old, new in zip(model_card(before).splitlines(), model_card(after).splitlines(), strict=True):
        text = text if old == new else text.replace(old.encode(), new.encode())
    path.write_bytes(text)

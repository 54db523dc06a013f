"""Table files: writing them in the format, quantizing them, and passing them on without reading them."""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .file_writer_engram import FileWriter, can_link, link_or_copy, write_json
from .safetensors_engram import header_bytes
from .table_engram import dequantize_rows, quantize_rows
from .table_format_engram import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    METADATA_KEY,
    NAMES,
    PAGE,
    ROW_FORMATS,
    StoredTable,
    TableDescription,
)

# Bytes of rows held at once while a table is converted.
_STEP_BYTES = 4 << 20


def table_file_name(layer: int, part: int = 0, parts: int = 1) -> str:
    """`engram-layer-00001.safetensors`; of several parts, `engram-layer-00001-00000-of-00002.safetensors`."""
    return f"engram-layer-{layer:05d}{f'-{part:05d}-of-{parts:05d}' if parts > 1 else ''}.safetensors"


def table_file_names(stored: StoredTable) -> list[str]:
    """What the files of a table's parts are called in a model folder."""
    return [table_file_name(stored.layer, index, len(stored.parts)) for index in range(len(stored.parts))]


class TableWriter(FileWriter):
    """Writes one table file, row range by row range.

    Args:
        path: of the file.
        description: of the table, with the `rows` of this file. Its scales follow its rows.
    """

    def __init__(self, path: str | os.PathLike, description: TableDescription):
        self.description = description
        super().__init__(path, _head(description))

    def write(self, first: int, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Write rows from table row `first` on, as stored: `values` `[n, W]`, `scale` `[n, W / C]`."""
        row = first - self.description.rows[0]
        for kind, tensor in (("weight", values), ("scale", scale)):
            if tensor is not None:
                begin = self.header.tensors[self.description.tensors[kind]].offset
                data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                self.write_at(begin + row * data[0].nbytes, memoryview(data).cast("B"))


def _head(d: TableDescription) -> bytes:
    """The header of a table file, padded to a page."""
    count = d.rows[1] - d.rows[0]
    tensors = [(d.tensors["weight"], d.dtype, (count, d.width))]
    if d.scale_dtype:
        tensors.append((d.tensors["scale"], d.scale_dtype, (count, d.width // d.scale_block)))
    return header_bytes(tensors, {METADATA_KEY: d.to_json()}, PAGE)


def write_manifest(folder: str | os.PathLike, entries: dict[int, dict]) -> None:
    """Write `engram_tables.json`, complete or not at all; write it last.

    Args:
        entries: by layer; see [`manifest_entry`].
    """
    tables = {str(layer): entries[layer] for layer in sorted(entries)}
    write_json(Path(folder) / MANIFEST_NAME, {"format_version": FORMAT_VERSION, "tables": tables})


def manifest_entry(
    parts: Iterable[tuple[str, tuple[int, int], dict[str, str]]], description: TableDescription | None = None
) -> dict:
    """One layer's entry of a manifest.

    Args:
        parts: file name, `(first, stop)` and tensor names by `"weight"` and `"scale"` of every part, in row order.
        description: for files that do not describe themselves.
    """
    entry: dict = {}
    for file, rows, names in parts:
        for kind, tensor in names.items():
            entry.setdefault(kind, []).append({"file": file, "tensor": tensor, "rows": list(rows)})
    if description is not None:
        members = asdict(description)
        entry["description"] = {name: members[name] for name in members if name not in ("rows", "tensors")}
    return entry


@dataclass
class QuantizationError:
    """What quantizing a table changed.

    Args:
        rows: rows compared.
        largest: largest difference of a channel.
        relative: root of the summed squared differences over that of the summed squares; 0 for a table of zeros.
    """

    rows: int = 0
    largest: float = 0.0
    squares: float = 0.0
    squared_differences: float = 0.0

    @property
    def relative(self) -> float:
        return (self.squared_differences / self.squares) ** 0.5 if self.squares else 0.0

    def add(self, rows: torch.Tensor, decoded: torch.Tensor) -> None:
        """Count float32 rows and what became of them."""
        difference = rows - decoded
        self.rows += len(rows)
        self.largest = max(self.largest, difference.abs().max().item())
        self.squares += rows.square().sum(dtype=torch.float64).item()
        self.squared_differences += difference.square().sum(dtype=torch.float64).item()


def quantize_table(
    source,
    path: str | os.PathLike,
    description: TableDescription,
    table_dtype: str,
    advance: Callable[[int], object] = lambda count: None,
) -> QuantizationError:
    """Write a float table to one file as float8 or int8, a few megabytes at a time.

    Args:
        source: what reads the rows; see `table_engram.RowSource`.
        description: of the table as it is.
        table_dtype: `"float8_e4m3fn"`, by the rule of the release, or `"int8"`.
        advance: told after every step how many bytes of the source it has read.

    Returns:
        The difference it makes.

    Raises:
        ValueError: the table is quantized already, or cannot have this dtype, or holds NaN.
    """
    if description.scale_dtype is not None:
        raise ValueError(
            f"The table of layer {description.layer} is {description.dtype} already; quantize float rows."
        )
    target, error = _quantized(description, table_dtype), QuantizationError()
    step = max(1, _STEP_BYTES // (4 * description.width))
    with TableWriter(path, target) as writer:
        for first in range(*description.rows, step):
            values, _ = source.read(first, min(first + step, description.rows[1]))
            rows = values.to(torch.float32)
            quantized, scale = quantize_rows(rows, table_dtype)
            error.add(rows, dequantize_rows(quantized, scale))
            writer.write(first, quantized, scale)
            advance(values.nbytes)
    return error


def _quantized(description: TableDescription, table_dtype: str) -> TableDescription:
    dtype = NAMES[getattr(torch, table_dtype)]
    scale_dtype, block = ROW_FORMATS[dtype]
    name = description.tensors["weight"]
    return replace(
        description,
        dtype=dtype,
        scale_dtype=scale_dtype,
        scale_block=block or description.width,
        tensors={"weight": name, "scale": f"{name.removesuffix('weight')}scale"},
    )


def can_be_linked(stored: StoredTable, files: dict[Path, int], folder: Path) -> bool:
    """Whether `pass_on` has nothing to copy."""
    return stored.has_own_files and all(can_link(source, path, folder) for path, source in files.items())


def pass_on(
    stored: StoredTable,
    files: dict[Path, int],
    folder: Path,
    description: TableDescription,
    symbolic: bool = False,
) -> dict:
    """Make an unchanged table part of `folder`; returns its entry of the manifest.

    Files that hold nothing but this table are linked, or copied whole. Out of files that hold other tensors too, the
    table is copied into files of its own.

    Args:
        files: open file of every path in `stored`.
        description: of the table, for files that are written.
        symbolic: as in [`link_or_copy`].
    """
    names = table_file_names(stored)
    sources = [files[part.file.path] for part in stored.parts]
    ranges = [(part.first, part.stop) for part in stored.parts]
    if stored.has_own_files:
        for part, name, source in zip(stored.parts, names, sources, strict=True):
            link_or_copy(source, part.file.path, folder / name, symbolic)
        tensors = [part.names for part in stored.parts]
        self_describing = METADATA_KEY in stored.parts[0].file.metadata
        return manifest_entry(zip(names, ranges, tensors, strict=True), None if self_describing else description)
    for part, name, source in zip(stored.parts, names, sources, strict=True):
        with TableWriter(folder / name, description.with_rows(part.first, part.stop)) as writer:
            for kind, span in part.spans.items():
                writer.copy(description.tensors[kind], span, source)
    return manifest_entry((name, rows, description.tensors) for name, rows in zip(names, ranges, strict=True))

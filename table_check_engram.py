"""Check a folder of table files against the whole format: `python -m engram_hf.table_check_engram FOLDER`."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .safetensors_engram import FileFormatError, TensorSpan, read_header, reading
from .table_format_engram import (
    PAGE,
    TOKEN_MAP_NAME,
    StoredTable,
    TableDescription,
    TableFormatError,
    covers_token_map,
    read_tables,
    token_map_digest,
)

_STEP_ROWS = 65_536
# The numbers of a file are viewed as these types: NumPy has none for 8-bit floats, nor for bfloat16.
_ARRAY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1", "F8_E4M3": "u1", "F8_E8M0": "u1"}


@dataclass(frozen=True)
class TableReport:
    """The result for one layer's table.

    Args:
        table: the stored table.
        aligned: whether its rows begin at pages.
        token_map: `"checked"`, `"absent"` (the folder has no token map), `"unknown"` (the table does not name one) or
            `"none"` (ids are not compressed).
    """

    table: StoredTable
    aligned: bool
    token_map: str

    def __str__(self) -> str:
        table = self.table
        files = f"{len(table.parts)} file{'s' if len(table.parts) > 1 else ''}"
        alignment = "" if self.aligned else ", not page-aligned"
        hashing = "hash not described" if table.description is None else f"token map {self.token_map}"
        return (
            f"layer {table.layer}: {table.num_rows:,} rows x {table.width} {table.dtype}, {table.size / 1e9:.3f} GB in "
            f"{files}{alignment}, {hashing}"
        )


def check_folder(folder: str | Path, rows: bool = False) -> list[TableReport]:
    """Check the manifest of `folder`, every file it names, all scales and the token map.

    Args:
        rows: read all rows too, to find values that are not numbers; this takes as long as reading the files.

    Raises:
        FileFormatError: the message names the fault.
    """
    folder = Path(folder)
    token_map = read_token_map(folder / TOKEN_MAP_NAME)
    reports = []
    for table in read_tables(folder).values():
        token_map_state = _check_token_map(table.description, token_map, folder)
        _check_numbers(table, rows)
        aligned = all(part.weight.offset % PAGE == 0 for part in table.parts)
        reports.append(TableReport(table, aligned, token_map_state))
    return reports


def read_token_map(path: Path) -> np.ndarray | None:
    """Return the checked token map, int32 `[ids]`; None if there is no such file.

    Raises:
        FileFormatError: it is damaged, or breaks a rule of the format.
    """
    if not os.path.lexists(path):  # A broken link does not count as an absent map.
        return None
    header = read_header(path)
    span = header.tensors.get("token_map")
    if header.metadata.get("format_version") != "1":
        found = header.metadata.get("format_version")
        raise TableFormatError(f"{path} has format_version {found!r}, expected '1'; upgrade engram-hf.")
    if span is None or span.dtype != "I32" or len(span.shape) != 1 or span.size == 0:
        raise TableFormatError(f"{path} has no vector `token_map` of I32; save the tokenizer again.")
    with reading(path), path.open("rb") as file:
        file.seek(span.offset)
        values = np.frombuffer(_read(file, path, span.size), dtype="<i4")
    if token_map_digest(values) != header.metadata.get("map_sha256") or values.min() < 0:
        raise TableFormatError(
            f"{path} is damaged: its token map has another digest than it says, or negative ids; fetch it again."
        )
    return values


def _check_token_map(described: TableDescription | None, token_map: np.ndarray | None, folder: Path) -> str:
    if described is None:
        return "unknown"
    if described.token_map_sha256 is None:
        return "none"
    if token_map is None:
        return "absent"
    outside = (token_map[: described.token_map_ids] >= described.vocab_size).any()
    if outside or not covers_token_map(described, token_map):
        raise TableFormatError(
            f"The table of layer {described.layer} was written for another token map than {folder / TOKEN_MAP_NAME}; put "
            "the one back that belongs to the tables."
        )
    return "checked"


def _check_numbers(table: StoredTable, rows: bool) -> None:
    for part in table.parts:
        for kind in ("weight", "scale") if rows else ("scale",):
            for first, numbers in _scan(part.spans[kind]) if kind in part.spans else ():
                wrong = _invalid(numbers, part.spans[kind].dtype, kind).any(-1)
                if wrong.any():
                    row = part.first + first + int(wrong.argmax())
                    raise TableFormatError(
                        f"Row {row} of layer {table.layer} has a {kind} that is no valid number ({_RULES[kind]}); write the "
                        "table again."
                    )


def _scan(span: TensorSpan) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the numbers `[n, C]` of some rows at a time, as arrays of `_ARRAY_DTYPES`, and the first of these rows."""
    with reading(span.path), span.path.open("rb") as file:
        file.seek(span.offset)
        for first in range(0, span.shape[0], _STEP_ROWS):
            some = span.rows(first, min(first + _STEP_ROWS, span.shape[0]))
            numbers = np.frombuffer(_read(file, span.path, some.size), dtype=_ARRAY_DTYPES[span.dtype])
            yield first, numbers.reshape(some.shape)


def _read(file: BinaryIO, path: Path, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise FileFormatError(f"{path} became shorter while it was read; fetch it again.")
    return data


_RULES = {"weight": "NaN, infinite, or -128 as int8", "scale": "NaN, infinite or negative"}


def _invalid(numbers: np.ndarray, dtype: str, kind: str) -> np.ndarray:
    """Return where `numbers` `[n, C]`, read as `_ARRAY_DTYPES` says, break the format's rules."""
    if dtype == "U8":  # A byte has several channels; every byte is valid.
        return np.zeros_like(numbers, dtype=bool)
    if dtype == "I8":
        return numbers == -128
    if dtype == "F8_E8M0":
        return numbers == 0xFF
    if dtype == "F8_E4M3":
        wrong, is_negative = numbers & 0x7F == 0x7F, numbers > 0x80
    elif dtype == "BF16":
        wrong, is_negative = numbers & 0x7F80 == 0x7F80, numbers > 0x8000
    else:
        wrong, is_negative = ~np.isfinite(numbers), numbers < 0
    return wrong | is_negative if kind == "scale" else wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status is 1 if the folder breaks the format."""
    parser = argparse.ArgumentParser(prog="python -m engram_hf.table_check_engram", description=__doc__)
    parser.add_argument("folder", help="a folder with engram_tables.json")
    parser.add_argument("--rows", action="store_true", help="read all rows, too")
    options = parser.parse_args(arguments)
    try:
        reports = check_folder(options.folder, options.rows)
        print(*reports, sep="\n")
        print(f"{options.folder}: {len(reports)} tables, {sum(r.table.size for r in reports) / 1e9:.3f} GB, all well.")
        sys.stdout.flush()
    except (FileFormatError, OSError) as error:
        # It may quote names from files; characters that move a terminal's cursor are left out.
        print("".join(letter if letter.isprintable() else "?" for letter in str(error)), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Print results of commands: aligned columns for people, JSON for programs."""

import json
from collections.abc import Iterable, Sequence
from typing import Any


def columns(titles: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return rows under their titles, padded to equal width; numbers are aligned to the right."""
    rows = [list(row) for row in rows]
    cells = [
        list(titles),
        *[[f"{cell:,}" if isinstance(cell, int) else printable(cell) for cell in row] for row in rows],
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_number = [all(isinstance(cell, int) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        )
        for line in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def printable(value: Any) -> str:
    """Return a text that may quote names from files, on one line and without characters that move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(value).split()))


def size(count: int) -> str:
    """Return a number of bytes, to three digits: `1.23 GB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))

"""Writing new table files: row range by row range, and quantized."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .safetensors_engram import EngramError, FileWriter
from .saving_engram import table_head
from .table_engram import QUANTIZED_FORMATS, SAFETENSORS_NAMES, dequantize_rows, quantize_rows
from .table_format_engram import TableDescription

# Bytes of rows held at once while a table is converted.
_STEP_BYTES = 4 << 20


class TableWriter(FileWriter):
    """Writes one table file, row range by row range.

    Args:
        path: of the file.
        description: of the table, with the `rows` of this file. Its scales follow its rows.
    """

    def __init__(self, path: str | os.PathLike, description: TableDescription):
        self.description = description
        super().__init__(path, table_head(description))

    def write(self, first: int, values: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Write rows from table row `first` on, as stored: `values` `[n, W]`, `scale` `[n, W / C]`."""
        row = first - self.description.rows[0]
        for kind, tensor in (("weight", values), ("scale", scale)):
            if tensor is not None:
                begin = self.header.tensors[self.description.tensors[kind]].offset
                data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                self.write_at(begin + row * data[0].nbytes, memoryview(data).cast("B"))


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
        raise EngramError(
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
    row_format = QUANTIZED_FORMATS[table_dtype]
    name = description.tensors["weight"]
    return replace(
        description,
        dtype=SAFETENSORS_NAMES[row_format.dtype],
        scale_dtype=SAFETENSORS_NAMES[row_format.scale_dtype],
        scale_block=row_format.block or description.width,
        tensors={"weight": name, "scale": f"{name.removesuffix('weight')}scale"},
    )

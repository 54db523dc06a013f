"""What a `transformers.Trainer` user needs beyond the model: optimizer groups, and training only the rows that are read."""

from .optimizer import engram_parameter_groups
from .row_adapters import RowAdapter, add_row_adapters, merge_row_adapters, saved_rows, touched_rows

__all__ = [
    "RowAdapter",
    "add_row_adapters",
    "engram_parameter_groups",
    "merge_row_adapters",
    "saved_rows",
    "touched_rows",
]

"""What a `transformers.Trainer` user needs beyond the model: optimizer groups, and training only the rows that are read."""

from .optimizer import engram_parameter_groups
from .row_scan import RowScan, scan_rows
from .rows_peft import EngramRowsConfig

__all__ = [
    "EngramRowsConfig",
    "RowScan",
    "engram_parameter_groups",
    "scan_rows",
]

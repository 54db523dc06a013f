"""Additions for users of `transformers.Trainer`: optimizer groups, row adapters, sparse gradients, shards, and facts
in rows.
"""

from .callback import EngramTrainingCallback
from .fact_report import FactReport
from .facts import forget_facts, write_facts
from .optimizer import engram_parameter_groups
from .row_scan import RowScan, scan_rows
from .rows_peft import EngramRowsConfig, hotswap_rows
from .shard_checkpoints import export_model, load_shards, save_shards
from .sharding import shard_tables, tables_on_meta
from .sparse_adam import SparseAdamW
from .sparse_gradients import enable_sparse_gradients

__all__ = [
    "EngramRowsConfig",
    "EngramTrainingCallback",
    "FactReport",
    "RowScan",
    "SparseAdamW",
    "enable_sparse_gradients",
    "engram_parameter_groups",
    "export_model",
    "forget_facts",
    "hotswap_rows",
    "load_shards",
    "save_shards",
    "scan_rows",
    "shard_tables",
    "tables_on_meta",
    "write_facts",
]

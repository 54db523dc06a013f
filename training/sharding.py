"""Shard tables by row over the processes of a group, so that no process holds a whole one: `shard_tables`.

    model = EngramForCausalLM.from_pretrained(folder, engram_residency="mapped")  # reads no rows
    shard_tables(model)  # this process's rows are read
    optimizer = SparseAdamW(engram_parameter_groups(model, lr=3e-4))

Shape letters: R rows of a table, W channels of a row, T heads a position reads.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from transformers.utils import logging

from ..cache_engram import RuntimeSubclass
from ..layer_engram import extend
from ..safetensors_engram import EngramError
from ..table_engram import EngramTable, apply_global_scale, dequantize_rows
from .memory import find_engram
from .row_shards import Exchange, LookUp, RowShard, own_rows
from .sparse_gradients import mark_sparse

if TYPE_CHECKING:
    from ..layer_engram import EngramMemory

_BLOCK = 65_536


class TableInShards(RuntimeSubclass):
    """Precedes a table's class: its parameters are DTensors, of which this process has the rows of `shard`."""

    shard: RowShard
    source: Any
    weight: nn.Parameter
    scale: nn.Parameter | None

    def forward(self, row_ids: torch.Tensor, dtype: torch.dtype | None = None, source: Any = None) -> torch.Tensor:
        """Look rows up as a table does. All processes call it together, each with the rows that it needs, possibly
        none.
        """
        return _look_up(self, row_ids, dtype)

    def require_whole(self) -> None:
        """Refuse to be saved as a whole table.

        Raises:
            ValueError: the rows are not in a file.
        """
        if self.source is None:
            raise EngramError(
                f"This process has the rows {self.shard.first} to {self.shard.stop - 1} of a table of {self.shard.num_rows}, which "
                "save_pretrained cannot write: call export_model(model, folder) in every process for a model folder, or "
                "save_shards(model, folder, optimizer) for a checkpoint."
            )

    def _apply(self, fn, recurse=True):
        # The attributes are set again, because torch replaces a DTensor by one that has none of them.
        super()._apply(fn, recurse)  # type: ignore[misc]  # of the table's class
        mark_sparse(self.weight, self.shard)
        return self


# Compilers do not support exchanges whose sizes depend on the data; the rest of the model is compiled around this.
@torch.compiler.disable
def _look_up(table: Any, row_ids: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    exchange = Exchange(table.shard, row_ids)
    if table.table_dtype is None:
        if torch.is_grad_enabled() and table.weight.requires_grad:
            rows = LookUp.apply(table.weight, exchange)
        else:
            rows = exchange.to_askers(own_rows(table.weight).index_select(0, exchange.rows))
        return F.embedding(exchange.place, rows).flatten(-2)
    # Bytes are exchanged in their stored form, and are decoded by the receiver.
    stored = (own_rows(some).view(torch.uint8).index_select(0, exchange.rows) for some in (table.weight, table.scale))
    values, scale = (exchange.to_askers(some) for some in stored)
    scales = apply_global_scale(scale.view(table.scale.dtype), table.global_scale)
    rows = dequantize_rows(values.view(table.weight.dtype), scales, dtype, table.width)
    return rows[exchange.place].flatten(-2)


@contextlib.contextmanager
def tables_on_meta() -> Iterator[None]:
    """While it is active, tables of new models take no memory until [`shard_tables`] fills them.

        with tables_on_meta():
            model = EngramForCausalLM.from_backbone(name, tokenizer, layer_ids=[1, 15], rows=200_000_000)
        shard_tables(model)

    Other threads must not build models meanwhile.
    """
    make = EngramTable.__init__

    def make_on_meta(self: EngramTable, *arguments: Any, **options: Any) -> None:
        make(self, *arguments, **{**options, "device": torch.device("meta")})

    EngramTable.__init__ = make_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        EngramTable.__init__ = make  # type: ignore[method-assign]


def shard_tables(model: nn.Module) -> set[nn.Parameter]:
    """Spread every table of a model by row over all processes. Every process calls this, with the same model.

    Rows of mapped tables are read from the ranges of their files that belong to this process, and those of tables on the meta
    device (see [`tables_on_meta`]) are drawn at random, independently of the number of processes. The other rows of resident
    tables are released. Float tables can be trained, by [`SparseAdamW`] only; other tables are frozen.

    Call it after `get_peft_model` and after moving the model to its device; then wrap it in DDP, or call `fully_shard` with the
    result. From then on, all processes run each forward and backward pass together.

    Args:
        model: an Engram model, plain or wrapped by PEFT, equal in all processes.

    Returns:
        The parameters of the tables: `ignored_params` for FSDP2. DDP finds them itself.

    Raises:
        ValueError: there is no process group; or a table is in shards already, wrapped, or has fewer rows than there are
            processes. The model is unchanged.
    """
    engram = find_engram(model)
    memories = engram.memories()
    if not (dist.is_available() and dist.is_initialized()):
        raise EngramError(
            "Tables are sharded over the processes of a group, and there is none: start the script by torchrun or accelerate "
            "launch, and call torch.distributed.init_process_group() first."
        )
    for layer, memory in memories.items():
        _require_shardable(layer, memory, dist.get_world_size())
    # The tables have a group of their own, so that exchanges of DDP or FSDP cannot mix with theirs.
    group = dist.new_group()
    std = getattr(engram.config, "initializer_range", None) or 0.02
    for layer, memory in memories.items():
        shard = RowShard(memory.table.num_rows, dist.get_rank(group), dist.get_world_size(group), group)
        _shard(memory, layer, shard, std)
    engram.prefetcher = None
    names = [name for name, _ in model.named_parameters() if ".engram.table." in f".{name}"]
    # PEFT and torch.compile forward attributes to the model inside of them, and lengthen its names; row adapters wrap
    # a table.
    names += [name.replace(".engram.table.", ".engram.table.base_layer.") for name in names]
    longer = [f"{front}{name}" for front in ("base_model.model.", "_orig_mod.") for name in names]
    cast(Any, model)._ddp_params_and_buffers_to_ignore = {*names, *longer}
    return {parameter for memory in memories.values() for parameter in memory.table.parameters()}


def _require_shardable(layer: int, memory: "EngramMemory", processes: int) -> None:
    table = memory.table
    if isinstance(table, TableInShards) or isinstance(getattr(table, "weight", None), DTensor):
        raise EngramError(
            f"The table of layer {layer} is in shards already; call shard_tables once, and before fully_shard."
        )
    if hasattr(table, "base_layer") or "table_dtype" not in vars(table):
        raise EngramError(f"The table of layer {layer} has row adapters; call shard_tables before they are added.")
    if next(memory.kv_proj.parameters()).is_meta:
        raise EngramError(
            "The model is on the meta device; load it, or build it within tables_on_meta(), where its tables alone are."
        )
    if RowShard(table.num_rows, processes - 1, processes, None).first >= table.num_rows:
        raise EngramError(
            f"The table of layer {layer} has {table.num_rows} rows, which cannot be divided among {processes} processes; start "
            "fewer."
        )


@torch.no_grad()
def _shard(memory: "EngramMemory", layer: int, shard: RowShard, std: float) -> None:
    table: Any = memory.table
    device = next(memory.kv_proj.parameters()).device
    is_trained = table.table_dtype is None and (not table.is_resident or table.weight.requires_grad)
    source = table.source or table.unread
    local = {} if source is not None else _cut(table, shard, device, layer, std)
    if source is not None:
        local = _read(table, shard, device)
        if source.global_scale is not None:
            table.global_scale = nn.Parameter(source.global_scale.to(device), False)
    mesh = DeviceMesh.from_group(shard.group, device.type)
    for name, rows in local.items():
        shape = torch.Size((shard.num_rows, rows.shape[1]))
        spread = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=shape, stride=(rows.shape[1], 1))
        setattr(table, name, nn.Parameter(spread, is_trained))
    table.source = table.unread = None
    table.shard = shard
    extend(table, TableInShards)
    mark_sparse(table.weight, shard)


def _read(table: Any, shard: RowShard, device: torch.device) -> dict[str, torch.Tensor]:
    """Read this process's rows from the files of a table, a few at a time."""
    source = table.source or table.unread
    local: dict[str, torch.Tensor] = {}
    blocks = range(shard.first, shard.stop, _BLOCK)
    for first in logging.tqdm(blocks, desc="Reading this process's rows of a memory table", delay=1):
        stop = min(first + _BLOCK, shard.stop)
        values, scale = source.read(first, stop)
        values = values.to(table.row_dtype) if table.table_dtype is None else values
        for name, rows in (("weight", values), ("scale", scale)):
            if rows is not None:
                if name not in local:
                    local[name] = rows.new_empty((shard.stop - shard.first, rows.shape[1]), device=device)
                local[name][first - shard.first : stop - shard.first].copy_(rows)
    return local


def _cut(table: Any, shard: RowShard, device: torch.device, layer: int, std: float) -> dict[str, torch.Tensor]:
    """Return this process's rows of a resident table; they are random if the table has none yet."""
    if not table.weight.is_meta:
        parameters = {"weight": table.weight, "scale": table.scale}
        return {
            name: some.detach()[shard.first : shard.stop].to(device, copy=True)
            for name, some in parameters.items()
            if some is not None
        }
    if table.table_dtype is not None:
        raise EngramError(
            f"The table of layer {layer} is quantized and on the meta device; load it from a saved model."
        )
    local = torch.empty((shard.stop - shard.first, table.width), dtype=table.row_dtype, device=device)
    generator = torch.Generator()
    # Whole blocks are drawn, even if they extend into other processes' rows, so that rows do not depend on the number
    # of processes.
    for begin in range(shard.first - shard.first % _BLOCK, shard.stop, _BLOCK):
        generator.manual_seed(hash((torch.initial_seed(), layer, begin)))
        rows = torch.empty((_BLOCK, table.width)).normal_(std=std, generator=generator)
        first, stop = max(begin, shard.first), min(begin + _BLOCK, shard.stop)
        local[first - shard.first : stop - shard.first] = rows[first - begin : stop - begin].to(local.dtype)
    return {"weight": local}

"""Sparse gradients for tables: the cost of a training step depends on the rows that it reads, not on the size of the
table.

    enable_sparse_gradients(model)
    optimizer = SparseAdamW(engram_parameter_groups(model, lr=3e-4))

Shape letters: R rows of a table, W channels of a row, T heads a position reads, n rows that a step read.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..cache_engram import RuntimeSubclass
from ..layer_engram import extend
from ..safetensors_engram import EngramError
from .memory import find_engram, why_frozen
from .row_shards import RowShard, ShardGradient

# These optimizers of torch update the rows of a sparse gradient and leave the others unchanged.
_OF_TORCH = (torch.optim.SparseAdam, torch.optim.SGD, torch.optim.Adagrad)
# These also take the gradients of tables in shards.
_TAKE_ALL: list[type] = []
# These kernels were registered with torch, once in a process; they exist as long as this library object.
_kernels: list[torch.library.Library] = []
_hooks: list[Any] = []


class TableWithSparseGradients(RuntimeSubclass):
    """Precedes a table's class: the gradient of its weight `[R, W]` has the rows that were read, and no others."""

    weight: nn.Parameter

    def _embed(self, row_ids: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return _embed_sparsely(self, row_ids)
        return super()._embed(row_ids)  # type: ignore[misc]  # of the table's class


# Compilers trace the backward pass too, and do not support sparse gradients; the rest of the model is compiled around
# this.
@torch.compiler.disable
def _embed_sparsely(table: TableWithSparseGradients, row_ids: torch.Tensor) -> torch.Tensor:
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise EngramError(
            f"Sparse gradients of a whole table are for one process, but there are {torch.distributed.get_world_size()}: call "
            "shard_tables(model), which spreads tables over the processes, or train row adapters (EngramRowsConfig)."
        )
    try:
        return F.embedding(row_ids, table.weight, sparse=True)
    except IndexError:
        with torch.no_grad():
            return table._embed(row_ids)  # This raises the error for wrong ids.


def enable_sparse_gradients(model: nn.Module) -> None:
    """Give every trainable table of a model sparse gradients, which [`SparseAdamW`] takes.

    `torch.nn.utils.clip_grad_norm_` also takes them from now on; each row counts once in the norm, however often it was
    read. Call it after `get_peft_model` and before the optimizer is built. Frozen tables do not change.

    Args:
        model: an Engram model, plain or wrapped, whose trainable tables are resident and in floats.

    Raises:
        ValueError: a table is mapped or quantized, or none is trainable.
    """
    find_engram(model)
    # A table that PEFT copied is found too, and the classes of a remote-code model are not the installed ones.
    tables = {name: module for name, module in model.named_modules() if "table_dtype" in vars(module)}
    for name, table in tables.items():
        _require_floats_in_memory(name, table)
    chosen = [table for table in tables.values() if table.weight.requires_grad]
    if not chosen:
        raise EngramError("Every table of this model is frozen; set requires_grad of a table's weight first.")
    if not _kernels:
        _let_norms_take_sparse_gradients()
    for table in chosen:
        if not isinstance(table, TableWithSparseGradients):
            extend(table, TableWithSparseGradients)
        if not has_sparse_gradients(table.weight):
            mark_sparse(table.weight)
            table.weight.register_post_accumulate_grad_hook(_coalesce)


def has_sparse_gradients(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is a table's weight for which sparse gradients were enabled."""
    return getattr(parameter, "has_sparse_gradients", False)


def mark_sparse(parameter: Any, shard: RowShard | None = None) -> None:
    """Make optimizers that cannot take sparse gradients refuse a table's weight.

    Args:
        parameter: the weight.
        shard: the rows of this process, if not all.
    """
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_refuse_dense_optimizers))
    parameter.has_sparse_gradients, parameter.row_shard = True, shard


def shard_of(parameter: torch.Tensor) -> RowShard | None:
    """Return the rows of a table that this process has; None if all."""
    return getattr(parameter, "row_shard", None)


def rows_of_gradient(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return rows `[n]`, ascending, of a table or of this process's shard, and their gradient `[n, W]`; None if it is
    dense.
    """
    gradient = table.grad
    if isinstance(gradient, ShardGradient):
        return gradient.rows, gradient.row_values
    if gradient is None or not gradient.is_sparse:
        return None
    gradient = gradient.coalesce()
    return gradient.indices()[0], gradient.values()


def accept_sparse_gradients(optimizer: type) -> type:
    """Declare (as a decorator) that a class of optimizers takes the sparse gradients of tables, in shards or not."""
    _TAKE_ALL.append(optimizer)
    return optimizer


def _require_floats_in_memory(name: str, table: Any) -> None:
    if how := why_frozen(table):
        raise EngramError(
            f"The table {name} is {how} and cannot be trained as a whole: load the model with "
            "engram_residency='resident' from a checkpoint in floats, or train differences of its rows (EngramRowsConfig)."
        )


def _coalesce(parameter: torch.Tensor) -> None:
    """Sum the gradients of a row that was read several times, by one batch or by several accumulated batches."""
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = parameter.grad.coalesce()


def _let_norms_take_sparse_gradients() -> None:
    """Give `torch.linalg.vector_norm`, which gradient clipping calls, a kernel for sparse tensors, if torch has none."""
    _kernels.append(torch.library.Library("aten", "IMPL"))
    try:
        torch.linalg.vector_norm(torch.ones(1).to_sparse())
    except NotImplementedError:
        for backend in ("SparseCPU", "SparseCUDA"):
            _kernels[0].impl("linalg_vector_norm", _sparse_vector_norm, backend)


def _sparse_vector_norm(
    tensor: torch.Tensor,
    ord: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the norm of all elements; elements that are not stored are zero, which no positive order counts."""
    if dim is not None or ord <= 0:
        raise NotImplementedError(
            "The norm of a sparse tensor is over all elements; give a positive order and no dim."
        )
    values = tensor.coalesce().values()
    if not values.numel():
        return values.new_zeros((), dtype=dtype)
    return torch.linalg.vector_norm(values, ord, dtype=dtype)


def _refuse_dense_optimizers(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if isinstance(optimizer, tuple(_TAKE_ALL)):
        return
    takes_sparse = isinstance(optimizer, _OF_TORCH)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not has_sparse_gradients(parameter) or rows_of_gradient(parameter) is None:
                continue
            if not takes_sparse or isinstance(parameter.grad, ShardGradient):
                raise EngramError(
                    f"{type(optimizer).__name__} cannot take the sparse gradients of tables{'' if not takes_sparse else ' in shards'}; use "
                    "engram_hf.training.SparseAdamW, or do not call enable_sparse_gradients."
                )

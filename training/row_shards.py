"""Rows of a table that is spread over the processes of a group: their owners, their exchange, and their gradient.

Every process has the rows of one range. It requests from the others the rows that it reads, each once, and sends their gradients
to the rows' owners; both by torch's all-to-all. No process ever holds a table, or a gradient or moments of its size.

Shape letters: R rows of a table, W channels of a row, P processes, N distinct rows that a process reads, M rows that it is
asked for, n distinct rows of a gradient.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from ..safetensors_engram import EngramError


class RowShard(NamedTuple):
    """The rows of a table that this process owns, as torch's `Shard(0)` divides them.

    Args:
        num_rows: R.
        rank, processes: this process's number in the group, and P.
        group: the process group.
    """

    num_rows: int
    rank: int
    processes: int
    group: Any

    @property
    def step(self) -> int:
        """The number of rows of every process except the last ones."""
        return math.ceil(self.num_rows / self.processes)

    @property
    def first(self) -> int:
        """The number of its first row."""
        return min(self.rank * self.step, self.num_rows)

    @property
    def stop(self) -> int:
        """The number of the row behind its last one."""
        return min(self.first + self.step, self.num_rows)


def own_rows(table: torch.Tensor) -> torch.Tensor:
    """Return the rows of a table that this process owns, without a copy: all rows, unless the table is in shards."""
    table = table.detach()
    return table.to_local() if isinstance(table, DTensor) else table


class Exchange:
    """One look-up: the distinct rows that this process requests of each process, and the rows that are requested of
    it.

    Every process of the group creates one at the same time, with any number of rows.

    Args:
        shard: the rows of this process.
        row_ids: int64, of any shape.

    Attributes:
        place: the index of each row id among the N rows, in the shape of `row_ids`.
        rows: int64 `[M]`, the requested rows, counted from the first row of this process.

    Raises:
        ValueError: a row does not exist.
    """

    def __init__(self, shard: RowShard, row_ids: torch.Tensor):
        self.shard = shard
        asked, self.place = torch.unique(row_ids, return_inverse=True)
        if asked.numel() and (asked[0] < 0 or asked[-1] >= shard.num_rows):
            wrong = int(asked[0] if asked[0] < 0 else asked[-1])
            raise EngramError(
                f"Row {wrong} was asked for, but the table has rows 0..{shard.num_rows - 1}; the hash and the table do not "
                "belong together."
            )
        firsts = torch.arange(shard.processes + 1, device=asked.device) * shard.step
        counts = torch.searchsorted(asked, firsts).diff()
        self._asked = counts.tolist()
        self._given = self._swap(counts, [1] * shard.processes, [1] * shard.processes).tolist()
        self.rows = self._swap(asked, self._asked, self._given) - shard.first

    def to_askers(self, rows: torch.Tensor) -> torch.Tensor:
        """Send the requested ones of this process's `rows` `[M, ...]`, and return the N rows that it requested."""
        return self._swap(rows, self._given, self._asked)

    def to_owners(self, gradients: torch.Tensor) -> torch.Tensor:
        """Send `gradients` `[N, ...]` to the owners of the rows, and return those of the M requested rows."""
        return self._swap(gradients, self._asked, self._given)

    def _swap(self, tensor: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        # The rows are exchanged as bytes, because no backend knows every dtype of stored rows.
        data = tensor.contiguous().view(torch.uint8) if tensor.dim() > 1 else tensor.contiguous()
        result = data.new_empty((sum(received), *data.shape[1:]))
        dist.all_to_all_single(result, data, list(received), list(sent), group=self.shard.group)
        return result.view(tensor.dtype)


class ShardGradient(torch.Tensor):
    """The gradient of a table `[R, W]` in shards: of those rows of this process that any process read, and no others.

    Autograd accumulates it, and gradient clipping measures and scales it; the norm is that over all processes.

    Args:
        shard: the rows of this process.
        rows: int64 `[n]`, counted from the first row of this process.
        values: `[n, W]`; the values of a repeated row are summed.
    """

    shard: RowShard
    rows: torch.Tensor
    row_values: torch.Tensor

    @staticmethod
    def __new__(cls, shard: RowShard, rows: torch.Tensor, values: torch.Tensor):
        shape = (shard.num_rows, values.shape[1])
        gradient = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=values.dtype, device=values.device)
        gradient.shard = shard
        gradient.rows, gradient.row_values = _summed(rows, values)
        return gradient

    def __init__(self, shard: RowShard, rows: torch.Tensor, values: torch.Tensor):
        super().__init__()

    # The representation by torch would need all rows.
    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.rows.numel()} of {self.shard.num_rows} rows)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares its own as a function
        cls, function: Any, types: Any, arguments: tuple = (), options: dict | None = None
    ) -> Any:
        handle = _HANDLED.get(function)
        if handle is None or not isinstance(arguments[0], cls):
            raise EngramError(
                f"{function} cannot take the gradient of a table in shards. Train with engram_hf.training.SparseAdamW, without "
                "a scaler of losses (bf16, not fp16), and call shard_tables on the very model that is then wrapped by DDP."
            )
        return handle(*arguments, **(options or {}))


def _summed(rows: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distinct rows, ascending, and the sums of their values; sums are in float32 at least, and rounded once."""
    distinct, place = torch.unique(rows, return_inverse=True)
    sums = values.new_zeros(
        (distinct.numel(), values.shape[1]), dtype=torch.promote_types(values.dtype, torch.float32)
    )
    return distinct, sums.index_add_(0, place, values.to(sums.dtype)).to(values.dtype)


def _accumulate(gradient: ShardGradient, other: ShardGradient) -> ShardGradient:
    gradient.rows, gradient.row_values = _summed(
        torch.cat([gradient.rows, other.rows]), torch.cat([gradient.row_values, other.row_values])
    )
    return gradient


def _copy(gradient: ShardGradient, **_: Any) -> ShardGradient:
    return ShardGradient(gradient.shard, gradient.rows, gradient.row_values)


def _norm(
    gradient: ShardGradient,
    order: float = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the norm of all elements, over all processes; elements that are not stored are zero, which no positive
    order counts.
    """
    if dim is not None or order <= 0:
        raise NotImplementedError(
            "The norm of a gradient in shards is over all elements; give a positive order and no dim."
        )
    values, is_largest = gradient.row_values, math.isinf(order)
    own = values.new_zeros((), dtype=dtype)
    if values.numel():
        own = torch.linalg.vector_norm(values, order, dtype=dtype)
    own = own if is_largest else own**order
    dist.all_reduce(own, dist.ReduceOp.MAX if is_largest else dist.ReduceOp.SUM, group=gradient.shard.group)
    return own if is_largest else own ** (1 / order)


def _scale(apply: Callable[[torch.Tensor, Any], Any]) -> Callable[[ShardGradient, Any], ShardGradient]:
    def scale(gradient: ShardGradient, factor: Any) -> ShardGradient:
        # Under FSDP the norm of all gradients, and what follows from it, is a DTensor.
        apply(gradient.row_values, factor.full_tensor() if isinstance(factor, DTensor) else factor)
        return gradient

    return scale


_ATEN = torch.ops.aten
# Autograd and clipping apply these operations to a gradient.
_HANDLED: dict[Any, Callable[..., Any]] = {
    _ATEN.add_.Tensor: _accumulate,
    _ATEN.add.Tensor: lambda one, other: _accumulate(_copy(one), other),
    _ATEN.clone.default: _copy,
    _ATEN.detach.default: _copy,
    _ATEN.linalg_vector_norm.default: _norm,
    _ATEN.mul_.Tensor: _scale(torch.Tensor.mul_),
    _ATEN.mul_.Scalar: _scale(torch.Tensor.mul_),
    _ATEN.div_.Tensor: _scale(torch.Tensor.div_),
    _ATEN.div_.Scalar: _scale(torch.Tensor.div_),
}


class LookUp(torch.autograd.Function):
    """The N rows of an exchange, `[N, W]`; their gradients are sent to the rows' owners, averaged over the processes.

    DDP and FSDP average all other gradients in the same way.
    """

    @staticmethod
    def forward(ctx: Any, weight: DTensor, exchange: Exchange) -> torch.Tensor:
        """Return the N rows of the table `weight`."""
        ctx.exchange = exchange
        return exchange.to_askers(weight.to_local().index_select(0, exchange.rows))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[ShardGradient, None]:
        """Return the gradient of the table; `gradient` `[N, W]` is that of this process's loss."""
        exchange = ctx.exchange
        values = exchange.to_owners(gradient / exchange.shard.processes)
        return ShardGradient(exchange.shard, exchange.rows, values), None

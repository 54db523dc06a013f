"""`SparseAdamW`: AdamW with moments only for those rows of a table that were ever read.

Shape letters: R rows of a table, W channels of a row, n rows that a step read, K rows that were ever read.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from ..safetensors_engram import EngramError
from .row_shards import RowShard, own_rows
from .sparse_gradients import accept_sparse_gradients, has_sparse_gradients, rows_of_gradient, shard_of

_GROWTH = 1.5


class _RowSlots:
    """Gives every row the next free slot when it is first seen.

    The rows are kept in sorted runs, each at least twice as long as the next, so that a new row is moved only a few times,
    independently of the number of rows.
    """

    def __init__(self, rows: torch.Tensor):
        self.count = rows.numel()
        ordered, slots = torch.sort(rows)
        self._runs = [(ordered, slots)]

    def find(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the slots `[n]` of `rows` `[n]`, -1 for rows that were never seen."""
        found = torch.full_like(rows, -1)
        for ordered, slots in self._runs:
            if ordered.numel():
                place = torch.searchsorted(ordered, rows).clamp_max_(ordered.numel() - 1)
                found = torch.where(ordered[place] == rows, slots[place], found)
        return found

    def add(self, rows: torch.Tensor) -> None:
        """Give slots to `rows` `[n]`, ascending, none of which was seen before."""
        slots = torch.arange(self.count, self.count + rows.numel(), device=rows.device)
        self.count += rows.numel()
        self._runs.append((rows, slots))
        while len(self._runs) > 1 and self._runs[-2][0].numel() < 2 * self._runs[-1][0].numel():
            (one, its_slots), (other, others_slots) = self._runs.pop(), self._runs.pop()
            ordered, order = torch.sort(torch.cat([one, other]))
            self._runs.append((ordered, torch.cat([its_slots, others_slots])[order]))


class _RowMoments:
    """Adam's moments of the rows of one table that were ever read, in float32, in the order in which they were first read.

    Args:
        rows: int64 `[K]`, without repetitions.
        exp_avg, exp_avg_sq: `[K, W]`.
    """

    def __init__(self, rows: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor):
        self._slots = _RowSlots(rows)
        self._rows, self._exp_avg, self._exp_avg_sq = rows, exp_avg, exp_avg_sq

    @property
    def rows(self) -> torch.Tensor:
        """The row numbers `[K]`."""
        return self._rows[: self._slots.count]

    @property
    def device(self) -> torch.device:
        """The device of the moments."""
        return self._exp_avg.device

    def slots_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the slots of the moments of `rows` `[n]`, ascending; moments of new rows are zero."""
        slots, first = self._slots.find(rows), self._slots.count
        is_new = slots < 0
        new = rows[is_new]
        if new.numel():
            self._slots.add(new)
            self._grow(self._slots.count)
            self._rows[first : self._slots.count] = new
            slots[is_new] = torch.arange(first, self._slots.count, device=rows.device)
        return slots

    def update(self, slots: torch.Tensor, gradient: torch.Tensor, beta1: float, beta2: float) -> tuple:
        """Update both moments `[n, W]` with a gradient `[n, W]`."""
        average = self._exp_avg.index_select(0, slots).lerp_(gradient, 1 - beta1)
        square = self._exp_avg_sq.index_select(0, slots).mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self._exp_avg.index_copy_(0, slots, average)
        self._exp_avg_sq.index_copy_(0, slots, square)
        return average, square

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of a checkpoint; they are copies, because the moments are views of larger tensors."""
        count = self._slots.count
        return {
            "rows": self._rows[:count].clone(),
            "exp_avg": self._exp_avg[:count].clone(),
            "exp_avg_sq": self._exp_avg_sq[:count].clone(),
        }

    def _grow(self, count: int) -> None:
        held = self._rows.numel()
        if count <= held:
            return
        extra = max(count, int(held * _GROWTH)) - held
        width = self._exp_avg.shape[1]
        self._rows = torch.cat([self._rows, self._rows.new_zeros(extra)])
        self._exp_avg = torch.cat([self._exp_avg, self._exp_avg.new_zeros(extra, width)])
        self._exp_avg_sq = torch.cat([self._exp_avg_sq, self._exp_avg_sq.new_zeros(extra, width)])


@accept_sparse_gradients
class SparseAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` for models with sparse gradients of tables (see [`enable_sparse_gradients`]).

    A step reads and writes those rows of a table that have a gradient, and keeps moments, in float32, of rows that ever had
    one. If every row has a gradient in every step, this is AdamW. Otherwise it is lazy, as `torch.optim.SparseAdam` is:
    between two gradients of a row, its moments do not decay, it does not move, and weight decay does not act on it; the
    correction of Adam's bias counts all steps. Every other parameter is updated by AdamW itself.

    A checkpoint (`state_dict`) has the moments of rows that had a gradient, and their numbers.

    Args:
        params: parameters or groups, such as those of [`engram_parameter_groups`].
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.

    Raises:
        ValueError: no table among the parameters has sparse gradients; in `step`, no table has a gradient, or a table was moved
            after its moments were made; in `load_state_dict`, the moments do not belong to these tables.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if not self._tables():
            raise EngramError(
                "No table among these parameters has sparse gradients; call enable_sparse_gradients(model) before the "
                "parameters are passed, or use torch.optim.AdamW."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters, as any optimizer of torch does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tables = self._tables()
        self._require_gradients(tables)
        sparse = [(table, table.grad, group) for table, group in tables.items() if table.grad is not None]
        for table, _, _ in sparse:
            table.grad = None
        try:
            # AdamW's own step without its wrapper, which would call the hooks of this optimizer a second time.
            inspect.unwrap(torch.optim.AdamW.step)(self)
        finally:
            for table, gradient, _ in sparse:
                table.grad = gradient
        for table, _, group in sparse:
            self._step_rows(table, group)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the state as any optimizer of torch; a table has `step`, `rows` `[K]`, `exp_avg` and `exp_avg_sq`
        `[K, W]`.

        For tables in shards, they are those of this process; see [`save_shards`] for those of all processes.
        """
        packed = super().state_dict()
        tables = {id(state): shard_of(table) for table, state in self.state.items() if "moments" in state}
        packed["state"] = {
            number: _packed(state, tables[id(state)]) if "moments" in state else state
            for number, state in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as any optimizer of torch. Nothing changes if the moments do not fit."""
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        moments = {}
        for number, parameter in zip(saved, own, strict=False):  # torch raises the error if the numbers differ.
            state = state_dict["state"].get(number)
            if state is not None and has_sparse_gradients(parameter):
                moments[parameter] = _checked(state, parameter)
        others = {number: state for number, state in state_dict["state"].items() if "rows" not in state}
        # Otherwise, torch would cast the numbers of rows to the dtype of the table.
        super().load_state_dict({**state_dict, "state": others})
        for parameter, state in moments.items():
            tensors = (state[name].to(parameter.device, copy=True) for name in ("rows", "exp_avg", "exp_avg_sq"))
            self.state[parameter] = {"step": state["step"].clone(), "moments": _RowMoments(*tensors)}

    def rows_of(self, table: nn.Parameter) -> torch.Tensor:
        """Return the rows of a table that ever had a gradient, int64 `[K]`, in the order of their first; for a table
        in shards, this process's.
        """
        moments = self.state.get(table, {}).get("moments")
        if moments is None:
            return torch.empty(0, dtype=torch.int64)
        shard = shard_of(table)
        return moments.rows if shard is None else moments.rows + shard.first

    def moments_of(self, table: nn.Parameter) -> dict[str, torch.Tensor] | None:
        """Return copies of `step`, `rows` `[K]`, `exp_avg` and `exp_avg_sq` `[K, W]` of a table; None before its first
        gradient.

        Rows are numbered as in the whole table; for a table in shards, they are this process's.
        """
        state = self.state.get(table, {})
        if "moments" not in state:
            return None
        return {"step": state["step"].clone(), **state["moments"].tensors(), "rows": self.rows_of(table).clone()}

    def set_moments(self, table: nn.Parameter, moments: dict[str, torch.Tensor]) -> None:
        """Replace the values that `moments_of` returns."""
        shard = shard_of(table)
        rows = moments["rows"] if shard is None else moments["rows"] - shard.first
        tensors = (some.to(table.device) for some in (rows, moments["exp_avg"], moments["exp_avg_sq"]))
        self.state[table] = {"step": moments["step"].clone(), "moments": _RowMoments(*tensors)}

    def _tables(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Return the tables, with the group of each."""
        pairs = ((parameter, group) for group in self.param_groups for parameter in group["params"])
        return {parameter: group for parameter, group in pairs if has_sparse_gradients(parameter)}

    def _require_gradients(self, tables: Iterable[nn.Parameter]) -> None:
        trained = [table for table in tables if table.requires_grad]
        others = (parameter for group in self.param_groups for parameter in group["params"])
        without = trained and all(table.grad is None for table in trained)
        if without and any(other.grad is not None for other in others):
            raise EngramError(
                "No table of this optimizer has a gradient, though other parameters have: it was built before the model "
                "was moved or wrapped, and its tables are not the model's any more; build it afterwards."
            )
        for table in trained:
            if table.grad is not None and rows_of_gradient(table) is None:
                raise EngramError(
                    "A table has a dense gradient; call enable_sparse_gradients(model) again after the model was changed."
                )

    def _step_rows(self, table: nn.Parameter, group: dict[str, Any]) -> None:
        rows, values = cast(tuple, rows_of_gradient(table))
        values, own = values.float(), own_rows(table)
        moments = self._moments_of(table)
        state = self.state[table]
        state["step"] += 1
        if not rows.numel():
            return
        (beta1, beta2), lr, step = group["betas"], float(group["lr"]), float(state["step"])
        average, square = moments.update(moments.slots_of(rows), values, beta1, beta2)
        size = square.sqrt_().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        updated = own.index_select(0, rows).float().mul_(1 - lr * group["weight_decay"])
        updated.addcdiv_(average, size, value=-lr / (1 - beta1**step))
        own.index_copy_(0, rows, updated.to(own.dtype))

    def _moments_of(self, table: nn.Parameter) -> _RowMoments:
        if table not in self.state:
            none = torch.empty((0, table.shape[1]), device=table.device, dtype=torch.float32)
            moments = _RowMoments(none.new_empty(0, dtype=torch.int64), none, none.clone())
            self.state[table] = {"step": torch.tensor(0.0, device="cpu"), "moments": moments}
        moments = self.state[table]["moments"]
        if moments.device != table.device:
            raise EngramError(
                f"A table is on {table.device} and its moments are on {moments.device}: the optimizer was built before the "
                "model was moved; build it afterwards."
            )
        return moments


def _packed(state: dict[str, Any], shard: RowShard | None) -> dict[str, torch.Tensor]:
    part = {} if shard is None else {"shard": torch.tensor([shard.first, shard.stop, shard.num_rows])}
    return {"step": state["step"], **state["moments"].tensors(), **part}


def _checked(state: dict[str, Any], table: nn.Parameter) -> dict[str, torch.Tensor]:
    """Return the saved moments of a table, checked.

    Raises:
        ValueError: the values are not moments of this table.
    """
    tensors: list[Any] = [state.get(name) for name in ("rows", "exp_avg", "exp_avg_sq", "step")]
    own, shard = own_rows(table), shard_of(table)
    count, part = own.shape[0], state.get("shard")
    if (None if part is None else part.tolist()) != (
        None if shard is None else [shard.first, shard.stop, shard.num_rows]
    ):
        raise EngramError(
            f"The saved moments are of {'a whole table' if part is None else 'the rows {} to {} of {}'.format(*part.tolist())}, but "
            f"this process has {'a whole one' if shard is None else f'the rows {shard.first} to {shard.stop} of {shard.num_rows}'}: "
            "start as many processes as saved them, or load what save_shards wrote with load_shards."
        )
    if all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        rows, average, square, _ = tensors
        shape = (rows.numel(), table.shape[1])
        fits = rows.dtype == torch.int64 and rows.dim() == 1 and average.shape == square.shape == shape
        if fits and rows.unique().numel() == rows.numel() and not ((rows < 0) | (rows >= count)).any():
            return state
    raise EngramError(
        f"The saved optimizer has no moments for rows of a table of {count} x {table.shape[1]}; it is of another "
        "model or another optimizer. Start with a new SparseAdamW."
    )

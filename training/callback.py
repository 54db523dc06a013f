"""Log the memory's state while a `Trainer` trains: `EngramTrainingCallback`.

Shape letters: R rows of a table, W channels of a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .memory import find_engram
from .row_shards import own_rows
from .sparse_adam import SparseAdamW
from .sparse_gradients import rows_of_gradient, shard_of


class _LayerWatch:
    """The statistics of one layer's memory since the last log.

    Args:
        memory: the `EngramMemory`.
        index: its position among the layers that have memory.
    """

    def __init__(self, memory: Any, index: int):
        self.memory, self.index = memory, index
        weight = getattr(memory.table, "weight", None)  # The weight of a table in a file is not a parameter.
        self.shard = shard_of(weight) if weight is not None and weight.requires_grad else None
        count = memory.table.num_rows if self.shard is None else self.shard.stop - self.shard.first
        self.ever = torch.zeros(count, dtype=torch.bool)
        self.step_rows: list[torch.Tensor] = []
        self.reset()

    def reset(self) -> None:
        """Reset the statistics after a log."""
        self.gates: torch.Tensor | float = 0.0
        self.positions: torch.Tensor | float = 0.0
        self.steps, self.rows, self.squares = 0, 0, 0.0

    @torch.compiler.disable
    def note_rows(self, memory: nn.Module, args: tuple) -> None:
        """Record the rows that valid positions read (a forward pre-hook of the memory)."""
        if memory.training:
            inputs = args[1]
            row_ids = inputs.row_ids[self.index]
            self.step_rows.append(row_ids.flatten() if inputs.valid is None else row_ids[inputs.valid].flatten())

    @torch.compiler.disable
    def note_gates(self, gate: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """Record the gate's output, which is zero at positions without memory (a forward hook of the gate)."""
        if gate.training:
            valid = args[1] if len(args) > 1 else None
            count = output[..., 0].numel() if valid is None else valid.expand(output.shape[:2]).sum()
            self.gates = self.gates + output.detach().mean(-1).sum()
            self.positions = self.positions + count

    def take_step_rows(self) -> torch.Tensor:
        """Return the rows that were read since the last step, ascending; for a shard, those that any process read,
        counted from its first row.
        """
        if self.shard is not None:
            self.step_rows.clear()
            gradient = rows_of_gradient(self.memory.table.weight)
            return torch.empty(0, dtype=torch.int64) if gradient is None else gradient[0]
        rows = torch.unique(torch.cat(self.step_rows)) if self.step_rows else torch.empty(0, dtype=torch.int64)
        self.step_rows.clear()
        return rows

    def count_step(self, rows: torch.Tensor, update: float) -> None:
        """Count the rows of a step and the norm of their update."""
        self.ever[rows.cpu()] = True
        self.steps, self.rows, self.squares = self.steps + 1, self.rows + rows.numel(), self.squares + update**2

    def values(self) -> dict[str, float]:
        """Return the values for the log."""
        touched, steps = int(self.ever.sum()), max(self.steps, 1)
        return {
            "gate": float(self.gates / max(float(self.positions), 1.0)),
            "rows_per_step": self.rows / steps,
            "rows_touched": touched,
            "rows_never_touched": 1 - touched / self.ever.numel(),
            "update_norm": (self.squares / steps) ** 0.5,
        }


class EngramTrainingCallback(TrainerCallback):
    """Adds statistics of the memory to every log of a `Trainer`, in the progress bar and in all services of `report_to`.

        trainer.add_callback(EngramTrainingCallback(trainer))

    For every layer with memory, a log gets these values of the steps since the last log, under `engram/layer_N/`:

    - `gate`: the mean of the gate, 0 to 1, over the positions that have memory;
    - `rows_per_step`: the mean number of distinct rows of the table that a step read;
    - `rows_touched`, `rows_never_touched`: the number of rows read so far, and the share of the table that was not read. A
      resumed run knows earlier rows if the optimizer is [`SparseAdamW`], which saves them; with other optimizers it begins
      at zero;
    - `update_norm`: the norm of a step's change of the rows that it read (or of row adapters), as root mean square over
      steps.

    The callback counts the rows that this process reads; for tables in shards, it counts those of this process's rows that
    any process reads. It keeps one byte for each row of a table and, during a step, a copy of the rows read.

    Args:
        trainer: the trainer to which it is added. The callback moves itself in front of the others, which would report a
            log before it is complete.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._watches: dict[int, _LayerWatch] = {}
        self._hooks: list[Any] = []
        self._before: list[tuple[_LayerWatch, torch.Tensor, Callable[[], torch.Tensor], torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Start to watch the memory of the model."""
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))
        self._stop()
        optimizer = getattr(optimizer, "optimizer", optimizer)  # This removes accelerate's wrapper.
        for index, (layer, memory) in enumerate(find_engram(model).memories().items()):
            watch = self._watches[layer] = _LayerWatch(memory, index)
            self._hooks += [
                memory.register_forward_pre_hook(watch.note_rows),
                memory.gate.register_forward_hook(watch.note_gates),
            ]
            if isinstance(optimizer, SparseAdamW):
                for _, table in memory.table.named_parameters():
                    first = 0 if watch.shard is None else watch.shard.first
                    watch.ever[optimizer.rows_of(table).cpu() - first] = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Copy the rows that the step may change."""
        for watch in self._watches.values():
            rows = watch.take_step_rows()
            read = _reader(watch.memory.table, rows)
            self._before.append((watch, rows, read, read()))

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Compare the copied rows with the changed ones."""
        for watch, rows, read, before in self._before:
            watch.count_step(rows, float((read() - before).norm()) if before.numel() else 0.0)
        self._before.clear()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the statistics to the log of training steps."""
        if logs is None or "loss" not in logs:
            return
        found: dict[str, float] = {}
        for layer, watch in self._watches.items():
            found |= {f"engram/layer_{layer}/{name}": value for name, value in watch.values().items()}
            watch.reset()
        logs.update(found)
        state.log_history[-1].update(found)

    def on_train_end(self, args, state, control, **kwargs):
        """Remove the hooks from the model."""
        self._stop()

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._watches.clear()
        self._before.clear()


def _reader(table: nn.Module, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a function that copies, as floats, all values of a table that a step may change: trainable rows `[n, W]`,
    or row adapters.
    """
    trained = [parameter for parameter in table.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def read() -> torch.Tensor:
        parts = [own_rows(p)[rows.to(p.device)] if p.shape[0] == table.num_rows else p for p in trained]
        # A parameter with another number of rows is a row adapter, all rows of which may change.
        return torch.cat([part.flatten().float() for part in parts]) if parts else torch.empty(0)

    return read

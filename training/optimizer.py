"""Optimizer groups as in the Engram paper: tables have a higher learning rate than the backbone, and no weight decay."""

import re

from torch import nn
from transformers.utils import logging

from ..safetensors_engram import EngramError
from .memory import why_frozen

logger = logging.get_logger(f"transformers.{__name__}")

# The paper trains tables at five times the backbone's learning rate (arXiv 2601.07372, pre-training setup).
TABLE_LR_SCALE = 5.0
# Memory that is added to a trained, frozen backbone learns faster with this one (benchmarks/add_memory.py).
ADDED_TABLE_LR_SCALE = 20.0

# Modules are found by name, not by class: the classes of a remote-code model are not the installed ones, and PEFT, DDP and FSDP wrap
# modules but keep their names. Row adapters are submodules of their table, so they count as tables too.
_TABLE = re.compile(r"(^|\.)engram\.table\.")


def engram_parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, table_lr_scale: float | None = None
) -> list[dict]:
    """Return parameter groups for an Adam-like optimizer; parameters that are frozen now are left out.

        groups = engram_parameter_groups(model, lr=3e-4, weight_decay=0.1)
        trainer = Trainer(model, args, train_dataset=..., optimizers=(torch.optim.AdamW(groups), None))

    A warning names tables that cannot be trained although the rest of their memory is: mapped, pinned and quantized ones.

    Tables and row adapters get `lr * table_lr_scale` and no weight decay: a row is read rarely, and decay, which acts
    at every step, would forget it in between. Norms, biases and other vectors do not decay either.

    Args:
        model: an Engram model, plain or wrapped (PEFT, DDP, compiled).
        lr: learning rate of the backbone and of the memory's projections, norms and convolution.
        weight_decay: weight decay of the matrices.
        table_lr_scale: learning rate of the tables, in units of `lr`; None stands for 5, as in the paper, or for 20 if
            the backbone is frozen and the memory around the tables is trained.

    Raises:
        ValueError: the model has nothing to train, or rows of a quantized table are trainable.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    rest: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if _TABLE.search(name):
            _require_trainable_dtype(name, parameter)
            tables.append(parameter)
        else:
            (decayed if _decays(name, parameter) else undecayed).append(parameter)
            rest.append(name)
    if table_lr_scale is None:
        added = bool(rest) and all(".engram." in name for name in rest)
        table_lr_scale = ADDED_TABLE_LR_SCALE if added else TABLE_LR_SCALE
    groups = [
        {"params": decayed, "lr": lr, "weight_decay": weight_decay},
        {"params": undecayed, "lr": lr, "weight_decay": 0.0},
        {"params": tables, "lr": lr * table_lr_scale, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise EngramError("Every parameter of this model is frozen; set requires_grad on what shall be trained first.")
    _say_frozen_tables(model)
    return groups


def _say_frozen_tables(model: nn.Module) -> None:
    """Warn if the memory around a table is trained, but its rows cannot be: `auto` maps large tables without being asked."""
    for name, table in model.named_modules():
        if "table_dtype" not in vars(table):
            continue
        # A table with row adapters is inside of another module, and LoRA freezes the norms.
        norm = getattr(model.get_submodule(name.rpartition(".")[0]), "q_norm", None)
        if norm is not None and norm.weight.requires_grad and (how := why_frozen(table)):
            logger.warning(
                f"The table {name} is {how} and will not be trained: load the model with engram_residency='resident' from a "
                "checkpoint in floats, or train differences of its rows (EngramRowsConfig)."
            )


def _require_trainable_dtype(name: str, parameter: nn.Parameter) -> None:
    if parameter.dtype.itemsize < 2:
        raise EngramError(
            f"{name} is {parameter.dtype}, and quantized rows take no gradient: train differences of them (EngramRowsConfig), "
            "or load a checkpoint whose tables are in floats."
        )


def _decays(name: str, parameter: nn.Parameter) -> bool:
    # Norms of the memory have a weight for each residual stream, so the number of dimensions alone does not identify them.
    return parameter.dim() > 1 and "norm" not in name and not name.endswith("bias")

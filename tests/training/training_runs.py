"""Functions that tests of training share besides fixtures."""

import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer

from engram_hf.training import EngramRowsConfig, scan_rows

TEXTS = [
    "the memory is cheap",
    "The Memory of a table is a row of the table",
    "a gate opens and the row comes in",
    "cheap rows",
]


def losses(trainer: Trainer) -> list[float]:
    """Return the training losses that a Trainer logged, by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def train_rows_of(model, ids: torch.Tensor) -> tuple[PeftModel, torch.Tensor]:
    """Train an adapter of the rows that `ids` read for two steps; return the model, and the loss before each step."""
    model.eval()
    peft = get_peft_model(model, EngramRowsConfig(rows=scan_rows([{"input_ids": ids}], None, model)))
    optimizer = torch.optim.SGD([parameter for parameter in peft.parameters() if parameter.requires_grad], lr=1.0)
    found = []
    for _ in range(2):
        loss = peft(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return peft, torch.stack(found)

"""Functions that the training tests share besides fixtures."""

from transformers import Trainer

TEXTS = [
    "the memory is cheap",
    "The Memory of a table is a row of the table",
    "a gate opens and the row comes in",
    "cheap rows",
]


def losses(trainer: Trainer) -> list[float]:
    """Return the training losses that a Trainer logged, by step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

"""One training run: a stock Trainer on blocks in a fixed order, which resumes after an interruption.

Shape letters: N blocks, S positions.
"""

import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from engram_hf.training import engram_parameter_groups

_CHECKPOINTS = 4


class Interrupted(Exception):
    """The time is up; a checkpoint has the finished steps."""


class _Clock(TrainerCallback):
    """Counts the seconds of all parts of a run, and stops with a checkpoint when the time is up."""

    def __init__(self, deadline: float | None):
        self.deadline = deadline
        self.is_late = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = dict(getattr(state, "stateful_callbacks", {}).get("spent", {"wall": 0.0, "processor": 0.0}))
        self.started = {"wall": time.perf_counter(), "processor": time.process_time()}

    def on_step_end(self, args, state, control, **kwargs):
        if self.deadline is not None and time.monotonic() > self.deadline and state.global_step < state.max_steps:
            self.is_late = control.should_save = control.should_training_stop = True
        if control.should_save:
            state.stateful_callbacks["spent"] = self.spent()

    def spent(self) -> dict[str, float]:
        """Return wall-clock and processor seconds."""
        now = {"wall": time.perf_counter(), "processor": time.process_time()}
        return {name: self.before[name] + now[name] - self.started[name] for name in now}


def train(
    model: PreTrainedModel,
    examples: list[dict[str, torch.Tensor]],
    *,
    folder: Path,
    batch: int,
    rate: float,
    seed: int,
    device: str = "cpu",
    deadline: float | None = None,
) -> dict[str, float]:
    """Train once on `examples`, in their order and in bfloat16 mixed precision, with AdamW, the paper's parameter groups,
    and a cosine with one tenth of warm-up.

    Args:
        model: the model, changed in place.
        examples: `input_ids` and `labels` `[S]`; as many as there are windows in all steps.
        folder: a folder for checkpoints; the run resumes from one that is there.
        batch: examples of a step.
        rate: the learning rate; tables have five times as much.
        seed: the seed of all other random choices.
        device: `cpu` or `cuda`.
        deadline: a time of `time.monotonic()`; None for none.

    Returns:
        The seconds of all parts of an interrupted run: `wall`, `processor`.

    Raises:
        Interrupted: the deadline passed; call again to resume.
    """
    steps = len(examples) // batch
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        save_strategy="steps",
        save_steps=max(1, steps // _CHECKPOINTS),
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        train_sampling_strategy="sequential",
        dataloader_pin_memory=False,
        use_cpu=device == "cpu",
        bf16=True,
        seed=seed,
    )
    groups = engram_parameter_groups(model, rate, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    clock = _Clock(deadline)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples, optimizers=(optimizer, None), callbacks=[clock]
    )
    checkpoint = get_last_checkpoint(str(folder)) if folder.exists() else None
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # What follows is measured in float32.
    if clock.is_late:
        raise Interrupted
    return clock.spent()

"""Execution of runs: finished runs are not repeated, and interrupted runs resume.

Shape letters: N windows, S positions.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel
from transformers.utils import logging

from engram_hf import EngramError
from engram_hf.analysis import Off, Windows, compare_layers, measure_depth, measure_traffic, measure_worth
from engram_hf.analysis.evaluation import token_losses
from engram_hf.analysis.texts import TOKEN_CLASSES

from . import long_context, tasks
from .corpus import FREQUENCIES, Corpus
from .models import build, size_of
from .plan import Run, side_of
from .presets import Preset
from .results import Results, held, now, provenance
from .training import Interrupted, train

logger = logging.get_logger(f"transformers.{__name__}")

_DEPTH_WINDOWS = 32
_WORTH_WINDOWS = 64
_LONG_LENGTH = 256
_LONG_SEED = 1_000_000


class Runner:
    """Executes the runs of a preset.

    Args:
        preset: the sizes.
        corpus: the texts.
        results: the folder for results.
        work: a folder for checkpoints and trained models.
        device: `cpu` or `cuda`.
        deadline: a time of `time.monotonic()`; None for none.
    """

    def __init__(
        self,
        preset: Preset,
        corpus: Corpus,
        results: Results,
        work: Path,
        device: str = "cpu",
        deadline: float | None = None,
    ):
        self.preset, self.corpus, self.results, self.work = preset, corpus, results, work
        self.device, self.deadline = device, deadline
        # The provenance is recorded at the start, because the checkout may change while runs last.
        self._provenance = provenance(corpus.digest, device)
        self._tasks: dict[str, list[tasks.Item]] | None = None

    @property
    def items(self) -> dict[str, list[tasks.Item]]:
        """Return the items of the downstream tasks, by task."""
        if self._tasks is None:
            parts = self.corpus.parts
            self._tasks = tasks.make_tasks(
                parts["train"], parts["test"], self.corpus.tokenizer, self.preset.task_items
            )
        return self._tasks

    def do_all(self, runs: list[Run]) -> None:
        """Execute runs in order, without those of another process and those that wait for these.

        Raises:
            Interrupted: the deadline passed.
            ValueError: existing results were measured on other texts.
        """
        self._require_same_texts(runs)
        for number, run in enumerate(runs, 1):
            is_ready = all(self.results.read(name) is not None for name in run.needs)
            if self.results.read(run.name) is not None or not is_ready:
                continue
            if self.deadline is not None and time.monotonic() > self.deadline:
                raise Interrupted
            with held(self.work / "locks" / run.name) as is_ours:
                if is_ours and self.results.read(run.name) is None:
                    print(f"[{number}/{len(runs)}] {run.name}", flush=True)
                    self.do(run)

    def _require_same_texts(self, runs: list[Run]) -> None:
        for run in runs:
            result = self.results.read(run.name)
            if result is not None and result["provenance"]["corpus"] != self.corpus.digest:
                raise EngramError(
                    f"{self.results.path(run.name)} was measured on other texts ({result['provenance']['corpus']}, now "
                    f"{self.corpus.digest}), so it cannot be compared; use another folder with --results, or the --work folder that it "
                    "was made with, which holds its texts."
                )

    def do(self, run: Run) -> None:
        """Execute one run, and store its result."""
        does = {
            "tuning": self._tune,
            "text": self._train_on_text,
            "long context": self._long_context,
            "layers": self._compare,
        }
        found = does[run.kind](run)
        about = {"run": run.name, "kind": run.kind, "variant": run.variant, "seed": run.seed}
        self.results.write(run.name, {**about, **found, "provenance": {"date": now(), **self._provenance}})
        shutil.rmtree(self._folder(run), ignore_errors=True)

    def best_rate(self, variant: str) -> float:
        """Return the rate whose tuning run of this variant's side has the lowest loss on the validation files."""
        side = side_of(variant)
        found = [self.results.read(Run("tuning", side, 0, (), rate).name) for rate in range(len(self.preset.rates))]
        done = [one for one in found if one is not None]
        if len(done) < len(found):
            raise EngramError(f"The learning rate of {side!r} is not chosen yet; do its tuning runs first.")
        return min(done, key=lambda one: one["validation_loss"])["learning_rate"]

    def _folder(self, run: Run) -> Path:
        return self.work / "checkpoints" / run.name

    def _weights(self, name: str) -> Path:
        return self.work / "models" / f"{name}.safetensors"

    def _tune(self, run: Run) -> dict[str, Any]:
        rate = self.preset.rates[run.rate]
        model, found = self._trained(run, rate, self._text(run.seed, max(2, self.preset.steps // 2)))
        losses = token_losses(model, self.corpus.validation, batch=16)
        return {**found, "validation_loss": _mean(losses, self.corpus.validation)}

    def _train_on_text(self, run: Run) -> dict[str, Any]:
        steps = self.preset.steps
        if run.variant == "twin of equal time":
            steps = self._steps_of_equal_time(run.seed)
        model, found = self._trained(run, self.best_rate(run.variant), self._text(run.seed, steps))
        if run.variant in ("memory", "twin"):
            self._weights(run.name).parent.mkdir(parents=True, exist_ok=True)
            save_model(model, str(self._weights(run.name)))
        started = time.process_time()
        found |= self._loss(model, run.seed)
        found["tasks"] = {
            name: {"items": len(items), "right": tasks.exact_match(model, self.corpus.tokenizer, items)}
            for name, items in self.items.items()
            if items
        }
        if run.variant in ("memory", "twin"):
            found["divergence"] = measure_depth(model, _some(self.corpus.test, _DEPTH_WINDOWS)).divergence
        if run.variant == "memory":
            some = _some(self.corpus.test, _DEPTH_WINDOWS)
            found["divergence_off"] = measure_depth(model, some, edit=Off()).divergence
            found["worth"] = asdict(measure_worth(model, _some(self.corpus.test, _WORTH_WINDOWS)))
        if run.variant in ("memory", "raw ids") or run.variant.endswith(("head", "heads")):
            found |= _traffic(model, self.corpus.test)
        if run.variant == "learned addresses":
            found["rows_read"] = model.addresses.rows_read(self.corpus.test) / sum(model.config.engram_num_embeddings)
        return {**found, "evaluation_seconds": time.process_time() - started}

    def _long_context(self, run: Run) -> dict[str, Any]:
        tokenizer, tokens = self.corpus.tokenizer, self.corpus.tokens.flatten()
        blocks = tokens[: len(tokens) // _LONG_LENGTH * _LONG_LENGTH].view(-1, _LONG_LENGTH)
        maker = long_context.Maker(tokenizer, blocks, run.seed)
        steps = 2 * self.preset.steps
        examples = long_context.training_examples(maker, steps * self.preset.batch)
        model, found = self._trained(run, self.best_rate(run.variant), examples)
        unseen = long_context.Maker(tokenizer, self._unseen_blocks(), _LONG_SEED + run.seed)
        count = self.preset.test_windows
        scores = {task: long_context.score(model, unseen, task, count) for task in long_context.TASKS}
        return {**found, "length": _LONG_LENGTH, "scores": scores}

    def _unseen_blocks(self) -> torch.Tensor:
        ids = torch.cat([torch.tensor(self.corpus.tokenizer(text)["input_ids"]) for text in self.corpus.parts["test"]])
        return ids[: len(ids) // _LONG_LENGTH * _LONG_LENGTH].view(-1, _LONG_LENGTH)

    def _compare(self, run: Run) -> dict[str, Any]:
        models = []
        for name in run.needs:
            result, path = self.results.read(name), self._weights(name)
            if result is None or not path.exists():
                raise EngramError(
                    f"The weights of {name} are not in {path.parent}; delete its result, so that it is trained again."
                )
            model = build(result["variant"], self.preset, self.corpus.tokenizer, run.seed)
            load_model(model, str(path))
            models.append(model.to(self.device).eval())
        return {"similarity": compare_layers(*models, self.corpus.test).similarity}

    def _text(self, seed: int, steps: int) -> list[dict[str, torch.Tensor]]:
        blocks = self.corpus.train_blocks(seed, steps * self.preset.batch)
        return [{"input_ids": block, "labels": block} for block in blocks]

    def _trained(self, run: Run, rate: float, examples: list) -> tuple[PreTrainedModel, dict[str, Any]]:
        model = build(run.variant, self.preset, self.corpus.tokenizer, run.seed).to(self.device)
        size = size_of(model, self.preset.block)
        spent = train(
            model,
            examples,
            folder=self._folder(run),
            batch=self.preset.batch,
            rate=rate,
            seed=run.seed,
            device=self.device,
            deadline=self.deadline,
        )
        tokens = sum(len(example["input_ids"]) for example in examples)
        steps = len(examples) // self.preset.batch
        about = {"learning_rate": rate, "steps": steps, "tokens": tokens, "size": size, "seconds": spent}
        return model.eval(), about

    def _steps_of_equal_time(self, seed: int) -> int:
        """Return the number of steps of the twin that take the processor time of the run with memory."""
        spent = [self.results.read(f"text_{side}_seed-{seed}")["seconds"]["processor"] for side in ("memory", "twin")]
        return max(2, round(self.preset.steps * spent[0] / spent[1]))

    def _loss(self, model: PreTrainedModel, seed: int) -> dict[str, Any]:
        windows = self.corpus.test
        losses = token_losses(model, windows, batch=16)
        reference = build("memory", self.preset, self.corpus.tokenizer, 0)
        classes = self.corpus.frequencies(reference, seed, self.preset.steps * self.preset.batch)
        return {
            "loss": _mean(losses, windows),
            "by_frequency": _by(losses, classes.where(windows.valid[:, 1:], -1), FREQUENCIES),
            "by_class": _by(losses, windows.classes[:, 1:], TOKEN_CLASSES),
        }


def _by(losses: torch.Tensor, classes: torch.Tensor, names: Sequence[str]) -> dict[str, dict[str, float]]:
    groups = {}
    for number, name in enumerate(names):
        chosen = classes == number
        if chosen.any():
            groups[name] = {"tokens": int(chosen.sum()), "loss": float(losses[chosen].double().mean())}
    return groups


def _mean(losses: torch.Tensor, windows: Windows) -> float:
    return float(losses[windows.valid[:, 1:]].double().mean())


def _some(windows: Windows, count: int) -> Windows:
    return Windows(windows.input_ids[:count], windows.valid[:count], windows.classes[:count])


def _traffic(model: PreTrainedModel, windows: Windows) -> dict[str, Any]:
    """Return the share of rows that the windows read and, by order, the share of a head's reads that collide with
    another n-gram.
    """
    traffic = measure_traffic(model, windows)
    collisions: dict[str, float] = {}
    for order in sorted({head.order for head in traffic.heads}):
        shares = [head.traffic for head in traffic.heads if head.order == order]
        collisions[str(order)] = sum(shares) / len(shares)
    rows = dict(zip(model.config.engram_layer_ids, model.config.engram_num_embeddings, strict=True))
    read = sum((1 - share) * rows[layer] for layer, share in traffic.never_read.items())
    return {"collisions": collisions, "rows_read": read / sum(rows.values())}

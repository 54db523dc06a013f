"""The report of written facts: measurements on the facts themselves, and on protected texts.

Shape letters: B batch, S positions, V vocabulary.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .fact_texts import Fact
from .memory import find_engram, read_rows_of

if TYPE_CHECKING:
    from ..modeling_engram import EngramModel

_BATCH = 32
# These are the upper bounds of the classes of distances.
_DISTANCES = (0, 1, 3, 7, 15, 31)


class Recall(NamedTuple):
    """The model's continuation of a prompt.

    Args:
        probability: the probability of the whole target, given the prompt.
        rank: the worst rank of a target token, each given those before it: 1 if greedy decoding gives the target.
    """

    probability: float
    rank: int


@dataclass
class FactResult:
    """The results of one fact before and after the training.

    Args:
        prompt, target: the texts of the fact.
        probability_before, probability_after, rank_before, rank_after: see [`Recall`].
        rows, bytes: the numbers of rows and bytes that the adapter has for it.
        shared_rows: the number of these rows that other facts have too.
    """

    prompt: str
    target: str
    probability_before: float
    probability_after: float
    rank_before: int
    rank_after: int
    rows: int
    bytes: int
    shared_rows: int


@dataclass
class Disturbance:
    """The effect of the written facts on protected texts.

    Args:
        texts, positions: their numbers.
        reading: the number of positions that read a written row.
        untouched_texts: the number of texts without such a position.
        untouched_positions: the number of their positions, and of those before the first such position in the others.
        changed_untouched: the number of untouched positions whose logits changed in any bit; it should be 0.
        loss_before, loss_after: the loss over all of the texts, in nats per token.
        kl_by_distance: mean KL divergence from before to after, in nats, by the distance of a position from the last written
            row that was read.
    """

    texts: int = 0
    positions: int = 0
    reading: int = 0
    untouched_texts: int = 0
    untouched_positions: int = 0
    changed_untouched: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    kl_by_distance: dict[str, float] = field(default_factory=dict)


@dataclass
class FactReport:
    """The result of [`write_facts`]; `print` shows a table.

    Args:
        name: name of the adapter.
        facts: one result each, in the given order.
        layers, orders: the layers and n-gram orders of the rows.
        rows, bytes: their numbers in the adapter, each row counted once.
        steps, seconds: the length of the training.
        protected: the effect on the protected texts; None without such texts.
        notes: conflicts between facts, a sentence each.
    """

    name: str
    facts: list[FactResult]
    layers: list[int]
    orders: list[int]
    rows: int
    bytes: int
    steps: int
    seconds: float
    protected: Disturbance | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def recall(self) -> float:
        """The share of the facts whose target greedy decoding gives."""
        return sum(fact.rank_after == 1 for fact in self.facts) / len(self.facts)

    def to_json(self) -> str:
        """Return the report as one JSON document."""
        return json.dumps({**asdict(self), "recall": self.recall}, indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        lines = [fact_lines(self.facts)]
        lines.append(
            f"{self.recall:.0%} of {len(self.facts)} facts recalled; {self.rows:,} rows of layers {self.layers} (orders "
            f"{self.orders}), {self.bytes:,} bytes; {self.steps} steps, {self.seconds:.1f} s"
        )
        if self.protected is not None:
            lines.append(_protected_lines(self.protected))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def fact_lines(facts: Sequence[FactResult]) -> str:
    """Return a table of facts, with their results before and after the training."""
    title = f"{'fact':<46}  {'probability':>18}  {'rank':>13}  {'rows':>5}  {'shared':>6}"
    lines = [title]
    for index, fact in enumerate(facts):
        text = " ".join(f"{index} {fact.prompt} → {fact.target.strip()}".split())
        text = text if len(text) <= 46 else f"{text[:22]}…{text[-23:]}"
        chance = f"{fact.probability_before:.2g} → {fact.probability_after:.2g}"
        rank = f"{fact.rank_before:,} → {fact.rank_after:,}"
        lines.append(f"{text:<46}  {chance:>18}  {rank:>13}  {fact.rows:>5}  {fact.shared_rows:>6}")
    return "\n".join(lines)


def _protected_lines(found: Disturbance) -> str:
    kl = "  ".join(f"{distance}: {value:.2g}" for distance, value in found.kl_by_distance.items())
    return (
        f"protected: {found.reading:,} of {found.positions:,} positions read a written row; {found.untouched_texts:,} of "
        f"{found.texts:,} texts read none\n"
        f"  loss {found.loss_before:.4f} → {found.loss_after:.4f}; of {found.untouched_positions:,} positions before any such "
        f"read, {found.changed_untouched} changed in any bit\n"
        f"  KL by distance behind a written row: {kl or 'none is read'}"
    )


@torch.no_grad()
def measure_facts(model: nn.Module, facts: Sequence[Fact]) -> list[Recall]:
    """Return the continuation of every prompt by `model` in its present state."""
    found = []
    for first in range(0, len(facts), _BATCH):
        some = facts[first : first + _BATCH]
        log_probs = F.log_softmax(logits_of(model, batch_of(some, model)).float(), dim=-1)
        for fact, rows in zip(some, log_probs, strict=True):
            there = rows[list(fact.predicting)]
            right = there.gather(1, torch.tensor(fact.target_ids, device=there.device).unsqueeze(1))
            ranks = 1 + (there > right).sum(1)
            found.append(Recall(float(right.sum().exp()), int(ranks.max())))
    return found


def batch_of(facts: Sequence[Fact], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask` `[B, S]`, padded on the right, on the model's device."""
    device = next(model.parameters()).device
    ids = [fact.input_ids for fact in facts]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True).to(device),
        "attention_mask": pad([torch.ones_like(part) for part in ids], batch_first=True).to(device),
    }


def logits_of(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits `[B, S, V]`, computed without a cache."""
    return model(**batch, use_cache=False).logits


class _Sums:
    """Running sums over texts."""

    def __init__(self) -> None:
        self.found = Disturbance()
        self.losses, self.predicted = [0.0, 0.0], 0
        self.kl: dict[str, list[float]] = {}

    def result(self) -> Disturbance:
        self.found.loss_before, self.found.loss_after = (loss / max(self.predicted, 1) for loss in self.losses)
        order = [_name_of_distance(end) for end in (*_DISTANCES, 10**9)]
        self.found.kl_by_distance = {
            name: sum(self.kl[name]) / len(self.kl[name]) for name in order if name in self.kl
        }
        return self.found


@torch.no_grad()
def measure_protected(
    model: nn.Module,
    texts: Iterable[Mapping[str, torch.Tensor]],
    written: Mapping[int, torch.Tensor],
    without: Callable[[], AbstractContextManager],
) -> Disturbance:
    """Compare a model with and without an adapter, one text at a time, so that no text's shape depends on other texts.

    Args:
        model: the model with the adapter.
        texts: batches with `input_ids` and other inputs of the model.
        written: the rows of the adapter, by layer.
        without: returns a context manager in which the adapter is off.
    """
    engram, sums = find_engram(model), _Sums()
    for batch in logging.tqdm(texts, desc="Comparing protected texts", delay=1):
        for index in range(len(batch["input_ids"])):
            text = {
                name: batch[name][index : index + 1].to(next(model.parameters()).device)
                for name in ("input_ids", "attention_mask", "position_ids", "seq_idx", "image_mask")
                if batch.get(name) is not None
            }
            after = logits_of(model, text)[0]
            with without():
                before = logits_of(model, text)[0]
            _compare(sums, engram, text, written, before, after)
    return sums.result()


def _compare(
    sums: _Sums,
    engram: "EngramModel",
    text: Mapping[str, torch.Tensor],
    written: Mapping[int, torch.Tensor],
    before: torch.Tensor,
    after: torch.Tensor,
) -> None:
    """Add the result of one text, whose logits `[S, V]` were `before` and are `after`."""
    read = read_rows_of(engram, text)
    valid = read.valid[0]
    hits = torch.zeros_like(valid)
    for layer, rows in written.items():
        hits |= torch.isin(read.row_ids[engram.hashing.layer_ids.index(layer), 0], rows.cpu()).any(-1)
    hits &= valid
    is_untouched = valid & (hits.cumsum(0) == 0)
    found = sums.found
    found.texts += 1
    found.positions += int(valid.sum())
    found.reading += int(hits.sum())
    found.untouched_texts += int(not hits.any())
    found.untouched_positions += int(is_untouched.sum())
    changed = (before != after).any(-1).cpu()
    found.changed_untouched += int((changed & is_untouched).sum())
    ids = text["input_ids"][0]
    predicts = (valid[:-1] & valid[1:]).to(ids.device)
    for index, logits in enumerate((before, after)):
        losses = F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
        sums.losses[index] += float(losses[predicts].sum())
    sums.predicted += int(predicts.sum())
    _add_divergence(sums, hits, valid & ~is_untouched, before, after)


def _add_divergence(
    sums: _Sums, hits: torch.Tensor, is_behind: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> None:
    last = -1
    places = [place for place in range(len(hits)) if is_behind[place]]
    if not places:
        return
    first, second = (F.log_softmax(logits[places].float(), dim=-1) for logits in (before, after))
    divergence = (first.exp() * (first - second)).sum(-1).clamp_min(0).tolist()
    for place, value in zip(places, divergence, strict=True):
        last = place if hits[place] else last
        sums.kl.setdefault(_name_of_distance(place - last), []).append(value)


def _name_of_distance(distance: int) -> str:
    lower = 0
    for end in _DISTANCES:
        if distance <= end:
            return str(end) if lower == end else f"{lower}-{end}"
        lower = end + 1
    return f"{lower}+"

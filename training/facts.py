"""Write facts into rows of memory, and remove them: `write_facts` and `forget_facts`.

The rows that a prompt reads are known in advance, so a fact can be trained into these rows alone. A text that reads
none of them is computed as before, to the last bit.
"""

import contextlib
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from ..safetensors_engram import EngramError
from .fact_report import (
    FactReport,
    FactResult,
    Recall,
    batch_of,
    logits_of,
    measure_facts,
    measure_protected,
)
from .fact_texts import Fact, WrittenFact, choose_positions, parse_facts, say_conflicts
from .memory import check_layers, check_orders, find_engram, require_tokenizer_of
from .row_adapters import RowDifferences, RowsLayer
from .row_scan import Batches, scan_rows
from .rows_peft import NAME, EngramRowsConfig

logger = logging.get_logger(f"transformers.{__name__}")

_BATCH = 32
# Training ends when every token of every target leads every other token by this many nats.
_SURE = 2.0
# A gate below this value adds almost nothing.
_SHUT = 0.05


def write_facts(
    model: nn.Module,
    tokenizer: Any,
    facts: Iterable[Mapping[str, Any]],
    *,
    name: str = "facts",
    protect: Iterable[Any] | None = None,
    max_protected_reads: int = 0,
    steps: int = 200,
    learning_rate: float = 1.0,
    layers: Iterable[int] | None = None,
    orders: Iterable[int] | None = None,
) -> tuple[PeftModel, FactReport]:
    """Train the rows that facts are read from until the model recalls them; everything else is frozen.

    The same facts give the same rows: nothing here is random. Active adapters stay active during the training. Their facts keep
    their logits to the last bit, since rows that these read are left alone; if the new facts are not recalled without such
    rows, they are written, too, and trained so that all facts are recalled.

    Args:
        model: an Engram model with a head, in eval mode or not. A `PeftModel` gets one more adapter; an adapter of another method
            (LoRA) stays active.
        tokenizer: the model's tokenizer.
        facts: dictionaries with `prompt` and `target`; or with `subject`, `relation` (a template with `{}` for the
            subject) and `target`.
        name: name of the new adapter.
        protect: texts whose predictions should not change (see `data` of [`scan_rows`]): rows that they read are not written.
        max_protected_reads: a row is written nevertheless if `protect` reads it at most this number of times.
        steps: maximum number of steps; training ends when every fact is recalled with certainty.
        learning_rate: learning rate of Adam, in units of the rows' own root mean square.
        layers: decoder layers whose rows are written; None for the first with memory or, if a fact is not recalled from it
            alone, for all with memory.
        orders: n-gram orders; None for the largest alone, which is the most specific.

    Returns:
        A `PeftModel` with the active adapter, and the report.

    Raises:
        ValueError: a fact is incomplete or contradicts another; all rows are protected; or the memory cannot learn. The
            model is unchanged.
    """
    engram = find_engram(model)
    require_tokenizer_of(engram, tokenizer)
    if steps < 1 or learning_rate <= 0 or max_protected_reads < 0:
        raise EngramError(
            f"steps is {steps}, learning_rate {learning_rate} and max_protected_reads {max_protected_reads}; steps must be at "
            "least 1, the rate positive, and the number of reads not negative."
        )
    if name in getattr(model, "peft_config", {}):
        raise EngramError(
            f"The model has an adapter {name!r} already; choose another name, or delete_adapter({name!r}) first."
        )
    parsed = parse_facts(facts, tokenizer)
    texts = None if protect is None else list(Batches(protect, tokenizer))
    chosen_orders = check_orders(engram, [engram.hashing.max_ngram] if orders is None else orders)
    replaced = {fact.prompt_ids for fact in parsed}
    earlier = tuple(fact for fact in _facts_of_active(model) if fact.prompt_ids not in replaced)
    chosen_layers = check_layers(engram, layers)
    protected: dict[int, torch.Tensor] = {}
    if texts is not None:
        scan = scan_rows(texts, tokenizer, model, layers=chosen_layers, orders=chosen_orders)
        protected = {layer: ids[scan.counts[layer] > max_protected_reads] for layer, ids in scan.items()}
    settings = _Settings(name, texts, protected, steps, learning_rate, tuple(chosen_orders), earlier)
    # One layer takes the fewest bytes, and changes the least; rows that earlier facts read are the last resort.
    trials = [chosen_layers[:1]] if layers is None and len(chosen_layers) > 1 else []
    trials += [chosen_layers] if earlier else []
    for some_layers in trials:
        with contextlib.suppress(EngramError):  # An error here is raised again by the last try.
            return _write(model, parsed, settings, some_layers, is_trial=True)
    return _write(model, parsed, settings, chosen_layers)


def _facts_of_active(model: nn.Module) -> list[Fact]:
    """Return the facts of all active adapters."""
    names = [name for name in _active_rows(model) if getattr(model.peft_config[name], "facts", None)]
    return [written.fact for name in names for written in facts_of(model, name)]


class _Settings(NamedTuple):
    """The values that all tries of [`write_facts`] share.

    Args:
        name: name of the new adapter.
        texts: batches of the protected texts.
        protected: rows that these read too often to be written, by layer.
        steps, learning_rate, orders: the arguments.
        earlier: facts of active adapters.
    """

    name: str
    texts: list[Any] | None
    protected: dict[int, torch.Tensor]
    steps: int
    learning_rate: float
    orders: tuple[int, ...]
    earlier: tuple[Fact, ...]


def _write(
    model: nn.Module,
    parsed: Sequence[Fact],
    settings: _Settings,
    layers: Sequence[int],
    is_trial: bool = False,
) -> tuple[PeftModel, FactReport]:
    """Write facts into some layers.

    A trial writes no row that earlier facts read, and keeps the rest only if all facts are recalled. Otherwise, earlier facts
    are trained along.

    Raises:
        ValueError: as in [`write_facts`]; or a fact of a trial is not recalled. The model is unchanged.
    """
    engram, name, chosen_orders, chosen_layers = find_engram(model), settings.name, settings.orders, tuple(layers)
    kept, along = (settings.earlier, ()) if is_trial else ((), settings.earlier)
    everywhere = [(fact, tuple(range(len(fact.input_ids)))) for fact in kept]
    read = [WrittenFact(fact, positions, chosen_layers, chosen_orders).rows(engram) for fact, positions in everywhere]
    protected = _union([{layer: ids for layer, ids in settings.protected.items() if layer in layers}, *read])
    written = [
        WrittenFact(fact, positions, chosen_layers, chosen_orders)
        for fact, positions in zip(
            parsed, choose_positions(engram, parsed, chosen_layers, chosen_orders, protected), strict=True
        )
    ]
    rows, notes = _rows_to_write(model, written, protected)
    notes += say_conflicts(engram, parsed, chosen_orders)
    config = EngramRowsConfig(
        rows=_union(rows), facts=[fact.to_dict() for fact in written], task_type=_task_type(model)
    )
    started = time.perf_counter()
    with _evaluating(model), _adapter(model, config, name) as peft_model:
        before, earlier = measure_facts(peft_model, parsed), measure_facts(peft_model, along)
        taught = [fact for fact, part in zip(parsed, rows, strict=True) if any(ids.numel() for ids in part.values())]
        done = _train(peft_model, name, [*taught, *along], settings.steps, settings.learning_rate)
        after = measure_facts(peft_model, parsed)
        if is_trial and any(recall.rank > 1 for recall in after):
            raise EngramError("Not all facts are recalled from these layers alone; write them into more.")
        seconds = time.perf_counter() - started
        notes += _say_shut_gates(peft_model, written, after)
        notes += _say_forgotten(along, earlier, measure_facts(peft_model, along))
        report = FactReport(
            name=name,
            facts=_results(written, rows, before, after, engram),
            layers=list(chosen_layers),
            orders=list(chosen_orders),
            rows=sum(ids.numel() for ids in config.rows.values()),
            bytes=sum(_bytes(engram, ids.numel(), layer) for layer, ids in config.rows.items()),
            steps=done,
            seconds=round(seconds, 3),
            notes=notes,
        )
        if settings.texts is not None:
            report.protected = measure_protected(
                peft_model, settings.texts, config.rows, lambda: _without(peft_model, name)
            )
    return peft_model, report


def forget_facts(model: PeftModel, name: str, which: int | Iterable[int]) -> int:
    """Remove single facts from an adapter: rows that only these facts have become unchanged again, to the last bit.

    Rows that other facts of the adapter have too stay, with a warning. An adapter without facts changes
    nothing. Save the adapter again afterwards.

    Args:
        model: a `PeftModel` with the adapter.
        name: name of the adapter.
        which: indices of the facts, in the order of writing.

    Returns:
        The number of removed rows.

    Raises:
        ValueError: there is no such adapter or fact. Nothing is changed.
    """
    facts = facts_of(model, name)
    indices = {which} if isinstance(which, int) else set(which)
    wrong = sorted(index for index in indices if type(index) is not int or not 0 <= index < len(facts))
    if wrong or not indices:
        raise EngramError(f"Facts {wrong or 'of no number'} are not in {name!r}; it has facts 0 to {len(facts) - 1}.")
    engram = find_engram(model)
    gone = _union([fact.rows(engram) for index, fact in enumerate(facts) if index in indices])
    kept = _union([fact.rows(engram) for index, fact in enumerate(facts) if index not in indices])
    config = model.peft_config[name]
    removed, shared, rows = 0, 0, {}
    for layer, table in rows_layers(model, name).items():
        adapter = table.engram_rows_adapter[name]
        held = adapter.rows.cpu()
        is_gone = torch.isin(held, gone.get(layer, held[:0]))
        is_kept = torch.isin(held, kept.get(layer, held[:0]))
        adapter.keep(~is_gone | is_kept)
        removed, shared = removed + int((is_gone & ~is_kept).sum()), shared + int((is_gone & is_kept).sum())
        rows[layer] = adapter.rows.cpu()
        config.memory[str(layer)] |= {"rows": rows[layer].numel(), "rows_sha256": adapter.digest}
    config.rows, config.facts = rows, [fact.to_dict() for index, fact in enumerate(facts) if index not in indices]
    if shared:
        logger.warning(
            f"{shared} rows of the facts {sorted(indices)} are those of other facts in {name!r} too, and stay written."
        )
    return removed


def facts_of(model: nn.Module, name: str) -> list[WrittenFact]:
    """Return the facts that an adapter of a model lists.

    Raises:
        ValueError: there is no adapter of this name, or it has no facts.
    """
    config = getattr(model, "peft_config", {}).get(name)
    if not getattr(config, "facts", None):
        known = sorted(getattr(model, "peft_config", {}))
        raise EngramError(f"There is no adapter {name!r} with facts; the adapters of this model are {known}.")
    return [WrittenFact.from_dict(values) for values in config.facts]


def rows_layers(model: nn.Module, name: str) -> dict[int, RowsLayer]:
    """Return the tables that have rows of an adapter, by decoder layer."""
    tables = {layer: memory.table for layer, memory in find_engram(model).memories().items()}
    return {
        layer: table
        for layer, table in tables.items()
        if isinstance(table, RowsLayer) and name in table.engram_rows_adapter
    }


def results_of(model: PeftModel, name: str) -> list[FactResult]:
    """Return the results of every fact of an adapter, without and with it, for the model in its present state."""
    engram, facts = find_engram(model), facts_of(model, name)
    held = {layer: table.engram_rows_adapter[name].rows.cpu() for layer, table in rows_layers(model, name).items()}
    rows = [
        {layer: ids[torch.isin(ids, held[layer])] for layer, ids in fact.rows(engram).items() if layer in held}
        for fact in facts
    ]
    texts = [fact.fact for fact in facts]
    with _evaluating(model):
        after = measure_facts(model, texts)
        with _without(model, name):
            before = measure_facts(model, texts)
    return _results(facts, rows, before, after, engram)


def _task_type(model: nn.Module) -> str:
    if not hasattr(model, "generate"):
        raise EngramError(f"{type(model).__name__} has no head to recall facts with; load it as EngramForCausalLM.")
    return "CAUSAL_LM"


def _rows_to_write(
    model: nn.Module, written: Sequence[WrittenFact], protected: Mapping[int, torch.Tensor]
) -> tuple[list[dict[int, torch.Tensor]], list[str]]:
    """Return rows of every fact by layer, without protected rows; and notes about conflicts."""
    engram, notes = find_engram(model), []
    rows = [
        {layer: ids[~torch.isin(ids, protected.get(layer, ids[:0]))] for layer, ids in fact.rows(engram).items()}
        for fact in written
    ]
    for index, of_fact in enumerate(rows):
        if not any(ids.numel() for ids in of_fact.values()):
            notes.append(f"Every row of fact {index} is read by the protected texts, so nothing of it was written.")
    if len(notes) == len(rows):
        raise EngramError(
            "Every row of these facts is read by the protected texts; protect less, or raise max_protected_reads."
        )
    notes += _say_shared(model, written, rows)
    return rows, notes


def _say_shared(
    model: nn.Module, written: Sequence[WrittenFact], rows: Sequence[Mapping[int, torch.Tensor]]
) -> list[str]:
    notes = []
    for index, of_fact in enumerate(rows):
        for other in range(index):
            if written[other].fact.target_ids == written[index].fact.target_ids:
                continue
            shared = sum(int(torch.isin(ids, rows[other][layer]).sum()) for layer, ids in of_fact.items())
            if shared:
                notes.append(f"Facts {other} and {index} write {shared} rows together, for different targets.")
    union = _union(rows)
    for name in getattr(model, "peft_config", {}):
        shared = sum(
            int(torch.isin(table.engram_rows_adapter[name].rows.cpu(), union.get(layer, torch.empty(0))).sum())
            for layer, table in rows_layers(model, name).items()
        )
        if shared:
            notes.append(f"The adapter {name!r} writes {shared} of these rows too; where both are active they add up.")
    return notes


def _say_forgotten(facts: Sequence[Fact], before: Sequence[Recall], after: Sequence[Recall]) -> list[str]:
    """Return a sentence for each earlier fact that was recalled, and no longer is."""
    return [
        f"An earlier fact is no longer recalled: {fact.prompt} → {fact.target}."
        for fact, was, now in zip(facts, before, after, strict=True)
        if was.rank == 1 and now.rank > 1
    ]


def _union(rows: Sequence[Mapping[int, torch.Tensor]]) -> dict[int, torch.Tensor]:
    layers = sorted({layer for of_fact in rows for layer in of_fact})
    union = {layer: torch.unique(torch.cat([part[layer] for part in rows if layer in part])) for layer in layers}
    return {layer: ids for layer, ids in union.items() if ids.numel()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off, and restore the mode of every module afterwards."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


@contextlib.contextmanager
def _adapter(model: nn.Module, config: EngramRowsConfig, name: str) -> Iterator[PeftModel]:
    """Yield a `PeftModel` with a new adapter, active beside the other active ones; remove it if anything fails."""
    active = _active_rows(model)
    had_gradients = [parameter for parameter in model.parameters() if parameter.requires_grad]
    is_rows = isinstance(model, PeftModel) and model.peft_type == NAME
    if is_rows:
        model.add_adapter(name, config)
        peft_model = model
    else:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # These warn about adapters of another method, which are intended here.
            peft_model = get_peft_model(base, config, adapter_name=name)
    try:
        peft_model.base_model.set_adapter([*active, name])
        yield peft_model
        peft_model.base_model.set_adapter([*active, name], inference_mode=True)
    except BaseException:
        peft_model.delete_adapter(name)
        for parameter in had_gradients:
            parameter.requires_grad_(True)
        if is_rows:
            peft_model.base_model.set_adapter(active)
        elif base is model:
            peft_model.unload()
        raise


def _active_rows(model: nn.Module) -> list[str]:
    for module in model.modules():
        if isinstance(module, RowsLayer) and not module.disable_adapters:
            return list(module.active_adapters)
    return []


@contextlib.contextmanager
def _without(model: nn.Module, name: str) -> Iterator[None]:
    """Turn off one of the model's active adapters within the context."""
    tables = [module for module in model.modules() if isinstance(module, RowsLayer)]
    active = [list(table.active_adapters) for table in tables]
    for table, names in zip(tables, active, strict=True):
        table.set_adapter([other for other in names if other != name], inference_mode=True)
    try:
        yield
    finally:
        for table, names in zip(tables, active, strict=True):
            table.set_adapter(names, inference_mode=True)


def _train(model: PeftModel, name: str, facts: Sequence[Fact], steps: int, learning_rate: float) -> int:
    """Train the differences of one adapter, and return the number of steps."""
    adapters = {layer: table.engram_rows_adapter[name] for layer, table in rows_layers(model, name).items()}
    deltas = [adapter.delta for adapter in adapters.values()]
    groups = [
        {"params": [adapter.delta], "lr": learning_rate * _size_of_rows(model, layer, adapter)}
        for layer, adapter in adapters.items()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    for delta in deltas:
        delta.requires_grad_(True)
    bar = logging.tqdm(total=steps, desc=f"Writing {len(facts)} facts")
    try:
        for step in range(steps):
            leads = _accumulate(model, facts, deltas)
            bar.set_postfix({"recalled": f"{sum(lead > 0 for lead in leads)}/{len(facts)}"})
            if min(leads) >= _SURE:
                return step
            _require_gradient(deltas, step)
            optimizer.step()
            bar.update()
        return steps
    finally:
        bar.close()
        for adapter in adapters.values():
            adapter.delta.grad = None
            adapter.round()  # In bfloat16, the adapter takes half the bytes, and the report measures the saved values.


def _accumulate(model: PeftModel, facts: Sequence[Fact], deltas: Sequence[nn.Parameter]) -> list[float]:
    """Add the gradients of the mean loss of all facts; return the smallest lead of each fact's target, in nats."""
    leads = []
    for delta in deltas:
        delta.grad = torch.zeros_like(delta)
    for first in range(0, len(facts), _BATCH):
        some = facts[first : first + _BATCH]
        with torch.enable_grad():
            logits = logits_of(model, batch_of(some, model))
            losses = torch.stack([_loss(fact, rows) for fact, rows in zip(some, logits, strict=True)])
            # Only these gradients are computed; other parameters keep the gradients that they have.
            gradients = torch.autograd.grad(losses.sum() / len(facts), list(deltas), allow_unused=True)
        for delta, gradient in zip(deltas, gradients, strict=True):
            if gradient is not None:
                delta.grad += gradient
        leads += [_lead(fact, rows) for fact, rows in zip(some, logits.detach(), strict=True)]
    return leads


def _loss(fact: Fact, logits: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over the target's tokens, for logits `[S, V]`."""
    targets = torch.tensor(fact.target_ids, device=logits.device)
    return F.cross_entropy(logits[list(fact.predicting)].float(), targets)


def _lead(fact: Fact, logits: torch.Tensor) -> float:
    """Return the smallest lead of a target's token over all others, in logits `[S, V]`."""
    there = logits[list(fact.predicting)].float()
    targets = torch.tensor(fact.target_ids, device=logits.device).unsqueeze(1)
    right = there.gather(1, targets).squeeze(1)
    return float((right - there.scatter(1, targets, float("-inf")).amax(1)).min())


def _require_gradient(deltas: Sequence[nn.Parameter], step: int) -> None:
    largest = max(float(delta.grad.abs().max()) for delta in deltas)
    if largest == 0 and step == 0:
        raise EngramError(
            "The memory of this model passes no gradient to its rows: its value projection is zero, as in memory that was "
            "just added. Train the model first."
        )
    if not largest < float("inf"):
        raise EngramError("Training the facts diverged (gradients are not finite); lower learning_rate.")


@torch.no_grad()
def _size_of_rows(model: nn.Module, layer: int, adapter: RowDifferences) -> float:
    """Return the root mean square of the channels of the adapted rows in the table; 1 if they are all zero."""
    base = find_engram(model).memories()[layer].table.get_base_layer()
    rows = base(adapter.rows.unsqueeze(-1), dtype=torch.float32).float()
    return float(rows.square().mean().sqrt()) or 1.0


def _say_shut_gates(model: PeftModel, written: Sequence[WrittenFact], after: Sequence[Recall]) -> list[str]:
    notes = []
    for index, (fact, recall) in enumerate(zip(written, after, strict=True)):
        if recall.rank == 1:
            continue
        ids = fact.fact.input_ids.unsqueeze(0).to(next(model.parameters()).device)
        gates = model.get_base_model().engram_gates(ids)
        widest = max(float(gates[layer][0, list(fact.positions)].max()) for layer in fact.layers)
        reason = f"; the gate opens {widest:.0%} at most there" if widest < _SHUT else ""
        notes.append(
            f"Fact {index} is not recalled (rank {recall.rank:,}){reason}: more steps, layers or orders may help."
        )
    return notes


def _results(
    written: Sequence[WrittenFact],
    rows: Sequence[Mapping[int, torch.Tensor]],
    before: Sequence[Recall],
    after: Sequence[Recall],
    engram: Any,
) -> list[FactResult]:
    results = []
    for index, fact in enumerate(written):
        others = _union([part for other, part in enumerate(rows) if other != index])
        results.append(
            FactResult(
                prompt=fact.fact.prompt,
                target=fact.fact.target,
                probability_before=before[index].probability,
                probability_after=after[index].probability,
                rank_before=before[index].rank,
                rank_after=after[index].rank,
                rows=sum(ids.numel() for ids in rows[index].values()),
                bytes=sum(_bytes(engram, ids.numel(), layer) for layer, ids in rows[index].items()),
                shared_rows=sum(
                    int(torch.isin(ids, others.get(layer, ids[:0])).sum()) for layer, ids in rows[index].items()
                ),
            )
        )
    return results


def _bytes(engram: Any, rows: int, layer: int) -> int:
    """Return the bytes of the saved row numbers and differences."""
    return rows * (8 + 2 * engram.memories()[layer].table.width)

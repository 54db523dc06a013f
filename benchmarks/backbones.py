"""Memory on every causal language model of transformers: small random models on the CPU, each in a separate process.

    python benchmarks/backbones.py                     # all kinds (minutes); prints a line for each, and counts
    python benchmarks/backbones.py gpt2 mixtral        # these
    python benchmarks/backbones.py --write             # all, and write docs/backbones.md from the results
    python benchmarks/backbones.py --page              # write that page again from the stored results

Each kind is checked as follows: the logits are exactly the bare model's at first; a memory with weights changes them;
cached decoding, left padding and generation (greedy, and with beams) agree with the plain forward, if they do for the
bare model; gates can be read; every table gets a gradient, gradient checkpointing gives the same one, and a step
changes the logits; a saved model has the same logits, with and without its head.

A kind is `full` if all of this holds, `refused` if adding memory raises an error of ours, `refused-late` if only a
forward does, `broken` otherwise, and `not-built` if no small config of it runs without memory. The script exits with 1
if any kind is broken or refused late.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from backbone_configs import VOCAB, build, kinds
from transformers import AutoModel, PreTrainedModel

from engram_hf import EngramError, EngramForCausalLM

ROOT = Path(__file__).resolve().parent.parent
NOTED = ROOT / "benchmarks" / "backbones.json"
PAGE = ROOT / "docs" / "backbones.md"
LAYER_IDS = [1, 2]
MEMORY = {"engram_n_heads": 2, "engram_head_dim": 8, "engram_vocab_size": 97}
EXACT = 1e-4  # The tolerance is relative, for rounding errors of floats.
SECONDS = 300  # This is the limit for one kind.


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def tolerance(allowed: float) -> float:
    """Return the error allowed for a model with memory, whose bare model has the error `allowed` itself.

    Some bare models have errors in any precision: BERT counts pads as positions, and RoFormer of transformers 5.17
    differs with a cache. The states that gates read have the same error, and gates take a square root near zero.
    """
    return EXACT if allowed < 1e-6 else max(EXACT, 4 * allowed**0.5)


def error_of(measure: Callable[..., float | None], *arguments) -> float | None:
    """Return the result of `measure` on a bare model; infinity if the model cannot do it at all."""
    with contextlib.suppress(Exception):
        return measure(*arguments)
    return float("inf")


@torch.no_grad()
def cached_error(model: PreTrainedModel, ids: torch.Tensor) -> float | None:
    """Return the error of seven tokens at once and then one by one, against all at once; None if the model has no
    cache.
    """
    output = model(input_ids=ids[:, :7], use_cache=True)
    parts = [output.logits]
    for token in ids[:, 7:].split(1, dim=1):
        name = next((name for name in ("cache", "past_key_values") if output.get(name) is not None), None)
        if name is None:
            return None
        output = model(input_ids=token, use_cache=True, **{name: output[name]})
        parts.append(output.logits)
    return relative(torch.cat(parts, 1), model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def padded_error(model: PreTrainedModel, ids: torch.Tensor) -> float | None:
    """Return the error of three pads on the left, against none."""
    padded = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    logits = model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, 3:]
    return relative(logits, model(input_ids=ids, use_cache=False).logits)


@torch.no_grad()
def generation_differs(model: PreTrainedModel, ids: torch.Tensor, beams: int) -> bool:
    """Return whether generating with a cache gives other tokens than without."""
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    return not torch.equal(*(model.generate(ids, use_cache=cached, **options) for cached in (True, False)))


def table_gradients(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the gradients of all tables, concatenated."""
    torch.manual_seed(0)
    model.train().zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    tables = [memory.table.weight for memory in model.base_model.memories().values()]
    gradients = [torch.zeros_like(table) if table.grad is None else table.grad for table in tables]
    if not all(gradient.any() for gradient in gradients):
        return torch.zeros(0)
    return torch.cat([gradient.flatten() for gradient in gradients])


def checkpoint_layers(model: PreTrainedModel, use_reentrant: bool) -> None:
    """Turn on gradient checkpointing, under the name of this version of transformers."""
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


@torch.no_grad()
def wake(model: PreTrainedModel) -> None:
    """Give the memory weights that change the logits."""
    generator = torch.Generator().manual_seed(0)
    for memory in model.base_model.memories().values():
        for name, parameter in memory.named_parameters():
            if "norm" not in name:
                scale = 1.0 if name.startswith("table") else 0.3
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def faults(
    model: PreTrainedModel, ids: torch.Tensor, before: torch.Tensor, bare: dict[str, float | bool | None]
) -> Iterator[str]:
    """Yield what fails on a model with memory, given the logits `before` and the errors `bare` of its bare model."""
    with torch.no_grad():
        if not torch.equal(model(input_ids=ids, use_cache=False).logits, before):
            yield "logits change as memory is added"
    for name, measure in (("cached decoding", cached_error), ("left padding", padded_error)):
        allowed = bare[name]
        if allowed is not None and allowed != float("inf") and abs(measure(model, ids) - allowed) > 1e-6:
            yield f"{name} is not what it is without memory, with one that adds nothing"
    with torch.no_grad():
        wake(model)
        awake = model(input_ids=ids, use_cache=False).logits
    if torch.equal(awake, before):
        yield "the memory changes nothing"
    for name, measure in (("cached decoding", cached_error), ("left padding", padded_error)):
        allowed = bare[name]
        if allowed is not None and allowed < 1e-3 and (error := measure(model, ids)) > tolerance(allowed):
            yield f"{name} is off by {error:.0e}, and by {allowed:.0e} without memory"
    for beams in (1, 2):
        if bare.get(f"generation with {beams}") is False and generation_differs(model, ids, beams):
            yield f"generation with {beams} beams differs with and without cache"
    gates = model.engram_gates(ids)
    if not all(gate.shape[:2] == ids.shape and (gate > 0).all() for gate in gates.values()):
        yield "gates are not told"
    yield from _faults_of_training(model, ids)
    yield from _faults_of_saving(model, ids)


def _faults_of_training(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[str]:
    gradients = table_gradients(model, ids)
    if not len(gradients):
        yield "a table gets no gradient"
    elif model.supports_gradient_checkpointing:
        checkpoint_layers(model, use_reentrant=False)
        if relative(table_gradients(model, ids), gradients) > EXACT:
            yield "gradient checkpointing changes gradients"
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    model.eval()
    with torch.no_grad():
        unchanged = model(input_ids=ids, use_cache=False).logits
    tables = [memory.table.weight for memory in model.base_model.memories().values()]
    torch.optim.SGD([table for table in tables if table.grad is not None], lr=100.0).step()
    with torch.no_grad():
        if torch.equal(model(input_ids=ids, use_cache=False).logits, unchanged):
            yield "a step of training changes nothing"


@torch.no_grad()
def _faults_of_saving(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[str]:
    logits = model(input_ids=ids, use_cache=False).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = EngramForCausalLM.from_pretrained(folder).eval()
        if relative(again(input_ids=ids, use_cache=False).logits, logits) > 1e-5:
            yield "a saved model gives other logits"
        base = AutoModel.from_pretrained(folder).eval()
        if base.memories().keys() != model.base_model.memories().keys():
            yield "the model without head has no memory"
        states = [part(input_ids=ids, use_cache=False)[0] for part in (base, again.base_model)]
        if relative(*states) > 1e-5:
            yield "the model without head gives other states"


def check(kind: str, quick: bool = False) -> tuple[str, str]:
    """Return the state of a kind, and the reason; `quick` leaves beams out."""
    ids = torch.randint(4, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))
    try:
        host, before = build(kind, ids)
    except LookupError as error:
        return "not-built", str(error)
    bare = {
        "cached decoding": error_of(cached_error, host, ids),
        "left padding": error_of(padded_error, host, ids),
        **{
            f"generation with {beams}": error_of(generation_differs, host, ids, beams)
            for beams in ((1,) if quick else (1, 2))
        },
    }
    model = None
    try:
        model = EngramForCausalLM.from_backbone(host, layer_ids=LAYER_IDS, **MEMORY).eval()
        found = list(faults(model, ids, before, bare))
    except EngramError as error:
        return ("refused" if model is None else "refused-late"), str(error)
    except Exception as error:
        return "broken", f"{type(error).__name__}: {error}"
    return ("broken", "; ".join(found)) if found else ("full", "")


def _answer(kind: str, pipe) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.alarm(SECONDS)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        pipe.send(check(kind))


def run(names: list[str], jobs: int) -> dict[str, tuple[str, str]]:
    """Check kinds, `jobs` at a time and each in a separate process, and print a line for each."""
    context, results = multiprocessing.get_context("fork"), {}
    waiting, running = list(reversed(names)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop()
            near, far = context.Pipe(duplex=False)
            process = context.Process(target=_answer, args=(kind, far))
            process.start()
            far.close()
            running[near] = kind, process
        for pipe in multiprocessing.connection.wait(list(running)):
            kind, process = running.pop(pipe)
            try:
                state, why = pipe.recv()
            except EOFError:
                state, why = "broken", f"the process ended, or took {SECONDS} s"
            process.join()
            results[kind] = state, " ".join(why.split())
            print(f"{kind:28} {state:12} {results[kind][1][:200]}", flush=True)
    return results


def page(noted: dict[str, dict[str, tuple[str, str]]]) -> str:
    """Return the text of docs/backbones.md from the results of each version of transformers, oldest first."""
    versions = sorted(noted, key=lambda version: [int(part) for part in version.split(".")])
    newest = noted[versions[-1]]
    lines = [
        "<!-- Generated by `make backbones`; do not edit. -->",
        "# Backbones",
        "",
        *_INTRODUCTION.format(count=count_full(noted), newest=versions[-1]).splitlines(),
        "",
        "| | " + " | ".join(f"transformers {version}" for version in versions) + " |",
        "| --- |" + " --- |" * len(versions),
    ]
    for state in ("full", "refused", "not-built", "refused-late", "broken"):
        counts = [sum(found == state for found, _ in noted[version].values()) for version in versions]
        if any(counts):
            lines.append(f"| {state} | " + " | ".join(map(str, counts)) + " |")
    lines += [
        "",
        "## Kinds",
        "",
        "| kind | " + " | ".join(versions) + " | why |",
        "| --- |" + " --- |" * (len(versions) + 1),
    ]
    for kind in sorted(set().union(*noted.values())):
        states = [noted[version].get(kind, ("missing", ""))[0] for version in versions]
        why = newest[kind][1] if kind in newest else noted[versions[0]][kind][1]
        lines.append(f"| `{kind}` | " + " | ".join(states) + f" | {_cell(why)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:240]


_INTRODUCTION = """\
`EngramForCausalLM` runs on **{count} kinds of causal language models** of transformers {newest}. This page lists them, and the
reasons why others are refused. It is generated from `benchmarks/backbones.json`, which `make backbones` fills: it builds a small
random model of every kind that `AutoModelForCausalLM` knows, adds memory to it, and checks that

- the logits are exactly those of the bare model until the memory is trained, and a memory with weights changes them;
- decoding with a cache, left padding, greedy search and beam search agree with the plain forward (if they do for the bare model);
- gates can be read, every table gets a gradient, gradient checkpointing gives the same one, and a training step has an effect;
- a saved model has the same logits, with and without its head.

`full` means that all of this holds. `refused` means that `from_backbone` and the constructor raise an error with the reason,
`missing` that this version of transformers does not have the kind, and `not-built` that no small model of it runs even without
memory, so that nothing is known. For kinds with several parts (such as a vision tower), the language model is checked; BERT and
similar models run with `is_decoder=True`. Support depends on the structure of a model, not on its name: other models with the same
structure (remote code too) can have memory as well.

The decoder layers are found as the only list of layers in the model. In a model that runs some of its layers more than once (`dory`,
looped and recurrent-depth models), a listed layer reads its rows in every pass, from one table, and the history of the convolution
is stored for each pass separately. Layers with two sublayers (`longcat_flash`) count once."""


def count_full(noted: dict[str, dict[str, tuple[str, str]]]) -> int:
    """Return how many kinds are full on the newest version."""
    newest = max(noted, key=lambda version: [int(part) for part in version.split(".")])
    return sum(state == "full" for state, _ in noted[newest].values())


def read_noted() -> dict[str, dict[str, tuple[str, str]]]:
    """Return results by version of transformers and kind."""
    return json.loads(NOTED.read_text(encoding="utf-8")) if NOTED.is_file() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", help="model types (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--write", action="store_true", help=f"note the results in {NOTED.relative_to(ROOT)}")
    parser.add_argument(
        "--page", action="store_true", help=f"write {PAGE.relative_to(ROOT)} from what was noted, and run nothing"
    )
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(page(read_noted()), encoding="utf-8")
        return 0
    started = time.monotonic()
    results = run(arguments.kinds or kinds(), arguments.jobs)
    counts = collections.Counter(state for state, _ in results.values())
    print(f"transformers {transformers.__version__}: {dict(counts)} in {time.monotonic() - started:.0f} s")
    if arguments.write:
        noted = read_noted()
        known = noted.get(transformers.__version__, {}) if arguments.kinds else {}
        noted[transformers.__version__] = {**known, **results}
        NOTED.write_text(json.dumps(noted, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        PAGE.write_text(page(noted), encoding="utf-8")
    return 1 if counts["broken"] or counts["refused-late"] else 0


if __name__ == "__main__":
    sys.exit(main())

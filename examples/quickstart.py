"""Engram in a few minutes, from the Python standard library's sources to a model that loads anywhere.

The script trains a tokenizer, a small mixture-of-experts model with memory and its twin without. It compares their
loss on held-out files, reloads the model in a fresh process, and shows which tokens opened the memory's gate.

    python examples/quickstart.py [--output out/quickstart] [--steps N] [--seed N] [--quick]
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

# This must be set before torch starts its threads: waiting threads then sleep. On a machine with other work, they
# would otherwise use the cores that the awaited threads need, and a step would take several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

EXAMPLES = Path(__file__).parent
PROMPT = "class Reader:\n    def __init__(self, stream, encoding=None):\n        self."
SENTENCE = "for name, value in self.__dict__.items():"
THREADS = 2
BARS = " ▁▂▃▄▅▆▇█"
DEMO_PROMPT = "Return True if"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("out/quickstart"), help="folder for the models (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, help="training steps of each model (default: as many as the size needs)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the order of the data and of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="train a tiny model for a few steps, to check that everything runs"
    )
    args = parser.parse_args()
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps is {args.steps}, but each model needs at least one step of training")
    run(args.output, args.seed, args.steps, args.quick)


def run(output: Path, seed: int, steps: int | None, quick: bool) -> None:
    """Run all parts; everything is written below `output`."""
    started = time.perf_counter()
    # These imports come after parsing, so that `--help` does not wait for torch.
    import torch
    from rich.console import Console
    from stdlib_text import read_sources, token_blocks, train_tokenizer
    from transformers.utils import logging
    from twin_models import QUICK, Size, build_twin, build_with_memory, count_parameters, train

    logging.disable_progress_bar()  # Loading and saving show bars; the Trainer has its own.
    torch.set_num_threads(THREADS)
    size = QUICK if quick else Size()
    size = replace(size, steps=steps or size.steps)
    console = Console()

    console.rule("0. The model in the box: examples/engram-demo, trained on Python's documentation", align="left")
    console.print(
        continued(EXAMPLES / "engram-demo", DEMO_PROMPT), markup=False, highlight=False, soft_wrap=True, style="green"
    )

    console.rule("1. Text and tokenizer", align="left")
    sources, unseen = read_sources()
    sources = sources[: size.files]
    console.print(f"{len(sources)} files of the standard library to train on, {len(unseen)} held out")
    tokenizer = train_tokenizer(sources, size.vocab_size)
    console.print(str(tokenizer.compression_summary(examples=3)), markup=False, highlight=False, soft_wrap=True)
    blocks = {
        "train": token_blocks(tokenizer, sources, size.block, seed),
        "held_out": token_blocks(tokenizer, unseen, size.block, seed)[: size.held_out_blocks],
    }

    console.rule("2. Two models, one training", align="left")
    model = build_with_memory(size, tokenizer, seed)
    active, _ = count_parameters(model)
    twin = build_twin(size, tokenizer, seed, active)
    console.print("The twin's experts are wider: a token uses as many parameters as with memory.")
    results = [
        train(twin, "without memory", size, blocks, output, seed),
        train(model, "with memory", size, blocks, output, seed),
    ]
    console.print(comparison(*results))
    rows = sum(memory.table.weight.numel() for memory in model.model.memories().values())
    read = len(model.model.memories()) * model.config.engram_row_width
    console.print(f"The tables hold {rows:,} parameters, of which a token reads {read}.")

    console.rule("3. Saved, and reloaded in a process that has never seen engram-hf", align="left")
    folder = output / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    console.print(continued(folder.resolve(), PROMPT), markup=False, highlight=False, soft_wrap=True, style="green")

    console.rule("4. Which tokens open the gate", align="left")
    picture = output / "gates.png"
    show_gates(console, model, tokenizer, picture)

    console.rule(align="left")
    console.print(f"model and tokenizer  {folder}\ngates                {picture}", highlight=False)
    console.print(f"elapsed              {time.perf_counter() - started:.1f} s", highlight=False)


def comparison(without, with_memory):
    """Return the table of the two runs."""
    from rich.table import Table

    table = Table("", without.title, with_memory.title, "difference")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(label: str, name: str, form: str, relative: bool = True) -> None:
        first, second = getattr(without, name), getattr(with_memory, name)
        difference = f"{second / first - 1:+.2%}" if relative else f"{second - first:+{form}}"
        table.add_row(label, f"{first:{form}}", f"{second:{form}}", difference)

    row("active parameters", "active", ",")
    row("all parameters", "total", ",")
    row("tokens trained on", "tokens", ",")
    row("training, seconds", "seconds", ".1f")
    row("training, processor seconds", "processor_seconds", ".1f")
    row("held-out loss, nats/token", "loss", ".4f", relative=False)
    row("held-out perplexity", "perplexity", ".2f")
    return table


def continued(folder: Path, prompt: str) -> str:
    """Return a continuation of `prompt` by the model in `folder`, made by a fresh Python."""
    command = [sys.executable, "-X", "utf8", str(EXAMPLES / "continue_text.py"), str(folder), prompt]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout.rstrip()


def show_gates(console, model, tokenizer, picture: Path) -> None:
    """Draw the gates of one line of Python in the terminal, and save them as a picture."""
    from engram_hf.analysis import draw, read_text

    reading = read_text(model.eval(), tokenizer, SENTENCE)
    console.print(gate_bars(reading))
    draw(reading).savefig(picture, dpi=120)


def gate_bars(reading):
    """Return, for every layer, the tokens and below each a bar whose height shows its gate."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    shown = [token.text.replace("\n", "⏎").replace(" ", "·") for token in reading.tokens]
    for layer in reading.layers:
        gates = [sum(token.gates[layer]) / len(token.gates[layer]) for token in reading.tokens]
        bars = [BARS[round(gate * (len(BARS) - 1))] * len(token) for gate, token in zip(gates, shown, strict=True)]
        widest = sorted(zip(gates, shown, strict=True), reverse=True)[:3]
        table.add_row(f"layer {layer}", " ".join(shown))
        table.add_row("", " ".join(bars))
        table.add_row("", "widest: " + ", ".join(f"{token} {gate:.2f}" for gate, token in widest))
    return table


if __name__ == "__main__":
    main()

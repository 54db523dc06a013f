"""How many bits the rows of a memory need: the loss of trained models by the bits of their tables.

    python benchmarks/row_bits.py [--home out/row_bits] [--models NAME ...] [--seeds 0 1 2] [--picture
    docs/row-bits.svg]

The script trains small models on the sources of Python's standard library, and the demo model on its documentation
(minutes each), converts their tables to each format, and measures the loss on held-out files. A change is given as a
share of the memory's worth: the rise of the loss when memory is off. HOME/results.jsonl has one line for each model,
seed and format; existing lines are not measured again.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F
from tqdm import tqdm

from engram_hf import EngramForCausalLM, EngramTokenizer
from engram_hf.analysis.evaluation import Off
from engram_hf.convert_scripts.number_formats import decode, encode
from engram_hf.convert_scripts.storage import FP4_ROWS
from engram_hf.table_engram import apply_global_scale, dequantize_rows
from engram_hf.table_writer_engram import quantize_rows

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from make_demo import DEMO
from stdlib_text import read_documentation, read_sources, token_blocks, train_tokenizer
from twin_models import Size, build_with_memory, train

MODELS = {
    "quickstart": Size(steps=600),
    "demo": DEMO,
    "wide rows": Size(memory_width=128, memory_heads=2, rows=40_000, steps=150),
    "dense": Size(experts=0, hidden_size=256, expert_width=512, layers=6, memory_width=64, rows=60_000, steps=150),
}
HELD_OUT_TOKENS = 16_384
# These classes count how often the three tokens that address a position's rows occurred in the training text.
FREQUENCIES = {"never": (0, 0), "1 to 3 times": (1, 3), "4 to 15 times": (4, 15), "16 times and more": (16, 1 << 40)}
ROWS_AT_ONCE = 8192


class Format(NamedTuple):
    """A way to store rows.

    Args:
        family: formats of one family share a line in the picture.
        bits: bits per channel, scales included, for rows of a width.
        code: rounds rows `[n, W]` to the stored values.
    """

    family: str
    bits: Callable[[int], float]
    code: Callable[[torch.Tensor], torch.Tensor]


def of_package(table_dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the formats that `engram quantize` writes."""

    def code(rows: torch.Tensor) -> torch.Tensor:
        global_scale = torch.tensor([448 * 6]) / rows.abs().max() if table_dtype == "nvfp4" else None
        values, scale = quantize_rows(rows, table_dtype, global_scale)
        return dequantize_rows(values, apply_global_scale(scale, global_scale), None, rows.shape[1])

    return code


def mxfp4(rows: torch.Tensor) -> torch.Tensor:
    """Round to 4-bit floats with a power of two per 32 channels, as in the experts of DeepSeek-V4.1."""
    return decode(*encode(rows, FP4_ROWS), FP4_ROWS)


def float8_by_row(rows: torch.Tensor) -> torch.Tensor:
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 448
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


def by_largest(bits: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Round to integers, with a scale that maps the largest magnitude of a row to the largest integer."""
    most = 2 ** (bits - 1) - 1

    def code(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / most
        return (rows / scale).round().clamp(-most, most) * scale

    return code


def by_least_squares(bits: int, group: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Round to levels halfway between integers, with the scale of a row (or group) that minimizes the squared error."""
    half = 2 ** (bits - 1)

    def code(rows: torch.Tensor) -> torch.Tensor:
        blocks = rows.reshape(-1, group or rows.shape[1])
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12) / (half - 0.5) * (0.8 if bits > 2 else 0.6)
        for _ in range(8):
            levels = (blocks / scale).floor().clamp(-half, half - 1) + 0.5
            scale = ((blocks * levels).sum(1, keepdim=True) / levels.square().sum(1, keepdim=True)).clamp_min(1e-12)
        scale = scale.bfloat16().float()
        return (((blocks / scale).floor().clamp(-half, half - 1) + 0.5) * scale).view_as(rows)

    return code


FORMATS = {
    "float8, power of two per 32": Format("float", lambda width: 8.25, of_package("float8_e4m3fn")),
    "float8, scale a row": Format("float", lambda width: 8 + 16 / width, float8_by_row),
    "int8, scale a row": Format("int, largest number", lambda width: 8 + 32 / width, of_package("int8")),
    **{
        f"int{bits}, largest number": Format(
            "int, largest number", lambda width, bits=bits: bits + 16 / width, by_largest(bits)
        )
        for bits in (6, 4)
    },
    **{
        f"int{bits}, scale a row": Format(
            "int, scale a row", lambda width, bits=bits: bits + 16 / width, by_least_squares(bits)
        )
        for bits in (6, 5, 3, 1)
    },
    "int4 (engram quantize)": Format("int, scale a row", lambda width: 4 + 16 / width, of_package("int4")),
    "int2 (engram quantize)": Format("int, scale a row", lambda width: 2 + 16 / width, of_package("int2")),
    **{
        f"int{bits}, groups of 16": Format(
            "int, groups of 16", lambda width, bits=bits: bits + 1, by_least_squares(bits, 16)
        )
        for bits in (4, 3, 2, 1)
    },
    "NVFP4": Format("float", lambda width: 4.5, of_package("nvfp4")),
    "MXFP4": Format("float", lambda width: 4.25, mxfp4),
    "the mean row": Format("none", lambda width: 0, lambda rows: rows.mean(0, keepdim=True).expand_as(rows)),
}


class Corpus(NamedTuple):
    """The texts that models are trained and measured on.

    Args:
        train, unseen: texts.
        tokenizer: trained on the former.
        held_out: blocks of the latter, `[n, S]`.
        seen: see [`seen_before`].
    """

    train: list[str]
    unseen: list[str]
    tokenizer: EngramTokenizer
    held_out: torch.Tensor
    seen: torch.Tensor


@cache
def read_corpus(read: Callable[[], tuple[list[str], list[str]]], vocab_size: int, block: int) -> Corpus:
    """Return the texts that `read` returns, in tokens."""
    train, unseen = read()
    tokenizer = train_tokenizer(train, vocab_size)
    blocks = token_blocks(tokenizer, unseen, block, 0)[: HELD_OUT_TOKENS // block]
    held_out = torch.stack([one["input_ids"] for one in blocks])
    return Corpus(train, unseen, tokenizer, held_out, seen_before(tokenizer(train)["input_ids"], held_out))


def trained(name: str, seed: int, home: Path, corpus: Corpus, steps: int | None) -> Path:
    """Return the folder of a trained model; train it if it is missing."""
    folder, size = home / f"{name.replace(' ', '-')}-{seed}", MODELS[name]
    if not (folder / "done.json").exists():
        size = replace(size, steps=steps or size.steps)
        blocks = [token_blocks(corpus.tokenizer, some, size.block, seed) for some in (corpus.train, corpus.unseen)]
        model = build_with_memory(size, corpus.tokenizer, seed)
        data = {"train": blocks[0], "held_out": blocks[1][:256]}
        outcome = train(model, f"{name}, seed {seed}", size, data, home / "trainer", seed)
        model.save_pretrained(folder)
        corpus.tokenizer.save_pretrained(folder)
        (folder / "done.json").write_text(json.dumps({"loss": outcome.loss, "steps": size.steps}))
    return folder


def seen_before(tokens: list[list[int]], held_out: torch.Tensor) -> torch.Tensor:
    """Return how often the three tokens up to each position of `held_out` `[n, S]` occur in `tokens`."""
    counts = Counter(three for text in tokens for three in zip(text, text[1:], text[2:], strict=False))
    seen = torch.zeros_like(held_out)
    for row, block in enumerate(held_out.tolist()):
        for at in range(2, len(block)):
            seen[row, at] = counts[tuple(block[at - 2 : at + 1])]
    return seen


@torch.no_grad()
def losses(model: EngramForCausalLM, held_out: torch.Tensor, **options) -> torch.Tensor:
    """Return the loss of each token but the first, `[n, S - 1]`, in nats."""
    found = []
    for some in held_out.split(16):
        logits = model(input_ids=some, use_cache=False, **options).logits[:, :-1].float()
        found.append(F.cross_entropy(logits.transpose(1, 2), some[:, 1:], reduction="none"))
    return torch.cat(found)


def measurements(model: EngramForCausalLM, held_out: torch.Tensor, known: set[str]) -> Iterator[tuple[str, dict]]:
    """Yield per-token losses by format, `"float"` and `"memory off"` first, for formats that are not `known`."""
    todo = [name for name in FORMATS if name not in known]
    if not todo:
        return
    yield "memory off", {"loss": losses(model, held_out, engram_edit=Off())}
    yield "float", {"loss": losses(model, held_out)}
    tables = [memory.table.weight for memory in model.model.memories().values()]
    rows = [table.detach().float().clone() for table in tables]
    for name in tqdm(todo, desc="Formats"):
        differences = squares = 0.0
        for table, own in zip(tables, rows, strict=True):
            step = len(own) if name == "the mean row" else ROWS_AT_ONCE
            decoded = torch.cat([FORMATS[name].code(some) for some in own.split(step)])
            differences += (decoded - own).square().sum().item()
            squares += own.square().sum().item()
            table.data.copy_(decoded)
        yield name, {"loss": losses(model, held_out), "error": (differences / squares) ** 0.5}
        for table, own in zip(tables, rows, strict=True):
            table.data.copy_(own)


def measure(name: str, seed: int, folder: Path, held_out: torch.Tensor, seen: torch.Tensor, results: Path) -> None:
    """Append missing measurements to `results`."""
    known = {line["format"] for line in read_results(results) if (line["model"], line["seed"]) == (name, seed)}
    model = EngramForCausalLM.from_pretrained(folder).eval()
    width, found = model.config.engram_head_dim, {}
    for form, result in measurements(model, held_out, known):
        found[form] = result["loss"]
        if form not in FORMATS:
            continue
        worth = (found["memory off"] - found["float"]).double()
        lost = (found[form] - found["float"]).double()
        bins = {}
        for frequency, (least, most) in FREQUENCIES.items():
            here = (seen[:, :-1] >= least) & (seen[:, :-1] <= most)
            bins[frequency] = {
                "positions": int(here.sum()),
                "worth": worth[here].sum().item(),
                "lost": lost[here].sum().item(),
            }
        line = {
            "model": name,
            "seed": seed,
            "format": form,
            "bits": FORMATS[form].bits(width),
            "loss": found["float"].mean().item(),
            "worth": worth.mean().item(),
            "lost": lost.mean().item(),
            # This is the standard deviation of the tokens' differences over the square root of their number.
            "uncertainty": (lost.std() / lost.numel() ** 0.5).item(),
            "error": result["error"],
            "by_frequency": bins,
        }
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read_results(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(lines: list[dict]) -> str:
    """Return a table in Markdown: lost shares by format and model, and by how often the n-gram was seen."""
    models = list(dict.fromkeys(line["model"] for line in lines))
    out = ["| format | bits | " + " | ".join(models) + " |", "| --- | --- |" + " --- |" * len(models)]
    for form in FORMATS:
        some = [line for line in lines if line["format"] == form]
        if not some:
            continue
        bits = sorted({round(line["bits"], 2) for line in some})
        cells = []
        for model in models:
            shares = [100 * line["lost"] / line["worth"] for line in some if line["model"] == model]
            spread = f" ({min(shares):.2f} to {max(shares):.2f})" if len(shares) > 1 else ""
            cells.append(f"{statistics.mean(shares):.2f} %{spread}" if shares else "")
        out.append(
            f"| {form} | {bits[0]:g}{f' to {bits[-1]:g}' if len(bits) > 1 else ''} | " + " | ".join(cells) + " |"
        )
    out += ["", "| format | " + " | ".join(FREQUENCIES) + " |", "| --- |" + " --- |" * len(FREQUENCIES)]
    for form in FORMATS:
        some = [line["by_frequency"] for line in lines if line["format"] == form]
        sums = [{key: sum(bins[name][key] for bins in some) for key in ("worth", "lost")} for name in FREQUENCIES]
        if some:
            out.append(f"| {form} | " + " | ".join(f"{100 * one['lost'] / one['worth']:.2f} %" for one in sums) + " |")
    return "\n".join(out)


def draw(lines: list[dict], path: Path) -> None:
    """Draw lost shares by bits, with a line per family and a point per model and seed."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    families = dict.fromkeys(form.family for form in FORMATS.values() if form.family != "none")
    for family, colour in zip(families, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False):
        some = [line for line in lines if FORMATS[line["format"]].family == family]
        shares = [100 * line["lost"] / line["worth"] for line in some]
        axes.scatter(
            [line["bits"] for line in some], [max(share, 0.001) for share in shares], s=14, color=colour, alpha=0.4
        )
        means: dict[float, list[float]] = {}
        for line, share in zip(some, shares, strict=True):
            means.setdefault(round(line["bits"]), []).append(share)
        if family.startswith("int"):
            points = [
                (statistics.mean(line["bits"] for line in some if round(line["bits"]) == at), means[at])
                for at in sorted(means)
            ]
            axes.plot(
                [x for x, _ in points], [max(statistics.mean(y), 0.001) for _, y in points], color=colour, label=family
            )
        else:
            axes.scatter([], [], color=colour, label="float8, NVFP4, MXFP4")
    axes.set(xlabel="bits a channel, scales included", ylabel="lost of what memory is worth, %", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--home", type=Path, default=Path("out/row_bits"), help="folder of models and results (default: %(default)s)"
    )
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), help="models to measure (default: all)"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of the training (default: 0 1 2)"
    )
    parser.add_argument("--steps", type=int, help="training steps of models that are not there yet")
    parser.add_argument("--report", action="store_true", help="train and measure nothing")
    parser.add_argument("--picture", type=Path, help="file to draw the results to")
    options = parser.parse_args()
    results = options.home / "results.jsonl"
    if not options.report:
        options.home.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            for name in options.models:
                size = MODELS[name]
                read = read_documentation if name == "demo" else read_sources
                corpus = read_corpus(read, size.vocab_size, size.block)
                folder = trained(name, seed, options.home, corpus, options.steps)
                measure(name, seed, folder, corpus.held_out, corpus.seen, results)
    lines = read_results(results)
    print(report(lines))
    if options.picture is not None:
        draw(lines, options.picture)


if __name__ == "__main__":
    main()

"""Write tables and pictures of the existing results into docs/evidence.md, between its markers.

Every comparison is paired by seed: the difference of two variants is taken for each seed that both have, and its 95 %
interval over seeds is Student's.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engram_hf import EngramError
from engram_hf.analysis import Estimate

from .corpus import FREQUENCIES
from .long_context import TASKS
from .models import SHARES
from .plan import ABLATIONS, CONTROLS, EXPERIMENTS, HEADS, Run
from .presets import Preset
from .results import Results, interval
from .tasks import NEED_NONE, NEED_RECALL

_MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NOTHING = "No run of this is in yet.\n"
_COLOURS = ("#2a78b8", "#d1722c", "#3a9b63")
# The paper's curve is lowest here.
_BEST_SHARE = (20, 25)

Pick = Callable[[dict[str, Any]], float]


class Found:
    """The existing results of a preset.

    Args:
        plan: all runs.
        results: their files.
    """

    def __init__(self, plan: list[Run], results: Results):
        self.plan = plan
        self.by_name = {run.name: found for run in plan if (found := results.read(run.name)) is not None}

    def of(self, variant: str, kind: str = "text") -> dict[int, dict[str, Any]]:
        """Return the results of a variant by seed."""
        runs = (run for run in self.plan if (run.kind, run.variant) == (kind, variant) and run.name in self.by_name)
        return {run.seed: self.by_name[run.name] for run in runs}

    def mean(self, variant: str, pick: Pick, kind: str = "text") -> Estimate | None:
        """Return the mean of a number over the seeds of a variant; None without any."""
        values = [pick(one) for one in self.of(variant, kind).values()]
        return interval(values) if values else None

    def difference(self, variant: str, reference: str, pick: Pick, kind: str = "text") -> Estimate | None:
        """Return the mean of `variant` minus `reference` over the seeds that both have; None without any."""
        first, second = self.of(variant, kind), self.of(reference, kind)
        values = [pick(first[seed]) - pick(second[seed]) for seed in sorted(first.keys() & second.keys())]
        return interval(values) if values else None


def write_report(name: str, preset: Preset, plan: list[Run], results: Results, page: Path) -> str:
    """Write the tables into a page with markers for them, and pictures beside the results; return what was done.

    Raises:
        ValueError: the page is missing or has no marker.
    """
    if not page.exists() or not _MARKED.search(page.read_text(encoding="utf-8")):
        raise EngramError(
            f"{page} has no marker for a table (<!-- state --> ... <!-- end -->); name such a page with --page."
        )
    results.require_writable()
    found = Found(plan, results)
    pictures = _pictures(found, results.folder, preset)
    tables = {
        "state": _state(name, found),
        "tuning": _tuning(found, preset),
        "fair": _fair(found),
        "frequency": _frequency(found),
        "downstream": _downstream(found),
        "worth": _worth(found),
        "experts": _experts(found),
        "long": _long(found),
        "depth": _depth(found),
        "heads": _heads(found),
        "addresses": _addresses(found),
    }

    def filled(match: re.Match) -> str:
        picture = pictures.get(match[2])
        shown = f"\n![{match[2]}]({_link(picture, page)})\n" if picture else ""
        return f"{match[1]}{tables[match[2]]}{shown}{match[3]}"

    text = _MARKED.sub(filled, page.read_text(encoding="utf-8"))
    beside = page.with_name(page.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(page)
    return f"{len(found.by_name)} of {len(plan)} runs are in; wrote {page} and {len(pictures)} pictures."


def _link(picture: Path, page: Path) -> str:
    return Path(os.path.relpath(picture, page.parent)).as_posix()


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if len(lines) > 2 else _NOTHING


def _shown(found: Estimate | None, form: str = ".4f", sign: str = "") -> str:
    """Return a number with its interval, as text."""
    if found is None:
        return ""
    if found.low is None:
        return f"{found.value:{sign}{form}} (one seed)"
    return f"{found.value:{sign}{form}} ({found.low:{sign}{form}} to {found.high:{sign}{form}})"


def _verdict(found: Estimate | None, more: str, less: str) -> str:
    """Return the conclusion from an interval."""
    if found is None or found.low is None or found.high is None:
        return ""
    return more if found.low > 0 else less if found.high < 0 else "not told apart"


def _loss(result: dict[str, Any]) -> float:
    return result["loss"]


def _state(name: str, found: Found) -> str:
    if not found.by_name:
        return _NOTHING
    rows = []
    for number, title in EXPERIMENTS.items():
        runs = [run for run in found.plan if number in run.experiments]
        rows.append([f"{number}. {title}", f"{sum(run.name in found.by_name for run in runs)} of {len(runs)}"])
    all_results = found.by_name.values()
    hours = (
        sum(one.get("seconds", {}).get("processor", 0) + one.get("evaluation_seconds", 0) for one in all_results)
        / 3600
    )
    made = [one["provenance"] for one in all_results]
    written = {
        key: ", ".join(sorted({str(one[key]) for one in made}))
        for key in ("machine", "torch", "transformers", "commit", "corpus")
    }
    dates = sorted(one["date"] for one in made)
    return (
        f"Preset `{name}`: **{len(found.by_name)} of {len(found.plan)} runs are in**, {hours:.1f} hours of one core, between "
        f"{dates[0]} and {dates[-1]} UTC; {written['machine']}, torch {written['torch']}, transformers {written['transformers']}, commit "
        f"{written['commit']}, corpus {written['corpus']}.\n\n"
    ) + _table(["experiment", "runs that are in"], rows)


def _tuning(found: Found, preset: Preset) -> str:
    rows = []
    for side in ("memory", "twin", "share 0", "share 20"):
        done = {
            run.rate: found.by_name[run.name]["validation_loss"]
            for run in found.plan
            if (run.kind, run.variant) == ("tuning", side) and run.name in found.by_name
        }
        if done:
            best = min(done, key=lambda rate: done[rate])
            cells = [
                f"**{done[rate]:.4f}**" if rate == best else f"{done[rate]:.4f}" if rate in done else ""
                for rate in range(len(preset.rates))
            ]
            is_edge = len(done) == len(preset.rates) and best in (0, len(preset.rates) - 1)
            rows.append([side, *cells, "the best is at the edge of the grid" if is_edge else ""])
    return _table(["side", *(f"{rate:g}" for rate in preset.rates), ""], rows)


def _size(found: Found, variant: str, kind: str = "text") -> list[str]:
    results = list(found.of(variant, kind).values())
    size = results[0]["size"]
    seconds = interval([one["seconds"]["processor"] for one in results]).value
    return [*(f"{size[key] / 1e6:.2f}M" for key in ("active", "total", "flops", "bytes")), f"{seconds:.0f}"]


_SIZES = ["active parameters", "all parameters", "FLOPs a token", "bytes a token", "training, s of one core"]


def _against(found: Found, variant: str, other: str, if_higher: str, if_lower: str) -> list[str]:
    """Return seeds, sizes and held-out loss of a variant, and the difference from another one (empty for the same
    variant).
    """
    change = found.difference(variant, other, _loss) if variant != other else None
    seeds = str(len(found.of(variant)))
    loss = _shown(found.mean(variant, _loss))
    return [seeds, *_size(found, variant), loss, _shown(change, sign="+"), _verdict(change, if_higher, if_lower)]


def _fair(found: Found) -> str:
    variants = [
        "memory",
        "twin",
        "twin of equal time",
        "twin of all parameters",
        *CONTROLS,
        *(one for one in ABLATIONS if "twin" not in one),
    ]
    rows = []
    for variant in variants:
        if not found.of(variant):
            continue
        from_twin = found.difference(variant, "twin", _loss) if variant != "twin" else None
        against = _against(found, variant, "memory", "memory is better", "memory is worse")
        rows.append([variant, *against, _shown(from_twin, sign="+")])
    return _table(["variant", "seeds", *_SIZES, "held-out loss", "minus memory's", "", "minus the twin's"], rows)


def _frequency(found: Found) -> str:
    rows = []
    for name in FREQUENCIES:
        some = [one["by_frequency"].get(name) for one in found.of("memory").values()]
        if not some or None in some:
            continue

        def pick(result: dict[str, Any], name: str = name) -> float:
            return result["by_frequency"][name]["loss"]

        cells = [_shown(found.difference(other, "memory", pick), sign="+") for other in ("twin", "one row")]
        rows.append([name, f"{some[0]['tokens']:,}", _shown(found.mean("memory", pick)), *cells])
    titles = [
        "n-gram in the training text",
        "tokens (first seed)",
        "loss with memory",
        "twin minus memory",
        "one row minus memory",
    ]
    return _table(titles, rows)


def _downstream(found: Found) -> str:
    rows = []
    for need, tasks in (("recall", NEED_RECALL), ("none", NEED_NONE)):
        for task, asks in tasks.items():
            some = list(found.of("memory").values())
            if not some or task not in some[0]["tasks"]:
                continue

            def pick(result: dict[str, Any], task: str = task) -> float:
                return 100 * result["tasks"][task]["right"]

            change = found.difference("memory", "twin", pick)
            rows.append(
                [
                    asks,
                    need,
                    str(some[0]["tasks"][task]["items"]),
                    *(_shown(found.mean(side, pick), ".1f") for side in ("memory", "twin")),
                    _shown(change, ".1f", "+"),
                    _verdict(change, "memory is better", "memory is worse"),
                ]
            )
    return _table(["what is asked for", "recall it needs", "items", "memory, %", "twin, %", "difference", ""], rows)


def _worth(found: Found) -> str:
    some = list(found.of("memory").values())
    names = some[0]["worth"]["increase"] if some else {}
    rows = []
    for name in names:
        change = found.mean("memory", lambda one, name=name: one["worth"]["increase"][name]["value"])
        rows.append([name, _shown(change, sign="+"), _verdict(change, "costs", "helps")])
    return _table(["change of a trained model's memory", "loss grows by", ""], rows)


def _experts(found: Found) -> str:
    rows = []
    for share in SHARES:
        variant = f"share {share}"
        if found.of(variant):
            words = "worse than experts alone", "better than experts alone"
            from_20 = found.difference(variant, "share 20", _loss) if share != 20 else None
            rows.append([f"{share} %", *_against(found, variant, "share 0", *words), _shown(from_20, sign="+")])
    titles = ["share of memory", "seeds", *_SIZES, "held-out loss", "minus that at 0 %", "", "minus that at 20 %"]
    return _table(titles, rows)


def _long(found: Found) -> str:
    rows = []
    for task in TASKS:

        def pick(result: dict[str, Any], task: str = task) -> float:
            return 100 * result["scores"][task]

        if not found.of("memory", "long context"):
            continue
        change = found.difference("memory", "twin", pick, "long context")
        sides = [_shown(found.mean(side, pick, "long context"), ".1f") for side in ("memory", "twin")]
        rows.append(
            [task, *sides, _shown(change, ".1f", "+"), _verdict(change, "memory is better", "memory is worse")]
        )
    return _table(["task", "memory, % of answers", "twin, %", "difference", ""], rows)


def _layers(found: Found) -> int:
    some = list(found.of("memory").values())
    return len(some[0]["divergence"]) if some else 0


def _depth(found: Found) -> str:
    rows = []
    similar = [one["similarity"] for one in found.of("memory and twin", "layers").values()]
    for layer in range(_layers(found)):

        def pick(result: dict[str, Any], layer: int = layer) -> float:
            return result["divergence"][layer]

        off = found.mean("memory", lambda one, layer=layer: one["divergence_off"][layer])
        change = found.difference("memory", "twin", pick) if layer + 1 < _layers(found) else None
        alike = [max(range(len(one[layer])), key=lambda other: one[layer][other]) for one in similar]
        rows.append(
            [
                str(layer),
                *(_shown(found.mean(side, pick), ".3f") for side in ("memory", "twin")),
                _shown(off, ".3f"),
                _shown(change, ".3f", "+"),
                _verdict(change, "later than the twin", "earlier than the twin"),
                ", ".join(map(str, alike)),
            ]
        )
    titles = [
        "layer",
        "memory, KL in nats",
        "twin",
        "memory off",
        "memory minus twin",
        "",
        "the twin's layer most alike (CKA), by seed",
    ]
    return _table(titles, rows)


def _heads(found: Found) -> str:
    rows = []
    named = {"raw ids": "4 heads, raw ids", "memory": "4 heads"}
    for variant in ("memory", "raw ids", *HEADS):
        results = list(found.of(variant).values())
        if not results:
            continue
        change = found.difference(variant, "memory", _loss) if variant != "memory" else None
        shared = " / ".join(f"{100 * share:.0f}" for share in results[0]["collisions"].values())
        rows.append(
            [
                named.get(variant, variant),
                str(len(results)),
                *_size(found, variant)[:2],
                shared,
                f"{100 * results[0]['rows_read']:.0f}",
                _shown(found.mean(variant, _loss)),
                _shown(change, sign="+"),
                _verdict(change, "the reference is better", "the reference is worse"),
            ]
        )
    titles = [
        "variant",
        "seeds",
        *_SIZES[:2],
        "reads of a shared row, %, orders 2 / 3",
        "rows read by the test, %",
        "held-out loss",
        "minus the reference's",
        "",
    ]
    return _table(titles, rows)


def _addresses(found: Found) -> str:
    rows = []
    for variant in ("memory", "learned addresses"):
        results = list(found.of(variant).values())
        if results:
            change = found.difference(variant, "memory", _loss) if variant != "memory" else None
            rows.append(
                [
                    {"memory": "fixed hash"}.get(variant, variant),
                    str(len(results)),
                    *_size(found, variant),
                    f"{100 * results[0]['rows_read']:.0f}",
                    _shown(found.mean(variant, _loss)),
                    _shown(change, sign="+"),
                    _verdict(change, "fixed is better", "learned is better"),
                ]
            )
    return _table(
        ["addresses", "seeds", *_SIZES, "rows read by the test, %", "held-out loss", "minus the hash's", ""], rows
    )


def _pictures(found: Found, folder: Path, preset: Preset) -> dict[str, Path]:
    drawn = {"experts": _draw_experts(found), "fair": _draw_fair(found), "depth": _draw_depth(found)}
    written = {}
    for name, figure in drawn.items():
        if figure is not None:
            written[name] = folder / f"{name}.png"
            figure.savefig(written[name], dpi=130)
    return written


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _reach(points: Sequence[Estimate]) -> list[list[float]]:
    """Return how far intervals extend below and above their means."""
    return [
        [one.value - (one.value if one.low is None else one.low) for one in points],
        [(one.value if one.high is None else one.high) - one.value for one in points],
    ]


def _draw_experts(found: Found) -> Figure | None:
    pairs = [(share, found.difference(f"share {share}", "share 0", _loss)) for share in SHARES if share]
    known = [(share, change) for share, change in pairs if change is not None]
    if not known:
        return None
    figure, axes = _axes(6.4, 3.6)
    axes.axvspan(*_BEST_SHARE, color=_COLOURS[2], alpha=0.15, label="lowest in the article (20 to 25 %)")
    shares, changes = zip((0, Estimate(0.0, None, None)), *known, strict=True)
    axes.errorbar(shares, [one.value for one in changes], _reach(changes), color=_COLOURS[0], marker="o", capsize=3)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set(xlabel="share of the sparse budget that is memory, %", ylabel="loss minus that of experts alone")
    axes.legend(frameon=False)
    return figure


def _draw_fair(found: Found) -> Figure | None:
    variants = [
        "twin",
        "twin of equal time",
        "twin of all parameters",
        *CONTROLS,
        *(one for one in ABLATIONS if "twin" not in one),
    ]
    pairs = [(variant, found.difference(variant, "memory", _loss)) for variant in variants]
    known = [(variant, change) for variant, change in pairs if change is not None]
    if not known:
        return None
    figure, axes = _axes(6.8, 0.34 * len(known) + 1.1)
    names, changes = zip(*known, strict=True)
    axes.errorbar(
        [one.value for one in changes],
        names,
        xerr=_reach(changes),
        color=_COLOURS[0],
        marker="o",
        linestyle="",
        capsize=3,
    )
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="held-out loss minus that with memory, nats a token")
    return figure


def _draw_depth(found: Found) -> Figure | None:
    if not _layers(found):
        return None
    figure, axes = _axes(6.4, 3.4)
    curves = [
        ("memory", "memory", "divergence"),
        ("memory off", "memory", "divergence_off"),
        ("twin", "twin", "divergence"),
    ]
    for colour, (label, variant, key) in zip(_COLOURS, curves, strict=True):
        if found.of(variant):
            points = [
                found.mean(variant, lambda one, key=key, at=layer: one[key][at]) for layer in range(_layers(found))
            ]
            known = [one for one in points if one is not None]
            axes.errorbar(
                range(len(known)),
                [one.value for one in known],
                _reach(known),
                color=colour,
                label=label,
                marker="o",
                capsize=3,
            )
    axes.set(xlabel="layer", ylabel="KL from the final prediction, nats")
    axes.legend(frameon=False)
    return figure

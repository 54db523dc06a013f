"""Pictures of measurements, drawn with matplotlib (an optional dependency)."""

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..safetensors_engram import EngramError
from .attention import AttentionFreed
from .depth import EffectiveDepth, LayerSimilarity
from .gates import Gates
from .reading import Reading
from .traffic import RowTraffic
from .worth import MemoryWorth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#2a78b8", "#d1722c", "#3a9b63", "#a6508f", "#8a8a3c", "#c04848", "#5f6fc4", "#7a7a7a")
# This is the number of tokens in one line of a picture of a text.
_LINE = 24


def _new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple["Figure", Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EngramError("Pictures need matplotlib; install it with pip install 'engram-hf[analysis]'.") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


@functools.singledispatch
def draw(measurement: Any) -> "Figure":
    """Draw a measurement as a matplotlib figure: `draw(gates).savefig("gates.png")`.

    Raises:
        ValueError: matplotlib is not installed, or the type is unknown.
    """
    raise EngramError(
        f"There is no picture of a {type(measurement).__name__}; pass what a function of analysis returned."
    )


@draw.register(Gates)
def _(gates: Gates) -> "Figure":
    figure, ((by_class, by_frequency, histogram),) = _new_figure(11, 3.2, columns=3)
    _grouped_bars(by_class, gates.by_class, "mean gate")
    _grouped_bars(by_frequency, gates.by_frequency, "mean gate")
    by_class.set_title("by class of token")
    by_frequency.set_title("by frequency of the longest n-gram")
    for colour, (layer, shares) in zip(_COLOURS, gates.histogram.items(), strict=False):
        histogram.stairs(
            shares, [step / len(shares) for step in range(len(shares) + 1)], color=colour, label=f"layer {layer}"
        )
    histogram.set(title="all gates", xlabel="gate", ylabel="share")
    histogram.legend(frameon=False)
    return figure


@draw.register(MemoryWorth)
def _(worth: MemoryWorth) -> "Figure":
    figure, ((conditions, groups),) = _new_figure(11, 0.35 * len(worth.increase) + 1.6, columns=2)
    _intervals(conditions, worth.increase)
    conditions.set_title(f"loss {worth.loss:.3f} with memory; what it grows by")
    named = {f"{name} ({group.tokens:,})": group.increase for name, group in worth.by_class.items()}
    named |= {f"n-gram seen {name} ({group.tokens:,})": group.increase for name, group in worth.by_frequency.items()}
    _intervals(groups, named)
    groups.set_title("without memory, by predicted token")
    return figure


@draw.register(EffectiveDepth)
def _(depth: EffectiveDepth) -> "Figure":
    return draw_depths({"": depth})


def draw_depths(depths: Mapping[str, EffectiveDepth]) -> "Figure":
    """Draw several models, or one with memory and without, in one picture.

    Args:
        depths: measurements by the name in the legend.
    """
    figure, ((axes,),) = _new_figure(6, 3.4)
    for colour, (name, depth) in zip(_COLOURS, depths.items(), strict=False):
        axes.plot(range(1, len(depth.divergence) + 1), depth.divergence, "o-", color=colour, label=name or None)
    axes.set(xlabel="layers that have run", ylabel="KL to the final prediction, nats")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if any(depths):
        axes.legend(frameon=False)
    return figure


@draw.register(LayerSimilarity)
def _(similarity: LayerSimilarity) -> "Figure":
    figure, ((axes,),) = _new_figure(4.6, 4)
    image = axes.imshow(similarity.similarity, vmin=0, vmax=1, origin="lower", cmap="viridis")
    axes.set(xlabel="layer of the second model", ylabel="layer of the first model")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="linear CKA")
    return figure


@draw.register(RowTraffic)
def _(traffic: RowTraffic) -> "Figure":
    figure, ((zipf, cache, collisions),) = _new_figure(11, 3.2, columns=3)
    for colour, layer in zip(_COLOURS, traffic.zipf, strict=False):
        zipf.loglog(*zip(*traffic.zipf[layer], strict=True), ".-", color=colour, label=f"layer {layer}")
        cache.semilogx(*zip(*traffic.hit_rate[layer], strict=True), ".-", color=colour)
    zipf.set(title="reads of a row", xlabel="rank", ylabel="reads")
    zipf.legend(frameon=False)
    cache.set(title="hit rate of the most read rows", xlabel="rows held", ylabel="share of reads", ylim=(0, 1.02))
    collisions.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    for colour, order in zip(_COLOURS, sorted({head.order for head in traffic.heads}), strict=False):
        chosen = [head for head in traffic.heads if head.order == order]
        expected, counted = [head.shared_expected for head in chosen], [head.shared for head in chosen]
        collisions.plot(expected, counted, "o", color=colour, label=f"{order}-grams", alpha=0.7)
    collisions.set(title="n-grams that share a row, by head", xlabel="expected", ylabel="counted")
    collisions.legend(frameon=False)
    return figure


@draw.register(AttentionFreed)
def _(attention: AttentionFreed) -> "Figure":
    figure, ((entropy, distance),) = _new_figure(8.5, 3.2, columns=2)
    pairs = (
        (entropy, attention.entropy, attention.entropy_off),
        (distance, attention.distance, attention.distance_off),
    )
    for axes, with_memory, without in pairs:
        axes.plot(list(with_memory), list(with_memory.values()), "o-", color=_COLOURS[0], label="with memory")
        axes.plot(list(without), list(without.values()), "o--", color=_COLOURS[1], label="memory off")
        axes.set(xlabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    entropy.set(title="entropy of attention", ylabel="nats")
    distance.set(title="mean distance of attention", ylabel="tokens")
    entropy.legend(frameon=False)
    return figure


@draw.register(Reading)
def _(reading: Reading) -> "Figure":
    lines = [reading.tokens[first : first + _LINE] for first in range(0, len(reading.tokens), _LINE)]
    height = 0.45 * len(reading.layers) + 0.75
    figure, grid = _new_figure(
        min(_LINE, len(reading.tokens)) * 0.52 + 1.2, height * len(lines) + 0.4, rows=len(lines)
    )
    for axes, tokens in zip(grid[:, 0], lines, strict=True):
        values = [[_mean(token.gates[layer]) for token in tokens] for layer in reading.layers]
        padded = [row + [float("nan")] * (len(lines[0]) - len(row)) for row in values]
        image = axes.imshow(padded, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        labels = [plain(token.text) for token in tokens]
        axes.set_xticks(range(len(tokens)), labels, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
        axes.set_yticks(range(len(reading.layers)), [f"layer {layer}" for layer in reading.layers])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=list(grid[:, 0]), label="gate", shrink=0.8)
    return figure


def plain(text: str) -> str:
    """Return a token as a label: on one line, without characters that fonts lack."""
    shown = "".join(letter if letter.isprintable() else "↵" if letter == "\n" else "·" for letter in text)
    return shown if shown.strip() else "␣" * len(shown)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _grouped_bars(axes: "Axes", groups: Mapping[int, Mapping[str, float]], label: str) -> None:
    """Draw bars for every name, with one bar for each layer."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = 0.8 / len(groups)
    for index, (layer, values) in enumerate(groups.items()):
        places = [place + (index - (len(groups) - 1) / 2) * width for place in range(len(names))]
        heights = [values.get(name, 0.0) for name in names]
        axes.barh(places, heights, width, color=_COLOURS[index % len(_COLOURS)], label=f"layer {layer}")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel=label, xlim=(0, 1))


def _intervals(axes: "Axes", estimates: Mapping[str, Any]) -> None:
    for place, each in enumerate(estimates.values()):
        reach = None if each.low is None else [[each.value - each.low], [each.high - each.value]]
        axes.errorbar(each.value, place, xerr=reach, fmt="o", color=_COLOURS[0], capsize=3)
    axes.axvline(0, color="#999999", linewidth=0.8)
    axes.set_yticks(range(len(estimates)), list(estimates))
    axes.invert_yaxis()
    axes.set(xlabel="nats a token, 95 % interval")

"""Draw `docs/images/dataflow.svg`, the flow of data through a model with memory: `python docs/tools/draw_dataflow.py`.

Boxes have their own fills and lines are middle grey, so that the picture suits light and dark pages.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

TARGET = Path(__file__).resolve().parents[1] / "images" / "dataflow.svg"
IDS, TABLE, LAYER, LINE = "#cfe8e4", "#f7e0b2", "#d5dcf5", "#7d8590"
# Each box has a text, a centre, a width and a fill.
BOXES = {
    "tokens": ("token ids\n… 'The', ' list'", (1.3, 5.6), IDS),
    "compressed": ("compressed ids\n(case, accents, spaces\nmake no difference)", (4.1, 5.6), IDS),
    "mix": ("n-grams of orders 2 … N\nmixed with multipliers", (7.1, 5.6), IDS),
    "rows": ("row ids: one for each\norder and head, mod\nits prime number", (10.1, 5.6), IDS),
    "table": ("table of the layer\n(in memory, on disk,\nor pinned)", (10.1, 3.6), TABLE),
    "read": ("a few rows,\nside by side", (7.1, 3.6), TABLE),
    "value": ("key and value", (4.1, 3.6), TABLE),
    "embed": ("embeddings and\nearlier layers", (1.3, 1.2), LAYER),
    "gate": ("gate: how far do\nstream and key agree?", (4.1, 1.2), LAYER),
    "add": ("stream +\ngate × value", (7.1, 1.2), LAYER),
    "layer": ("attention, experts,\nlater layers, logits", (10.1, 1.2), LAYER),
}
ARROWS = [
    ("tokens", "compressed"),
    ("compressed", "mix"),
    ("mix", "rows"),
    ("rows", "table"),
    ("table", "read"),
    ("read", "value"),
    ("value", "gate"),
    ("tokens", "embed"),
    ("embed", "gate"),
    ("gate", "add"),
    ("add", "layer"),
]


def main() -> None:
    """Write the picture; every run writes the same bytes."""
    plt.rcParams |= {"svg.hashsalt": "dataflow", "svg.fonttype": "none", "font.family": "sans-serif"}
    figure, axes = plt.subplots(figsize=(11.4, 6.2))
    axes.set(xlim=(0, 11.4), ylim=(0.1, 6.9))
    axes.axis("off")
    for text, (x, y), fill in BOXES.values():
        box = {"boxstyle": "round,pad=0.55", "facecolor": fill, "edgecolor": LINE}
        axes.text(x, y, text, ha="center", va="center", fontsize=10, color="#1f2328", bbox=box, zorder=3)
    for start, end in ARROWS:
        draw_arrow(axes, BOXES[start][1], BOXES[end][1])
    titles = {
        6.55: "before the backbone runs, for all layers at once, from token ids alone",
        0.25: "in each listed layer",
    }
    for y, text in titles.items():
        axes.text(5.7, y, text, ha="center", va="center", fontsize=10, style="italic", color=LINE)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, transparent=True, bbox_inches="tight", metadata={"Date": None})


def draw_arrow(axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow from the edge of one box to that of another, in a row or a column."""
    (x0, y0), (x1, y1) = start, end
    half = (1.12, 0.62)
    step = ((x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0))
    head = (x1 - step[0] * half[0], y1 - step[1] * half[1])
    tail = (x0 + step[0] * half[0], y0 + step[1] * half[1])
    style = {"arrowstyle": "-|>", "color": LINE, "lw": 1.6, "mutation_scale": 14}
    axes.annotate("", head, tail, arrowprops=style, zorder=2)


if __name__ == "__main__":
    main()

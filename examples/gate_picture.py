"""Which tokens of a text open the memory's gates: in the terminal, and as a picture."""

from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

BARS = " ▁▂▃▄▅▆▇█"


def read_gates(model, tokenizer, text: str) -> tuple[list[str], dict[int, list[float]]]:
    """The tokens of `text`, and for every layer with memory one gate between 0 and 1 for each of them."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    tokens = [tokenizer.decode(token) for token in ids[0]]
    gates = model.engram_gates(ids)
    return tokens, {layer: gate[0].mean(-1).tolist() for layer, gate in gates.items()}


def draw_in_terminal(tokens: list[str], gates: dict[int, list[float]]) -> Table:
    """A row of shaded tokens for every layer, and under it the same as bars, for terminals without colour."""
    table = Table.grid(padding=(0, 2))
    shown = [token.replace("\n", "⏎").replace(" ", "·") for token in tokens]
    for layer, values in gates.items():
        shades, bars = Text(), Text()
        for token, gate in zip(shown, values, strict=True):
            level = round(255 * (1 - gate))
            shades.append(token, style=f"{'white' if gate > 0.5 else 'black'} on rgb({level},{level},255)")
            shades.append(" ")
            bars.append(BARS[round(gate * (len(BARS) - 1))] * len(token) + " ")
        table.add_row(f"layer {layer}", shades)
        table.add_row("", bars)
        widest = sorted(zip(values, shown, strict=True), reverse=True)[:3]
        table.add_row("", "widest: " + ", ".join(f"{token} {gate:.2f}" for gate, token in widest))
    return table


def save_picture(tokens: list[str], gates: dict[int, list[float]], path: Path) -> None:
    """The same as a heat map: a row for every layer, a column for every token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.6 * len(tokens) + 1.5, 0.6 * len(gates) + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(torch.tensor(list(gates.values())), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_yticks(range(len(gates)), [f"layer {layer}" for layer in gates])
    axes.set_xticks(range(len(tokens)), [repr(token)[1:-1].replace(" ", "·") for token in tokens], rotation=60)
    for row, values in enumerate(gates.values()):
        for column, gate in enumerate(values):
            shade = "white" if gate > 0.6 else "black"
            axes.text(column, row, f"{gate:.2f}", ha="center", va="center", color=shade, fontsize=8)
    axes.set_title("How far the memory's gate opens")
    figure.colorbar(image)
    figure.savefig(path, dpi=120)

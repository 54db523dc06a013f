"""A report has all measurements of one model, as a page and as data."""

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from ..safetensors_engram import EngramError
from ..training.memory import find_engram
from .attention import measure_attention
from .depth import compare_layers, measure_depth
from .evaluation import Measurement, Off
from .gates import measure_gates
from .pages import report_page
from .pictures import draw, draw_depths
from .texts import Windows
from .traffic import RowTraffic, measure_traffic
from .worth import MemoryWorth, measure_worth


class Report:
    """All measurements of a model.

    Args:
        title: the model's name.
        model: an Engram causal language model in evaluation mode.
        windows: windows of a text that the model has not seen.
        other: a model to compare its layers with, of the same vocabulary and depth; it may have no memory.
    """

    def __init__(self, title: str, model: PreTrainedModel, windows: Windows, other: PreTrainedModel | None = None):
        self.title = title
        self.data: dict[str, Any] = {}
        self._parts: list[dict[str, Any]] = []
        engram = find_engram(model)
        self.facts = {
            "backbone": engram.config.text_config.model_type,
            "layers with memory": ", ".join(map(str, engram.memories())),
            "rows": ", ".join(f"{rows:,}" for rows in engram.config.engram_num_embeddings),
            "n-grams": f"2 to {engram.hashing.max_ngram} tokens, {engram.hashing.heads} heads each",
            "windows": f"{len(windows):,}",
            "tokens": f"{int(windows.valid.sum()):,}",
        }
        self._add("What memory is worth", _WORTH, measure_worth(model, windows), table=_worth_table)
        self._add("Gates", _GATES, measure_gates(model, windows))
        self._add_depth(model, windows)
        if other is not None:
            self._add("Layers of the two models", _CKA, compare_layers(model, other, windows))
        self._add("Rows", _ROWS, measure_traffic(model, windows), table=_traffic_table)
        try:
            self._add("Attention", _ATTENTION, measure_attention(model, windows))
        except EngramError as error:
            self._parts.append({"title": "Attention", "text": str(error), "figure": None, "table": None})

    def _add(self, title: str, text: str, found: Measurement, table: Callable | None = None) -> None:
        self.data[title] = asdict(found)
        self._parts.append(
            {"title": title, "text": text, "figure": draw(found), "table": None if table is None else table(found)}
        )

    def _add_depth(self, model: PreTrainedModel, windows: Windows) -> None:
        depths = {
            "with memory": measure_depth(model, windows),
            "memory off": measure_depth(model, windows, edit=Off()),
        }
        self.data["Effective depth"] = {name: asdict(depth) for name, depth in depths.items()}
        self._parts.append({"title": "Effective depth", "text": _DEPTH, "figure": draw_depths(depths), "table": None})

    def page(self) -> str:
        """Return the report as one HTML document."""
        return report_page(self.title, self.facts, self._parts)

    def to_json(self) -> str:
        """Return the numbers of the report as one JSON document."""
        return json.dumps({"model": self.title, **self.facts, **self.data}, indent=2, ensure_ascii=False)


_WORTH = (
    "The loss on this text, in nats a token, and by how much it grows when memory is changed. Reading the rows of other positions, a "
    "mean row or a single row are controls: where they cost as much as no memory, it is what the rows hold that helps; where "
    "they cost nothing, it is the added computation."
)
_GATES = "How far gates open: 0 lets nothing of a row into the residual stream, 1 all of it. n-grams are counted in this text."
_DEPTH = (
    "KL divergence from the model's final prediction to what its own norm and head read from the states behind each layer. A curve "
    "that falls earlier needs fewer layers to say the same."
)
_CKA = (
    "Linear CKA of the states behind each layer, on the same text: 1 where two layers hold the same up to a rotation."
)
_ROWS = (
    "Rows that this text reads. n-grams that share a row cannot be told apart by that head; expected is what a uniform hash would "
    "give. A cache of the most read rows would answer the share of reads shown."
)
_ATTENTION = "Attention with memory and with it switched off, averaged over heads and positions."


def _worth_table(worth: MemoryWorth) -> dict[str, Any]:
    rows = [[name, each.value, each.low, each.high] for name, each in worth.increase.items()]
    return {
        "titles": ["memory", "loss grows by", "from", "to (95 %)"],
        "rows": [[_shown(cell) for cell in row] for row in rows],
    }


def _traffic_table(traffic: RowTraffic) -> dict[str, Any]:
    titles = ["layer", "order", "head", "rows", "read", "n-grams", "shared", "expected", "shared, by traffic"]
    rows = [
        [
            head.layer,
            head.order,
            head.head,
            head.rows,
            head.read,
            head.ngrams,
            head.shared,
            head.shared_expected,
            head.traffic,
        ]
        for head in traffic.heads
    ]
    return {"titles": titles, "rows": rows}


def _shown(cell: Any) -> Any:
    return "" if cell is None else cell

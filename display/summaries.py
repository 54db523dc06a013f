"""Summaries of a model's memory and a tokenizer's compression, for printing and for notebooks."""

from html import escape
from typing import NamedTuple

from ..modeling_engram import EngramPreTrainedModel
from ..row_sources_engram import MappedRows, PinnedRows
from ..table_engram import EngramTable
from ..table_format_engram import ROW_FORMATS
from ..tokenization import EngramTokenizer


class TableSummary(NamedTuple):
    """The size of one table: its rows of `width` numbers, and their stored bytes."""

    layer: int
    rows: int
    width: int
    dtype: str
    bytes: int
    residency: str
    trainable: bool

    def cells(self) -> list[str]:
        """Return the cells of a table's line."""
        use = "trainable" if self.trainable else "frozen"
        return [str(self.layer), f"{self.rows:,}", str(self.width), self.dtype, f"{self.bytes:,}", self.residency, use]


TITLES = ["layer", "rows", "width", "dtype", "bytes", "residency", "gradient"]


def summarize_tables(model: EngramPreTrainedModel) -> list[TableSummary]:
    """Return the tables of a model by layer; no row is read."""
    memories = model.memory_model.memories()
    return [_summarize(layer, memory.table) for layer, memory in memories.items()]


def _summarize(layer: int, table: EngramTable) -> TableSummary:
    if isinstance(table.source, MappedRows):
        residency = "pinned" if isinstance(table.source, PinnedRows) else "mapped"
        stored = table.source.stored
        dtype = ROW_FORMATS[stored.dtype].name
        return TableSummary(layer, table.num_rows, table.width, dtype, stored.size, residency, False)
    parameters = list(table.parameters())
    dtype = table.table_dtype or str(table.row_dtype).removeprefix("torch.")
    size, trainable = sum(p.nbytes for p in parameters), any(p.requires_grad for p in parameters)
    return TableSummary(layer, table.num_rows, table.width, dtype, size, "resident", trainable)


def print_memory_summary(model: EngramPreTrainedModel) -> None:
    """Print rows, bytes, dtype and residency of every table, and the memory's share of all parameters.

    It resembles PEFT's `print_trainable_parameters`; no row is read, and adapters count with the layers that they
    belong to.
    """
    rows = [TITLES, *(table.cells() for table in summarize_tables(model))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print(_totals(model))


def _totals(model: EngramPreTrainedModel) -> str:
    """Return a sentence with the counts of parameters in tables, in the rest of the memory and in the backbone."""
    memories = model.memory_model.memories().values()
    in_tables = sum(memory.table.num_rows * memory.table.width for memory in memories)
    tables = {id(parameter) for memory in memories for parameter in memory.table.parameters()}
    beside = {id(parameter) for memory in memories for parameter in memory.parameters()} - tables
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    in_projections = sum(counts[key] for key in beside)
    backbone = sum(count for key, count in counts.items() if key not in tables | beside)
    share = in_tables / (in_tables + in_projections + backbone)
    return (
        f"{in_tables:,} parameters in tables ({share:.1%} of the model), {in_projections:,} in the projections that read "
        f"them, {backbone:,} in the backbone"
    )


def model_html(model: EngramPreTrainedModel) -> str:
    """Return the summary for a notebook, with the modules that `print(model)` lists folded below it."""
    head = "".join(f"<th>{title}</th>" for title in TITLES)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in table.cells()) for table in summarize_tables(model)]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    name = f"{type(model).__name__} on {model.config.backbone.model_type}"
    return (
        f"<p><b>{escape(name)}</b>: {escape(_totals(model))}</p><table><tr>{head}</tr>{body}</table>"
        f"<details><summary>modules</summary><pre>{escape(repr(model))}</pre></details>"
    )


def tokenizer_html(tokenizer: EngramTokenizer) -> str:
    """Return how far the vocabulary is compressed, for a notebook, with the text of `print(tokenizer)` folded below."""
    summary = str(tokenizer.compression_summary())
    return (
        f"<p><b>{escape(type(tokenizer).__name__)}</b></p><pre>{escape(summary)}</pre>"
        f"<details><summary>tokenizer</summary><pre>{escape(repr(tokenizer))}</pre></details>"
    )


def register() -> None:
    """Add these methods to models and tokenizers."""
    methods = {"print_memory_summary": print_memory_summary, "_repr_html_": model_html}
    for name, method in methods.items():
        setattr(EngramPreTrainedModel, name, method)
    setattr(EngramTokenizer, "_repr_html_", tokenizer_html)  # noqa: B010 (a type checker does not know the attribute)

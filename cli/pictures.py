"""`engram show` and `engram report`: pages about the effect of a model's memory."""

import argparse
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .folders import read_utf8

if TYPE_CHECKING:
    from torch import nn

    from engram_hf.saving_engram import FolderWriter


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    show = commands.add_parser(
        "show",
        help="one text, token by token: gates, rows, and the prediction without memory",
        description="Write a page, and a picture beside it, of how a model reads a text with memory and without.",
    )
    show.add_argument("model", help="a saved model with its tokenizer, or a Hub id")
    show.add_argument("text", help="the text that is read, of at least two tokens")
    report = commands.add_parser(
        "report",
        help="all measurements of a model, on one page",
        description="Measure what memory is worth, its gates, effective depth, rows and attention on a text, and write a page.",
    )
    report.add_argument("model", help="a saved model with its tokenizer, or a Hub id")
    report.add_argument(
        "--corpus", metavar="FILE", help="a text (UTF-8) that the model has not seen (default: Python's documentation)"
    )
    report.add_argument(
        "--against",
        metavar="OTHER",
        help="folder or Hub id of a model of the same vocabulary and depth, to compare layers with",
    )
    report.add_argument(
        "--windows", type=int, default=64, metavar="N", help="windows of the text at most (default: %(default)s)"
    )
    report.add_argument(
        "--length", type=int, default=256, metavar="N", help="tokens in a window (default: %(default)s)"
    )
    for parser, run in ((show, run_show), (report, run_report)):
        parser.add_argument(
            "--output",
            default=f"{parser.prog.split()[-1]}.html",
            metavar="FILE",
            help="the page to write (default: %(default)s)",
        )
        parser.add_argument(
            "--residency",
            choices=("auto", "resident", "mapped", "pinned"),
            help="where the memory's tables live (default: auto)",
        )
        parser.add_argument("--json", action="store_true", help="print the data as one JSON document")
        parser.set_defaults(run=run)


def run_show(options: argparse.Namespace) -> None:
    """Write the page of `options.text`, and its picture."""
    from engram_hf.analysis import draw, read_text, reading_page

    with _page_writer(options.output) as writer:
        model, tokenizer = _load(options.model, options.residency), _load_tokenizer(options.model)
        reading = read_text(model, tokenizer, options.text)
        page = writer.path / Path(options.output).name
        page.write_text(reading_page(reading, options.model), encoding="utf-8")
        draw(reading).savefig(page.with_suffix(".png"), dpi=150)
        writer.publish()
    picture = Path(options.output).with_suffix(".png")
    print(reading.to_json() if options.json else f"page     {options.output}\npicture  {picture}")


def run_report(options: argparse.Namespace) -> None:
    """Write the page of a model."""
    from engram_hf.analysis import Report, cut_windows

    texts = _read_corpus(options.corpus)
    with _page_writer(options.output) as writer:
        model, tokenizer = _load(options.model, options.residency), _load_tokenizer(options.model)
        other = None if options.against is None else _load(options.against, None)
        windows = cut_windows(texts, tokenizer, length=options.length, limit=options.windows)
        report = Report(options.model, model, windows, other)
        (writer.path / Path(options.output).name).write_text(report.page(), encoding="utf-8")
        writer.publish()
    print(report.to_json() if options.json else f"page     {options.output}")


def _page_writer(name: str) -> "AbstractContextManager[FolderWriter]":
    """Return the writer of the page's folder; a folder that cannot be written to is refused before the measurement.

    Raises:
        ValueError: the folder does not exist, or the name is not that of a page.
    """
    from engram_hf.claimed_saving_engram import ClaimedFolderWriter

    page = Path(name)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output is {name}; a page has a name that ends in .html.")
    if not page.parent.is_dir():
        raise ValueError(f"{page.parent} is not a folder; make it, or give another --output.")
    return ClaimedFolderWriter(page.parent)


def _read_corpus(name: str | None) -> list[str]:
    """Return the texts of a file, or Python's own documentation.

    Raises:
        ValueError: the file is not text.
    """
    if name is None:
        from pydoc_data.topics import topics

        return list(topics.values())
    return [read_utf8(Path(name))]


def _load(name: str, residency: str | None) -> "nn.Module":
    """Return a model whose attention returns its weights, if its backbone has such an attention."""
    from transformers import AutoModelForCausalLM

    import engram_hf  # noqa: F401 (registers the architecture)

    where = {} if residency is None else {"engram_residency": residency}
    try:
        model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager", **where)
    except ValueError as error:
        if "eager" not in str(error):
            raise
        model = AutoModelForCausalLM.from_pretrained(name, **where)
    return model.eval()


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    import engram_hf  # noqa: F401 (registers the architecture)

    return AutoTokenizer.from_pretrained(name)

"""Self-contained HTML pages without network or script; they work light and dark, on a phone and on paper."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..safetensors_engram import EngramError
from .pictures import plain
from .reading import Reading

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib.figure import Figure


def reading_page(reading: Reading, title: str) -> str:
    """Return the page of one text.

    Args:
        reading: see [`read_text`].
        title: the model's name; it is escaped like all other text.

    Raises:
        ValueError: jinja2 is not installed.
    """
    return _template("reading.html.jinja").render(reading=reading, title=title)


def report_page(title: str, facts: Mapping[str, Any], parts: list[dict[str, Any]]) -> str:
    """Return the page of a model.

    Args:
        title: the model's name.
        facts: the entries at the top, by name.
        parts: `title`, `text`, `figure` (a matplotlib figure or None), and `table` (`titles` and `rows`, or None) of
            each section.

    Raises:
        ValueError: jinja2 is not installed.
    """
    shown = [{**part, "figure": None if part["figure"] is None else _svg(part["figure"])} for part in parts]
    return _template("report.html.jinja").render(title=title, facts=facts, parts=shown)


def _template(name: str) -> "Template":
    try:
        import jinja2
    except ImportError as error:
        raise EngramError("Pages need jinja2; install it with pip install 'engram-hf[analysis]'.") from error
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = plain
    return environment.get_template(name)


def _svg(figure: "Figure") -> str:
    """Return a figure as an `<svg>` element; matplotlib escapes the texts in it."""
    import matplotlib
    from markupsafe import Markup

    buffer = io.StringIO()
    # Text in the SVG stays text, so that it can be searched and copied, and ids are the same in every run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "engram"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])

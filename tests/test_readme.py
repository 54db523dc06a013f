"""The README is short, and the outputs it shows were printed by its code."""

import importlib
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.any_version

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
sys.path.insert(0, str(ROOT / "docs" / "tools"))
check_prose = importlib.import_module("check_prose")


def test_prose_check_finds_words_and_a_long_readme(tmp_path, monkeypatch):
    """`make check` runs it over the repository, which passes."""
    monkeypatch.setattr(check_prose, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    page.write_text("a line\n" * 130)
    assert check_prose.readme_complaints() == [] and check_prose.complaints(page) == []
    page.write_text("an " + "ali" + "ve position\n" + "x" * 121 + "\n" * 130)
    assert len(check_prose.readme_complaints()) == 2
    assert [line.split(":")[:2] for line in check_prose.complaints(page)] == [["README.md", "1"]]


def test_prose_check_finds_docstrings_and_comments_that_are_no_sentences(tmp_path, monkeypatch):
    """Every bad text has one fault, the first comment two; the good ones have none."""
    monkeypatch.setattr(check_prose, "ROOT", tmp_path)
    path, bad = (
        tmp_path / "module.py",
        ["Whether it works.", "The result.", "Returns a result.", "Return it", "return it."],
    )
    functions = [f'def f():\n    """{text}"""\n' for text in [*bad, "Return the result.", "Forget it: `x` is lost."]]
    comments = ["# is the whole\n", "# Of the rows.\n", "# Nothing here.\n", "# It is the whole\n# of two lines.\n"]
    path.write_text('"""A module."""\n' + "\n".join([*functions, *comments]) + "def test_a_name(): ...\n")
    faults = [line.partition(": ")[2] for line in check_prose.complaints(path)]
    assert [" ".join(fault.split()[:6]) for fault in faults] == [
        "docstring begins with 'Whether' and is",
        "docstring of a function does not",
        "docstring of a function does not",
        "docstring does not end like a",
        "docstring does not begin with a",
        "comment does not begin with a",
        "comment does not end like a",
        "comment begins with 'Of' and is",
        "comment has no verb: Nothing here.",
        "test_a_name begins with an article; name",
    ]


def test_readme_example_prints_the_shown_output(monkeypatch, capsys):
    """The demo model runs from a checkout; its remote code is the code of the package."""
    monkeypatch.chdir(ROOT)
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", "\n".join(LINES), re.DOTALL).groups()
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed

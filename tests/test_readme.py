"""The README is short, and what it shows was really printed."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_readme_is_short():
    assert len(LINES) <= 130
    assert [line for line in LINES if len(line) > 120] == []


def test_readme_prints_what_it_shows(monkeypatch, capsys):
    """The demo model, from a checkout; its remote code is the code of the package."""
    monkeypatch.chdir(ROOT)
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", "\n".join(LINES), re.DOTALL).groups()
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed

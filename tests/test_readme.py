"""What the README shows was really printed."""

import re
from pathlib import Path

import pytest
import transformers

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(section: str) -> tuple[str, str]:
    """The section's first Python block, and the first text block behind it."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    code, printed = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", text, re.DOTALL).groups()
    return code, printed


@pytest.fixture(autouse=True)
def _quiet(capsys):
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def test_thirty_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, printed = blocks("In thirty lines")
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed

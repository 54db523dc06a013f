"""`examples/teach_facts.py` on the demo model, with two of its facts and two protected texts."""

import importlib
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
teach_facts, stdlib_text = map(importlib.import_module, ("teach_facts", "stdlib_text"))


@pytest.mark.slow
def test_two_facts_are_written_loaded_and_one_is_forgotten(tmp_path, monkeypatch, capsys):
    texts, unseen = stdlib_text.read_documentation()
    monkeypatch.setattr(stdlib_text, "read_documentation", lambda: (texts, [text[:200] for text in unseen[:2]]))
    monkeypatch.setattr(teach_facts, "FACTS", teach_facts.FACTS[:2])
    monkeypatch.setattr(teach_facts, "CAPITALS", dict(list(teach_facts.CAPITALS.items())[:2]))
    monkeypatch.setattr(sys, "argv", ["", "--output", str(tmp_path)])
    try:
        teach_facts.main()
    finally:
        logging.enable_progress_bar()
    said = capsys.readouterr().out
    assert "100% of 2 facts recalled" in said and "0 changed in any bit" in said
    written, loaded, forgotten = (said.split(title)[1] for title in ("facts recalled", "loaded again", "forgotten ("))
    assert "kB" in written
    assert "The capital of Zembla is Onhava" in loaded and "The capital of Zembla is Onhava" not in forgotten
    assert "The capital of Ruritania is Strelsau" in forgotten

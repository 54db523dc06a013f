"""`engram demo`: a model that loads with nothing of ours, whole or not at all."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

import engram_hf
from engram_hf.analysis.evaluation import Off

ROOT = Path(engram_hf.__file__).parent
DEMO = ROOT / "examples" / "engram-demo"
PROMPT = "Return True if the object is a"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A copy that is made once."""
    from engram_cli.main import main

    folder = tmp_path_factory.mktemp("demo") / "engram-demo"
    assert main(["demo", str(folder)]) == 0
    return folder


def test_it_says_what_to_try_and_keeps_what_is_there(engram, complaint, tmp_path):
    said = engram("demo", tmp_path / "new")
    assert "engram show" in said and "engram quantize" in said and "pipeline(" in said
    assert "is there already" in complaint("demo", tmp_path / "new")


def test_its_code_is_the_package_s(saved):
    entries = [ROOT / "modeling_engram.py", ROOT / "tokenization" / "tokenization_engram.py"]
    own = {Path(path) for entry in entries for path in (entry, *get_relative_import_files(entry))}
    assert {path.name for path in saved.glob("*.py")} == {path.name for path in own}
    for path in own:
        assert (saved / path.name).read_bytes() == path.read_bytes() and not (saved / path.name).is_symlink()


def test_it_is_small(saved):
    assert sum(path.stat().st_size for path in saved.iterdir()) <= 12_000_000


@torch.no_grad()
def test_it_continues_and_its_memory_matters(saved):
    model = AutoModelForCausalLM.from_pretrained(saved, engram_residency="mapped").eval()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=2, do_sample=False)[0])
    assert text.startswith(PROMPT + " class")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert loss + 1 < model(**inputs, labels=inputs["input_ids"], engram_edit=Off()).loss


def test_a_full_disk_leaves_nothing(complaint, tmp_path, monkeypatch):
    copied, copy = [], shutil.copyfile

    def full(source, target):
        copied.append(source)
        if len(copied) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return copy(source, target)

    monkeypatch.setattr("engram_cli.demo.shutil.copyfile", full)
    assert "No space left" in complaint("demo", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_it_answers_where_nothing_of_ours_is_installed(saved):
    script = [sys.executable, str(ROOT / "examples" / "continue_text.py"), str(saved), PROMPT, "--tokens", "4"]
    done = subprocess.run(script, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.startswith(PROMPT)

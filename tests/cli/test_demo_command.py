"""`engram demo`: the model loads without the package, and is copied completely or not at all."""

import errno
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from engram_cli.demo import incomplete_folder
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_relative_import_files

import engram_hf
from engram_hf.analysis.evaluation import Off
from engram_hf.claiming_engram import FolderClaim

ROOT = Path(engram_hf.__file__).parent
DEMO = ROOT / "examples" / "engram-demo"
PROMPT = "Return True if the object is a"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Make one copy for all tests."""
    from engram_cli.main import main

    folder = tmp_path_factory.mktemp("demo") / "engram-demo"
    assert main(["demo", str(folder)]) == 0
    return folder


def test_demo_prints_what_to_try_and_refuses_an_existing_folder(engram, complaint, tmp_path):
    said = engram("demo", tmp_path / "new")
    assert "engram show" in said and "engram quantize" in said and "pipeline(" in said
    assert "is there already" in complaint("demo", tmp_path / "new")


def test_demo_code_is_that_of_the_package(saved):
    entries = [ROOT / "modeling_engram.py", ROOT / "tokenization" / "tokenization_engram.py"]
    own = {Path(path) for entry in entries for path in (entry, *get_relative_import_files(entry))}
    assert {path.name for path in saved.glob("*.py")} == {path.name for path in own}
    for path in own:
        assert (saved / path.name).read_bytes() == path.read_bytes() and not (saved / path.name).is_symlink()


def test_demo_model_is_small(saved):
    assert sum(path.stat().st_size for path in saved.iterdir()) <= 12_000_000


@torch.no_grad()
def test_demo_model_continues_a_text_and_needs_its_memory(saved):
    model = AutoModelForCausalLM.from_pretrained(saved, engram_residency="mapped").eval()
    tokenizer = AutoTokenizer.from_pretrained(saved)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0])
    assert text.startswith(PROMPT + " user-defined function")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert loss + 1 < model(**inputs, labels=inputs["input_ids"], engram_edit=Off()).loss


def test_full_disk_leaves_nothing(complaint, tmp_path, monkeypatch):
    copied, copy = [], shutil.copyfile

    def full(source, target):
        copied.append(source)
        if len(copied) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return copy(source, target)

    monkeypatch.setattr("engram_cli.demo.shutil.copyfile", full)
    assert "No space left" in complaint("demo", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_demo_replaces_the_rest_of_a_killed_run_and_refuses_an_active_one(engram, complaint, tmp_path):
    left = incomplete_folder(tmp_path / "new") / "model"
    left.mkdir(parents=True)
    (left / "rest").touch()
    with FolderClaim(left.parent):
        assert "is being written by process" in complaint("demo", tmp_path / "new")
    engram("demo", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and not (tmp_path / "new" / "rest").exists()


@pytest.mark.slow
def test_demo_model_runs_without_the_package(saved):
    script = [sys.executable, str(ROOT / "examples" / "continue_text.py"), str(saved), PROMPT, "--tokens", "4"]
    done = subprocess.run(script, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.startswith(PROMPT)


@pytest.mark.slow
def test_wheel_in_a_fresh_environment_has_the_demo(tmp_path):
    """The wheel is built and installed; its dependencies are those of this environment, which has no package index."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=_left_out_of_a_wheel)
    wheels = ["wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run([*pip, *wheels], check=True, timeout=300)
    venv.create(tmp_path / "environment", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "environment" / "lib").glob("python*/site-packages")
    (wheel,) = tmp_path.glob("engram_hf-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(packages), str(wheel)], check=True)
    # A path in a .pth file is searched after the wheel's own; .pth files in it, such as that of an editable install,
    # are not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    engram = [str(tmp_path / "environment" / "bin" / "python"), "-P", "-m", "engram_cli"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for words in (["demo", "demo"], ["check", "demo"]):
        done = subprocess.run([*engram, *words], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("demo: all well\n")
    where = [engram[0], "-P", "-c", "import engram_cli; print(engram_cli.__file__)"]
    assert str(packages) in subprocess.run(where, env=clean, capture_output=True, text=True, check=True).stdout


def _left_out_of_a_wheel(folder: str, names: list[str]) -> set[str]:
    """Return names in a checkout that are not sources, such as environments."""
    return {name for name in names if name.startswith(".") or name in ("build", "dist", "out", "tests", "__pycache__")}

"""What the README shows was really printed."""

import importlib
import re
import shutil
from pathlib import Path

import pytest
import transformers
from deepseek_v41_reference import copy_release, needs_auto_image_processor
from engram_cli.main import main as engram

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def text_of(section: str) -> str:
    return README.split(f"\n## {section}\n")[1].split("\n## ")[0]


def blocks(section: str) -> tuple[str, str]:
    """The section's first Python block, and the first text block behind it."""
    text = text_of(section)
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


def commands(section: str) -> list[tuple[list[str], str]]:
    """The words of each command of the section's first console block, and what it prints."""
    block = re.search(r"```console\n(.*?)```", text_of(section), re.DOTALL).group(1)
    pieces = [piece.partition("\n") for piece in block.split("$ ")[1:]]
    return [(line.partition("#")[0].split(), printed) for line, _, printed in pieces]


def run(words: list[str]) -> int:
    if words[0] == "engram":
        return engram(words[1:])
    assert words[:2] == ["python", "-m"]
    return importlib.import_module(words[2]).main(words[3:])


def test_commands(tmp_path, monkeypatch, capsys, golden):
    """On the miniature checkpoint; only how long it takes may differ."""
    left_out = shutil.ignore_patterns("README.md", "golden.safetensors")
    shutil.copytree(golden / "deepseek_v41_tiny", tmp_path / "tiny", ignore=left_out)
    monkeypatch.chdir(tmp_path)
    for words, printed in commands("DeepSeek-V4.1") + commands("Command line"):
        assert run(words) == 0
        assert without_time(capsys.readouterr().out) == without_time(printed)


@needs_auto_image_processor
def test_images_and_drafts(tmp_path, monkeypatch, capsys, golden):
    folder = golden / "deepseek_v41_tiny_vl"
    copy_release(folder, tmp_path / "tiny-vl")
    shutil.copy(folder / "golden_vl.safetensors", tmp_path)
    monkeypatch.chdir(tmp_path)
    ((words, printed),) = commands("Images and drafts")
    assert run(words) == 0
    assert without_time(capsys.readouterr().out) == without_time(printed)
    code, printed = blocks("Images and drafts")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def without_time(text: str) -> str:
    return re.sub(r" in [\d.]+ s \([\d.]+ [kMG]?B/s\)", "", text)

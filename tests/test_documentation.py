"""README and docs: a test runs every code block or the page gives a reason, and no message or public name is left out.

A block of Python, a console or a shell may follow a comment of one line:

    <!-- not run: REASON -->
    <!-- run by: tests/FILE.py -->     that test runs it, or the same on another model
    <!-- also in: docs/PAGE.md -->     that page has the same block and it is run there
    <!-- prints -->                    before a block of text: the output of the page's last block of Python

All other blocks are run here, in the order of the page, in one folder and one namespace.
"""

import ast
import importlib
import json
import re
import resource
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pytest
import torch
from deepseek_v41_reference import copy_release, needs_auto_image_processor
from engram_cli.main import main as engram
from test_house import PUBLIC_NAMES
from tiny_backbones import needs_continuous_batching
from transformers import (
    DataCollatorForLanguageModeling,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from engram_hf import EngramConfig, EngramForCausalLM

pytestmark = pytest.mark.any_version

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BLOCK = re.compile(r"(?:^<!-- ([^\n]+) -->\n\s*)?^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "console", "bash", "text", "json"}
sys.path[:0] = [str(ROOT / "docs" / "tools"), str(ROOT / "examples")]
messages, stdlib_text = importlib.import_module("messages"), importlib.import_module("stdlib_text")


class Block(NamedTuple):
    """A code block of a page.

    Args:
        note: the comment before the block; empty without one.
        language: the word after its fence.
        text: its lines.
    """

    note: str
    language: str
    text: str

    @property
    def is_run_here(self) -> bool:
        """Return whether `test_blocks_of_a_page` runs the block."""
        return self.language in ("python", "console", "bash") and not self.note


def read_blocks(page: Path) -> list[Block]:
    return [Block(note or "", *rest) for note, *rest in BLOCK.findall(page.read_text(encoding="utf-8"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_run_or_gives_a_reason(page):
    """The comment is one of those above and names an existing file; a block without one is in a language that can be
    run.
    """
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(read_blocks(page))
    for block in read_blocks(page):
        assert block.language in LANGUAGES, block
        kind, _, value = block.note.partition(": ")
        if kind == "run by":
            assert (ROOT / value).is_file(), block
        elif kind == "also in":
            assert block.text in (ROOT / value).read_text(encoding="utf-8"), block
        elif kind != "prints" and not block.is_run_here and block.language in ("python", "console", "bash"):
            assert kind == "not run" and len(value) > 10, block
        elif block.is_run_here and block.language == "python":
            ast.parse(block.text)
        elif block.is_run_here:
            assert all(words[0] in ("engram", "python") for words, _ in commands(block)), block


def test_every_message_is_on_the_page():
    """All sources are read: a message in a file without a marker, or one that cannot be read, is an error."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert len(messages.fill_markers(page)) > len(page)
    texts = [message.text for message in messages.read_messages()]
    quoted = re.findall(r"^\| `([^`]+)` \|", page.split("Without a message of ours")[0], re.MULTILINE)
    assert len(quoted) > 10
    assert [phrase for phrase in quoted if not any(phrase in text for text in texts)] == []


def test_messages_are_read_from_every_kind_of_source(tmp_path, monkeypatch):
    """Messages in calls, variables, functions, rule tables and warnings are read; others are refused."""
    monkeypatch.setattr(messages, "ROOT", tmp_path)
    source = tmp_path / "some_engram.py"
    source.write_text(
        "def rules(self):\n    yield self.a, f'the rule of {self.a} is broken'\n"
        "def made(name):\n    return ValueError(f'{name} was made by a function')\n"
        "def check(self, x):\n"
        "    for holds, message in rules(self):\n        raise EngramError(message)\n"
        "    text = 'assigned to a name ' + 'and added up' if x else 'or something else than that'\n"
        "    raise EngramError(text)\n"
        "    raise made(x)\n"
        "    logger.warning_once(f'a warning about {len(x)} things')\n"
    )
    assert {message.text for message in messages.messages_of(source)} == {
        "the rule of {a} is broken",
        "{name} was made by a function",
        "assigned to a name and added up",
        "or something else than that",
        "a warning about {...} things",
    }
    source.write_text("raise EngramError(somewhere.else_entirely[0])\n")
    with pytest.raises(ValueError, match=r"some_engram\.py:1: no message"):
        messages.messages_of(source)


def test_reference_has_every_public_name():
    """`make docs` looks for each name in the finished site, too."""
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    entries = re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE)
    assert len(entries) == len(set(entries))
    public = {f"{package}.{name}" for package, names in PUBLIC_NAMES.items() for name in names}
    assert public - set(entries) == set()


def commands(block: Block) -> list[tuple[list[str], str]]:
    """Return the words of each command, and its output on the page (nothing for a `bash` block)."""
    if block.language == "bash":
        return [(shlex.split(line, comments=True), "") for line in block.text.splitlines()]
    pieces = [piece.partition("\n") for piece in block.text.split("$ ")[1:]]
    return [(shlex.split(line, comments=True), printed) for line, _, printed in pieces]


def run_command(words: list[str]) -> int:
    if words[0] == "engram":
        return engram(words[1:])
    assert words[:2] == ["python", "-m"]
    return importlib.import_module(words[2]).main(words[3:])


def without_time(text: str) -> str:
    return re.sub(r" in [\d.]+ s \([\d.]+ [kMG]?B/s\)", "", text)


@pytest.fixture(scope="module")
def place(tmp_path_factory, golden) -> Path:
    """Create a folder with the files that the pages name: a backbone, a model, texts, and the miniatures of
    DeepSeek-V4.1.
    """
    folder = tmp_path_factory.mktemp("pages")
    set_seed(0)
    sources, held_out = stdlib_text.read_sources()
    tokenizer = stdlib_text.train_tokenizer(sources[:12], 600)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    backbone = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=4, head_dim=8, **size)
    config = EngramConfig.for_backbone(
        backbone, tokenizer, layer_ids=[1, 2], rows=2000, engram_n_heads=2, engram_head_dim=16
    )
    model = EngramForCausalLM(config)
    model.set_token_map(tokenizer)
    for name, made in {"my-backbone": Qwen3ForCausalLM(backbone), "path/to/model": model}.items():
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "corpus.txt").write_text("\n".join(sources[:3])[:6000])
    (folder / "held_out.txt").write_text("\n".join(held_out)[:6000])
    copy_release(golden / "deepseek_v41_tiny", folder / "tiny")
    copy_release(golden / "deepseek_v41_tiny_vl", folder / "tiny-vl")
    shutil.copy(golden / "deepseek_v41_tiny_vl" / "golden_vl.safetensors", folder)
    return folder


def names_of_a_page(place: Path) -> dict:
    """Return names for the blocks that begin in the middle of a task."""
    model = EngramForCausalLM.from_pretrained(place / "path/to/model")
    tokenizer = stdlib_text.EngramTokenizer.from_pretrained(place / "path/to/model")
    texts = [(place / "corpus.txt").read_text()]
    ids = torch.tensor(tokenizer(texts[0])["input_ids"])[:512].view(8, 64)
    return {
        "torch": torch,
        "Trainer": Trainer,
        "TrainingArguments": TrainingArguments,
        "DataCollatorForLanguageModeling": DataCollatorForLanguageModeling,
        "EngramForCausalLM": EngramForCausalLM,
        "model": model,
        "tokenizer": tokenizer,
        "texts": texts,
        "inputs": tokenizer("for name, value in self.items():", return_tensors="pt"),
        "dataset": [{"input_ids": row} for row in ids],
        "batches": [{"input_ids": ids[:2]}],
    }


def pages_to_run() -> list:
    found = [page for page in PAGES if any(block.is_run_here for block in read_blocks(page))]
    marks = {"convert-v41": needs_auto_image_processor, "continuous-batching": needs_continuous_batching}
    return [
        pytest.param(page, id=name_of(page), marks=[marks[page.stem]] if page.stem in marks else []) for page in found
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_to_run())
def test_blocks_of_a_page(page, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    names, printed = names_of_a_page(place), ""
    set_seed(0)
    for block in read_blocks(page):
        if block.is_run_here and block.language == "python":
            capsys.readouterr()
            exec(compile(block.text, name_of(page), "exec"), names)
            printed = capsys.readouterr().out
        elif block.is_run_here:
            for words, expected in commands(block):
                capsys.readouterr()
                assert run_command(words) == 0
                shown = capsys.readouterr().out
                assert block.language == "bash" or without_time(shown) == without_time(expected)
        elif block.note == "prints":
            assert printed == block.text


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, tmp_path, monkeypatch):
    """The notebook runs from top to bottom, its assertions hold, and it restores the process's limits."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    limits, names = resource.getrlimit(resource.RLIMIT_DATA), {"display": lambda shown: None}
    try:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), path.name, "exec"), names)
        assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def test_notebooks_have_outputs_and_a_badge():
    """Stored outputs come from one run from top to bottom without an error; the badge has the repository's address."""
    (address,) = re.findall(
        r"git clone (?:https://github\.com/)?(\S+?)(?:\.git)? ", PAGES[0].read_text(encoding="utf-8")
    )
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
        assert f"/{address}/blob/main/notebooks/{path.name})" in "".join(notebook["cells"][0]["source"])

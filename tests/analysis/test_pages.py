"""`engram show` and `engram report`: the pages they write, and the input they refuse."""

import html.parser
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from engram_cli.main import main
from PIL import Image
from tiny_tokenizer import make_tokenizer

from engram_hf import EngramForCausalLM

pytestmark = pytest.mark.any_version

CORPUS = " ".join(f"w{index * index % 23}" for index in range(120))


@pytest.fixture(scope="module")
def saved(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; return its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return command


class Reader(html.parser.HTMLParser):
    """Collects the visible text of a page and the addresses it would fetch."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.fetched = [], "", []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object"):
            self.fetched.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href") and not value.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(path):
    page = path.read_text(encoding="utf-8")
    reader = Reader(re.sub(r"<svg.*?</svg>", "<p>picture</p>", page, flags=re.DOTALL))
    assert not reader.open and not reader.fetched
    assert not re.search(r"@import|url\((?!#)|<script|xlink:href=\"(?!#|data:)", page)
    return reader.text, page


@pytest.mark.parametrize("residency", ["resident", "mapped"])
def test_show_writes_a_page(saved, run, tmp_path, residency):
    status, out, _ = run("show", saved, "the café w3 w4", "--residency", residency)
    assert status == 0 and "show.html" in out
    text, page = read_page(tmp_path / "show.html")
    assert "Layer 1" in text and "Layer 2" in text and "café" in text and page.count('<tr id="t') == 4
    assert Image.open(tmp_path / "show.png").size[0] > 100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["show.html", "show.png"]


def test_show_prints_json(saved, run, model):
    _, out, _ = run("show", saved, "w3 w4 w3 w4", "--json")
    tokens = json.loads(out)["tokens"]
    assert [len(token["ngrams"]["1"]) for token in tokens] == [0, 1, 2, 2]
    first, last = tokens[1]["ngrams"]["1"][0], tokens[3]["ngrams"]["1"][0]
    assert first["text"] == "w3w4" and first["rows"] == last["rows"]
    assert tokens[3]["next_probability"] is None and 0 < tokens[0]["next_probability"] < 1


def test_report_writes_a_page(saved, run, tmp_path):
    (tmp_path / "text.txt").write_text(CORPUS)
    status, out, _ = run("report", saved, "--corpus", "text.txt", "--length", 32, "--against", saved)
    assert status == 0 and "report.html" in out
    text, page = read_page(tmp_path / "report.html")
    for title in ("What memory is worth", "Gates", "Effective depth", "Layers of the two models", "Rows", "Attention"):
        assert title in text
    assert page.count("<svg") == 6
    status, out, _ = run("report", saved, "--corpus", "text.txt", "--length", 32, "--json")
    assert set(json.loads(out)) > {"What memory is worth", "Gates", "Effective depth", "Rows", "Attention"}


def test_pages_escape_names_and_tokens(saved, run, tmp_path):
    """A folder's name and a vocabulary come from strangers."""
    folder = shutil.copytree(saved, tmp_path / "<b onclick=x>&")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<script>alert(1)</script>"] = vocabulary.pop("w5")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    from engram_hf.analysis import read_text, reading_page

    class Tokens:
        all_special_ids = ()

        def __call__(self, text):
            return {"input_ids": [15, 16, 17]}

        def decode(self, ids):
            return '<script>alert("1")</script>'

        def convert_ids_to_tokens(self, index):
            return "x"

    model = EngramForCausalLM.from_pretrained(saved)
    page = tmp_path / "page.html"
    page.write_text(reading_page(read_text(model, Tokens(), ""), str(folder)))
    text, _ = read_page(page)
    assert '<script>alert("1")</script>' in text and "<b onclick=x>&" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{saved}", "w3"], "two tokens"),
        (["show", "{saved}", ""], "two tokens"),
        (["show", "{saved}", "<bos> <eos>"], "two tokens"),
        (["show", "{saved}", "w3 " * 3000], "more than 2,048 tokens"),
        (["show", "{saved}", "w3 w4", "--output", "page.png"], "ends in .html"),
        (["show", "{saved}", "w3 w4", "--output", "nowhere/page.html"], "is not a folder"),
        (["report", "{saved}", "--corpus", "bytes"], "is no text in UTF-8"),
        (["report", "{saved}", "--corpus", "missing.txt"], "missing.txt"),
        (["report", "{plain}", "--corpus", "text.txt"], "no Engram memory"),
    ],
)
def test_show_and_report_refuse_bad_input(saved, run, tmp_path, arguments, message):
    from tiny_backbones import BACKBONES
    from transformers import AutoModelForCausalLM

    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "text.txt").write_text(CORPUS)
    plain = tmp_path / "plain"
    if "{plain}" in arguments:
        AutoModelForCausalLM.from_config(BACKBONES["llama"]()).save_pretrained(plain)
        make_tokenizer().save_pretrained(plain)
    status, _, errors = run(*(argument.format(saved=saved, plain=plain) for argument in arguments))
    assert status == 1 and message in errors.splitlines()[-1]
    assert not list(tmp_path.glob("*.html"))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_renders_in_a_browser(saved, run, tmp_path, scheme):
    """At the width of a phone, only tables and pictures are wider than the screen."""
    run("show", saved, "the café w3 w4")
    page = (tmp_path / "show.html").read_text()
    probe = "<script>document.title = [document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor].join()</script>"
    (tmp_path / "probe.html").write_text(page.replace("</body>", probe + "</body>"))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--dump-dom"]
    dark = (
        ["--blink-settings=preferredColorScheme=0"]
        if scheme == "dark"
        else ["--blink-settings=preferredColorScheme=1"]
    )
    done = subprocess.run(
        [*command, *dark, f"file://{tmp_path}/probe.html"], capture_output=True, text=True, timeout=120
    )
    width, colour = re.search(r"<title>(\d+),(.*?)</title>", done.stdout).groups()
    assert int(width) <= 500
    assert colour == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)")


def test_walkthrough_runs(monkeypatch, capsys):
    """The example computes everything twice, and stops where the model differs."""
    examples = Path(__file__).parents[2] / "examples"
    monkeypatch.syspath_prepend(str(examples))
    runpy.run_path(str(examples / "walkthrough.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "8 rows of 32 = 256 numbers" in printed and len(re.findall(r"= row [\d,]+$", printed, re.MULTILINE)) == 8

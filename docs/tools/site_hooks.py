"""Hooks of `mkdocs build`: pages that are made from other files, and checks of the finished site."""

import argparse
import ast
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import messages
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "out" / "site-package"
# These pages are elsewhere in the repository, by their name on the site.
ELSEWHERE = {
    "benchmarks.md": "benchmarks/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
# The pictures of the experiments are beside their results; the site has them among its own.
RESULTS, PICTURES = "experiments/results", "images/experiments"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PUBLIC = ("", "training", "analysis", "other_models", "tokenization")


def on_startup(**_: Any) -> None:
    """Link the installed files under the package's name: the reference is read from them, without an import."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    package = PACKAGE / "engram_hf"
    package.mkdir(parents=True)
    for path in ROOT.glob("*.py"):
        if path.stem != "setup":
            (package / path.name).symlink_to(path)
    for path in ROOT.glob("*/__init__.py"):
        (package / path.parent.name).symlink_to(path.parent)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `ELSEWHERE`, the notebooks, the support matrix, the command line, and pictures of results."""
    made = {name: (ROOT / source).read_text(encoding="utf-8") for name, source in ELSEWHERE.items()}
    made |= {f"notebooks/{path.stem}.md": notebook_page(path) for path in NOTEBOOKS}
    made["command-line.md"] = command_line_page()
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for path in (ROOT / RESULTS).glob("*/*.png"):
        name = f"{PICTURES}/{path.parent.name}/{path.name}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in lists of messages and the support matrix; make links out of `docs` point to pages of the site."""
    path = page.file.src_uri
    try:
        markdown = messages.fill_markers(markdown) if messages.groups_of(markdown) else markdown
    except ValueError as error:
        raise PluginError(f"{path}: {error}") from error
    markdown = markdown.replace("<!-- support by version -->", support_table())
    return _relink(markdown, path)


def on_page_content(html: str, **_: Any) -> str:
    """Show only the names of classes, which docstrings write like Hugging Face's tools: ``[`~module.Class`]``."""
    return re.sub(r"\[<code>~?(?:\w+\.)*(\w+)</code>\]", r"<code>\1</code>", html)


def on_post_build(config: Any) -> None:
    """Require every public name in the reference, and pages that fetch nothing from other sites."""
    site = Path(config["site_dir"])
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    anchors = {anchor for html in pages.values() for anchor in re.findall(r' id="(engram_hf[\w.]*)"', html)}
    missing = sorted(set(public_names()) - anchors)
    if missing:
        raise PluginError(f"docs/api has no entry for {', '.join(missing)}")
    fetched = re.compile(
        r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(https?:)?//|<link\b[^>]*rel="stylesheet"[^>]*"https?:'
    )
    remote = sorted(str(path.relative_to(site)) for path, html in pages.items() if fetched.search(html))
    if remote:
        raise PluginError(f"{', '.join(remote)} would fetch something from another server")


def public_names() -> Iterator[str]:
    """Return `__all__` of the package and of its rooms, with dots."""
    for room in PUBLIC:
        tree = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
        (names,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and _is_all(node))
        prefix = f"engram_hf.{room}." if room else "engram_hf."
        yield from (prefix + name for name in ast.literal_eval(names))


def _is_all(node: ast.Assign) -> bool:
    return [getattr(target, "id", None) for target in node.targets] == ["__all__"]


def _relink(markdown: str, path: str) -> str:
    up = "../" * path.count("/")
    source = ELSEWHERE.get(path)
    if source is not None:  # written for where it stands
        markdown = re.sub(r"\]\((?:\.\./)?docs/", "](", markdown)
    markdown = markdown.replace(f"](../{RESULTS}/", f"]({up}{PICTURES}/")
    for name, target in ELSEWHERE.items():
        markdown = re.sub(rf"\]\((?:\.\./)*{re.escape(target)}(#[^)]*)?\)", rf"]({up}{name}\1)", markdown)
    return markdown


def notebook_page(path: Path) -> str:
    """Return a notebook as a page: its text, its code, and its stored outputs."""
    parts = [f"*This page is `notebooks/{path.name}`.*"]
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append("\n".join(line for line in source.splitlines() if "badge" not in line))
        elif source:
            parts += [f"```python\n{source}\n```", *map(_output, cell["outputs"])]
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        image = "".join(data["image/png"]).replace("\n", "")
        return f"![What the cell draws](data:image/png;base64,{image})"
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def command_line_page() -> str:
    """Return the output of `engram --help` and of the help of each command."""
    known = list(sys.path)
    sys.path.insert(0, str(PACKAGE / "engram_hf"))
    try:
        from cli.main import build_parser

        parts = ["# Command line", *_helps(build_parser(), "engram", 2)]
    finally:
        sys.path[:] = known
    return "\n\n".join(parts)


def _helps(parser: argparse.ArgumentParser, title: str, level: int) -> Iterator[str]:
    yield f"{'#' * level} {title}\n\n```text\n{parser.format_help().rstrip()}\n```"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from _helps(command, f"{title} {name}", min(level + 1, 4))


def support_table() -> str:
    """Return a row for each tested version of transformers, from `benchmarks/backbones.json` and the files of
    constraints.
    """
    noted = json.loads((ROOT / "benchmarks" / "backbones.json").read_text(encoding="utf-8"))
    pins = {}
    for path in [ROOT / "constraints.txt", *(ROOT / "constraints").glob("transformers-*.txt")]:
        found = _pins(path)
        pins[found["transformers"]] = found
    rows = [
        "| transformers | backbones with every check passed | torch | PEFT | accelerate | tokenizers |",
        "| --- |" * 1 + " --- |" * 5,
    ]
    for version in sorted(pins, key=lambda each: [*map(int, each.split("."))]):
        kinds = [kind[0] for kind in noted.get(version, {}).values()]
        counted = f"{kinds.count('full')} of {len(kinds) - kinds.count('missing')}" if kinds else "not counted"
        others = " | ".join(pins[version][name] for name in ("torch", "peft", "accelerate", "tokenizers"))
        rows.append(f"| {version} | {counted} | {others} |")
    return "\n".join(rows)


def _pins(path: Path) -> dict[str, str]:
    pins: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-c "):
            pins = _pins(path.parent / line.removeprefix("-c ").strip()) | pins
        elif "==" in line:
            name, _, version = line.partition("==")
            pins[name] = version
    return pins

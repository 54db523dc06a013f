"""Checks of prose that need no reader: the README's size, house words, and the form of docstrings and comments.

`make check` runs it. Whether a sentence is clear, a reader still has to judge.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README_LINES, README_COLUMNS = 130, 120
# Only this repository used these words; the field has others.
WORDS = {
    r"alive": "valid (of positions), running (of processes)",
    r"silenced?|silence": "zero-initialize, zero value projection",
    r"carried (?!out\b)": "passed through, saved with",
    r"in turn": "interleaved, alternating, one after the other",
    r"at home": "not uploaded, not installed",
    r"so many": "the number itself, or its name",
    r"hand(?:s|ed)? on": "pass, passes",
    r"lest": "so that ... not",
    r"facts (?:of|about) (?:a|the) (?:file|checkpoint|source)": "provenance",
    r"heard|hears": "takes effect, is read",
    r"tak(?:e|en) back": "undone, reset, removed",
    r"honest(?:ly)?": "fair, complete",
}
_WORD = re.compile("|".join(rf"\b(?:{word})(?:\b|(?<=\s))" for word in WORDS), re.IGNORECASE)
# Names of libraries that are written in lower case may begin a sentence.
_LIBRARIES = (
    r"accelerate|bitsandbytes|compressed-tensors|engram|lm-eval|macOS|numpy|psutil|safetensors|transformers|vLLM"
)
_BEGINNING = re.compile(rf"[\"'(\[*]*(?:[A-Z0-9`.,<%]|(?:{_LIBRARIES})\b)|\w+ \(`")
_END = re.compile(r"[.:?!][)\"'`]*$|[`)\]]$")
# A docstring or comment that begins like this has no subject, or is a clause without its sentence.
_FRAGMENT = re.compile(r"(?:Whether|Of|What|Also|Else|Likewise|Told|Lest)\b|As (?:in|of|for|with)\b")
# The docstring of a function begins with an imperative, which none of these words is.
_NO_IMPERATIVE = re.compile(r"(?:An?|The|All|Any|As|Both|Config|Each|Every|From|On|One|Part|To|Two|With|\w+[^s]s)\b")
# A word that is or may be a finite verb. The docstring of a test and a comment have one; a class may be named by a noun.
_VERB = re.compile(
    r"\b(?:are|can|cannot|come|could|differ|did|do|fit|get|give|had|have|hold|keep|kept|lie|make|may|might|must|need|"
    r"read|run|should|stay|take|was|were|will|work|would|write|\w+s|\w+ed)\b"
)
# A page that a docstring cites, from the root of the repository.
_PAGE = re.compile(r"\b[a-z0-9_/.-]+\.md\b")
_NO_SENTENCE = re.compile(r"noqa|type:|fmt:|---|\[|[=-]+$|!")


def tracked_files() -> list[Path]:
    """Return the repository's Python sources and pages, without this file and links."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and not path.is_symlink() and path != Path(__file__).resolve()]


def complaints(path: Path) -> list[str]:
    """Return a line for every fault of a file."""
    name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    found = [
        (number, f"{match[0].strip()!r} is not the field's word; write instead: {_instead(match[0])}")
        for number, line in enumerate(text.splitlines(), start=1)
        for match in _WORD.finditer(line)
    ]
    if path.suffix == ".py":
        found += _faults_of_form(text)
    return [f"{name}:{number}: {fault}" for number, fault in sorted(found)]


def _instead(word: str) -> str:
    return next(better for pattern, better in WORDS.items() if re.match(pattern, word, re.IGNORECASE))


def _faults_of_form(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and fault of each docstring, comment and name of a test."""
    strings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, ast.Constant) and isinstance(node.value, str)) or isinstance(node, ast.JoinedStr):
            strings.update(range(node.lineno, node.end_lineno + 1) if node.end_lineno > node.lineno else ())
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            line, is_function = getattr(node, "lineno", 1), isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            is_test = is_function and node.name.startswith("test_")
            if text := ast.get_docstring(node):
                pages = [page for page in _PAGE.findall(text) if not (ROOT / page).exists()]
                yield from ((line, f"docstring cites {page}, which is not in the repository") for page in pages)
                text = " ".join(text.partition("\n\n")[0].split())
                yield from (
                    (line, f"docstring {fault}")
                    for fault in _faults(text, needs_verb=is_test, may_be_clause=_is_property(node))
                )
                if is_function and not is_test and not _is_property(node) and _NO_IMPERATIVE.match(text):
                    yield line, f"docstring of a function does not begin with an imperative: {text[:60]}"
            if is_test and re.match(r"test_(?:an?|the)_", node.name):
                yield line, f"{node.name} begins with an article; name what it calls"
    for number, text in _comments(source.splitlines(), strings):
        yield from ((number, f"comment {fault}") for fault in _faults(text, needs_verb=True))


def _is_property(node: ast.AST) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))


def _comments(lines: list[str], strings: set[int]) -> Iterator[tuple[int, str]]:
    """Yield the first line and the text of each comment with lines of its own."""
    start, text = 0, []
    for number, line in enumerate([*lines, ""], start=1):
        body = line.strip()
        if body.startswith("# ") and number not in strings and not (text and _NO_SENTENCE.match(body[2:])):
            start, text = start if text else number, [*text, body[2:]]
        elif text:
            if not _NO_SENTENCE.match(text[0]):
                yield start, " ".join(text)
            text = []


def _faults(text: str, needs_verb: bool, may_be_clause: bool = False) -> Iterator[str]:
    """Yield what keeps a text from being a sentence."""
    if not _BEGINNING.match(text):
        yield f"does not begin with a capital letter: {text[:60]}"
    if not _END.search(text):
        yield f"does not end like a sentence: {text[-60:]}"
    if not may_be_clause and (match := _FRAGMENT.match(text)):
        yield f"begins with {match[0]!r} and is no sentence: {text[:60]}"
    if needs_verb and not _VERB.search(text):
        yield f"has no verb: {text[:60]}"


def readme_complaints() -> list[str]:
    """Return what makes the README too long to be read in a minute."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    wide = [number for number, line in enumerate(lines, start=1) if len(line) > README_COLUMNS]
    found = [f"README.md:{number}: longer than {README_COLUMNS} columns; wrap the line" for number in wide]
    if len(lines) > README_LINES:
        found.append(
            f"README.md has {len(lines)} lines, at most {README_LINES} are read; move some to a page of docs/"
        )
    return found


def main() -> int:
    """Print all faults; return 1 if there are any."""
    found = readme_complaints() + [line for path in tracked_files() for line in complaints(path)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

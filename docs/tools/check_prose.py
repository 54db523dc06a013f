"""Checks of prose that need no reader: the README's size, and words that only this repository used. Run by `make check`."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README_LINES, README_COLUMNS = 130, 120
# Words, and what to write instead.
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
}
_PATTERN = re.compile("|".join(rf"\b(?:{word})(?:\b|(?<=\s))" for word in WORDS), re.IGNORECASE)


def tracked_files() -> list[Path]:
    """Python sources and pages of the repository, without this file, generated pages and texts of others."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file() and not path.is_symlink() and path != Path(__file__).resolve()]


def complaints(path: Path) -> list[str]:
    """A line for every word of `WORDS` in a file."""
    name = path.relative_to(ROOT).as_posix()
    return [
        f"{name}:{number}: {match[0].strip()!r} is not the field's word; write instead: {_instead(match[0])}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        for match in _PATTERN.finditer(line)
    ]


def _instead(word: str) -> str:
    return next(better for pattern, better in WORDS.items() if re.match(pattern, word, re.IGNORECASE))


def readme_complaints() -> list[str]:
    """What makes the README too long to be read in a minute."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    wide = [number for number, line in enumerate(lines, start=1) if len(line) > README_COLUMNS]
    found = [f"README.md:{number}: longer than {README_COLUMNS} columns; wrap the line" for number in wide]
    if len(lines) > README_LINES:
        found.append(
            f"README.md has {len(lines)} lines, at most {README_LINES} are read; move some to a page of docs/"
        )
    return found


def main() -> int:
    """Print what is found; the exit status is 1 if that is anything."""
    found = readme_complaints() + [line for path in tracked_files() for line in complaints(path)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

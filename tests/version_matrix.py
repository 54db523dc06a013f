"""Run all tests on every tested version of transformers: `python tests/version_matrix.py` (or `make test-matrix`).

Each version has its own environment and constraints file. The script prints a table, and another one of folders that
are saved with one version and loaded as remote code with another. The exit code is 1 if a test failed or did not run,
or tokens differ.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def constraints_files() -> dict[str, Path]:
    """Return the constraints file of every tested version of transformers, oldest first."""
    paths = [ROOT / "constraints.txt", *(ROOT / "constraints").glob("transformers-*.txt")]
    versions = {_pinned_version(path): path for path in paths}
    return {version: versions[version] for version in sorted(versions, key=lambda each: [*map(int, each.split("."))])}


def _pinned_version(path: Path) -> str:
    (version,) = re.findall(r"^transformers==([\d.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return version


def run_suite(version: str, constraints: Path, pytest_args: str) -> dict[str, int | str]:
    """Return one row of the table: how many tests passed, failed and were skipped, and the seconds they took."""
    report = ROOT / "out" / f"tests-{version}.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    started = time.monotonic()
    command = ["make", "run-tests", f"VENV=.venv-{version}", f"CONSTRAINTS={constraints.relative_to(ROOT)}"]
    command += ["TESTS=slow or not slow", f"PYTEST_ARGS=--junitxml={report} {pytest_args}"]
    subprocess.run(command, cwd=ROOT, check=False)
    return {"transformers": version, **_count(report), "seconds": round(time.monotonic() - started)}


def _count(report: Path) -> dict[str, int | str]:
    if not report.is_file():
        return {"passed": "-", "failed": "did not run", "skipped": "-"}
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return {"passed": tests - skipped - failed, "failed": failed, "skipped": skipped}


def exchange(versions: list[str]) -> list[dict[str, str]]:
    """Return a row for each version: whether a folder saved with it gives the same tokens as remote code in every
    other version.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for saving in versions:
            expected = _tokens(saving, "save", f"{folder}/{saving}")
            loaded = {loading: _tokens(loading, "load", f"{folder}/{saving}") for loading in versions}
            row = {loading: "same" if tokens == expected else "DIFFERS" for loading, tokens in loaded.items()}
            rows.append({"saved with": saving, **row})
    return rows


def _tokens(version: str, side: str, folder: str) -> str:
    """Return the last line that a worker prints in the environment of a version."""
    python = ROOT / f".venv-{version}" / "bin" / "python"
    worker = subprocess.run(
        [python, ROOT / "tests" / "exchange_worker.py", side, folder], capture_output=True, text=True, check=False
    )
    return worker.stdout.strip().rpartition("\n")[2] or worker.stderr[-300:]


def print_table(rows: list[dict]) -> None:
    """Print rows with their keys as a heading."""
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print("  ".join(f"{value!s:>14}" for value in row.values()))


def main() -> int:
    files = constraints_files()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(files), help=f"of {', '.join(files)} (default: all)")
    parser.add_argument("--pytest-args", default="", help="more arguments for pytest, in one string")
    options = parser.parse_args()
    if unknown := [version for version in options.versions if version not in files]:
        parser.error(f"no constraints file pins transformers {', '.join(unknown)}; there are {', '.join(files)}")
    rows = [run_suite(version, files[version], options.pytest_args) for version in options.versions]
    print_table(rows)
    exchanged = exchange(options.versions)
    print_table(exchanged)
    agree = not any("DIFFERS" in row.values() for row in exchanged)
    return 0 if agree and all(row["failed"] == 0 and row["passed"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Compare the outcome of each test on the bare backbone and with memory; print a table and return an exit code."""

from dataclasses import dataclass, field

from excuses import Excuses


@dataclass
class Row:
    """The outcomes of one backbone."""

    passed_bare: int = 0
    passed_with_memory: int = 0
    excused: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def compare(outcomes: dict[str, dict], excuses: Excuses) -> tuple[dict[str, Row], Excuses]:
    """Compare the two outcomes of each test.

    Args:
        outcomes: by pytest's name of the test, whose class is called `Bare_<backbone>` or `Memory_<backbone>`.
        excuses: the list of known failures.
    """
    by_test: dict[tuple[str, str], dict[str, dict]] = {}
    for name, outcome in outcomes.items():
        _, group, test = name.split("::")
        kind, backbone = group.split("_", 1)
        by_test.setdefault((backbone, test), {})[kind] = outcome
    rows: dict[str, Row] = {}
    for (backbone, test), pair in sorted(by_test.items()):
        row = rows.setdefault(backbone, Row())
        if pair.get("Bare", {}).get("outcome") != "passed":
            continue
        row.passed_bare += 1
        with_memory = pair.get("Memory", {"outcome": "missing", "message": "the test did not run"})
        if with_memory["outcome"] == "passed":
            row.passed_with_memory += 1
        elif excuses.excuses(backbone, test):
            row.excused.append(test)
        else:
            row.failed[test] = f"{with_memory['outcome']}: {with_memory['message']}"
    return rows, excuses


def print_report(compared: tuple[dict[str, Row], Excuses], version: str, complete: bool) -> int:
    """Print the table; return 1 if a failure is not listed or, after a complete run, an entry is not needed."""
    rows, excuses = compared
    print(f"transformers {version}")
    print(f"{'backbone':<24}{'passed bare':>12}{'with memory':>13}{'excused':>9}{'failed':>8}")
    for name, row in rows.items():
        counts = (len(row.excused), len(row.failed))
        print(f"{name:<24}{row.passed_bare:>12}{row.passed_with_memory:>13}{counts[0]:>9}{counts[1]:>8}")
    failed = {f"{name} {test}": message for name, row in rows.items() for test, message in row.failed.items()}
    for test, message in failed.items():
        print(f"\nFAILED {test}\n  {message}")
    unused = excuses.unused(list(rows)) if complete else []
    for line in unused:
        print(f"\nOUT OF DATE in excused.toml: {line}")
    nothing = [name for name, row in rows.items() if not row.passed_bare]
    if nothing or not rows:
        print(f"\nNO TEST passed on the bare backbone: {', '.join(nothing) or 'none was run'}")
    return 1 if failed or unused or nothing or not rows else 0

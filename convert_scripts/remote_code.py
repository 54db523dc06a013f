"""The files of the package that lie beside a model's weights as its remote code."""

import ast
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def code_files(entry: str) -> list[Path]:
    """Return the flat file `entry` and all files that it imports, directly or not, in the order of their names.

    Flat files import each other only as `from .name import ...`, the one form that transformers follows.
    """
    found, waiting = set(), [entry]
    while waiting:
        path = _ROOT / f"{waiting.pop()}.py"
        if path not in found:
            found.add(path)
            waiting += _imported(path)
    return sorted(found)


def _imported(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return [name for node in imports for name in ([node.module] if node.module else [a.name for a in node.names])]

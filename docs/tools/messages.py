"""Read every error and warning message of the package from its sources, without importing it.

A message is the argument of an error or a warning. It may be written in the call itself, be assigned to a name before,
be returned by a function that the call uses, or be one of the rules that a function yields (`tuple[bool, str]`). Names
in braces are replaced when the message is raised.
"""

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
WARNINGS = {"warn", "warning", "warning_once", "warning_advice"}
# These are raised without a message: signals between functions of one file, and errors that protocols require.
SIGNALS = {"KeyError", "AttributeError", "StopIteration", "_Interrupted", "NotImplementedError", "KeyboardInterrupt"}
MARKER = re.compile(r"^<!-- messages: (.+) -->$", re.MULTILINE)


class Message(NamedTuple):
    """One sentence, with `{}` for replaced parts.

    Args:
        file: relative to the root, without `.py`.
        text: the sentence.
        is_warning: whether the call continues.
    """

    file: str
    text: str
    is_warning: bool


def source_files() -> list[Path]:
    """Return every installed file."""
    rooms = [path.parent for path in sorted(ROOT.glob("*/__init__.py"))]
    flat = [path for path in sorted(ROOT.glob("*.py")) if path.stem not in ("__init__", "setup")]
    return flat + [path for room in rooms for path in sorted(room.glob("*.py"))]


def read_messages() -> list[Message]:
    """Return all messages, in the order of the files."""
    return [message for path in source_files() for message in messages_of(path)]


def messages_of(path: Path) -> list[Message]:
    """Return the messages of one file, each once, in the order of its lines.

    Raises:
        ValueError: an error is made out of something that this reader does not understand.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    name = path.relative_to(ROOT).with_suffix("").as_posix()
    found: dict[Message, None] = {}
    for scope, call in _calls(tree):
        is_warning = _name(call) in WARNINGS
        texts = [text for argument in call.args for text in _texts(argument, scope, functions)]
        if not texts and not is_warning and call.args and _name(call) not in SIGNALS:
            raise ValueError(f"{name}.py:{call.lineno}: no message is found in {ast.unparse(call)}")
        # Other functions of the file report an errno's own words.
        found |= {Message(name, text, is_warning): None for text in texts if " " in text and len(text) > 20}
    return list(found)


def _calls(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.Call]]:
    """Yield calls that make an error or warn, each with its function."""

    def walk(node: ast.AST, scope: ast.AST) -> Iterator[tuple[ast.AST, ast.Call]]:
        if isinstance(node, ast.Call) and (_name(node).endswith("Error") or _name(node) in WARNINGS):
            yield scope, node
        inner = node if isinstance(node, ast.FunctionDef) else scope
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inner)

    return walk(tree, tree)


def _name(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def _texts(node: ast.AST, scope: ast.AST, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """Return the possible sentences of an argument."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [_filled(node)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = (_texts(part, scope, functions) or ["{}"] for part in (node.left, node.right))
        return [one + other for one in left for other in right]
    if isinstance(node, ast.IfExp):
        return [*_texts(node.body, scope, functions), *_texts(node.orelse, scope, functions)]
    if isinstance(node, ast.Name):
        return _assigned(node.id, scope, functions)
    if isinstance(node, ast.Call) and _name(node) == "str":
        return ["{}"]  # another error's words
    if isinstance(node, ast.Call) and _name(node) in functions:
        function = functions[_name(node)]
        returned = [part.value for part in ast.walk(function) if isinstance(part, ast.Return) and part.value]
        return [text for value in returned for text in _texts(value, function, functions)]
    return []


def _assigned(name: str, scope: ast.AST, functions: dict[str, ast.FunctionDef]) -> list[str]:
    texts: list[str] = []
    for part in ast.walk(scope):
        if isinstance(part, ast.Assign) and name in {getattr(target, "id", None) for target in part.targets}:
            texts += _texts(part.value, scope, functions)
        elif isinstance(part, ast.For) and name in {getattr(target, "id", None) for target in ast.walk(part.target)}:
            asked = {_name(call) for call in ast.walk(part.iter) if isinstance(call, ast.Call)}
            texts += [text for one in asked & set(functions) for text in _rules(functions[one], functions)]
    return texts


def _rules(function: ast.FunctionDef, functions: dict[str, ast.FunctionDef]) -> list[str]:
    """Return the second members of the pairs that a function yields."""
    pairs = [part for part in ast.walk(function) if isinstance(part, ast.Tuple) and len(part.elts) == 2]
    return [text for pair in pairs for text in _texts(pair.elts[1], function, functions)]


def _filled(node: ast.JoinedStr) -> str:
    parts = [part.value if isinstance(part, ast.Constant) else f"{{{_short(part)}}}" for part in node.values]
    return "".join(parts)


def _short(part: ast.FormattedValue) -> str:
    """Return a name for a replaced part; nothing if it is an expression."""
    text = ast.unparse(part.value)
    return text.removeprefix("self.").lstrip("_") if re.fullmatch(r"[\w.]+", text) else "..."


def groups_of(page: str) -> list[list[str]]:
    """Return the patterns of each marker of a page: `<!-- messages: file, room/* -->`."""
    return [marker.replace(" ", "").split(",") for marker in MARKER.findall(page)]


def fill_markers(page: str) -> str:
    """Return the page with a list of messages in the place of each marker.

    Raises:
        ValueError: a file with messages is named by no marker, or by two.
    """
    messages, groups = read_messages(), groups_of(page)
    for file in sorted({message.file for message in messages}):
        named = [group for group in groups if _is_of(file, group)]
        if len(named) != 1:
            raise ValueError(f"{file} has messages, and {len(named)} markers name it; exactly one has to.")
    lists = iter([_listed(messages, group) for group in groups])
    return MARKER.sub(lambda _: next(lists), page)


def _is_of(file: str, patterns: list[str]) -> bool:
    return any(file.count("/") == each.count("/") and fnmatch.fnmatch(file, each) for each in patterns)


def _listed(messages: list[Message], patterns: list[str]) -> str:
    own = [message for message in messages if _is_of(message.file, patterns)]
    if not own:
        return ""
    lines = [f"- {'(warning) ' if message.is_warning else ''}`` {message.text.strip()} ``" for message in own]
    return "\n".join([f'??? quote "All {len(own)} messages"', "", *(f"    {line}" for line in lines)])

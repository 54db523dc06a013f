"""Find the non-public names of other libraries that the package uses: private names, and names they do not export."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

HOSTS = ("transformers", "accelerate", "peft", "huggingface_hub", "torch")
# These modules document their names, though the top of the library does not export them.
DOCUMENTED = ("torch", "transformers.utils.logging", "huggingface_hub.errors", "huggingface_hub.utils")
# Our classes derive from these or reach into them: a private name that we share with one of them belongs to it.
CLASSES = (
    "transformers.PreTrainedModel",
    "transformers.GenerationMixin",
    "transformers.PreTrainedConfig",
    "transformers.PreTrainedTokenizerFast",
    "transformers.Cache",
    "transformers.cache_utils.StaticLayer",
    "transformers.TrainerCallback",
    "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts",
    "torch.nn.Module",
)
# These are spelled like private names, but documented.
PROMISED = {"_replace", "_asdict", "_fields"}


def resolve(dotted: str) -> object:
    """Return the module, class, function or attribute with this dotted name.

    Raises:
        AttributeError, ModuleNotFoundError: no such name exists.
    """
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError as error:
            if error.name is None or not ".".join(parts[:end]).startswith(error.name):
                raise
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(dotted)


def private_names_of_hosts() -> set[str]:
    """Return the private names of the hosts' classes."""
    return {name for path in CLASSES for name in dir(resolve(path)) if is_private(name)}


def is_private(name: str) -> bool:
    """Return whether a name starts with an underscore and is not a special method."""
    return name.startswith("_") and not name.startswith("__") and name not in PROMISED | {"_"}


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a source file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def names_defined(tree: ast.Module) -> set[str]:
    """Return the private names that a file itself defines: functions, classes, variables, attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.level:
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return {name for name in found if is_private(name)}


def is_self(node: ast.AST) -> bool:
    """Return whether an expression is `self` or `cls`."""
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def names_used(tree: ast.Module) -> set[str]:
    """Return the private names that a file reads, sets or overrides, including strings and keywords."""
    found = set(_all_names(tree))
    return {name for name in found if is_private(name) and name.isidentifier()}


def _all_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def unexported_imports(tree: ast.Module) -> set[str]:
    """Return the dotted names that a file imports from inside a host that does not export them at its top."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        host = node.module.partition(".")[0]
        if host in HOSTS and not is_documented(node.module):
            found |= {
                f"{node.module}.{alias.name}" for alias in node.names if not _is_exported(host, node, alias.name)
            }
        found |= {f"{node.module}.{alias.name}" for alias in node.names if host in HOSTS and is_private(alias.name)}
    return found


def is_documented(module: str) -> bool:
    """Return whether a module documents its own names."""
    return any(module == known or (known == "torch" and module.startswith("torch.")) for known in DOCUMENTED)


def _is_exported(host: str, node: ast.ImportFrom, name: str) -> bool:
    top, module = importlib.import_module(host), importlib.import_module(str(node.module))
    if is_documented(f"{node.module}.{name}"):
        return True
    target = getattr(module, name, None)
    is_submodule = inspect.ismodule(target)
    return not is_private(name) and not is_submodule and getattr(top, name, None) is target and target is not None


def seams_in(path: Path, defined: set[str], hosts: set[str]) -> set[str]:
    """Return the last part of every non-public host name in a file.

    Args:
        path: a source file.
        defined: private names that some file of the package defines.
        hosts: private names that the hosts' classes have.
    """
    tree = parse(path)
    private = {name for name in names_used(tree) if name in hosts or name not in defined}
    return private | {dotted.rpartition(".")[2] for dotted in unexported_imports(tree)}

"""Tables of models that are not ours: rows that are addressed by ids, read where they lie."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import load_with_tables

__all__ = ["load_with_tables"]


def __getattr__(name: str) -> Any:
    """Import what loads models when it is asked for: `engram inspect` needs the names of tables alone."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .loading import load_with_tables

    return load_with_tables

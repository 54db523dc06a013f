"""Tables of other models, whose rows are addressed by ids and read from their files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import load_with_tables

__all__ = ["load_with_tables"]


def __getattr__(name: str) -> Any:
    """Import the loader on first use: `engram inspect` only needs the names of tables."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .loading import load_with_tables

    return load_with_tables

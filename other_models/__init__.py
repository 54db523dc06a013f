"""Tables of models that are not ours: rows that are addressed by ids, read where they lie."""

from .loading import load_with_tables

__all__ = ["load_with_tables"]

"""Models with memory behind a server."""

from .server import serve

__all__ = ["serve"]

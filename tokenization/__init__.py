"""Tokenizers with a compressed vocabulary."""

from typing import TYPE_CHECKING, Any

from .vocabulary_compression import CompressionSummary

if TYPE_CHECKING:
    from .tokenization_engram import EngramTokenizer

__all__ = ["CompressionSummary", "EngramTokenizer"]


def __getattr__(name: str) -> Any:
    """Import the tokenizer, and transformers with it, on first use: `engram compress` needs neither."""
    if name != "EngramTokenizer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .tokenization_engram import EngramTokenizer

    return EngramTokenizer

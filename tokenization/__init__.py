"""Tokenizers that know their compressed vocabulary."""

from .tokenization_engram import CompressionSummary, EngramTokenizer

__all__ = ["CompressionSummary", "EngramTokenizer"]

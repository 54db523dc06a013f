"""Replaces a mix-in that transformers' source distribution lacks; `tests/test_generation_strategies.py` covers its
tests.
"""


class GenerationTesterMixin:
    """It has no tests."""

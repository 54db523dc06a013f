"""Replaces a mix-in that transformers' source distribution lacks; see `tests/test_generation_strategies.py`."""


class GenerationTesterMixin:
    """It has no tests."""

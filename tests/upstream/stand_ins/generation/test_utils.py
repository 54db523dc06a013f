"""Stands in for a mix-in that transformers' source distribution lacks; see `tests/test_generation_strategies.py`."""


class GenerationTesterMixin:
    """No tests."""

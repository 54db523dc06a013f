"""Deprecations that our own code causes are failures, whether a library warns of them or only logs them.

A warning names the line that caused it by its `stacklevel`. Much of what transformers deprecates sits behind a
decorator or is called through `Module.__call__`, so that line is seldom ours. Instead, this file reads the stack and
finds the caller of the function that complains, skipping the machinery between.
"""

import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import transformers.utils.logging

import engram_hf

OURS = Path(engram_hf.__file__).resolve().parent
# Tests call deprecated functions on purpose, to check that they still work.
NOT_OURS = tuple(str(OURS / room) for room in ("tests", ".venv", ".upstream"))
CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
MACHINERY = re.compile(
    r"torch/nn/modules/module\.py|accelerate/hooks\.py|transformers/utils/(deprecation|generic|output_capturing)\.py"
    r"|torch/utils/_contextlib\.py|functools\.py|contextlib\.py|logging/__init__\.py|transformers/utils/logging\.py"
    r"|transformers/modeling_layers\.py"
)
DEPRECATED = re.compile(r"deprecat|will be removed", re.IGNORECASE)


class OwnDeprecation(AssertionError):
    """Our code uses something that a library is about to remove."""


def is_ours(frame: FrameType | None) -> bool:
    """Return whether a frame runs a file of the package."""
    if frame is None:
        return False
    path = str(Path(frame.f_code.co_filename).resolve())
    return path.startswith(f"{OURS}/") and not path.startswith(NOT_OURS)


def without_machinery(frame: FrameType | None) -> FrameType | None:
    """Return the frame, or the next one outward that does more than forward a call."""
    while frame is not None and MACHINERY.search(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def cause_of_warning(frame: FrameType | None, stacklevel: int) -> FrameType | None:
    """Return the frame that causes a warning raised in `frame`: the caller of the function that warns, if it names
    itself.
    """
    for _ in range(max(stacklevel - 1, 1)):
        frame = frame.f_back if frame is not None else None
    return without_machinery(frame)


@contextlib.contextmanager
def own_deprecations_fail() -> Iterator[None]:
    """Raise `OwnDeprecation` at the place where our code causes a deprecation."""
    warn, handler = warnings.warn, _Handler()

    def watching(message, category=None, stacklevel=1, *args, **kwargs):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, CATEGORIES):
            frame = sys._getframe(1)
            if is_ours(frame) and stacklevel > 1:
                pass  # This is our own warning about our caller.
            elif is_ours(cause_of_warning(frame, stacklevel)):
                raise OwnDeprecation(str(message))
        return warn(message, category, stacklevel + 1, *args, **kwargs)

    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    warnings.warn = watching
    # A message that is shown once per process would reach one test only.
    transformers.utils.logging.warning_once.cache_clear()
    try:
        yield
    finally:
        warnings.warn = warn
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    """Checks the messages that transformers logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise if the message reports a deprecation and our code called the function that logs it."""
        if not DEPRECATED.search(record.getMessage()):
            return
        frame = without_machinery(sys._getframe(1))
        if is_ours(frame) or (frame is not None and is_ours(without_machinery(frame.f_back))):
            raise OwnDeprecation(record.getMessage())

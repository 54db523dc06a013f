"""Deprecations that our own code causes are failures: those that libraries warn of, and those that they only log.

A warning names the line that caused it by its `stacklevel`; much of what transformers deprecates is behind a decorator
or called through `Module.__call__`, so that line is seldom ours. Here the stack is read instead: who called the function
that complains, not counting the machinery between.
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
# Tests call what is deprecated on purpose, to see that it is taken.
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
    """Whether a frame runs a file of the package."""
    if frame is None:
        return False
    path = str(Path(frame.f_code.co_filename).resolve())
    return path.startswith(f"{OURS}/") and not path.startswith(NOT_OURS)


def without_machinery(frame: FrameType | None) -> FrameType | None:
    """The frame, or the next one outward that does more than pass a call on."""
    while frame is not None and MACHINERY.search(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def cause_of_warning(frame: FrameType | None, stacklevel: int) -> FrameType | None:
    """Who is to blame for a warning that `frame` raises: who called the function that warns, if it names itself."""
    for _ in range(max(stacklevel - 1, 1)):
        frame = frame.f_back if frame is not None else None
    return without_machinery(frame)


@contextlib.contextmanager
def own_deprecations_fail() -> Iterator[None]:
    """Within it, a deprecation that our code causes raises `OwnDeprecation` where it happens."""
    warn, handler = warnings.warn, _Handler()

    def watching(message, category=None, stacklevel=1, *args, **kwargs):
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, CATEGORIES):
            frame = sys._getframe(1)
            if is_ours(frame) and stacklevel > 1:
                pass  # our own warning, about our caller
            elif is_ours(cause_of_warning(frame, stacklevel)):
                raise OwnDeprecation(str(message))
        return warn(message, category, stacklevel + 1, *args, **kwargs)

    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    warnings.warn = watching
    # A message that is shown once in a process would be seen by one test only.
    transformers.utils.logging.warning_once.cache_clear()
    try:
        yield
    finally:
        warnings.warn = warn
        logger.removeHandler(handler)


class _Handler(logging.Handler):
    """Looks at what transformers logs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise, if the message is of something deprecated, and the function that logs it was called by us."""
        if not DEPRECATED.search(record.getMessage()):
            return
        frame = without_machinery(sys._getframe(1))
        if is_ours(frame) or (frame is not None and is_ours(without_machinery(frame.f_back))):
            raise OwnDeprecation(record.getMessage())

"""A deprecation that our code causes fails the test it happens in, whether a library warns of it or logs it."""

import re
import warnings

import pytest
import torch
from deprecations import OURS, OwnDeprecation, own_deprecations_fail
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg


class Host(torch.nn.Module):
    """A module of a library whose forward has renamed an argument."""

    @deprecate_kwarg("past", new_name="cache", version="99.0.0")
    def forward(self, cache=None):
        """Return the argument."""
        return cache


def run(source: str, file: str, **names):
    """Run `source` as if it stood in `file`; return the function `f` that it defines."""
    exec(compile(source, file, "exec"), names)
    return names["f"]


def ours(source: str, **names):
    """Return a function defined in a file of the package."""
    return run(source, str(OURS / "modeling_engram.py"), **names)


def library(source: str, **names):
    """Return a function defined elsewhere."""
    return run(source, "/site-packages/library/code.py", **names)


WARNING = "def f(): warnings.warn('x is deprecated', FutureWarning{})"


@pytest.mark.parametrize("level", ["", ", stacklevel=2"])
def test_warning_of_a_function_that_we_call_fails(level):
    warns = library(WARNING.format(level), warnings=warnings)
    with pytest.raises(OwnDeprecation, match="x is deprecated"):
        ours("def f(): g()", g=warns)()


def test_decorated_argument_that_we_pass_fails():
    with pytest.raises(OwnDeprecation, match="past"):
        ours("def f(): host(past=1)", host=Host())()


def test_own_deprecations_fail_if_they_are_only_logged():
    logger = logging.get_logger("transformers.modeling_utils")
    logs = library("def f(): logger.warning_once('`x` is deprecated')", logger=logger)
    for _ in range(2):  # The test fails although another test has seen the message.
        with own_deprecations_fail(), pytest.raises(OwnDeprecation, match="`x` is deprecated"):
            ours("def f(): g()", g=logs)()


def test_deprecations_that_other_libraries_cause_pass():
    logger = logging.get_logger("transformers.modeling_utils")
    warns = library(WARNING.format(", stacklevel=2"), warnings=warnings)
    logs = library("def f(): logger.warning('`x` is deprecated')", logger=logger)
    for inner in (warns, logs):
        between = library("def f(): g()", g=inner)
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            ours("def f(): g()", g=between)()
            between()
            Host()(past=1)


def test_our_own_warning_passes():
    """It is about an argument of ours that will be removed: the caller who passes it is warned."""
    warns = ours(WARNING.format(", stacklevel=2"), warnings=warnings)
    with pytest.warns(FutureWarning, match="x is deprecated"):
        library("def f(): g()", g=warns)()


def test_warnings_keep_their_source_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library("def f(): warnings.warn('anything', UserWarning)", warnings=warnings)()
    assert [warning.filename for warning in caught] == ["/site-packages/library/code.py"]


def test_pytest_filters_cover_our_modules(pytestconfig):
    """Warnings raised by C code do not pass through `warnings.warn`: the filters by module name catch them."""
    filters = [line.split(":") for line in pytestconfig.getini("filterwarnings")]
    kinds = {(action, category, module) for action, _, category, module in filters}
    for category in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning"):
        patterns = [module for action, kind, module in kinds if (action, kind) == ("error", category)]
        for module in ("engram_hf.modeling_engram", "engram_cli.main", "transformers_modules.x.modeling_engram"):
            assert any(re.match(pattern, module) for pattern in patterns), (category, module)

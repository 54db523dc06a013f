"""The report of `make test-upstream`: which outcomes make it fail, with outcomes written by hand."""

import sys
import tarfile
from pathlib import Path

import pytest

UPSTREAM = Path(__file__).parent / "upstream"
sys.path.append(str(UPSTREAM))

from excuses import Excuse, Excuses  # noqa: E402 (the folder is not a package: it runs by itself)
from report import compare, print_report  # noqa: E402
from source import _fill_in, _unpack  # noqa: E402


def outcomes(**by_test: tuple[str, str]) -> dict[str, dict]:
    """Return the outcomes of each test on the bare backbone and with memory."""
    return {
        f"suite.py::{kind}_llama::{test}": {"outcome": outcome, "message": "because"}
        for test, pair in by_test.items()
        for kind, outcome in zip(("Bare", "Memory"), pair, strict=True)
    }


def report(tests: dict, *entries: Excuse, complete: bool = True) -> int:
    return print_report(compare(tests, Excuses(list(entries))), "5.0", complete)


GOOD = {"test_a": ("passed", "passed"), "test_b": ("failed", "failed"), "test_c": ("skipped", "failed")}


def test_report_leaves_out_tests_that_fail_on_the_bare_backbone(capsys):
    assert report(outcomes(**GOOD)) == 0
    assert capsys.readouterr().out.splitlines()[2].split() == ["llama", "1", "1", "0", "0"]


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_report_fails_for_a_failure_without_an_entry(outcome, capsys):
    tests = outcomes(**GOOD, test_inputs=("passed", outcome))
    assert report(tests) == 1
    assert f"FAILED llama test_inputs\n  {outcome}: because" in capsys.readouterr().out
    assert report(tests, Excuse("test_inp*", "refused")) == 0
    assert report(tests, Excuse("test_inputs", "refused", ("mixtral",))) == 1


def test_complete_run_fails_for_an_unneeded_entry(capsys):
    assert report(outcomes(**GOOD), Excuse("test_a", "refused")) == 1
    assert "OUT OF DATE in excused.toml: test_a does not fail on any backbone" in capsys.readouterr().out
    assert report(outcomes(**GOOD), Excuse("test_a", "refused"), complete=False) == 0
    assert report(outcomes(test_a=("passed", "failed")), Excuse("test_a", "refused", ("llama", "qwen3"))) == 1


def test_report_fails_for_a_run_without_tests():
    assert report({}) == 1
    assert report(outcomes(test_b=("failed", "failed"))) == 1
    only_bare = {"suite.py::Bare_llama::test_a": {"outcome": "passed", "message": ""}}
    assert report(only_bare) == 1


def test_excuses_are_read_by_version():
    for version in ("5.17.0", "5.24.0"):
        entries = Excuses.read(UPSTREAM / "excused.toml", version).entries
        assert entries and all(entry.reason.endswith(".") for entry in entries)


def test_excuse_without_a_reason_is_refused(tmp_path):
    path = tmp_path / "excused.toml"
    path.write_text('[[excused]]\ntest = "test_a"\n')
    with pytest.raises(ValueError, match="needs `test` and `reason`"):
        Excuses.read(path, "5.0")
    path.write_text('[[excused]]\ntest = "test_a"\nreason = "No."\ntransformers = "<5.20"\n')
    assert len(Excuses.read(path, "5.17.0").entries) == 1 and not Excuses.read(path, "5.20.2").entries


def test_only_test_files_are_unpacked(tmp_path):
    archive = tmp_path / "transformers-5.0.tar.gz"
    content = tmp_path / "content"
    content.write_text("x = 1\n")
    with tarfile.open(archive, "w:gz") as file:
        for name in ("tests/test_modeling_common.py", "tests/../../outside.py", "src/transformers/__init__.py"):
            file.add(content, f"transformers-5.0/{name}")
    _unpack(archive, tmp_path / "package")
    assert [path.name for path in (tmp_path / "package").iterdir()] == ["test_modeling_common.py"]
    _fill_in(tmp_path / "package", UPSTREAM / "stand_ins")
    assert (tmp_path / "package" / "generation" / "test_utils.py").is_file()
    assert not (tmp_path / "outside.py").exists()

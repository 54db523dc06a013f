"""Saved models, and the command as a function."""

import shutil
from pathlib import Path

import pytest
from command_models import make_config
from engram_cli.main import main
from tiny_backbones import randomize
from tiny_tokenizer import make_tokenizer

from engram_hf import EngramForCausalLM


@pytest.fixture(scope="module")
def model() -> EngramForCausalLM:
    model = randomize(EngramForCausalLM(make_config())).eval()
    model.set_token_map(make_tokenizer())
    return model


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """Save the model with its tables among the weights; tests do not change it."""
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def with_files(saved, tmp_path_factory) -> Path:
    """Save the model with its tables in files of their own; tests do not change it."""
    folder = tmp_path_factory.mktemp("with_files")
    EngramForCausalLM.from_pretrained(saved, engram_residency="mapped").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(with_files, tmp_path) -> Path:
    """Copy `with_files` to a folder that a test may damage."""
    return Path(shutil.copytree(with_files, tmp_path / "copy"))


@pytest.fixture
def engram(capsys):
    """Run a command that must succeed, and return its output."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def complaint(capsys):
    """Run a command that must fail, and return its error, one sentence."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 1
        captured = capsys.readouterr()
        (sentence,) = captured.err.splitlines()
        assert sentence.startswith("engram: ") and not captured.out
        return sentence

    return run

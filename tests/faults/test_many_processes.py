"""Many processes work on one folder: conversions start at once, and all ranks save."""

import json
import shutil

import pytest
import torch
from engram_cli.main import main as engram
from tiny_tokenizer import make_tokenizer
from trial_models import all_at_once, answer, contents, load, write_facts

from engram_hf import EngramTokenizer
from engram_hf.convert_scripts import convert_deepseek_v41, export_deepseek_v41
from engram_hf.loading_engram import weights_digest


@pytest.fixture(scope="module")
def source(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream") / "tiny"
    shutil.copytree(golden / "deepseek_v41_tiny", folder, ignore=shutil.ignore_patterns("golden.safetensors"))
    return folder


@pytest.fixture(scope="module")
def commands(source, folders, tmp_path_factory):
    """Return commands by name, each with these and with other options; they take the target."""
    converted = tmp_path_factory.mktemp("converted") / "v41"
    assert convert_deepseek_v41.main([str(source), str(converted)]) == 0

    def quantize(dtype):
        return lambda target: engram(["quantize", str(folders["old files"]), str(target), "--dtype", dtype])

    return {
        "convert": (
            lambda target: convert_deepseek_v41.main([str(source), str(target)]),
            lambda target: convert_deepseek_v41.main([str(source), str(target), "--layers", "4"]),
        ),
        "export": (
            lambda target: export_deepseek_v41.main([str(converted), str(target)]),
            lambda target: convert_deepseek_v41.main([str(source), str(target)]),
        ),
        "quantize": (quantize("int8"), quantize("float8_e4m3fn")),
        "facts": tuple(
            lambda target, word=word: write_facts(folders["old files"], target, word) for word in ("w5", "w6")
        ),
    }


@pytest.mark.parametrize("other_options", [False, True])
@pytest.mark.parametrize("name", ["convert", "export", "quantize", "facts"])
def test_simultaneous_conversions_into_one_folder(commands, tmp_path, rounds, name, other_options):
    """One of them succeeds, and the folder equals that of a single run."""
    pair = commands[name] if other_options else (commands[name][0],) * 2
    alone = [tmp_path / f"alone{index}" for index in range(2)]
    for command, target in zip(pair, alone, strict=True):
        assert command(target) == 0
    expected = [contents(target) for target in alone]
    for index in range(rounds(3)):
        target = tmp_path / str(index)
        codes = all_at_once([lambda command=command, target=target: command(target) for command in pair])
        assert 0 in codes and set(codes) <= {0, 1}, codes
        assert (
            not (other_options and codes == [0, 0]) or name == "facts"
        )  # A later `engram facts write` replaces an earlier one.
        assert contents(target) in [one for one, code in zip(expected, codes, strict=True) if code == 0]
        shutil.rmtree(target)


@pytest.mark.parametrize("kind", ["tokenizer", "files", "plain"])
def test_every_rank_saves_to_one_folder(folders, tmp_path, rounds, kind):
    """The files of the last writer win as a whole, whether the ranks save one model or different ones."""
    if kind == "tokenizer":
        ranks = [make_tokenizer() for _ in range(3)]
    else:
        ranks = [
            load(folders[f"{name} files"], "mapped" if kind == "files" else "resident")
            for name in ("old", "new", "old")
        ]
        answers = [answer(model) for model in ranks]
    for index in range(rounds(4)):
        target = tmp_path / str(index)
        results = all_at_once([lambda one=one, target=target: one.save_pretrained(target) and None for one in ranks])
        assert results == [None] * 3
        assert not [name for name in contents(target) if "unfinished" in name or name.startswith(".")]
        if kind == "tokenizer":
            assert torch.equal(EngramTokenizer.from_pretrained(target).token_map, ranks[0].token_map)
        else:
            found = answer(load(target))
            assert any(torch.equal(found, one) for one in answers)


def test_tables_of_other_weights_are_refused(folders, tmp_path):
    """A folder that another program changed in part does not load."""
    for weights, tables in (("old", "new"), ("new", "old")):
        target = tmp_path / tables
        shutil.copytree(folders[f"{tables} files"], target)
        shutil.copy(folders[f"{weights} files"] / "model.safetensors", target)
        for residency in ("resident", "mapped"):
            with pytest.raises(ValueError, match="other weights than the tables beside it were saved with"):
                load(target, residency)
    # A folder saved before there were digests still loads.
    manifest = target / "engram_tables.json"
    members = json.loads(manifest.read_text())
    assert len(members.pop("tables_sha256")) == 2
    assert members.pop("weights_digest") == {"": weights_digest([folders["old files"] / "model.safetensors"])}
    manifest.write_text(json.dumps(members))
    load(target)

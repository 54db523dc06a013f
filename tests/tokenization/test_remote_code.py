"""A saved folder is self-contained: none of the child processes here can import `engram_hf`."""

import pytest
import torch
from child_processes import WITHOUT_PACKAGE, run_elsewhere
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from engram_hf.tokenization import EngramTokenizer

# Refusing the import is stronger than hiding the path: an editable install adds its own finder.
PRELUDE = (
    WITHOUT_PACKAGE
    + """
import json, sys
try:
    import engram_hf
except ModuleNotFoundError:
    pass
else:
    sys.exit("engram_hf could be imported")
from transformers import AutoTokenizer
def load(folder, **kwargs):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **kwargs)
def describe(tok):
    ids = tok(["The café", "ＴＨＥ ＣＡＦＥ 👩‍🚀"], padding=True, return_tensors="pt")["input_ids"]
    return {"ids": ids.tolist(), "compressed": tok.compress(ids).tolist(), "map": tok.token_map.tolist(),
            "size": tok.compressed_vocab_size, "module": type(tok).__module__, "class": type(tok).__name__,
            "summary": str(tok.compression_summary())}
"""
)


@pytest.fixture
def run(tmp_path):
    """Run code after PRELUDE in a fresh process and return its output."""
    return lambda code: run_elsewhere(PRELUDE + code, tmp_path)


def test_tokenizer_loads_extends_and_saves_without_the_package(plain, tmp_path, run):
    here = EngramTokenizer.from_tokenizer(plain)
    here.save_pretrained(tmp_path / "first")
    there = run(f"""
tok = load({str(tmp_path / "first")!r})
first = describe(tok)
tok.add_tokens(["RETURN!", "<more>"])
tok.save_pretrained({str(tmp_path / "second")!r})
again = load({str(tmp_path / "second")!r})
import copy, pickle
assert pickle.dumps(copy.deepcopy(tok))
print(json.dumps([first, describe(tok), describe(again), type(tok).from_tokenizer(tok) is tok]))
""")
    first, grown, again, idempotent = there
    ids = here(["The café", "ＴＨＥ ＣＡＦＥ 👩‍🚀"], padding=True, return_tensors="pt")["input_ids"]
    assert first["ids"] == ids.tolist() and first["compressed"] == here.compress(ids).tolist()
    assert first["map"] == here.token_map.tolist() and first["summary"] == str(here.compression_summary())
    assert first["class"] == "EngramTokenizer" and first["module"].startswith("transformers_modules.")
    assert grown["map"] == again["map"] and grown["map"][: len(here)] == first["map"]
    assert len(grown["map"]) == len(here) + 2
    assert idempotent
    back = EngramTokenizer.from_pretrained(tmp_path / "second")
    assert back.token_map.tolist() == grown["map"]


def test_wrong_map_is_refused_without_the_package(plain, tmp_path, run):
    EngramTokenizer.from_tokenizer(plain).save_pretrained(tmp_path / "saved")
    plain.add_tokens(["<not mapped>"])
    plain.backend_tokenizer.save(str(tmp_path / "saved" / "tokenizer.json"))
    message = run(f"""
try:
    load({str(tmp_path / "saved")!r})
except ValueError as error:
    print(json.dumps(str(error)))
""")
    assert "token ids but the tokenizer beside it has" in message


def test_installed_class_recognizes_the_class_of_a_saved_folder(plain, tmp_path):
    EngramTokenizer.from_tokenizer(plain).save_pretrained(tmp_path)
    # The Auto class would take the installed class, which is registered with it.
    remote_class = get_class_from_dynamic_module("tokenization_engram.EngramTokenizer", str(tmp_path))
    assert remote_class is not EngramTokenizer
    remote = remote_class.from_pretrained(tmp_path)
    assert EngramTokenizer.from_tokenizer(remote) is remote
    assert torch.equal(remote.token_map, EngramTokenizer.from_tokenizer(plain).token_map)

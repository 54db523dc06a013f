"""`engram facts`: write, list and check through the command line, and bad input; tests/faults has interrupts and
kills.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from command_models import logits
from engram_cli.main import main
from peft import PeftModel
from tiny_tokenizer import make_tokenizer
from transformers.utils import logging

from engram_hf import EngramForCausalLM
from engram_hf.claiming_engram import FolderClaim

FACTS = [
    {"prompt": "w1 w2 w3 w4", "target": "w50 w51"},
    {"subject": "w5 w6", "relation": "{} w7", "target": "w60"},
]


@pytest.fixture(autouse=True)
def no_bars():
    """Turn progress bars off, so that an error is the only line."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, FACTS)) + "\n\n")
    return path


@pytest.fixture(scope="module")
def adapter(saved, facts, tmp_path_factory) -> Path:
    """Return the adapter that `facts write` made; tests do not change it."""
    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("written") / "adapter"
    assert main(["facts", "write", str(saved), str(facts), "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def damaged(adapter, tmp_path) -> Path:
    """Copy the adapter to a folder that a test may damage."""
    return Path(shutil.copytree(adapter, tmp_path / "damaged"))


def test_write_makes_an_adapter_that_peft_loads(saved, adapter):
    assert sorted(path.name for path in adapter.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    model = PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), adapter).eval()
    ids = make_tokenizer()("w1 w2 w3 w4", return_tensors="pt")["input_ids"]
    tokens = model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert make_tokenizer().decode(tokens[0, 4:]) == "w50 w51"
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(EngramForCausalLM.from_pretrained(saved)))


def test_write_prints_a_report_or_json(engram, saved, facts, tmp_path, monkeypatch):
    protect = tmp_path / "texts.txt"
    protect.write_text("w20 w21 w22 w23\n\nw30 w31\n\n\n")
    arguments = ["facts", "write", saved, facts, "--protect", protect, "--layers", 2, "--orders", 2, 3, "--steps", 150]
    said = engram(*arguments, "--output", tmp_path / "one")
    assert (
        said.startswith("fact ")
        and "protected: 0 of 6 positions" in said
        and said.endswith(f"in {tmp_path / 'one'}\n")
    )
    found = json.loads(engram(*arguments, "--json", "--output", tmp_path / "two"))
    assert found["recall"] == 1.0 and found["layers"] == [2] and found["orders"] == [2, 3]
    assert found["protected"]["texts"] == 2 and found["protected"]["changed_untouched"] == 0
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "w20 w21 w22 w23"}\n{"text": "w30 w31"}\n')
    arguments[arguments.index(protect)] = texts
    cached = tmp_path / "models--me--model"
    for folder in ("refs", "snapshots"):
        (cached / folder).mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).symlink_to(saved)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments[arguments.index(saved)] = "me/model"
    engram(*arguments, "--output", tmp_path / "three")
    assert (tmp_path / "three" / "adapter_model.safetensors").read_bytes() == one.read_bytes()
    base_models = [
        json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"]
        for name in ("two", "three")
    ]
    assert base_models == [str(saved), "me/model"]


def test_list_needs_no_model(engram, adapter):
    said = engram("facts", "list", adapter)
    assert "w1 w2 w3 w4" in said and "w5 w6 w7" in said and "of layer 1" in said
    found = json.loads(engram("facts", "list", adapter, "--json"))
    assert [fact["target"] for fact in found["facts"]] == ["w50 w51", "w60"]
    assert found["bytes"] == (adapter / "adapter_model.safetensors").stat().st_size


def test_check_asks_the_model(engram, capsys, saved, adapter, damaged):
    said = engram("facts", "check", saved, adapter)
    assert said.splitlines()[0].startswith("fact ") and said.endswith("all 2 facts are recalled\n")
    from safetensors.torch import load_file, save_file

    path = damaged / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: value if key.endswith("rows") else 0 * value for key, value in tensors.items()}, path)
    assert main(["facts", "check", str(saved), str(damaged)]) == 1
    assert "2 of 2 facts are not recalled: 0, 1" in capsys.readouterr().err


def test_check_refuses_another_model(complaint, model, adapter, tmp_path):
    from command_models import make_config
    from tiny_backbones import randomize

    other = randomize(EngramForCausalLM(make_config(engram_seed=9)))
    other.set_token_map(make_tokenizer())
    other.save_pretrained(tmp_path / "other")
    assert "multipliers" in complaint("facts", "check", tmp_path / "other", adapter)


BAD_FILES = {
    "is empty": "\n",
    "Line 2 of": '{"prompt": "w1", "target": "w2"}\n{"prompt"\n',
    "Fact 0 has no target": '{"prompt": "w1"}\n',
    "Fact 0 is a int": "3\n",
    "give one prompt two targets": '{"prompt": "w1", "target": "w2"}\n{"prompt": "w1", "target": "w3"}\n',
}


@pytest.mark.parametrize("said", BAD_FILES)
def test_bad_facts_are_one_sentence_and_leave_no_folder(complaint, saved, tmp_path, said):
    (tmp_path / "facts.jsonl").write_text(BAD_FILES[said])
    assert said in complaint("facts", "write", saved, tmp_path / "facts.jsonl", "--output", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_bad_arguments_are_one_sentence(complaint, saved, facts, adapter, tmp_path):
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text(" ")
    new = tmp_path / "new"
    for said, arguments in {
        "no text in UTF-8": ["write", saved, tmp_path / "bytes.jsonl", "--output", new],
        "No such file": ["write", saved, tmp_path / "none.jsonl", "--output", new],
        "holds no model": ["write", tmp_path, facts, "--output", new],
        "holds a model; name another folder": ["write", saved, facts, "--output", saved],
        "empty.txt is empty": ["write", saved, facts, "--protect", tmp_path / "empty.txt", "--output", new],
        "steps is 0": ["write", saved, facts, "--steps", 0, "--output", new],
        "Layer 7 has no Engram memory": ["write", saved, facts, "--layers", 7, "--output", new],
        "holds no adapter (adapter_config.json is missing)": ["list", tmp_path],
        "neither a folder nor a Hub id": ["check", tmp_path / "nowhere", adapter],
    }.items():
        assert said in complaint("facts", *arguments), said
        assert not new.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"facts": None}, "none with facts"),
        ({"peft_type": "LORA"}, "none with facts"),
        ({"memory": 3}, "does not say which rows"),
        ({"memory": {"1": {}}}, "does not say which rows"),
        ({"facts": [3]}, "are damaged"),
    ],
)
def test_damaged_adapters_are_one_sentence(complaint, damaged, change, said):
    path = damaged / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert said in complaint("facts", "list", damaged)


def test_adapter_without_safetensors_is_never_unpickled(complaint, saved, damaged):
    (damaged / "adapter_model.safetensors").rename(damaged / "adapter_model.bin")
    assert "adapter_model.safetensors is missing" in complaint("facts", "check", saved, damaged)


def test_folder_that_another_process_writes_to_is_refused(complaint, saved, facts, damaged):
    with FolderClaim(damaged):
        before = sorted(damaged.iterdir())
        said = complaint("facts", "write", saved, facts, "--output", damaged)
        assert f"is being written by process {os.getpid()}" in said and sorted(damaged.iterdir()) == before


def test_folder_of_a_write_killed_at_its_end_is_refused(complaint, saved, damaged, monkeypatch):
    monkeypatch.setattr("engram_hf.saving_engram.LOAD_WAITS", 0)
    (damaged / ".engram-exchange-1" / "files").mkdir(parents=True)
    for command in (["list", damaged], ["check", saved, damaged]):
        assert "files of two saves may be mixed" in complaint("facts", *command)
    with pytest.raises(ValueError, match="files of two saves may be mixed"):
        PeftModel.from_pretrained(EngramForCausalLM.from_pretrained(saved), damaged)

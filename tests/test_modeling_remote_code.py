"""A saved folder is self-contained: none of the child processes here can import `engram_hf`."""

import json

import pytest
import torch
from child_processes import WITHOUT_PACKAGE, run_elsewhere
from tiny_backbones import LAYER_IDS, build, built, tiny_tokenizer

from engram_hf import EngramForCausalLM
from engram_hf.safetensors_engram import VERSION

# Refusing the import is stronger than hiding the path: an editable install adds its own finder.
PRELUDE = (
    WITHOUT_PACKAGE
    + """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
def opened(auto, folder):
    return auto.from_pretrained(folder, trust_remote_code=True)
def generate(folder, prompts):
    model, tokenizer = opened(AutoModelForCausalLM, folder), opened(AutoTokenizer, folder)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert type(tokenizer).__module__.startswith("transformers_modules."), type(tokenizer).__module__
    assert "engram_hf" not in sys.modules
    assert model.write_model_card is None  # the card that transformers writes
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return model, tokenizer, tokens.tolist()
"""
)
PROMPTS = ["word1 Word2 word3", "Word9 <unk> word5 word6 word40"]
ROOT_FILES = {
    "configuration_engram.py",
    "hashing_engram.py",
    "safetensors_engram.py",
    "saving_engram.py",
    "loading_engram.py",
    "table_format_engram.py",
    "table_engram.py",
    "row_sources_engram.py",
    "prefetch_engram.py",
    "cache_engram.py",
    "layer_engram.py",
    "modeling_engram.py",
}
AUTO_MAP = {
    "AutoConfig": "configuration_engram.EngramConfig",
    "AutoModel": "modeling_engram.EngramModel",
    "AutoModelForCausalLM": "modeling_engram.EngramForCausalLM",
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> EngramForCausalLM:
    model = build("mixtral", engram_compressed_vocab_size=tokenizer.compressed_vocab_size)
    model.resize_token_embeddings(len(tokenizer))
    model.set_token_map(tokenizer)
    return model


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def run(tmp_path):
    """Run code after PRELUDE in a fresh process and return its output."""
    return lambda code: run_elsewhere(PRELUDE + code, tmp_path)


def test_folder_alone_and_its_copy_generate_the_same_tokens(model, tokenizer, folder, tmp_path, run):
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False).tolist()
    again = tmp_path / "again"
    code = f"""
model, tokenizer, tokens = generate({str(folder)!r}, {PROMPTS!r})
model.save_pretrained({str(again)!r})
tokenizer.save_pretrained({str(again)!r})
print(json.dumps(tokens))
"""
    assert run(code) == expected
    assert json.loads((again / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert run(f"print(json.dumps(generate({str(again)!r}, {PROMPTS!r})[2]))") == expected


def test_base_model_loads_through_its_auto_class(model, folder, run):
    code = f"""
model, config = opened(AutoModel, {str(folder)!r}), opened(AutoConfig, {str(folder)!r})
states = model(torch.tensor([[4, 9, 8]])).last_hidden_state
print(json.dumps([type(model).__name__, type(config).__name__, states.tolist()]))
"""
    model_name, config_name, states = run(code)
    assert (model_name, config_name) == ("EngramModel", "EngramConfig")
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(states), model.model(torch.tensor([[4, 9, 8]])).last_hidden_state)


@pytest.mark.parametrize("part", ["causal", "base"])
def test_saving_either_class_writes_every_file(part, tmp_path):
    model = built("mixtral")
    (model if part == "causal" else model.model).save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.glob("*.py")}
    # A user who passes `trust_remote_code=True` has this much code to read.
    assert files == ROOT_FILES and len(files) <= 12
    assert sum(len((tmp_path / name).read_text().splitlines()) for name in files) <= 6180
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["engram_layer_ids"] == LAYER_IDS
    assert config["engram_hf_version"] == VERSION


def test_saved_base_model_loads_as_a_causal_model(tmp_path, run):
    """Its head is new, which transformers reports; its memory is loaded."""
    base = built("mixtral").model
    base.save_pretrained(tmp_path / "base")
    code = f"""
model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}, trust_remote_code=True,
                                                   output_loading_info=True)
print(json.dumps([sorted(info["missing_keys"]), model.model(torch.tensor([[4, 9, 8]])).last_hidden_state.tolist()]))
"""
    missing, states = run(code)
    assert missing == ["lm_head.weight"]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(states), base(torch.tensor([[4, 9, 8]])).last_hidden_state)

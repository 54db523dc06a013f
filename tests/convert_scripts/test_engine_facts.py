"""An export has the names, shapes, dtypes and fields that the loaders of vLLM and SGLang require.

`read_engine_wheels.py` reads `engine_facts.json` from the engines' wheels; the engines themselves are not run.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from tiny_backbones import build, random_ids
from transformers import AutoModel, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engram_hf import EngramConfig, EngramForCausalLM
from engram_hf.convert_scripts import export_deepseek_v41
from engram_hf.safetensors_engram import read_header

pytestmark = pytest.mark.any_version

FACTS = json.loads(Path(__file__).with_name("engine_facts.json").read_text(encoding="utf-8"))
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory) -> Path:
    """Export a trained model, which has no record of the release it came from."""
    ours, target = tmp_path_factory.mktemp("ours") / "model", tmp_path_factory.mktemp("exported") / "release"
    shutil.copytree(converted, ours, ignore=shutil.ignore_patterns("upstream"))
    assert export_deepseek_v41.main([str(ours), str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def tensors(exported):
    """Return every tensor of the export in the files that its index names: an engine reads no others."""
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    headers = {file: read_header(exported / file).tensors for file in set(index.values())}
    assert sorted(path.name for path in exported.glob("*.safetensors")) == sorted(headers)
    return {name: headers[file][name] for name, file in index.items()}


@pytest.fixture(scope="module")
def config(exported):
    fields = json.loads((exported / "config.json").read_text())
    return {**fields["text_config"], **fields}


@pytest.mark.parametrize("engine", FACTS)
def test_loader_maps_the_name_of_every_tensor(engine, tensors):
    names = FACTS[engine]["names"]
    assert {re.sub(r"\b\d+\b", "N", name) for name in tensors} == set(names)
    # A loader skips drafts, and a text-only one skips vision tensors; it skips nothing of the text or the memory.
    assert {name for name, target in names.items() if target is None} <= {
        name for name in names if name.startswith(("mtp.", "vision.", "aligner.", "image_"))
    }


@pytest.mark.parametrize("engine", FACTS)
def test_memory_has_the_shapes_and_dtypes_of_the_engine(engine, tensors, config):
    columns = (config["engram_max_ngram_size"] - 1) * config["engram_n_heads"] * config["engram_head_dim"]
    for layer, rows in zip(config["engram_layer_ids"], config["engram_num_embeddings"], strict=True):
        sizes = {**config, "engram_num_embeddings": rows, "columns": columns}
        for name, facts in FACTS[engine]["tensors"].items():
            tensor = tensors[name.replace("N", str(layer), 1)]
            assert tensor.dtype == facts.get("dtype", tensor.dtype)
            assert list(tensor.shape) == [eval(size, {}, sizes) for size in facts["shape"]], name


@pytest.mark.parametrize("engine", FACTS)
def test_config_has_every_field_that_the_engine_reads(engine, config):
    facts = FACTS[engine]
    assert config["architectures"] == [facts["architecture"]] and config["model_type"] == facts["model_type"]
    assert [name for name in facts["config"] if name not in config] == []
    quantization = config["quantization_config"]
    # From these, vLLM recognizes the form of a linear layer and of the experts.
    assert (quantization["weight_block_size"], quantization["expert_dtype"]) == ([32, 32], "fp4")


def test_tokenizer_gives_the_compressed_vocabulary_of_both_engines(exported, config):
    """Both build the map from the tokenizer beside the weights, and refuse a size that differs from the config's."""
    from engram_hf.tokenization import EngramTokenizer

    tokenizer = EngramTokenizer.from_tokenizer(AutoTokenizer.from_pretrained(exported))
    assert tokenizer.compressed_vocab_size == config["engram_compressed_vocab_size"]


@pytest.mark.parametrize("engine", FACTS)
def test_serving_page_names_the_options_of_the_engine(engine):
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    version = FACTS[engine]["wheel"].split("-")[1]
    assert version in page and [name for name in FACTS[engine]["options"] if f"`{name}`" not in page] == []


def test_engines_page_describes_the_look_back_of_vllm():
    page = (DOCS / "engines.md").read_text(encoding="utf-8")
    assert FACTS["vllm"]["wheel"].split("-")[1] in page
    assert [word for word in FACTS["vllm"]["lookback"].values() if str(word) not in page] == []


def test_model_meets_the_requirements_of_vllms_transformers_backend(monkeypatch):
    """The backend builds the model on the meta device, registers an attention, and calls it with requests packed in
    one row.
    """
    seen = []
    own = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).tril().bool()[None, None]

    def attention(module, query, key, value, mask, **kwargs):
        seen.append(kwargs["attention_instances"][module.layer_idx])
        return sdpa_attention_forward(
            module, query, key, value, own, **kwargs
        )  # vLLM's own attention separates requests by itself.

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "vllm", attention)
    model, ids = build("llama").eval(), random_ids(1, 12)
    config = EngramConfig.from_dict(model.config.to_dict())
    config.get_text_config()._attn_implementation = "vllm"
    with init_empty_weights():
        wrapped = AutoModel.from_config(config, dtype=torch.float32)
    assert type(wrapped).is_backend_compatible() or type(wrapped)._can_set_attn_implementation()
    assert all(parameter.is_meta for parameter in wrapped.parameters())
    wrapped = wrapped.get_decoder().eval()
    wrapped.load_state_dict(model.model.state_dict(), assign=True)
    positions = torch.tensor([[0, 1, 2, 3, 4, *range(7)]])
    instances = {layer: layer for layer in range(config.get_text_config().num_hidden_layers)}
    with torch.no_grad():
        states = wrapped(
            input_ids=ids,
            inputs_embeds=None,
            use_cache=False,
            position_ids=positions,
            return_dict=False,
            attention_instances=instances,
        )[0]
        apart = [model.model(input_ids=part).last_hidden_state for part in ids.split([5, 7], dim=1)]
    torch.testing.assert_close(states, torch.cat(apart, dim=1))
    assert seen == list(instances)


def test_resident_tables_are_saved_among_the_weights(tmp_path):
    """A loader that reads only the weights or their index finds them, as docs/engines.md says."""
    build("llama").save_pretrained(tmp_path / "model")
    EngramForCausalLM.from_pretrained(tmp_path / "model", engram_residency="mapped").save_pretrained(tmp_path / "own")
    EngramForCausalLM.from_pretrained(tmp_path / "own", engram_residency="resident").save_pretrained(
        tmp_path / "among"
    )
    tables = {
        folder: [name for name in read_header(tmp_path / folder / "model.safetensors").tensors if ".table." in name]
        for folder in ("own", "among")
    }
    assert tables == {"own": [], "among": [f"model.layers.{layer}.engram.table.weight" for layer in (1, 2)]}
    assert not list((tmp_path / "among").glob("engram-layer-*"))

"""An export has the names, shapes, dtypes and fields that the loaders of vLLM and SGLang ask for.

`engine_facts.json` is read from the engines' wheels by `read_engine_wheels.py`; the engines themselves are not run.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engram_hf.convert_scripts import export_deepseek_v41
from engram_hf.safetensors_engram import read_header

FACTS = json.loads(Path(__file__).with_name("engine_facts.json").read_text(encoding="utf-8"))
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def exported(converted, tmp_path_factory) -> Path:
    """What a model that was trained is exported as: without the record of the release it came from."""
    ours, target = tmp_path_factory.mktemp("ours") / "model", tmp_path_factory.mktemp("exported") / "release"
    shutil.copytree(converted, ours, ignore=shutil.ignore_patterns("upstream"))
    assert export_deepseek_v41.main([str(ours), str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def tensors(exported):
    """Every tensor of the export, in the files that its index names: an engine reads no others."""
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    headers = {file: read_header(exported / file).tensors for file in set(index.values())}
    assert sorted(path.name for path in exported.glob("*.safetensors")) == sorted(headers)
    return {name: headers[file][name] for name, file in index.items()}


@pytest.fixture(scope="module")
def config(exported):
    fields = json.loads((exported / "config.json").read_text())
    return {**fields["text_config"], **fields}


@pytest.mark.parametrize("engine", FACTS)
def test_every_tensor_has_a_name_that_the_loader_maps(engine, tensors):
    names = FACTS[engine]["names"]
    assert {re.sub(r"\b\d+\b", "N", name) for name in tensors} == set(names)
    # A loader leaves out drafts, and where it loads text alone what reads images; nothing of the text, nothing of the memory.
    assert {name for name, target in names.items() if target is None} <= {
        name for name in names if name.startswith(("mtp.", "vision.", "aligner.", "image_"))
    }


@pytest.mark.parametrize("engine", FACTS)
def test_the_memory_has_the_shapes_and_dtypes_of_the_engine(engine, tensors, config):
    columns = (config["engram_max_ngram_size"] - 1) * config["engram_n_heads"] * config["engram_head_dim"]
    for layer, rows in zip(config["engram_layer_ids"], config["engram_num_embeddings"], strict=True):
        sizes = {**config, "engram_num_embeddings": rows, "columns": columns}
        for name, facts in FACTS[engine]["tensors"].items():
            tensor = tensors[name.replace("N", str(layer), 1)]
            assert tensor.dtype == facts.get("dtype", tensor.dtype)
            assert list(tensor.shape) == [eval(size, {}, sizes) for size in facts["shape"]], name


@pytest.mark.parametrize("engine", FACTS)
def test_the_config_has_every_field_that_the_engine_reads(engine, config):
    facts = FACTS[engine]
    assert config["architectures"] == [facts["architecture"]] and config["model_type"] == facts["model_type"]
    assert [name for name in facts["config"] if name not in config] == []
    quantization = config["quantization_config"]
    # By these vLLM tells in which of its forms a linear layer and the experts are.
    assert (quantization["weight_block_size"], quantization["expert_dtype"]) == ([32, 32], "fp4")


def test_the_tokenizer_gives_the_compressed_vocabulary_that_both_engines_build(exported, config):
    """Both build the map from the tokenizer beside the weights, and refuse a size that the config does not name."""
    from engram_hf.tokenization import EngramTokenizer

    tokenizer = EngramTokenizer.from_tokenizer(AutoTokenizer.from_pretrained(exported))
    assert tokenizer.compressed_vocab_size == config["engram_compressed_vocab_size"]


@pytest.mark.parametrize("engine", FACTS)
def test_the_page_names_what_the_engine_has(engine):
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    version = FACTS[engine]["wheel"].split("-")[1]
    assert version in page and [name for name in FACTS[engine]["options"] if f"`{name}`" not in page] == []


def test_the_page_for_engine_authors_tells_the_look_back_of_vllm():
    page = (DOCS / "engines.md").read_text(encoding="utf-8")
    for word in FACTS["vllm"]["lookback"].values():
        assert f"`{word}`" in page

"""Tables that cannot stay in their files, or do not belong together, are refused in one sentence."""

import json
import shutil

import other_tiny_models as tiny
import pytest
import torch
from other_tiny_models import GEMMA, QWEN
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from engram_hf import EngramError, load_with_tables


def load(folder, **options):
    return load_with_tables(AutoModelForCausalLM, str(folder), **options)


@pytest.fixture
def changed(folders, tmp_path):
    """Copy a model with other tensors: `change` takes and returns a dictionary."""

    def copy(name: str, change):
        folder = tmp_path / "changed"
        shutil.copytree(folders(name), folder, dirs_exist_ok=True)
        with safe_open(folder / "model.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in list(file.keys())}
        save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"residency": "disk"}, "must be one of 'mapped', 'pinned', 'resident'"),
        ({"tables": ["model.layers.0.mlp"]}, "'model.layers.0.mlp' is no embedding; the embeddings are"),
        ({"tables": "lm_head"}, "'lm_head' is no embedding"),
        ({"tables": ["model.nowhere"]}, "'model.nowhere' is no module of the model"),
        ({"tables": ["model.embed_tokens"]}, "is tied to the head or to another module"),
        ({"state_dict": {}}, "state_dict cannot be given here: tables are read from safetensors files"),
        ({"gguf_file": "a.gguf"}, "gguf_file cannot be given here"),
        ({"tp_plan": "auto"}, "a table that is not a parameter cannot be sharded"),
    ],
    ids=str,
)
def test_load_with_tables_refuses_bad_arguments(folders, options, said):
    with pytest.raises(EngramError, match=said):
        load(folders("gemma4"), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_load_with_tables_pinned_needs_a_gpu(folders):
    with pytest.raises(EngramError, match="there is none; use 'mapped'"):
        load(folders("gemma4"), residency="pinned")


def test_model_without_a_known_table_is_refused(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    with pytest.raises(
        EngramError, match=r"no table of a kind that is known; .*\(its embeddings are model\.embed_tokens\)"
    ):
        load(tmp_path)


def without(*ends: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(ends)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("shard_1.weight"), "has 3 shards of .*, but not shard_1"),
        (
            without("1.ple.ple_embedding.ngram_embedding.shard_3.weight"),
            "have 1056 rows together, but the model has 1408",
        ),
        (lambda t: t | {f"{QWEN}.weight": t[f"{QWEN}.shard_0.weight"].clone()}, "whole and in 4 shards"),
        (lambda t: t | {f"{QWEN}.shard_1.weight": torch.zeros(352, 5, dtype=torch.bfloat16)}, r"rows of \[4\]"),
        (lambda t: t | {f"{QWEN}.shard_1.weight": torch.zeros(352, 4)}, "all shards alike"),
        (lambda t: t | {f"{QWEN}.weight_scale": torch.ones(1)}, "stores .* with weight_scale, a quantization that"),
        (
            lambda t: t | {f"{QWEN}.weight_packed": torch.ones(9, dtype=torch.uint8)},
            "a quantization that the model's config does not",
        ),
        (without("layers.1.ple.ple_embedding.ngram_embedding." + "shard_0.weight"), "but not shard_0"),
    ],
)
def test_incomplete_shards_are_refused(changed, change, said):
    with pytest.raises(EngramError, match=said):
        load(changed("qwen4_exp", change))


def test_table_of_another_layer_does_not_replace_a_missing_one(changed):
    ends = tuple(f"layers.1.ple.ple_embedding.ngram_embedding.shard_{shard}.weight" for shard in range(4))
    with pytest.raises(EngramError, match=r"has no tensors of the table model\.layers\.1"):
        load(changed("qwen4_exp", without(*ends)))


def test_rows_without_scales_or_in_another_form_are_refused(changed):
    name = f"{GEMMA}.embedding_quantized"
    for change, said in (
        (without("embedding_scale"), "has no tensor .*embedding_scale"),
        (lambda t: t | {name: t[name].to(torch.int32)}, "quantized in a way that is not known here"),
        (lambda t: t | {name: t[name][:, :-1].clone()}, r"has shape \[200, 11\]"),
    ):
        with pytest.raises(EngramError, match=said):
            load(changed("gemma4 int4", change))


def test_table_without_its_scale_is_refused(changed, folders):
    with pytest.raises(EngramError, match=r"has no tensor .*ngram_embedding\.weight_scale, without which"):
        load(changed("qwen4_exp float8", without("weight_scale")))
    other = changed("qwen4_exp float8", lambda t: {name: t[name] * 2 if "_scale" in name else t[name] for name in t})
    with pytest.raises(EngramError, match="have another weight_scale"):
        load(folders("qwen4_exp float8"), tables_from=str(other))


def test_pattern_that_fits_two_tables_is_refused(changed):
    def change(tensors):
        table = tensors.pop(f"{GEMMA}.weight")
        return tensors | {f"{part}.embed_tokens_per_layer.weight": table.clone() for part in ("draft", "text")}

    with pytest.raises(
        EngramError, match=r"may be any of draft\.embed_tokens_per_layer, text\.embed_tokens_per_layer"
    ):
        load(changed("gemma4", change))


def test_missing_file_of_the_index_is_named(folders, tmp_path):
    tiny.qwen4_exp().save_pretrained(tmp_path, max_shard_size=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (tmp_path / index["weight_map"][f"{QWEN}.shard_2.weight"]).unlink()
    with pytest.raises(EngramError, match=r"lacks .*safetensors, which its index names; fetch the missing file"):
        load(tmp_path)


def test_file_truncated_while_in_use_is_reported(folders, tmp_path):
    load(folders("gemma4")).save_pretrained(tmp_path)  # The table has a separate file.
    model = load(tmp_path)
    with open(next(tmp_path.glob("model-tables-*")), "r+b") as file:
        file.truncate(5000)
    with pytest.raises(EngramError, match="was changed while it was in use"):
        tiny.logits(model)

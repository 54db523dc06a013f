"""Folders in the release's layout with other dimensions convert as far as their config allows."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from checkpoint_tools import EditableCheckpoint, contents, write_safetensors
from deepseek_v41_reference import copy_release
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from engram_hf.convert_scripts import convert_deepseek_v41, export_deepseek_v41
from engram_hf.convert_scripts.deepseek_v41 import DEEPSEEK_V41
from engram_hf.convert_scripts.tensor_rules import map_tensors
from engram_hf.table_format_engram import draw_primes

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def miniature(golden):
    return golden / "deepseek_v41_tiny_vl"


def no_tower(config):
    del config["vision_config"]


def empty_tower(config):
    config["vision_config"]["num_hidden_layers"] = 0


def no_drafts(config):
    config["text_config"] |= {"num_nextn_predict_layers": 0, "compress_ratios": [0, 0, 2, 2, 2, 1, 1, 1, 1]}


def text_alone(config):
    no_tower(config)
    no_drafts(config)
    del config["image_token_id"]


def other_counts(config):
    """Use fewer layers, more experts, another tower and other draft layers."""
    config["text_config"] |= {
        "num_hidden_layers": 6,
        "n_routed_experts": 12,
        "num_experts_per_tok": 2,
        "hc_mult": 2,
        "compress_ratios": [0, 2, 2, 1, 1, 1, 0, 0],
        "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3, 4],
        "candidate_source_layer_id": 3,
        "engram_layer_ids": [0, 2, 3],
        "engram_num_embeddings": [
            sum(map(sum, orders)) for orders in draw_primes(3, (300,) * 3, config["text_config"]["engram_n_heads"])
        ],
        "num_nextn_predict_layers": 2,
        "dspark_block_size": 3,
        "dspark_target_layer_ids": [4, 5],
        "dspark_n_routed_experts": 6,
        "dspark_num_experts_per_tok": 1,
        "dspark_markov_rank": 16,
    }
    config["vision_config"] |= {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "patch_size": 6,
        "downsample_ratio": 2,
        "max_image_tokens": 40,
    }


CHANGES = [no_tower, empty_tower, no_drafts, text_alone, other_counts]


def write_release(miniature, folder, change):
    """Write a folder of random weights with a changed config, in one shard."""
    config = json.loads((miniature / "config.json").read_text(encoding="utf-8"))
    change(config)
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(miniature / name, folder)
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    tensors = {}
    for mapping in map_tensors(DEEPSEEK_V41, config):
        for tensor in mapping.upstream:
            count = math.prod(tensor.shape)
            if tensor.dtype in ("BF16", "F32"):
                values = torch.from_numpy(0.2 * random.standard_normal(count, dtype=np.float32))
                values = values.bfloat16().view(torch.uint8) if tensor.dtype == "BF16" else values.view(torch.uint8)
                raw = values.numpy().tobytes()
            elif tensor.dtype == "F8_E8M0":
                raw = random.integers(118, 121, count, dtype=np.uint8).tobytes()
            else:
                raw = (random.integers(0, 256, count, dtype=np.uint8) & 0xBF).tobytes()
            tensors[tensor.name] = [tensor.dtype, list(tensor.shape), raw]
    write_safetensors(folder / "model-00001-of-00001.safetensors", tensors)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return config


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_convert_a_release_as_far_as_its_config_allows(miniature, tmp_path, change):
    """Opened directly, kept and dequantized, it gives equal logits; drafts and images work; the export is equal."""
    release, kept, plain = (tmp_path / name for name in ("release", "kept", "plain"))
    config = write_release(miniature, release, change)
    assert convert_deepseek_v41.main([str(release), str(kept)]) == 0
    assert convert_deepseek_v41.main([str(release), str(plain), "--dtype", "float32"]) == 0
    assert export_deepseek_v41.main([str(kept), str(tmp_path / "back")]) == 0
    assert contents(release).items() <= contents(tmp_path / "back").items()
    sees = (config.get("vision_config") or {}).get("num_hidden_layers", 0) > 0
    drafts = config["text_config"]["num_nextn_predict_layers"] > 0
    ids = torch.tensor([[0, 300, 411, 52, 633, 74, 85, 96, 107, 318, 129, 130, 241]])
    logits = []
    for folder in (release, kept, plain):
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits.append(model(ids).logits)
        assert torch.isfinite(logits[-1]).all()
        torch.testing.assert_close(logits[-1], logits[0], atol=1e-4, rtol=0)
    expected = model.generate(ids, **GREEDY)
    if drafts:
        assert torch.equal(model.generate(ids, use_mtp=True, **GREEDY), expected)
    else:
        with pytest.raises(ValueError, match="no draft layers"):
            model.generate(ids, use_mtp=True, **GREEDY)
    for folder in (release, kept, plain):
        if sees:
            seeing = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
            patch, image = config["vision_config"]["patch_size"], config["image_token_id"]
            ratio = config["vision_config"]["downsample_ratio"]
            rows, columns = -(-5 // ratio), -(-4 // ratio)
            prompt = torch.tensor([[0, *[image] * (rows * (columns + 1) + 2), 9]])
            pixels = torch.rand(20, 3, patch, patch) * 2 - 1
            with torch.no_grad():
                seen = seeing(prompt, pixel_values=pixels, image_grid_hws=torch.tensor([[5, 4]])).logits
            assert torch.isfinite(seen).all()
        else:
            with pytest.raises(ValueError, match="reads text alone"):
                AutoModelForImageTextToText.from_pretrained(folder)


# --- refused, with the field's name


def lacking(prefix):
    """Remove tensors that the config requires."""

    def change(folder):
        checkpoint = EditableCheckpoint(folder)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        gone = {name for name in index if name.startswith(prefix)}
        for shard in {index[name] for name in gone}:
            checkpoint.rewrite(folder / shard, lambda tensors: [tensors.pop(name, None) for name in gone])
        checkpoint.edit_index(lambda weights: [weights.pop(name) for name in gone])

    return change


def with_field(part, **fields):
    def change(folder):
        EditableCheckpoint(folder).edit_json(
            "config.json", lambda config: (config[part] if part else config).update(fields)
        )

    return change


REFUSED = {
    "tower of which tensors lack": (lacking("vision.blocks.2."), r"lacks .*vision\.blocks\.2\."),
    "no aligner": (lacking("aligner."), r"lacks .*aligner\."),
    "no delimiters": (lacking("image_"), r"lacks .*image_"),
    "drafts of which tensors lack": (lacking("mtp.1."), r"lacks .*mtp\.1\."),
    "a wider tower than its tensors": (with_field("vision_config", hidden_size=96), "vision"),
    "heads that cannot be rotated": (with_field("vision_config", num_attention_heads=5), "num_attention_heads"),
    "a part of the tower that we do not know": (with_field("vision_config", num_registers=4), "num_registers"),
    "another activation in the tower": (with_field("vision_config", hidden_act="gelu"), "hidden_act"),
    "a part of the drafts that we do not know": (with_field("text_config", dspark_tree_width=2), "dspark_tree_width"),
    "a part of the layers that we do not know": (with_field("text_config", attention_sinks=4), "attention_sinks"),
    "a part of the memory that we do not know": (
        with_field("text_config", engram_temperature=2.0),
        "engram_temperature",
    ),
    "another model beside": (with_field(None, audio_config={"hidden_size": 8}), "audio_config"),
    "another choice of experts": (with_field("text_config", topk_method="greedy"), "topk_method"),
    "a head that is the embedding": (with_field(None, tie_word_embeddings=True), "tie_word_embeddings"),
    "another activation": (with_field("text_config", hidden_act="gelu"), "hidden_act"),
    "more experts in drafts than tensors": (with_field("text_config", dspark_n_routed_experts=5), r"mtp\.0\.ffn"),
    "another rank": (with_field("text_config", dspark_markov_rank=16), "markov"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_convert_refuses_unknown_config_values_by_name(miniature, tmp_path, case, capsys):
    change, message = REFUSED[case]
    change(copy_release(miniature, tmp_path / "release"))
    assert convert_deepseek_v41.main([str(tmp_path / "release"), str(tmp_path / "target")]) == 1
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, sentence), sentence
    assert not (tmp_path / "target").exists() or not any((tmp_path / "target").iterdir())


@pytest.mark.parametrize("part", ["text_config", "vision_config", None], ids=str)
def test_direct_loading_refuses_an_unknown_field(miniature, tmp_path, part):
    """A field without a value has no effect and is not refused."""
    folder = copy_release(miniature, tmp_path / "release")
    with_field(part, attention_sinks=None)(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    with_field(part, attention_sinks=4)(folder)
    with pytest.raises(ValueError, match="attention_sinks"):
        AutoModelForCausalLM.from_pretrained(folder)

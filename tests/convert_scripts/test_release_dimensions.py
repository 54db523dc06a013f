"""The table of tensor names covers the release at its full size; nothing is allocated."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

import engram_hf
from engram_hf import EngramConfig, EngramForConditionalGeneration
from engram_hf.convert_scripts.deepseek_v41 import DEEPSEEK_V41
from engram_hf.convert_scripts.deepseek_v41_config import HASHING, to_engram_fields
from engram_hf.convert_scripts.tensor_rules import map_tensors

pytestmark = pytest.mark.any_version

# These are the release's shapes, layer by layer and in its tables.
RELEASE = {
    "vocab_size": 129280,
    "hidden_size": 5120,
    "moe_intermediate_size": 2304,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1280,
    "o_lora_rank": 1024,
    "o_groups": 8,
    "n_routed_experts": 384,
    "num_experts_per_tok": 6,
    "sliding_window": 128,
    "compress_ratios": [0] * 2 + [2] * 18 + [1] * 20,
    "kv_source_layer_ids": [2, 8, 14, 20],
    "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36],
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 512,
    "candidate_source_layer_id": 20,
    "candidate_topk_blocks": 2048,
    "candidate_block_size": 8,
    "engram_layer_ids": [1, 14],
    "engram_vocab_size": 16_000_000,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_num_embeddings": [384_006_168, 384_016_682],
    "engram_compressed_vocab_size": 99_092,
    "num_nextn_predict_layers": 3,
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [37, 38, 39],
    "dspark_markov_rank": 256,
    "dspark_n_routed_experts": 128,
    "dspark_num_experts_per_tok": 3,
}
VISION = {
    "num_hidden_layers": 32,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 2816,
    "patch_size": 14,
    "downsample_ratio": 3,
}
SHAPES = {
    "lm_head.weight": (129280, 5120),
    "model.layers.3.self_attn.q_b_proj.weight": (32768, 1280),
    "model.layers.3.self_attn.o_a_proj.weight": (8192, 4096),
    "model.layers.3.attn_hc.fn": (24, 20480),
    "model.layers.8.self_attn.indexer.k_proj.weight": (128, 512),
    "model.layers.1.engram.table.weight": (384_006_168, 256),
    "model.layers.14.engram.table.scale": (384_016_682, 8),
    "model.layers.1.engram.kv_proj.weight": (25600, 6144),
    "model.layers.14.engram.q_norm.weight": (4, 5120),
    "model.vision_tower.patch_embedding.weight": (1024, 588),
    "model.vision_tower.layers.31.self_attn.qkv_proj.weight": (3072, 1024),
    "model.vision_tower.layers.31.mlp.gate_up_proj.weight": (5632, 1024),
    "model.vision_tower.aligner.linear_1.weight": (5120, 9216),
    "model.image_newline": (5120,),
    "draft.main_proj.weight": (5120, 15360),
    "draft.layers.2.mlp.experts.gate_up_proj": (128, 4608, 5120),
    "draft.layers.2.mlp.gate.weight": (128, 5120),
    "draft.markov_head.weight": (129280, 256),
    "draft.confidence_head.weight": (1, 5376),
}


@pytest.fixture(scope="module")
def release(golden) -> dict:
    config = json.loads((golden / "deepseek_v41_tiny" / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= RELEASE
    config["vision_config"] |= VISION
    config["image_token_id"] = 129264
    return config


def test_tensor_table_names_the_parameters_of_the_model(release):
    config = EngramConfig.from_dict(to_engram_fields(release, "keep", dequantize_tables=False))
    config.draft = True
    with torch.device("meta"):
        state = EngramForConditionalGeneration(config).state_dict()
    mappings = map_tensors(DEEPSEEK_V41, release)
    named = {mapping.ours for mapping in mappings}
    named |= {mapping.ours_scale for mapping in mappings if mapping.rule.file == "table"}
    # The scales of linear weights exist once transformers' quantizer has replaced the modules; the model makes the
    # hash itself.
    assert {name for name in state if not name.startswith(f"{HASHING}.")} == named
    assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES
    assert all(tuple(state[mapping.ours].shape) == mapping.shape for mapping in mappings)


def test_every_tensor_of_the_release_is_used_once(release):
    mappings = map_tensors(DEEPSEEK_V41, release)
    names = [tensor.name for mapping in mappings for tensor in mapping.upstream]
    assert len(names) == len(set(names)) == 96_085  # The release's index has this number of tensors.
    sizes = {"BF16": 2, "F32": 4}
    total = sum(
        math.prod(tensor.shape) * sizes.get(tensor.dtype, 1) for mapping in mappings for tensor in mapping.upstream
    )
    # The release's `total_size` equals this if the tower's norms (65 of 1024 channels, whose header was not read) are
    # bfloat16.
    assert total - 65 * 1024 * 2 == 510_286_023_000
    vision = [name for name in names if name.startswith(("vision.", "aligner.", "image_"))]
    assert len(vision) == 266
    drafts = {name for name in names if name.startswith("mtp.")}
    assert sum(".ffn.experts." in name for name in drafts) == 3 * 128 * 3 * 2
    assert {name.split(".")[1] for name in drafts if "markov_head" in name or ".norm." in name} == {"2"}


def test_page_shows_the_computed_dimensions():
    """`docs/deepseek-v41.md` has the lines that the benchmark prints."""
    root = Path(engram_hf.__file__).parent
    spec = importlib.util.spec_from_file_location(
        "deepseek_v41_memory", root / "benchmarks" / "deepseek_v41_memory.py"
    )
    computed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(computed)
    page = (root / "docs" / "deepseek-v41.md").read_text(encoding="utf-8")
    assert "\n".join(computed.lines()) in page

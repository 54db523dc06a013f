"""The table of names at the size of the release: nothing is allocated, and nothing is left over."""

import json

import pytest
import torch

from engram_hf import EngramForCausalLM
from engram_hf.convert_scripts.deepseek_v41 import DEEPSEEK_V41
from engram_hf.convert_scripts.deepseek_v41_config import HASHING, to_engram_config
from engram_hf.convert_scripts.tensor_rules import bind

# The release's shapes, layer by layer and in its tables.
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
}


@pytest.fixture(scope="module")
def release(golden) -> dict:
    config = json.loads((golden / "deepseek_v41_tiny" / "config.json").read_text(encoding="utf-8"))
    config["text_config"] |= RELEASE
    return config


def test_the_table_names_what_the_model_holds(release):
    with torch.device("meta"):
        state = EngramForCausalLM(to_engram_config(release, "keep", dequantize_tables=False)).state_dict()
    bindings = bind(DEEPSEEK_V41, release["text_config"])
    named = {binding.ours for binding in bindings}
    named |= {binding.ours_scale for binding in bindings if binding.rule.file == "table"}
    # Scales of linear weights exist once transformers' quantizer has replaced the modules; the hash is the model's own.
    assert {name for name in state if not name.startswith(f"{HASHING}.")} == named
    assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES
    assert all(tuple(state[binding.ours].shape) == binding.shape for binding in bindings)

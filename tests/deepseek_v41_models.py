"""Small DeepSeek-V4.1 backbones with random weights, and ways to feed them.

The rounding of caches is off: it is a step function, and with random inputs float noise shows as large steps.
"""

import torch
from transformers import DynamicCache

from engram_hf.causal_lm_deepseek_v41 import DeepseekV41TextForCausalLM
from engram_hf.configuration_deepseek_v41 import DeepseekV41TextConfig

CHUNKS = (1, 2, 3, 7, 1000)


def tiny_config(**overrides) -> DeepseekV41TextConfig:
    """Return a config of six layers that covers every kind: window only, both ratios, shared sources, candidates."""
    fields = {
        "vocab_size": 97, "hidden_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 6,
        "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 8, "q_lora_rank": 24, "o_lora_rank": 8, "o_groups": 2,
        "sliding_window": 5, "compress_ratios": [0, 3, 3, 1, 1, 1], "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3, 5], "index_n_heads": 4, "index_head_dim": 32, "index_topk": 4,
        "candidate_source_layer_id": 3, "candidate_topk_blocks": 3, "candidate_block_size": 3, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "hc_mult": 3, "initializer_range": 0.1, "cache_rounding": False, "pad_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    return DeepseekV41TextConfig(**{**fields, **overrides})


def tiny_model(seed: int = 0, **overrides) -> DeepseekV41TextForCausalLM:
    torch.manual_seed(seed)
    model = DeepseekV41TextForCausalLM(tiny_config(**overrides)).eval()
    with torch.no_grad():  # Zero sinks and biases would hide a mistake.
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("sinks", "correction_bias", "bias_vl")):
                tensor.normal_()
    return model


def tokens(model, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def worst(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().max().item()


def in_chunks(model, ids, size: int, mask=None, positions=None, prepare=lambda chunk: None) -> torch.Tensor:
    """Return the logits of `ids` `[B, S]` fed `size` tokens at a time; `prepare` is called with each slice before its
    forward.
    """
    cache, logits = DynamicCache(config=model.config), []
    for start in range(0, ids.shape[1], size):
        chunk = slice(start, min(start + size, ids.shape[1]))
        prepare(chunk)
        logits.append(
            model(
                ids[:, chunk],
                attention_mask=None if mask is None else mask[:, : chunk.stop],
                position_ids=None if positions is None else positions[:, chunk],
                past_key_values=cache,
                use_cache=True,
            ).logits
        )
    return torch.cat(logits, dim=1)


def padded(ids: torch.Tensor, lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `lengths[b]` tokens of each row of `ids`, padded on one side, and the mask."""
    width = max(lengths)
    out, mask = torch.full((len(lengths), width), 2), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        out[row, place], mask[row, place] = ids[row, :length], 1
    return out, mask


def as_mask(indices: torch.Tensor, size: int, width: int) -> torch.Tensor:
    """Convert `[B, S, K]` ids of blocks of `size` (-1 for none) to a boolean mask `[B, S, width]`."""
    blocks = -(-width // size)
    indices = torch.where(indices < 0, blocks, indices.long())
    mask = torch.zeros(*indices.shape[:2], blocks + 1, dtype=torch.bool).scatter_(2, indices, True)
    return mask[..., :blocks].repeat_interleave(size, dim=-1)[..., :width]

"""A small config of every kind of causal language model in transformers, found by shrinking its defaults.

Most kinds use the same names for their sizes, so that one table of names fits them; where a kind needs other heads,
the next guess is tried. `OWN` has the fields of kinds that no guess fits, and `UNFIT` the reasons why kinds are left
out.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 120
LAYERS = 4  # This is also the number of heads and of experts.
# More parameters would take too long; no kind needs them.
MOST_PARAMETERS = 20_000_000
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# The package itself registers these kinds; other tests cover them.
OURS = {"engram", "deepseek_v41_text"}

# These are the names that configs have for each size.
_WIDTH = 64
_SIZES: dict[int, tuple[str, ...]] = {
    _WIDTH: (
        [
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embedding_size",
            "embed_dim",
            "word_embed_proj_dim",
            "attention_hidden_size",
            "lru_width",
        ]
    ),
    96: [
        "intermediate_size",
        "dense_intermediate_size",
        "shared_intermediate_size",
        "intermediate_size_mlp",
        "ffn_dim",
        "ffn_hidden_size",
        "inner_dim",
        "n_inner",
        "d_ff",
        "decoder_ffn_dim",
        "dim_ff",
    ],
    32: [
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "expert_intermediate_size",
        "expert_ffn_hidden_size",
        "moe_latent_size",
        "q_lora_rank",
        "kv_lora_rank",
        "o_lora_rank",
    ],
    16: [
        "head_dim",
        "v_head_dim",
        "qk_nope_head_dim",
        "kv_channels",
        "index_head_dim",
        "global_head_dim",
        "chunk_size",
        "hidden_size_per_layer_input",
    ],
    8: ["qk_rope_head_dim", "mamba_d_state", "state_size", "ssm_state_size"],
    LAYERS: [
        "num_hidden_layers",
        "num_layers",
        "n_layer",
        "n_layers",
        "decoder_layers",
        "num_attention_heads",
        "num_heads",
        "n_head",
        "n_heads",
        "decoder_attention_heads",
        "num_local_experts",
        "num_experts",
        "n_routed_experts",
        "moe_num_experts",
    ],
    2: [
        "num_key_value_heads",
        "num_kv_heads",
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_k",
        "top_k_experts",
    ],
    1: ["n_group", "topk_group", "first_k_dense_replace"],
    VOCAB: ["vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"],
    256: ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"],
    65: ["index_topk"],
}
_HEAD_WIDTHS = [
    "head_dim",
    "v_head_dim",
    "qk_nope_head_dim",
    "kv_channels",
    "index_head_dim",
    "global_head_dim",
    "qk_rope_head_dim",
]
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads")

_GPT = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256, "n_inner": 96, "rotary_dim": 8, **IDS}
_BERT = {
    "hidden_size": 64,
    "embedding_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "is_decoder": True,
    **IDS,
}
_GEMMA = {
    "hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCAB,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_kv_shared_layers": 0,
    "sliding_window": 32,
    **IDS,
}
_HEADS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    **IDS,
}
_MAMBA = {"mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
_EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
# These are the fields of kinds that no guess fits, or whose guess gives another model than their checkpoints have.
OWN: dict[str, dict[str, Any]] = {
    "gptj": _GPT,
    "codegen": _GPT,
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "max_position_embeddings": 256,
        "attention_types": [[["global", "local"], 2]],
        **IDS,
    },
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": None,
        "laurel_rank": 8,
        **_GEMMA,
    },
    "gemma4_text": {"global_head_dim": 16, **_GEMMA},
    "qwen4_exp_text": {
        **_HEADS,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "hc_lowrank": 16,
        "ple_layer_ids": [2],
        "ple_embed_dim": 256,
        "ngram_vocab_size_base": 200,
        "split_ngram_parts": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "longcat_flash": {
        "hidden_size": 64,
        "num_layers": 4,
        "num_attention_heads": 4,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": 8,
        **_LATENT,
        **IDS,
    },
    "dory": {**_HEADS, "head_dim": 16, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "bamba": {**_HEADS, **_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        **_HEADS,
        **_MAMBA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "falcon_h1": {**_HEADS, **_MAMBA, "head_dim": 16, "mamba_d_ssm": 128, "mamba_chunk_size": 16},
    "jamba": {
        **_HEADS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
    "deepseek_v2": {
        **_HEADS,
        **_LATENT,
        **_EXPERTS,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "head_dim": 8,
    },
    "dots1": {**_HEADS, **_EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16},
    "lfm2_moe": {
        **_HEADS,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
        **IDS,
    },
    "dots3_note_text": {
        **_HEADS,
        **_LATENT,
        **_EXPERTS,
        "shared_experts_intermediate_size": 32,
        "head_dim": 24,
        "index_topk": 65,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "sliding_window": 32,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        **{f"swa_{name}": size for name, size in _LATENT.items()},
        "swa_num_attention_heads": 4,
        "swa_head_dim": 24,
    },
    "zaya": {
        **_HEADS,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "router_hidden_size": 16,
    },
    "zamba": {
        **_HEADS,
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,
        "mamba_dt_rank": 8,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        **_HEADS,
        "num_key_value_heads": 4,
        "mamba_d_state": 16,
        "adapter_rank": 8,
        "chunk_size": 16,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "use_mamba_kernels": False,
    },
    "cohere_compass_text": {
        **_HEADS,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "kimi_linear": {
        **_HEADS,
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 16,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    },
    "mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "num_heads": 8,
        "n_groups": 1,
        "state_size": 16,
        **IDS,
    },
    "xlnet": {"d_model": 64, "n_layer": 4, "n_head": 4, "d_inner": 96, **IDS},
    "xmod": {**_BERT, "languages": ["en_XX"], "default_language": "en_XX"},
    "git": {
        **_HEADS,
        "vision_config": {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "image_size": 32,
        },
    },
}
OWN |= dict.fromkeys(
    [
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
    ],
    _BERT,
)
# These kinds are not built, for the given reason.
UNFIT = {
    "blt": "is a model of bytes made of four models, which cannot be shrunk together",
    "emu3": "is listed with the config of text and images, and its class takes that of text alone, which is not listed",
    "gemma4_assistant": "drafts for a Gemma 4 out of what that model computes, and does not run by itself",
    "gemma4_unified_assistant": "drafts for a Gemma 4 out of what that model computes, and does not run by itself",
    "mllama": "reads images through cross-attention: a backbone of EngramForConditionalGeneration, if any",
    "musicgen": "reads and writes codes of sound, several at each position",
    "musicgen_melody": "reads and writes codes of sound, several at each position",
    "phi4_multimodal": "reads images and sound with parts of one config, which cannot be shrunk together",
    "reformer": "keeps no transformers Cache, and hashes positions in chunks of its own",
}


def config_of(kind: str) -> PreTrainedConfig:
    """Return the first guess at a small config of a kind."""
    config_class, fields = next(_guesses(kind))
    return config_class(**fields)


def kinds() -> list[str]:
    """Return every kind of model that `AutoModelForCausalLM` knows, except ours."""
    return [kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if kind in CONFIG_MAPPING and kind not in OURS]


def build(kind: str, ids: torch.Tensor) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return the smallest model of a kind that runs, with random weights, and its logits for `ids`.

    Raises:
        LookupError: no guess fits; the message says why each failed.
    """
    if kind in UNFIT:
        raise LookupError(UNFIT[kind])
    errors: dict[str, None] = {}
    guesses = _guesses(kind)
    while True:
        try:
            config_class, fields = next(guesses)
            return _run(config_class(**fields), ids)
        except StopIteration:
            raise LookupError(" | ".join(errors)) from None
        except Exception as error:  # A config that does not fit may raise anything.
            errors[f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"] = None


def _guesses(kind: str) -> Iterator[tuple[type[PreTrainedConfig], dict[str, Any]]]:
    for known in (kind, f"{kind}_text"):
        if known in OWN:
            yield CONFIG_MAPPING[known], OWN[known]
            return
    text = CONFIG_MAPPING[kind]().get_text_config(decoder=True)
    if text.model_type in OWN:
        yield type(text), OWN[text.model_type]
        return
    for fields in _shrunk(text):
        yield type(text), fields


def _shrunk(text: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    small = {name: size for size, names in _SIZES.items() for name in names if _is_number(text, name)} | IDS
    without_widths = {name: size for name, size in small.items() if name not in _HEAD_WIDTHS}
    full_heads = {name: 4 for name in _KEY_HEADS if name in small}
    one_head = {name: 1 for name in _KEY_HEADS if name in small}
    types = _layer_types(text)
    yield from (small | types, small | types | full_heads, without_widths | types, without_widths | types | full_heads)
    yield from (small, small | full_heads, without_widths, without_widths | full_heads, small | types | one_head)
    yield small | types | {"head_dim": 16, "num_key_value_heads": 2}
    yield {name: size for name, size in small.items() if name != "num_hidden_layers"}


def _is_number(config: PreTrainedConfig, name: str) -> bool:
    try:
        return isinstance(getattr(config, name, None), (int, float))
    except Exception:  # This value differs between layers.
        return False


def _layer_types(text: PreTrainedConfig) -> dict[str, list[str]]:
    """Return the types of layers, each of which a model of few layers should contain."""
    found = {}
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(text, name, None)
        if isinstance(kinds, (list, tuple)) and len(kinds) > LAYERS:
            distinct = list(dict.fromkeys(kinds))
            found[name] = (distinct * LAYERS)[:LAYERS] if name == "layer_types" else sorted(distinct * 2)[:LAYERS]
    return found


@torch.no_grad()
def _run(config: PreTrainedConfig, ids: torch.Tensor) -> tuple[PreTrainedModel, torch.Tensor]:
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(config).num_parameters()
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f}M parameters are too many")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model)
    logits = model.eval()(input_ids=ids, use_cache=False).logits
    if not torch.isfinite(logits).all():
        raise ValueError("its logits are not finite")
    return model, logits


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Randomize every parameter: fresh weights leave whole parts of a model without effect."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.15 * noise)

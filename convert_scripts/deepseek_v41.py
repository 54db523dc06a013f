"""The table of DeepSeek-V4.1: upstream names, our names, shapes and storage.

Upstream is the layout of the released checkpoints (names as in DeepSeek's own inference code); ours is transformers' naming
of DeepSeek-V4 under `model.`, with Engram's tensors in the `engram` submodule of their layer.
"""

from collections.abc import Mapping

from .number_formats import BF16, F32, FP4_ROWS, FP8_BLOCKS, FP8_ROWS, Storage
from .safetensors_files import ConversionError
from .tensor_rules import Family, Geometry, Rule

LAYER = "layers.{layer}."
OUR_LAYER = "model.layers.{layer}."


def _rule(
    upstream: str | tuple[str, ...],
    ours: str,
    shape: str,
    storage: Storage,
    where: str = "layers",
    file: str = "model",
) -> Rule:
    names = (upstream,) if isinstance(upstream, str) else upstream
    return Rule(OUR_LAYER + ours, tuple(LAYER + name for name in names), tuple(shape.split()), storage, where, file)


RULES = (
    Rule("model.embed_tokens.weight", ("embed.weight",), ("vocab_size", "hidden_size"), BF16),
    Rule("model.norm.weight", ("norm.weight",), ("hidden_size",), BF16),
    Rule("lm_head.weight", ("head.weight",), ("vocab_size", "hidden_size"), BF16),
    # Norms and hyper-connections.
    _rule("attn_norm.weight", "input_layernorm.weight", "hidden_size", BF16),
    _rule("ffn_norm.weight", "post_attention_layernorm.weight", "hidden_size", BF16),
    _rule("hc_attn_fn", "attn_hc.fn", "hc_rows hc_width", F32),
    _rule("hc_attn_base", "attn_hc.base", "hc_rows", F32),
    _rule("hc_attn_scale", "attn_hc.scale", "hc_scales", F32),
    _rule("hc_ffn_fn", "ffn_hc.fn", "hc_rows hc_width", F32),
    _rule("hc_ffn_base", "ffn_hc.base", "hc_rows", F32),
    _rule("hc_ffn_scale", "ffn_hc.scale", "hc_scales", F32),
    # Attention.
    _rule("attn.wq_a.weight", "self_attn.q_a_proj.weight", "q_lora_rank hidden_size", FP8_BLOCKS),
    _rule("attn.q_norm.weight", "self_attn.q_a_norm.weight", "q_lora_rank", BF16),
    _rule("attn.wq_b.weight", "self_attn.q_b_proj.weight", "heads_width q_lora_rank", FP8_BLOCKS),
    _rule("attn.wkv.weight", "self_attn.kv_proj.weight", "head_dim hidden_size", FP8_BLOCKS),
    _rule("attn.kv_norm.weight", "self_attn.kv_norm.weight", "head_dim", BF16),
    _rule("attn.wo_a.weight", "self_attn.o_a_proj.weight", "o_width o_group_width", FP8_BLOCKS),
    _rule("attn.wo_b.weight", "self_attn.o_b_proj.weight", "hidden_size o_width", FP8_BLOCKS),
    _rule("attn.attn_sink", "self_attn.sinks", "num_attention_heads", F32),
    # Compressed attention: a KV source pools, an index source chooses.
    _rule(
        "attn.compressor.wkv.weight", "self_attn.compressor.kv_proj.weight", "head_dim hidden_size", BF16, "kv_sources"
    ),
    _rule(
        "attn.compressor.wgate.weight",
        "self_attn.compressor.gate_proj.weight",
        "head_dim hidden_size",
        BF16,
        "pooling",
    ),
    _rule("attn.compressor.norm.weight", "self_attn.compressor.kv_norm.weight", "head_dim", BF16, "kv_sources"),
    _rule(
        "attn.indexer.wq_b.weight",
        "self_attn.indexer.q_b_proj.weight",
        "index_width q_lora_rank",
        FP8_BLOCKS,
        "index_sources",
    ),
    _rule(
        "attn.indexer.weights_proj.weight",
        "self_attn.indexer.weights_proj.weight",
        "index_n_heads hidden_size",
        BF16,
        "index_sources",
    ),
    _rule("attn.indexer.wk.weight", "self_attn.indexer.k_proj.weight", "index_head_dim head_dim", BF16, "index_keys"),
    _rule("attn.indexer.k_norm.weight", "self_attn.indexer.k_norm.weight", "index_head_dim", BF16, "index_keys"),
    # Experts.
    _rule("ffn.gate.weight", "mlp.gate.weight", "n_routed_experts hidden_size", BF16),
    _rule("ffn.gate.bias", "mlp.gate.e_score_correction_bias", "n_routed_experts", F32),
    _rule("ffn.gate.bias_vl", "mlp.gate.e_score_correction_bias_vl", "n_routed_experts", F32),
    _rule(
        "ffn.shared_experts.w1.weight", "mlp.shared_experts.gate_proj.weight", "shared_width hidden_size", FP8_BLOCKS
    ),
    _rule("ffn.shared_experts.w3.weight", "mlp.shared_experts.up_proj.weight", "shared_width hidden_size", FP8_BLOCKS),
    _rule(
        "ffn.shared_experts.w2.weight", "mlp.shared_experts.down_proj.weight", "hidden_size shared_width", FP8_BLOCKS
    ),
    _rule(
        ("ffn.experts.{expert}.w1.weight", "ffn.experts.{expert}.w3.weight"),
        "mlp.experts.gate_up_proj",
        "moe_intermediate_size hidden_size",
        FP4_ROWS,
    ),
    _rule("ffn.experts.{expert}.w2.weight", "mlp.experts.down_proj", "hidden_size moe_intermediate_size", FP4_ROWS),
    # Engram: the table, one fused projection (keys of all streams, then the value), and the norms' weights.
    _rule("engram.embed.weight", "engram.table.weight", "engram_rows engram_head_dim", FP8_ROWS, "engram", "table"),
    _rule("engram.wkv.weight", "engram.kv_proj.weight", "engram_kv_width engram_width", FP8_BLOCKS, "engram"),
    _rule("engram.q_weight", "engram.q_norm.weight", "hc_mult hidden_size", BF16, "engram"),
    _rule("engram.k_weight", "engram.k_norm.weight", "hc_mult hidden_size", BF16, "engram"),
)


def geometry(text: Mapping) -> Geometry:
    """Dimensions and layer sets of an upstream `text_config`."""
    try:
        return Geometry(_dimensions(text), _layer_sets(text), text["n_routed_experts"])
    except KeyError as error:
        raise ConversionError(f"text_config of config.json lacks {error}; is it a DeepSeek-V4.1 config?") from error


def _dimensions(text: Mapping) -> dict:
    streams, hidden = text["hc_mult"], text["hidden_size"]
    orders = text["engram_max_ngram_size"] - 1
    copied = (
        "vocab_size hidden_size q_lora_rank head_dim num_attention_heads index_n_heads index_head_dim n_routed_experts "
        "moe_intermediate_size engram_head_dim hc_mult"
    )
    return {name: text[name] for name in copied.split()} | {
        # Per stream one `pre` and one `post`, and the matrix that mixes the streams; one scale each.
        "hc_rows": (2 + streams) * streams,
        "hc_width": streams * hidden,
        "hc_scales": 3,
        "heads_width": text["num_attention_heads"] * text["head_dim"],
        "o_width": text["o_groups"] * text["o_lora_rank"],
        "o_group_width": text["num_attention_heads"] * text["head_dim"] // text["o_groups"],
        "index_width": text["index_n_heads"] * text["index_head_dim"],
        "shared_width": text["n_shared_experts"] * text["moe_intermediate_size"],
        "engram_rows": dict(zip(text["engram_layer_ids"], text["engram_num_embeddings"], strict=True)),
        "engram_kv_width": (streams + 1) * hidden,
        "engram_width": orders * text["engram_n_heads"] * text["engram_head_dim"],
    }


def _layer_sets(text: Mapping) -> dict[str, tuple[int, ...]]:
    kv_sources, ratios = text["kv_source_layer_ids"], text["compress_ratios"]
    return {
        "layers": tuple(range(text["num_hidden_layers"])),
        "kv_sources": tuple(kv_sources),
        # At ratio 1 there is no group to pool, so nothing to weigh.
        "pooling": tuple(layer for layer in kv_sources if ratios[layer] > 1),
        "index_sources": tuple(text["index_source_layer_ids"]),
        "index_keys": tuple(layer for layer in text["index_source_layer_ids"] if layer in kv_sources),
        "engram": tuple(text["engram_layer_ids"]),
    }


DEEPSEEK_V41 = Family("deepseek_v41", RULES, ("vision.", "aligner.", "image_", "mtp."), geometry)

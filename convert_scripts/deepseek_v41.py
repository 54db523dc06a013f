"""The table of DeepSeek-V4.1: upstream names, our names, shapes and storage.

Tensors of the vision tower and of draft layers exist if the config describes these. Upstream is the layout of the
released checkpoints (names as in DeepSeek's own inference code); ours is transformers' naming of DeepSeek-V4 under
`model.`, with Engram's tensors in the `engram` submodule of their layer.
"""

from collections.abc import Mapping
from dataclasses import replace

from .safetensors_files import ConversionError
from .storage import BF16, F32, FP4_ROWS, FP8_BLOCKS, FP8_ROWS, LIKELY_BF16, LIKELY_F32, Storage
from .tensor_rules import Dimensions, Layout, Rule

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


TEXT = (
    Rule("model.embed_tokens.weight", ("embed.weight",), ("vocab_size", "hidden_size"), BF16),
    Rule("model.norm.weight", ("norm.weight",), ("hidden_size",), BF16),
    Rule("lm_head.weight", ("head.weight",), ("vocab_size", "hidden_size"), BF16),
    # These are norms and hyper-connections.
    _rule("attn_norm.weight", "input_layernorm.weight", "hidden_size", BF16),
    _rule("ffn_norm.weight", "post_attention_layernorm.weight", "hidden_size", BF16),
    _rule("hc_attn_fn", "attn_hc.fn", "hc_rows hc_width", F32),
    _rule("hc_attn_base", "attn_hc.base", "hc_rows", F32),
    _rule("hc_attn_scale", "attn_hc.scale", "hc_scales", F32),
    _rule("hc_ffn_fn", "ffn_hc.fn", "hc_rows hc_width", F32),
    _rule("hc_ffn_base", "ffn_hc.base", "hc_rows", F32),
    _rule("hc_ffn_scale", "ffn_hc.scale", "hc_scales", F32),
    # These are the projections of attention.
    _rule("attn.wq_a.weight", "self_attn.q_a_proj.weight", "q_lora_rank hidden_size", FP8_BLOCKS),
    _rule("attn.q_norm.weight", "self_attn.q_a_norm.weight", "q_lora_rank", BF16),
    _rule("attn.wq_b.weight", "self_attn.q_b_proj.weight", "heads_width q_lora_rank", FP8_BLOCKS),
    _rule("attn.wkv.weight", "self_attn.kv_proj.weight", "head_dim hidden_size", FP8_BLOCKS),
    _rule("attn.kv_norm.weight", "self_attn.kv_norm.weight", "head_dim", BF16),
    _rule("attn.wo_a.weight", "self_attn.o_a_proj.weight", "o_width o_group_width", FP8_BLOCKS),
    _rule("attn.wo_b.weight", "self_attn.o_b_proj.weight", "hidden_size o_width", FP8_BLOCKS),
    _rule("attn.attn_sink", "self_attn.sinks", "num_attention_heads", F32),
    # In compressed attention, a KV source pools positions, and an index source selects them.
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
    # These are the router and the experts.
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
    # Engram has the table, one fused projection (keys of all streams, then the value), and the norms' weights.
    _rule("engram.embed.weight", "engram.table.weight", "engram_rows engram_head_dim", FP8_ROWS, "engram", "table"),
    _rule("engram.wkv.weight", "engram.kv_proj.weight", "engram_kv_width engram_width", FP8_BLOCKS, "engram"),
    _rule("engram.q_weight", "engram.q_norm.weight", "hc_mult hidden_size", BF16, "engram"),
    _rule("engram.k_weight", "engram.k_norm.weight", "hc_mult hidden_size", BF16, "engram"),
)


def _vision(upstream: str, ours: str, shape: str, storage: Storage = LIKELY_BF16) -> Rule:
    return Rule(f"model.{ours}", (upstream,), tuple(shape.split()), storage, "vision")


BLOCK = "vision.blocks.{layer}."
OUR_BLOCK = "vision_tower.layers.{layer}."
VISION = (
    _vision("vision.patch_embed.proj.weight", "vision_tower.patch_embedding.weight", "vision_width patch_values"),
    _vision("vision.patch_embed.proj.bias", "vision_tower.patch_embedding.bias", "vision_width"),
    _vision("vision.norm.weight", "vision_tower.post_layernorm.weight", "vision_width", LIKELY_F32),
    _vision("aligner.w1.weight", "vision_tower.aligner.linear_1.weight", "hidden_size window_width"),
    _vision("aligner.w1.bias", "vision_tower.aligner.linear_1.bias", "hidden_size"),
    _vision("aligner.w2.weight", "vision_tower.aligner.linear_2.weight", "hidden_size hidden_size"),
    _vision("aligner.w2.bias", "vision_tower.aligner.linear_2.bias", "hidden_size"),
    _vision("image_start", "image_start", "hidden_size"),
    _vision("image_newline", "image_newline", "hidden_size"),
    _vision("image_end", "image_end", "hidden_size"),
    _vision(BLOCK + "norm1.weight", OUR_BLOCK + "layer_norm1.weight", "vision_width", LIKELY_F32),
    _vision(BLOCK + "norm2.weight", OUR_BLOCK + "layer_norm2.weight", "vision_width", LIKELY_F32),
    _vision(BLOCK + "attn.wqkv.weight", OUR_BLOCK + "self_attn.qkv_proj.weight", "vision_qkv_width vision_width"),
    _vision(BLOCK + "attn.wqkv.bias", OUR_BLOCK + "self_attn.qkv_proj.bias", "vision_qkv_width"),
    _vision(BLOCK + "attn.wo.weight", OUR_BLOCK + "self_attn.out_proj.weight", "vision_width vision_width"),
    _vision(BLOCK + "attn.wo.bias", OUR_BLOCK + "self_attn.out_proj.bias", "vision_width"),
    _vision(BLOCK + "mlp.w1.weight", OUR_BLOCK + "mlp.gate_up_proj.weight", "vision_mlp_rows vision_width"),
    _vision(BLOCK + "mlp.w2.weight", OUR_BLOCK + "mlp.down_proj.weight", "vision_width vision_mlp_width"),
)


def _draft(upstream: str, ours: str, shape: str, storage: Storage) -> Rule:
    return Rule(f"draft.{ours}", (upstream,), tuple(shape.split()), storage, "drafts", "draft")


def _of_a_draft_layer(rule: Rule) -> Rule:
    """Return the rule for a draft layer, which is a layer of window attention with fewer experts."""
    experts = "dspark_n_routed_experts"
    return replace(
        rule,
        ours="draft.layers.{layer}." + rule.ours.removeprefix(OUR_LAYER),
        upstream=tuple("mtp.{layer}." + name.removeprefix(LAYER) for name in rule.upstream),
        shape=tuple(experts if name == "n_routed_experts" else name for name in rule.shape),
        where="drafts",
        file="draft",
        experts=experts,
    )


LAST = "mtp.{last_draft}."
DRAFTS = (
    _draft("mtp.0.main_proj.weight", "main_proj.weight", "hidden_size draft_features", FP8_BLOCKS),
    _draft("mtp.0.main_norm.weight", "main_norm.weight", "hidden_size", BF16),
    _draft(LAST + "norm.weight", "final_norm.weight", "hidden_size", BF16),
    _draft(LAST + "markov_head.embed.weight", "markov_embed.weight", "vocab_size dspark_markov_rank", LIKELY_BF16),
    _draft(LAST + "markov_head.head.weight", "markov_head.weight", "vocab_size dspark_markov_rank", LIKELY_BF16),
    _draft(LAST + "confidence_head.proj.weight", "confidence_head.weight", "one confidence_width", LIKELY_BF16),
    *(_of_a_draft_layer(rule) for rule in TEXT if "{layer}" in rule.ours and rule.where == "layers"),
)
RULES = TEXT + VISION + DRAFTS


def dimensions(config: Mapping) -> Dimensions:
    """Return dimensions and layer sets of an upstream config."""
    try:
        text, vision = config["text_config"], config.get("vision_config") or {}
        sets = _layer_sets(text) | {
            "vision": tuple(range(vision.get("num_hidden_layers", 0))),
            "drafts": _drafts(text),
        }
        sizes = _sizes(text)
        if sets["vision"]:
            sizes |= _vision_sizes(vision)
        if sets["drafts"]:
            sizes |= _draft_sizes(text)
        return Dimensions(sizes, sets)
    except KeyError as error:
        raise ConversionError(f"config.json lacks {error}; is it a DeepSeek-V4.1 config?") from error


def _drafts(text: Mapping) -> tuple[int, ...]:
    """Return the draft layers; none if the text layers that they read were left out."""
    count = text.get("num_nextn_predict_layers") or 0
    readable = all(layer < text["num_hidden_layers"] for layer in text.get("dspark_target_layer_ids") or [])
    return tuple(range(count)) if readable else ()


def _vision_sizes(vision: Mapping) -> dict[str, int]:
    width, patch = vision["hidden_size"], vision["patch_size"]
    return {
        "vision_width": width,
        "vision_qkv_width": 3 * width,
        "vision_mlp_width": vision["intermediate_size"],
        "vision_mlp_rows": 2 * vision["intermediate_size"],
        "patch_values": 3 * patch * patch,
        "window_width": width * vision["downsample_ratio"] ** 2,
    }


def _draft_sizes(text: Mapping) -> dict[str, int]:
    hidden, rank = text["hidden_size"], text["dspark_markov_rank"]
    return {
        "draft_features": len(text["dspark_target_layer_ids"]) * hidden,
        "dspark_n_routed_experts": text["dspark_n_routed_experts"],
        "dspark_markov_rank": rank,
        "confidence_width": hidden + rank,
        "one": 1,
    }


def _sizes(text: Mapping) -> dict:
    streams, hidden = text["hc_mult"], text["hidden_size"]
    orders = text["engram_max_ngram_size"] - 1
    copied = (
        "vocab_size hidden_size q_lora_rank head_dim num_attention_heads index_n_heads index_head_dim n_routed_experts "
        "moe_intermediate_size engram_head_dim hc_mult"
    )
    return {name: text[name] for name in copied.split()} | {
        # Every stream has one `pre` and one `post`; a matrix mixes the streams; each of the three has one scale.
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
        # At ratio 1 there is no group to pool, so there are no weights.
        "pooling": tuple(layer for layer in kv_sources if ratios[layer] > 1),
        "index_sources": tuple(text["index_source_layer_ids"]),
        "index_keys": tuple(layer for layer in text["index_source_layer_ids"] if layer in kv_sources),
        "engram": tuple(text["engram_layer_ids"]),
    }


DEEPSEEK_V41 = Layout("deepseek_v41", RULES, ("vision.", "aligner.", "image_", "mtp."), dimensions)

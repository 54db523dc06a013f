"""The fields of DeepSeek-V4.1's configs, with the release's values as defaults, and their rules.

The config classes are made from these. `engram convert` and `engram export` read and write config.json with them
alone, because importing transformers takes seconds.
"""

from dataclasses import dataclass
from typing import Any

from .safetensors_engram import EngramError

# This is the release's schedule; a model with fewer layers uses its beginning.
_COMPRESS_RATIOS = [0] * 2 + [2] * 18 + [1] * 20
_KV_SOURCES = [2, 8, 14, 20]
_INDEX_SOURCES = [2, 8, 14, 20, 24, 28, 32, 36]
_CANDIDATE_SOURCE = 20
ROPE_SCALING = {
    "rope_type": "yarn",
    "factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 65536,
}

_TEXT_COUNTS = [
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_lora_rank",
    "o_groups",
    "n_routed_experts",
    "num_experts_per_tok",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "candidate_topk_blocks",
    "candidate_block_size",
    "hc_mult",
    "hc_sinkhorn_iters",
]

# The release fixes these, and this implementation computes them so; another value would be silently ignored.
_FIXED = {
    "num_key_value_heads": 1,
    "n_shared_experts": 1,
    "hidden_act": "silu",
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
}

_VISION_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "downsample_ratio",
    "min_pixels",
    "out_hidden_size",
)

# These fields of the text model's config describe the draft layers.
DRAFT_FIELDS = (
    "num_nextn_predict_layers",
    "dspark_block_size",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
    "dspark_markov_rank",
    "dspark_n_routed_experts",
    "dspark_num_experts_per_tok",
)


@dataclass(eq=False, repr=False, kw_only=True)
class VisionFields:
    """The fields of [`DeepseekV41VisionConfig`]."""

    hidden_size: int = 1024
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    intermediate_size: int = 2816
    patch_size: int = 14
    rope_theta: float = 10000.0
    downsample_ratio: int = 3
    out_hidden_size: int = 5120
    max_image_tokens: int = 1024
    min_pixels: int = 544 * 544
    max_wh_ratio: float | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def check(self) -> None:
        """Refuse sizes that contradict each other.

        Raises:
            ValueError: the message names the field and the rule.
        """
        for name in _VISION_COUNTS:
            if getattr(self, name) < 1:
                raise EngramError(f"`vision_config.{name}` must be a positive integer, got {getattr(self, name)}.")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise EngramError(
                f"`vision_config.hidden_size` must be a multiple of four times `num_attention_heads` "
                f"{self.num_attention_heads}, got {self.hidden_size}."
            )
        check_limits(self.max_image_tokens, self.min_pixels, self.max_wh_ratio)


def check_limits(max_image_tokens: int, min_pixels: int, max_wh_ratio: float | None) -> None:
    """Refuse limits that no image, or not every image, can satisfy.

    Raises:
        ValueError: the message names the limit, its value and the expected value.
    """
    if max_image_tokens < 4:
        raise EngramError(
            f"`max_image_tokens` is {max_image_tokens}; give at least 4: the start, one position, its row's end, the end."
        )
    if min_pixels < 1:
        raise EngramError(f"`min_pixels` is {min_pixels}; give a positive number of pixels.")
    if max_wh_ratio is not None and max_wh_ratio < 1:
        raise EngramError(f"`max_wh_ratio` is {max_wh_ratio}; give at least 1 (width for a height of 1), or None.")


@dataclass(eq=False, repr=False, kw_only=True)
class TextFields:
    """The fields of [`DeepseekV41TextConfig`]; an object of either class has these methods."""

    vocab_size: int = 129280
    hidden_size: int = 5120
    moe_intermediate_size: int = 2304
    num_hidden_layers: int = 40
    num_attention_heads: int = 64
    num_key_value_heads: int = 1
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1280
    o_lora_rank: int = 1024
    o_groups: int = 8
    sliding_window: int = 128
    compress_ratios: list[int] | None = None
    kv_source_layer_ids: list[int] | None = None
    index_source_layer_ids: list[int] | None = None
    index_n_heads: int = 32
    index_head_dim: int = 128
    index_topk: int = 512
    candidate_source_layer_id: int | None = -1
    candidate_topk_blocks: int = 2048
    candidate_block_size: int = 8
    n_routed_experts: int = 384
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    scoring_func: str = "sqrtsoftplus"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-20
    initializer_range: float = 0.02
    max_position_embeddings: int = 1048576
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_parameters: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    cache_rounding: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.0
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False
    vision_config: Any = None  # It is a dict, or an object with the fields of `VisionFields`.
    image_token_id: int | None = None
    draft: bool = False
    dspark_confidence_threshold: float | None = None

    @property
    def upstream_rope_scaling(self) -> dict | None:
        """The release's `rope_scaling`: `rope_parameters["compress"]` without the keys added here."""
        added = ("rope_theta", "partial_rotary_factor", "attention_factor")
        scaling = {key: value for key, value in self.rope_parameters["compress"].items() if key not in added}
        return None if scaling["rope_type"] == "default" else scaling

    def source_of(self, layer: int, sources: list[int]) -> int | None:
        """Return the last of `sources` at or before `layer`, or None."""
        return max((source for source in sources if source <= layer), default=None)

    def fill_in(self, rope: dict) -> None:
        """Set the fields that follow from others.

        Args:
            rope: `rope_parameters`, or the `rope_scaling` that they follow from; empty for neither.
        """
        self._fill_schedule()
        self.rope_parameters = self._nested_rope_parameters(rope)

    def check(self) -> None:
        """Refuse fields that contradict each other.

        Raises:
            ValueError: the message names the field and the rule.
        """
        self._check_values()
        self._check_schedule()
        self._check_vision()
        for name, parameters in self.rope_parameters.items():
            self._check_rope(name, parameters)

    def _fill_schedule(self):
        layers = self.num_hidden_layers
        if self.compress_ratios is None:
            self.compress_ratios = _COMPRESS_RATIOS[:layers]
        if self.kv_source_layer_ids is None:
            self.kv_source_layer_ids = [layer for layer in _KV_SOURCES if layer < layers]
        if self.index_source_layer_ids is None:
            self.index_source_layer_ids = [layer for layer in _INDEX_SOURCES if layer < layers]
        if self.candidate_source_layer_id == -1:
            self.candidate_source_layer_id = _CANDIDATE_SOURCE if layers > _CANDIDATE_SOURCE else None

    def _check_values(self):
        for name in _TEXT_COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise EngramError(f"`{name}` must be a positive integer, got {value!r}.")
        for name, expected in _FIXED.items():
            if getattr(self, name) != expected:
                raise EngramError(f"`{name}` must be {expected!r} for DeepSeek-V4.1, got {getattr(self, name)!r}.")
        rules = (
            (self.num_attention_heads % self.o_groups, "num_attention_heads", f"be a multiple of `o_groups` {self.o_groups}"),
            (self.qk_rope_head_dim % 2, "qk_rope_head_dim", "be even, since channels are rotated in pairs"),
            (self.qk_rope_head_dim > self.head_dim, "qk_rope_head_dim", f"not exceed `head_dim` {self.head_dim}"),
            (self.qk_rope_head_dim > self.index_head_dim, "qk_rope_head_dim", f"not exceed `index_head_dim` {self.index_head_dim}"),
            (
                int(self.head_dim * (self.qk_rope_head_dim / self.head_dim)) != self.qk_rope_head_dim,
                "qk_rope_head_dim",
                f"survive transformers' rounding of its share of `head_dim` {self.head_dim} (a power of two does)",
            ),
            (self.head_dim % 32, "head_dim", "be a multiple of 32, the channels that share a rounding scale"),
            (self.index_head_dim % 32, "index_head_dim", "be a multiple of 32, the channels that share a rounding scale"),
            (self.num_experts_per_tok > self.n_routed_experts, "num_experts_per_tok", f"not exceed `n_routed_experts` {self.n_routed_experts}"),
        )  # fmt: skip
        for broken, name, rule in rules:
            if broken:
                raise EngramError(f"`{name}` must {rule}, got {getattr(self, name)}.")

    def _check_schedule(self):
        layers, ratios = self.num_hidden_layers, self.compress_ratios
        if len(ratios) < layers or any(not isinstance(ratio, int) or ratio < 0 for ratio in ratios):
            raise EngramError(
                f"`compress_ratios` must give each of {layers} layers a ratio of 0 or more, got {ratios}."
            )
        for name in ("kv_source_layer_ids", "index_source_layer_ids"):
            ids = getattr(self, name)
            if ids != sorted(set(ids)) or any(not 0 <= layer < layers or not ratios[layer] for layer in ids):
                raise EngramError(
                    f"`{name}` must be ascending layers below `num_hidden_layers` {layers} with a compress ratio above "
                    f"0, got {ids}."
                )
        self._check_sources()

    def _check_sources(self):
        kv, index, ratios = self.kv_source_layer_ids, self.index_source_layer_ids, self.compress_ratios
        if not set(kv) <= set(index):
            raise EngramError(
                "Every layer of `kv_source_layer_ids` must be in `index_source_layer_ids` too, because positions chosen "
                f"among older latents mean nothing for new ones; got {kv} and {index}."
            )
        for layer in range(self.num_hidden_layers):
            source = self.source_of(layer, kv)
            if ratios[layer] and (source is None or ratios[source] != ratios[layer]):
                raise EngramError(
                    f"Layer {layer} has compress ratio {ratios[layer]}, so the latest of `kv_source_layer_ids` {kv} at or "
                    f"before it must exist and have the same ratio; `compress_ratios` is {ratios}."
                )
        candidates = self.candidate_source_layer_id
        if candidates is not None and (candidates not in index or any(layer > candidates for layer in kv)):
            raise EngramError(
                f"`candidate_source_layer_id` must be one of `index_source_layer_ids` {index} with no KV source "
                f"{kv} after it, got {candidates}."
            )

    def _check_vision(self):
        if self.vision_config is None:
            return
        if self.vision_config.out_hidden_size != self.hidden_size:
            raise EngramError(
                f"`vision_config.out_hidden_size` must be the text model's `hidden_size` {self.hidden_size}, got "
                f"{self.vision_config.out_hidden_size}."
            )
        if self.image_token_id is None or not 0 <= self.image_token_id < self.vocab_size:
            raise EngramError(
                f"`image_token_id` must be an id of the vocabulary of {self.vocab_size} when there is a `vision_config`, got "
                f"{self.image_token_id}."
            )

    def _nested_rope_parameters(self, given: dict) -> dict:
        if "main" in given and "compress" in given:
            return {name: dict(given[name]) for name in ("main", "compress")}
        scaling = dict(given)
        kind = scaling.pop("type", "default")  # This is the key's name before transformers called it `rope_type`.
        share = {"partial_rotary_factor": self.qk_rope_head_dim / self.head_dim}
        compress = {"rope_type": kind, **scaling, "rope_theta": self.compress_rope_theta, **share}
        if compress["rope_type"] == "yarn":
            # DeepSeek does not enlarge the rotated vectors; without this, transformers would derive a factor above 1.
            compress.setdefault("attention_factor", 1.0)
        return {"main": {"rope_type": "default", "rope_theta": self.rope_theta, **share}, "compress": compress}

    def _check_rope(self, name: str, parameters: dict):
        kind = parameters.get("rope_type")
        missing = {"factor", "original_max_position_embeddings"} - parameters.keys()
        if kind not in ("default", "yarn"):
            raise EngramError(f"`rope_parameters[{name!r}]` must have `rope_type` 'default' or 'yarn', got {kind!r}.")
        if kind == "yarn" and missing:
            raise EngramError(f"YaRN in `rope_parameters[{name!r}]` (`rope_scaling`) needs {sorted(missing)}.")

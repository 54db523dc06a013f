"""Configuration of the DeepSeek-V4.1 text backbone (the language model without its Engram memory).

Fields carry the names of the release's `text_config`. Keys this model does not read (`engram_*`, `dspark_*`,
`num_nextn_predict_layers`, ...) are kept as attributes, so that a saved config still holds them.
"""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from .configuration_vision_deepseek_v41 import DeepseekV41VisionConfig
from .fields_deepseek_v41 import ROPE_SCALING, TextFields

# The cache layer of `cache_deepseek_v41.py` registers itself with transformers under this name.
LAYER_TYPE = "deepseek_v41_attention"


def _plan_of_experts(plan: dict[str, str] | None) -> dict[str, str] | None:
    """Return the rules of a DeepSeek-V4 plan for its mixture of experts; its attention is built differently."""
    return plan and {name: how for name, how in plan.items() if ".mlp." in name}


class DeepseekV41TextConfig(TextFields, PreTrainedConfig):
    r"""
    Configuration of [`DeepseekV41TextModel`]; the defaults are DeepSeek-V4.1-Flash.

    Args:
        compress_ratios (`list[int]`, *optional*):
            Tokens pooled into one compressed position, by layer; 0 means window attention alone. Entries past
            `num_hidden_layers` (the release lists its draft layers too) are kept and not read.
        kv_source_layer_ids (`list[int]`, *optional*):
            Layers that compute compressed latents; the layers after them read the latest ones.
        index_source_layer_ids (`list[int]`, *optional*):
            Layers that choose which compressed positions a query reads; the layers after them reuse the choice.
        candidate_source_layer_id (`int`, *optional*):
            Index source that also narrows what later index sources choose from, to the best
            `candidate_topk_blocks` blocks of `candidate_block_size` compressed positions. `None` switches it off.
        qk_rope_head_dim (`int`):
            How many of a head's last channels are rotated.
        rope_theta, compress_rope_theta (`float`):
            Base of the rotation in layers without and with compressed positions.
        rope_parameters (`dict`, *optional*):
            `{"main": {...}, "compress": {...}}`. Upstream's `rope_scaling` (the release's YaRN when left out, None for
            none; compressed layers only) is accepted too and folded in;
            [`~DeepseekV41TextConfig.upstream_rope_scaling`] gives it back.
        vision_config (`dict` or [`DeepseekV41VisionConfig`], *optional*):
            The vision tower's. None: the checkpoint is of text alone. Only [`DeepseekV41ForConditionalGeneration`] has the
            tower; [`DeepseekV41TextForCausalLM`] opens the same checkpoint as text.
        image_token_id (`int`, *optional*):
            The id that every position of an image has.
        draft (`bool`):
            Whether the model holds the draft layers that `generate(use_mtp=True)` needs. Without, they are loaded when they
            are first used, from the folder that the model came from.
        dspark_confidence_threshold (`float`, *optional*):
            Drafting stops before a token whose predicted probability of being accepted is below this. None: never.
        cache_rounding (`bool`):
            Whether the latents and index vectors are rounded to FP8 / FP4, as the release was trained. Off only to
            compare implementations: rounding is a step function, so tiny differences otherwise show as large ones.

    Raises:
        ValueError: when fields contradict each other; the message names the field and the rule.
    """

    model_type = "deepseek_v41_text"
    base_config_key = "text_config"
    sub_configs = {"vision_config": DeepseekV41VisionConfig}  # noqa: RUF012 (transformers' spelling)
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (transformers' spelling)
    # transformers' experts, FP8 and parallelism code ask for these names.
    attribute_map = {  # noqa: RUF012
        "num_local_experts": "n_routed_experts",
        "intermediate_size": "moe_intermediate_size",
    }
    # The experts are DeepSeek-V4's, so they shard as in the installed transformers. There is no pipeline plan: layers
    # pass on the streams, their collapse weights and the shared compressed state, more than transformers' plan can
    # name.
    base_model_tp_plan = _plan_of_experts(DeepseekV4Config.base_model_tp_plan)
    base_model_ep_plan = _plan_of_experts(DeepseekV4Config.base_model_ep_plan)

    def __post_init__(self, **kwargs):
        if isinstance(self.vision_config, dict):
            fields = {**self.vision_config, "out_hidden_size": self.hidden_size}
            self.vision_config = DeepseekV41VisionConfig(**fields) if fields.get("num_hidden_layers") != 0 else None
        rope_scaling, rope_parameters = kwargs.pop("rope_scaling", ROPE_SCALING), self.rope_parameters
        # The base class expects one flat dict or one per layer type; ours is by kind of layer, and set afterwards.
        self.rope_parameters = None
        super().__post_init__(**kwargs)
        self.fill_in(rope_parameters or rope_scaling or {})
        self.validate()

    @property
    def layer_types(self) -> list[str]:
        """One cache layer type for every decoder layer; `DynamicCache(config=...)` reads this."""
        return [LAYER_TYPE] * self.num_hidden_layers

    def validate(self):
        """Check all fields; transformers calls this before saving.

        Replaces the inherited checks, which know only transformers' own layer types and rope layouts.
        """
        self.check()

    def validate_layer_type(self):
        """Skip the inherited check; [`~DeepseekV41TextConfig.validate`] checks the schedule of this model's own layer
        types.
        """

    def validate_rope(self, *args, **kwargs):
        """Skip the inherited check; [`~DeepseekV41TextConfig.validate`] checks this model's own layout."""

    def standardize_rope_params(self):
        """Do nothing: both dicts are complete by construction, and flat keys beside them would only add noise."""


# A transformers release that brings its own keeps its place.
if DeepseekV41TextConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(DeepseekV41TextConfig.model_type, DeepseekV41TextConfig)

__all__ = ["DeepseekV41TextConfig"]

"""Configuration of DeepSeek-V4.1's vision tower: how images become patches, and patches features of the text model."""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .fields_deepseek_v41 import VisionFields


class DeepseekV41VisionConfig(VisionFields, PreTrainedConfig):
    r"""
    Configuration of [`DeepseekV41VisionModel`]; the defaults are DeepSeek-V4.1-Flash.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`):
            Sizes of the tower. A head must have a multiple of 4 channels, because half of its rotated pairs turn with the
            row of a patch and half with its column.
        patch_size (`int`):
            Pixels on a side of a patch.
        downsample_ratio (`int`):
            Patches on a side of a window that becomes one position of the text.
        out_hidden_size (`int`):
            Width of the text model. The release does not say it here, because it is `hidden_size` of its `text_config`.
        max_image_tokens (`int`):
            The most text positions an image may take, delimiters included; larger images are shrunk.
        min_pixels (`int`):
            Smaller images are enlarged to about this many pixels.
        max_wh_ratio (`float`, *optional*):
            The largest width for a height of 1; wider images are squeezed. None for no bound.
        rms_norm_eps (`float`):
            Epsilon of the tower's norms, which is not the text model's.

    Raises:
        ValueError: when a field breaks a rule; the message names it.
    """

    model_type = "deepseek_v41_vision"
    base_config_key = "vision_config"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check()


def known_copies(config_class: type) -> set[type]:
    """Return the config class and its other copy, if any: as remote code, this file can be loaded beside the
    package's.

    Configs are instances of the copy that is registered under the model type, so model classes register for both.
    """
    registered = CONFIG_MAPPING[config_class.model_type]
    is_copy = registered.__module__.rpartition(".")[2] == config_class.__module__.rpartition(".")[2]
    return {config_class, registered} if is_copy else {config_class}


# A transformers release that brings its own keeps its place.
if DeepseekV41VisionConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(DeepseekV41VisionConfig.model_type, DeepseekV41VisionConfig)

__all__ = ["DeepseekV41VisionConfig"]

"""Configuration of DeepSeek-V4.1's vision tower: how images become patches, and patches vectors of the text model."""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .safetensors_engram import EngramError

_POSITIVE_INTEGERS = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "downsample_ratio",
    "min_pixels",
    "out_hidden_size",
)


class DeepseekV41VisionConfig(PreTrainedConfig):
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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name in _POSITIVE_INTEGERS:
            if getattr(self, name) < 1:
                raise EngramError(f"`vision_config.{name}` must be a positive integer, got {getattr(self, name)}.")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise EngramError(
                f"`vision_config.hidden_size` must be a multiple of four times `num_attention_heads` "
                f"{self.num_attention_heads}, got {self.hidden_size}."
            )
        check_limits(self.max_image_tokens, self.min_pixels, self.max_wh_ratio)


def check_limits(max_image_tokens: int, min_pixels: int, max_wh_ratio: float | None) -> None:
    """Refuse limits that no image, or not every image, can be fitted into.

    Raises:
        ValueError: names the limit, its value and what it should be.
    """
    if max_image_tokens < 4:
        raise EngramError(
            f"`max_image_tokens` is {max_image_tokens}; give at least 4: the start, one position, its row's end, the end."
        )
    if min_pixels < 1:
        raise EngramError(f"`min_pixels` is {min_pixels}; give a positive number of pixels.")
    if max_wh_ratio is not None and max_wh_ratio < 1:
        raise EngramError(f"`max_wh_ratio` is {max_wh_ratio}; give at least 1 (width for a height of 1), or None.")


def known_copies(config_class: type) -> set[type]:
    """The config class, and its other copy if there is one: as remote code, this file can be loaded beside the package's.

    Configs are of the copy that is registered under the model type, so model classes register for both.
    """
    registered = CONFIG_MAPPING[config_class.model_type]
    is_copy = registered.__module__.rpartition(".")[2] == config_class.__module__.rpartition(".")[2]
    return {config_class, registered} if is_copy else {config_class}


# A transformers release that brings its own keeps its place.
if DeepseekV41VisionConfig.model_type not in CONFIG_MAPPING:
    AutoConfig.register(DeepseekV41VisionConfig.model_type, DeepseekV41VisionConfig)

__all__ = ["DeepseekV41VisionConfig"]

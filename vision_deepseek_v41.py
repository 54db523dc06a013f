"""DeepSeek-V4.1's vision tower and aligner: from patches of images to features of the text model's width.

Every image is encoded alone; images of a batch share the matrix products and are separate in the attention.

Letters used for shapes: I images, N patches of all images, n patches of one image, P pixels on a patch's side, M
positions of the text that show a part of an image.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel, initialization
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import capture_outputs

from .configuration_vision_deepseek_v41 import DeepseekV41VisionConfig
from .safetensors_engram import EngramError


class DeepseekV41VisionRMSNorm(nn.RMSNorm):
    """RMS norm in float32 for any dtype of input and weight; the output has the input's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize `[..., hidden]`, keeping shape and dtype."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None = None,
    scaling: float = 1.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute plain attention of `[1, heads, n, D]`; return `[1, n, heads, D]` and the weights `[1, heads, n, n]`."""
    weights = (query @ key.transpose(2, 3) * scaling).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (channel j, channel j + D/2) of `[heads, N, D]` by float32 angles `[N, D/2]`, in float32."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(rotated, dim=-1).to(x.dtype)


class DeepseekV41VisionAttention(nn.Module):
    """Attention of every patch to all patches of its image."""

    def __init__(self, config: DeepseekV41VisionConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, x: torch.Tensor, lengths: list[int], position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Map `[N, hidden]` to `[N, hidden]`; `lengths` are the patches of each image."""
        states = self.qkv_proj(x).view(len(x), 3, self.num_heads, self.head_dim).permute(1, 2, 0, 3)
        # Each head is contiguous, because attention reads scattered rows slower.
        query, key = (rotate_halves(part, *position_embeddings) for part in states[:2])
        value = states[2].contiguous()
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        # transformers' interface takes [batch, heads, patches, D]; an image is a batch of one.
        images = zip(*(part.unsqueeze(0).split(lengths, dim=2) for part in (query, key, value)), strict=True)
        outputs = [
            attend(self, *image, None, scaling=self.scaling, dropout=0.0, is_causal=False)[0] for image in images
        ]
        return self.out_proj(torch.cat(outputs, dim=1).reshape(len(x), -1))


class DeepseekV41VisionMLP(nn.Module):
    """SwiGLU; gate and up are one matrix, without bias."""

    def __init__(self, config: DeepseekV41VisionConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[N, hidden]` to `[N, hidden]`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class DeepseekV41VisionLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a norm and added to its input."""

    def __init__(self, config: DeepseekV41VisionConfig):
        super().__init__()
        self.layer_norm1 = DeepseekV41VisionRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layer_norm2 = DeepseekV41VisionRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DeepseekV41VisionAttention(config)
        self.mlp = DeepseekV41VisionMLP(config)

    def forward(
        self, x: torch.Tensor, lengths: list[int], position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Map `[N, hidden]` to `[N, hidden]`."""
        x = x + self.self_attn(self.layer_norm1(x), lengths, position_embeddings)
        return x + self.mlp(self.layer_norm2(x))


class DeepseekV41Aligner(nn.Module):
    """Merges windows of encoded patches and projects them to the text model's width."""

    def __init__(self, config: DeepseekV41VisionConfig):
        super().__init__()
        self.ratio = config.downsample_ratio
        merged = config.hidden_size * self.ratio**2
        self.linear_1 = nn.Linear(merged, config.out_hidden_size)
        self.linear_2 = nn.Linear(config.out_hidden_size, config.out_hidden_size)

    def merge(self, encoded: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Return windows `[M, hidden * ratio ** 2]` of one image's patches `[rows * columns, hidden]`, row by row.

        Channels come first inside a window's vector. Windows at the border are padded with zeros.
        """
        ratio = self.ratio
        picture = F.pad(encoded.view(rows, columns, -1), (0, 0, 0, -columns % ratio, 0, -rows % ratio))
        windows = picture.unflatten(1, (-1, ratio)).unflatten(0, (-1, ratio))  # [R, ratio, C, ratio, hidden]
        return windows.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)

    def forward(self, merged: torch.Tensor) -> torch.Tensor:
        """Map `[M, hidden * ratio ** 2]` to `[M, out_hidden_size]`."""
        return self.linear_2(F.gelu(self.linear_1(merged)))


class DeepseekV41VisionPreTrainedModel(PreTrainedModel):
    """The attributes that transformers requires of the tower."""

    config: DeepseekV41VisionConfig
    config_class = DeepseekV41VisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV41VisionLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": DeepseekV41VisionLayer}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["layer_norm1", "layer_norm2", "post_layernorm"]  # noqa: RUF012 (as in the release)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, DeepseekV41VisionRMSNorm):
            initialization.ones_(module.weight)
        else:
            super()._init_weights(module)


class DeepseekV41VisionModel(DeepseekV41VisionPreTrainedModel):
    """The vision tower with its aligner."""

    def __init__(self, config: DeepseekV41VisionConfig):
        super().__init__(config)
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, config.hidden_size)
        self.layers = nn.ModuleList(DeepseekV41VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = DeepseekV41VisionRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.aligner = DeepseekV41Aligner(config)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self, pixel_values: torch.Tensor, image_grid_hws: torch.LongTensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: floating `[N, 3, P, P]`, the patches of all images, each image row by row; as
                [`DeepseekV41ImageProcessor`] makes them.
            image_grid_hws: integer `[I, 2]`, rows and columns of patches of each image.

        Returns:
            `last_hidden_state` `[N, hidden_size]`, the encoded patches, and `pooler_output` `[M, out_hidden_size]`,
            the features for the text model, image after image, in reading order.

        Raises:
            ValueError: for patches of another shape or dtype, and for grids that do not match them.
        """
        grids = self.checked_grids(pixel_values, image_grid_hws)
        lengths = [rows * columns for rows, columns in grids]
        angles = self._position_embeddings(grids, pixel_values.device)
        hidden_states = self.patch_embedding(pixel_values.flatten(1).to(self.patch_embedding.weight.dtype))
        for layer in self.layers:
            hidden_states = layer(hidden_states, lengths, angles)
        encoded = self.post_layernorm(hidden_states)
        merged = [
            self.aligner.merge(image, *grid)
            for image, grid in zip(encoded.split(lengths), grids, strict=True)
        ]  # fmt: skip
        return BaseModelOutputWithPooling(last_hidden_state=encoded, pooler_output=self.aligner(torch.cat(merged)))

    def checked_grids(self, pixel_values: torch.Tensor, image_grid_hws: torch.Tensor) -> list[tuple[int, int]]:
        """Return the grids as integers if patches and grids are valid for `forward`; raise a `ValueError` otherwise."""
        patch = self.config.patch_size
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != (3, patch, patch):
            raise EngramError(
                f"`pixel_values` must be [patches, 3, {patch}, {patch}], got {list(pixel_values.shape)}; make them with "
                "this model's processor."
            )
        if not pixel_values.is_floating_point():
            raise EngramError(
                f"`pixel_values` must be floating-point numbers between -1 and 1, got {pixel_values.dtype}; make them with "
                "this model's processor."
            )
        if image_grid_hws is None:
            raise EngramError(
                "`pixel_values` came without `image_grid_hws`; pass everything that the processor returns."
            )
        if image_grid_hws.dim() != 2 or image_grid_hws.shape[1] != 2 or image_grid_hws.is_floating_point():
            raise EngramError(
                f"`image_grid_hws` must be integers [images, 2] (rows and columns of patches), got {image_grid_hws.dtype} "
                f"{list(image_grid_hws.shape)}."
            )
        grids = [(int(rows), int(columns)) for rows, columns in image_grid_hws.tolist()]
        patches = sum(rows * columns for rows, columns in grids)
        if not grids or any(min(grid) < 1 for grid in grids) or patches != len(pixel_values):
            raise EngramError(
                f"`image_grid_hws` {grids} tells of {patches} patches, but `pixel_values` holds {len(pixel_values)}; pass "
                "both as the processor returns them."
            )
        return grids

    def _position_embeddings(
        self, grids: list[tuple[int, int]], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines `[N, head_dim / 2]` in float32: a patch's row angles, then its column angles."""
        pairs = self.config.hidden_size // self.config.num_attention_heads // 4  # These are the angles of each axis.
        # Positions are exact places in the images, so they are float32 for any dtype of the model.
        exponents = torch.arange(pairs, device=device, dtype=torch.float32) / pairs
        frequencies = self.config.rope_theta**-exponents
        angles = []
        for rows, columns in grids:
            axes = torch.meshgrid(
                torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
            )
            angles.append(torch.cat([axis.reshape(-1, 1) * frequencies for axis in axes], dim=-1))
        angles = torch.cat(angles)
        return angles.cos(), angles.sin()


# The key is our own config class, so nothing of a later transformers release is replaced.
AutoModel.register(DeepseekV41VisionConfig, DeepseekV41VisionModel, exist_ok=True)

__all__ = ["DeepseekV41VisionModel", "DeepseekV41VisionPreTrainedModel"]

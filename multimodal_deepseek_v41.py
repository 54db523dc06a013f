"""DeepSeek-V4.1 with images: the text backbone, with the vision tower's features at the positions of images.

The classes derive from the text model's, so a checkpoint has one set of names, and opens as text without the tower.

Letters used for shapes: B rows, S tokens of this call, I images, N patches of all images, P pixels on a patch's side.
"""

import re

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling, MoeCausalLMOutputWithPast
from transformers.utils import logging

from .causal_lm_deepseek_v41 import DeepseekV41TextForCausalLM
from .configuration_deepseek_v41 import DeepseekV41TextConfig
from .configuration_vision_deepseek_v41 import known_copies
from .modeling_deepseek_v41 import CACHE_OUTPUT, VISION_TENSOR, DeepseekV41TextModel
from .safetensors_engram import EngramError
from .vision_deepseek_v41 import DeepseekV41VisionModel

logger = logging.get_logger(f"transformers.{__name__}")


class ForbidImageToken(LogitsProcessor):
    """Masks the image id in generation: without pixels it has no meaning."""

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return `scores` `[B, vocab]` with the id's set to minus infinity."""
        return scores.index_fill(1, torch.tensor([self.image_token_id], device=scores.device), float("-inf"))


class _ReadsImages:
    """The common part of the decoder and the model with its head, beside the text classes they derive from."""

    input_modalities = ("image", "text")
    _no_split_modules = ["DeepseekV41DecoderLayer", "DeepseekV41VisionLayer"]  # noqa: RUF012

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        info, *others = super(_ReadsImages, type(model))._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )
        missing = sorted(name for name in info.missing_keys if re.search(VISION_TENSOR, name))
        if missing and expected_keys is None:  # else it is an adapter
            raise EngramError(
                f"The checkpoint lacks {len(missing)} tensors of the vision tower, such as {missing[0]}, which would be random; "
                "complete the folder, or open it as text, with AutoModelForCausalLM."
            )
        return info, *others


class DeepseekV41Model(_ReadsImages, DeepseekV41TextModel):
    """The decoder with the vision tower before it.

    `forward` takes these arguments beside those of [`DeepseekV41TextModel`]:

    Args:
        input_ids: `[B, S]`; every position of an image has `config.image_token_id`.
        inputs_embeds: `[B, S, hidden]` instead of ids, with image features inserted at `image_mask`.
        pixel_values: floating `[N, 3, P, P]`, the images of the batch in the order of their positions.
        image_grid_hws: integer `[I, 2]`, rows and columns of patches.
        mm_encoder_outputs: `{"image": get_image_features(...)}` instead of pixels, so that a prompt can be passed in
            chunks that cut an image: for each chunk, the features of its image positions.

    Raises:
        ValueError: images and image positions do not match, or one of them is missing.
    """

    _keys_to_ignore_on_load_unexpected = None

    def __init__(self, config: DeepseekV41TextConfig):
        if config.vision_config is None:
            raise EngramError(
                "The config has no `vision_config`, so there is no tower to read images with; open the checkpoint as text, "
                "with AutoModelForCausalLM."
            )
        super().__init__(config)
        self.vision_tower = DeepseekV41VisionModel._from_config(config.vision_config)
        for name in ("image_start", "image_newline", "image_end"):
            setattr(self, name, nn.Parameter(torch.empty(config.hidden_size)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DeepseekV41Model):
            for delimiter in (self.image_start, self.image_newline, self.image_end):
                initialization.normal_(delimiter, std=self.config.initializer_range)

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_hws: torch.LongTensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Return the features at the positions of images in the text.

        Args:
            pixel_values, image_grid_hws: see [`DeepseekV41VisionModel`].

        Returns:
            `last_hidden_state` `[N, width of the tower]`, and `pooler_output`: for each image `[positions, hidden]`,
            its start, row after row of features with the row's end, and its end.
        """
        encoded = self.vision_tower(pixel_values, image_grid_hws)
        ratio = self.config.vision_config.downsample_ratio
        grids = [(-(-rows // ratio), -(-columns // ratio)) for rows, columns in image_grid_hws.tolist()]
        parts = encoded.pooler_output.split([rows * columns for rows, columns in grids])
        images = [self._delimit(part, *grid) for part, grid in zip(parts, grids, strict=True)]
        return BaseModelOutputWithPooling(last_hidden_state=encoded.last_hidden_state, pooler_output=images)

    def _delimit(self, vectors: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Insert delimiters: `[rows * columns, hidden]` to `[rows * (columns + 1) + 2, hidden]`."""
        start, newline, end = (
            delimiter.to(vectors.dtype) for delimiter in (self.image_start, self.image_newline, self.image_end)
        )
        lines = torch.cat([vectors.view(rows, columns, -1), newline.expand(rows, 1, -1)], dim=1)
        return torch.cat([start[None], lines.flatten(0, 1), end[None]])

    def get_image_mask(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Return which positions belong to an image, delimiters included: bool, in the shape of `input_ids`."""
        return input_ids == self.config.image_token_id

    def _embed(
        self, input_ids, inputs_embeds, image_mask, cache, **images
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if inputs_embeds is None:
            features = self._image_features(**images)
            image_mask = self._checked_image_mask(input_ids, image_mask)
            return self._merge(input_ids, image_mask, features), image_mask
        if images["pixel_values"] is not None:
            raise EngramError("Give `pixel_values` with `input_ids`; `inputs_embeds` must hold the images already.")
        return inputs_embeds, image_mask

    def _checked_image_mask(self, input_ids: torch.LongTensor, given: torch.Tensor | None) -> torch.Tensor:
        image_mask = self.get_image_mask(input_ids)
        if given is not None and not torch.equal(given.to(image_mask.device).bool(), image_mask):
            raise EngramError(
                f"`image_mask` {list(given.shape)} is not where `input_ids` {list(input_ids.shape)} hold the image id "
                f"{self.config.image_token_id}; leave it out."
            )
        return image_mask

    def _image_features(self, pixel_values, image_grid_hws, mm_encoder_outputs) -> torch.Tensor | None:
        """Return features `[positions of all images, hidden]`, or None."""
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None and encoded is not None:
            raise EngramError("Give either `pixel_values` or `mm_encoder_outputs`, not both.")
        if pixel_values is None and image_grid_hws is not None:
            raise EngramError(
                "`image_grid_hws` came without `pixel_values`; pass everything that the processor returns."
            )
        if pixel_values is not None:
            encoded = self.get_image_features(pixel_values, image_grid_hws)
        return None if encoded is None else torch.cat(list(encoded.pooler_output))

    def _merge(
        self, input_ids: torch.LongTensor, image_mask: torch.Tensor, features: torch.Tensor | None
    ) -> torch.Tensor:
        """Return embeddings `[B, S, hidden]` of the ids, with `features` at the mask."""
        embeds = self.embed_tokens(input_ids)
        positions, given = int(image_mask.sum()), 0 if features is None else len(features)
        if positions != given:
            raise EngramError(
                f"`input_ids` holds {positions} image positions (id {self.config.image_token_id}), but the images given "
                f"fill {given}; pass everything that the processor returns, untruncated."
            )
        if features is None:
            return embeds
        return embeds.masked_scatter(image_mask.unsqueeze(-1), features.to(embeds.device, embeds.dtype))


class DeepseekV41ForConditionalGeneration(_ReadsImages, DeepseekV41TextForCausalLM):
    """The model with the language-model head, from text and images to text: see [`DeepseekV41Model`]."""

    _model_class = DeepseekV41Model

    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_hws: torch.LongTensor, **kwargs
    ) -> BaseModelOutputWithPooling:
        """Return image features; see [`DeepseekV41Model.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_grid_hws, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hws: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """Run [`DeepseekV41Model`]; return logits `[B, S, vocab]`, and a loss for `labels` `[B, S]`.

        Labels with the image id do not count: no position learns to continue with an image.
        """
        if labels is not None:
            images = labels == self.config.image_token_id
            labels = labels.masked_fill(images, -100)
            if kwargs.get("num_items_in_batch") is not None and bool(images.any()):
                logger.warning_once(
                    "The labels hold image positions, which teach nothing, but were counted among the tokens that the loss is "
                    "the mean of, so it is too small; set them to -100 where the batch is made."
                )
        if "past_key_values" in kwargs:
            kwargs[CACHE_OUTPUT] = kwargs.pop("past_key_values")
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            pixel_values=pixel_values,
            image_grid_hws=image_grid_hws,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """Do as in transformers; images are passed with the prompt alone."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        if inputs.get("pixel_values") is None:
            inputs.pop("image_grid_hws", None)
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ):
        """Expand as in transformers; if it does not encode images beforehand (before 5.20), they are repeated row by
        row.
        """
        images = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "image_grid_hws")}
        expanded, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if images["pixel_values"] is not None and expand_size > 1:
            images = self._repeat_images(input_ids, expand_size, **images)
        return expanded, model_kwargs | {name: tensor for name, tensor in images.items() if tensor is not None}

    def _repeat_images(self, input_ids, times: int, pixel_values, image_grid_hws) -> dict[str, torch.Tensor]:
        """Repeat the images of a batch whose rows are repeated `times` times, one after the other."""
        ratio = self.config.vision_config.downsample_ratio
        ends = self.model.get_image_mask(input_ids).sum(-1).cumsum(0)
        windows = -(-image_grid_hws // ratio)
        tokens = windows[:, 0] * (windows[:, 1] + 1) + 2
        row_of_image = torch.searchsorted(ends, tokens.cumsum(0).to(ends.device)).tolist()
        patches = pixel_values.split(image_grid_hws.prod(-1).tolist())
        order = [
            image
            for row in range(len(input_ids))
            for _ in range(times)
            for image, owner in enumerate(row_of_image)
            if owner == row
        ]
        return {
            "pixel_values": torch.cat([patches[image] for image in order]),
            "image_grid_hws": image_grid_hws[order],
        }

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """Generate as in transformers; the image id is never generated."""
        processors = LogitsProcessorList([*(logits_processor or []), ForbidImageToken(self.config.image_token_id)])
        return super().generate(inputs, generation_config, processors, *args, **kwargs)


for _config in known_copies(DeepseekV41TextConfig):
    AutoModelForImageTextToText.register(_config, DeepseekV41ForConditionalGeneration, exist_ok=True)

__all__ = ["DeepseekV41ForConditionalGeneration", "DeepseekV41Model"]

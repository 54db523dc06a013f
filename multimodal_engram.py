"""Engram memory for backbones that read images: only the language model in them gets it.

Such a backbone inserts image features into the embeddings of its text, and calls its language model with those alone.
Memory is looked up by token id, so the outer model stores the ids of a call for the language model.

Shape letters: B batch, S positions.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from transformers import AutoModel, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_engram import EngramConfig
from .layer_engram import BESIDE, require_extensible, within
from .loading_engram import FoundTables
from .modeling_engram import EngramForCausalLM, EngramModel, EngramPreTrainedModel, forward_with_memory
from .safetensors_engram import EngramError

# These fields of a backbone's config name the token ids that features of images, videos or sounds replace.
_PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id", "image_token_index", "video_token_index")


class _Call(NamedTuple):
    """The arguments of the outer model's call, for as long as it runs."""

    reader: EngramConfig  # It is the config of the language model that the call is for.
    arguments: dict[str, torch.Tensor | None]  # These are arguments of `prepare_memory`.
    options: dict[str, Any]  # These are keyword arguments of [`EngramModel`] that a backbone does not know.


# Every thread has its own context, so that models may be called concurrently, and within each other.
_CALL: ContextVar[_Call | None] = ContextVar("the call of a model that reads images", default=None)


class EngramLanguageModel(EngramModel):
    """The language model in a backbone that reads images; by itself it is an [`EngramModel`], and is saved as one."""

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        return EngramModel._members(base)

    def _read_call(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
        call, embeds = _CALL.get(), inputs.get("inputs_embeds")
        if call is None or call.reader is not self.config or embeds is None:
            return super()._read_call(inputs)
        ids = call.arguments["input_ids"]
        if ids.shape != embeds.shape[:2]:
            raise EngramError(
                f"input_ids {list(ids.shape)} do not fit: the backbone's language model is called with {list(embeds.shape[:2])} "
                "positions, and each needs the id of its token; expand the ids of images, or use another backbone."
            )
        inputs.update(call.options)
        if call.arguments["sequence_ids"] is not None:
            inputs["seq_idx"] = call.arguments["sequence_ids"]
        return call.arguments


class EngramMultimodalModel(EngramPreTrainedModel):
    """A backbone that reads images and text, whose language model has memory, without a language-model head.

    Positions without text, such as those of images, have no memory, and a look-back ends there.

    Args:
        config: names the backbone in `backbone_config`.
        backbone: an instance to use instead of a new one; it is changed in place.
        engram_tables: as in [`EngramModel`].

    Raises:
        ValueError: as [`EngramModel`]; or the backbone has no language model that can have memory.
    """

    @classmethod
    def _prepare(
        cls, config: EngramConfig, backbone: PreTrainedModel | None = None, engram_tables: FoundTables | None = None
    ) -> PreTrainedModel:
        if backbone is None:
            backbone = AutoModel.from_config(config.backbone, dtype=torch.get_default_dtype())
        require_extensible(backbone)
        config.backbone = backbone.config  # `from_config` copies the config, but both must be one object.
        EngramLanguageModel(config.text_config, _language_model(backbone), engram_tables)
        return backbone

    def __init__(
        self,
        config: EngramConfig,
        backbone: PreTrainedModel | None = None,
        engram_tables: FoundTables | None = None,
    ):
        # The backbone's own class has initialized it, and its language model has memory.
        self._become(config)
        part = self.memory_model
        self._take_over(part, next(name for name, module in self.named_modules() if module is part))
        self.init_weights()

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        return {**super()._members(base), "forward": forward_with_memory(base.forward)}

    @property
    def memory_model(self) -> EngramModel:
        """The language model."""
        return self.get_decoder()

    def get_image_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the positions of features of images, videos or sounds, by their ids: bool, in the shape of
        `input_ids`.
        """
        found = torch.zeros_like(input_ids, dtype=torch.bool)
        for placeholder in _placeholder_ids(self.config):
            found = found | (input_ids == placeholder)
        return found

    def _run_with_memory(self, run_backbone: Callable, inputs: dict[str, Any]):
        """Return the backbone's outputs for the keyword arguments `inputs`, with memory."""
        if self.memory_model._asks_context:
            inputs |= BESIDE.get() or {}
        with within(_CALL, self._note_call(inputs)), within(BESIDE, None):
            return run_backbone(self, **inputs)

    def _note_call(self, inputs: dict[str, Any]) -> _Call:
        arguments = self._read_call(inputs)
        images = self.get_image_mask(arguments["input_ids"])
        if arguments["image_mask"] is not None:  # It belongs to embeddings that the caller made.
            images = images | arguments["image_mask"].to(images.device).bool()
        inputs.pop("seq_idx", None)  # Only the language model gets it.
        arguments |= {"image_mask": images, "position_ids": _text_positions(arguments["position_ids"])}
        options = {name: inputs.pop(name) for name in ("engram_gate_values", "engram_edit") if name in inputs}
        return _Call(self.config.text_config, arguments, options)


def _placeholder_ids(config: EngramConfig | PreTrainedConfig) -> list[int]:
    return sorted({getattr(config, name, None) for name in _PLACEHOLDERS} - {None})


def _text_positions(position_ids: torch.Tensor | None) -> torch.Tensor | None:
    """Return position ids `[B, S]` that separate documents, if there are any.

    None of the three axes of an image's positions increases by one. In `generate`, they follow that of the text.
    """
    if position_ids is None or position_ids.dim() == 2:
        return position_ids
    return position_ids[0] if position_ids.shape[0] == 4 else None


def _language_model(backbone: PreTrainedModel) -> PreTrainedModel:
    decoder, config = backbone.get_decoder(), backbone.config
    if type(backbone).can_generate() or getattr(decoder, "config", None) is not config.text_config:
        raise EngramError(
            f"A {type(backbone).__name__} keeps no language model of its own beside the other parts, so there is nothing to add "
            "memory to; use a backbone built as Gemma3ForConditionalGeneration or LlavaForConditionalGeneration is."
        )
    if not _placeholder_ids(config):
        raise EngramError(
            f"The config of a {type(backbone).__name__} names no token id that stands for images ({', '.join(_PLACEHOLDERS)}), so "
            "memory cannot tell them from text."
        )
    return decoder


class EngramForConditionalGeneration(EngramForCausalLM):
    """A model of text and images with memory, on a backbone that reads images; positions of images have no memory.

    For a checkpoint of DeepSeek-V4.1, [`EngramForCausalLM`] is the text model. The arguments are the same, except that
    `AutoModelForImageTextToText` loads a backbone, and a processor may replace the tokenizer.

    Raises:
        ValueError: as [`EngramForCausalLM`]; or the backbone reads text alone, or does not support memory.
    """

    host_class = AutoModelForImageTextToText
    _reads_images = True

    @classmethod
    def _prepare(
        cls, config: EngramConfig, host: PreTrainedModel | None = None, engram_tables: FoundTables | None = None
    ) -> PreTrainedModel:
        if "AutoModelForImageTextToText" not in config.remote_code_map():
            raise EngramError(
                f"The backbone is a {config.text_config.model_type}, which reads text alone; use EngramForCausalLM "
                "(AutoModelForCausalLM), or give the config of a backbone that reads images."
            )
        return super()._prepare(config, host, engram_tables)

    def _get_name(self) -> str:
        """Return the backbone's own name if `Trainer` knows that as a causal language model's, whose smoothed labels
        it shifts.
        """
        name = self._extends[1].__name__
        return name if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else super()._get_name()


EngramModel.composite_class = EngramMultimodalModel

EngramMultimodalModel.register_for_auto_class("AutoModel")
EngramForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

# As remote code, a model on such a backbone begins here.
__all__ = [
    "EngramConfig",
    "EngramForCausalLM",
    "EngramForConditionalGeneration",
    "EngramModel",
    "EngramMultimodalModel",
]

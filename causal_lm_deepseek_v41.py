"""The DeepSeek-V4.1 text backbone with its language-model head, and with its draft layers on request."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM
from transformers.utils import logging

from .configuration_deepseek_v41 import DeepseekV41TextConfig
from .configuration_vision_deepseek_v41 import known_copies
from .draft_deepseek_v41 import DeepseekV41DraftModel, draft_layers_config, require_readable_features
from .drafting_deepseek_v41 import DeepseekV41CandidateGenerator, DraftReport
from .modeling_deepseek_v41 import DeepseekV41PreTrainedModel, DeepseekV41TextModel
from .safetensors_engram import EngramError

_LOCATION = ("revision", "cache_dir", "subfolder", "local_files_only")

logger = logging.get_logger(f"transformers.{__name__}")


class DeepseekV41TextForCausalLM(DeepseekV41PreTrainedModel, DeepseekV4ForCausalLM):
    """The backbone with a language-model head; DeepSeek-V4's forward, loss and auxiliary loss around our decoder."""

    # Draft layers are part of a checkpoint, and of the model when `config.draft` is set.
    _keys_to_ignore_on_load_unexpected = [r"^draft\."]  # noqa: RUF012
    _model_class = DeepseekV41TextModel
    # These arguments of `from_pretrained` say where its files are, for the draft layers that are loaded later.
    location: Mapping[str, Any] = MappingProxyType({})

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys=None):
        if expected_keys is None:  # else it is an adapter
            given = load_config.download_kwargs or {}
            model.location = {name: given[name] for name in _LOCATION if given.get(name)}
        return super(DeepseekV41TextForCausalLM, type(model))._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, expected_keys
        )

    def __init__(self, config: DeepseekV41TextConfig):
        # This skips DeepSeek-V4's constructor, which would build DeepSeek-V4's decoder.
        super(DeepseekV4ForCausalLM, self).__init__(config)
        self.model = self._model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.draft = DeepseekV41DraftModel(config) if config.draft else None
        self.draft_report: DraftReport | None = None  # of the latest generation with drafts
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.n_routed_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, *args, image_mask=None, **kwargs):
        """Do as in transformers; an `image_mask` of the prompt is cut to the tokens of this step, and generated tokens
        are text.
        """
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if image_mask is not None:
            ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
            missing = max(0, input_ids.shape[1] - image_mask.shape[1])
            inputs["image_mask"] = F.pad(image_mask, (0, missing))[:, -ids.shape[1] :]
        return inputs

    def load_drafts(self, folder: str | None = None, **kwargs) -> None:
        """Load the draft layers, which `from_pretrained` leaves out unless it is called with `draft=True`.

        Args:
            folder: a folder or Hub id; by default, where this model came from.
            **kwargs: arguments of `from_pretrained`.

        Raises:
            ValueError: the model was trained without draft layers, or some of their weights are missing.
        """
        folder, config = folder or self.name_or_path, copy.copy(getattr(self.config, "text_config", self.config))
        require_readable_features(self.config)
        draft_layers_config(config)
        if not folder:
            raise EngramError(
                "This model was not loaded from a folder; say where its draft layers are: load_drafts(folder)."
            )
        if folder == self.name_or_path:
            # The draft layers come from the revision of this model, with its code if that was trusted.
            kwargs = {**self.location, "trust_remote_code": __name__.startswith("transformers_modules."), **kwargs}
        # The config is read as stored; this model's own config no longer has the quantization if its weights were
        # dequantized.
        names = ("token", "trust_remote_code", *_LOCATION)
        stored = AutoConfig.from_pretrained(folder, **{name: kwargs[name] for name in names if name in kwargs})
        if getattr(stored, "quantization_config", None) is not None:
            config.quantization_config = stored.quantization_config
        last = self.model.layers[-1]
        options = {"dtype": self.dtype, "device_map": {"": next(last.parameters()).device}, **kwargs}
        draft, info = DeepseekV41DraftModel.from_pretrained(
            folder, config=config, among_others=True, output_loading_info=True, **options
        )
        if info["missing_keys"]:
            raise EngramError(
                f"{folder} lacks {len(info['missing_keys'])} tensors of the draft layers, such as "
                f"draft.{min(info['missing_keys'])}; convert or fetch the checkpoint again, or generate without `use_mtp`."
            )
        self.draft, self.config.draft = draft.eval(), True

    def generate(self, inputs=None, generation_config=None, *args, **kwargs):
        """Generate as in transformers. With `use_mtp=True` the draft layers draft, and this model verifies: the output
        is the same, or has the same distribution, in fewer passes. `draft_report` then has the number of accepted
        drafts.

        `num_assistant_tokens` shortens the drafted blocks; `config.dspark_confidence_threshold` ends them where the
        confidence of the draft layers is low.

        Raises:
            ValueError: `use_mtp` with beams, or for a model without draft layers.
        """
        settings = generation_config or self.generation_config
        drafts = kwargs.get("use_mtp", getattr(settings, "use_mtp", None))
        if drafts and (kwargs.get("num_beams", getattr(settings, "num_beams", None)) or 1) > 1:
            raise EngramError(
                "`use_mtp` drafts for one sequence, so it does not go with beams; leave one of them out."
            )
        self.draft_report = None
        output = super().generate(inputs, generation_config, *args, **kwargs)
        if self.draft_report is not None:
            logger.info("Drafts: %s.", self.draft_report)
        return output

    def _get_candidate_generator(self, generation_config, *args, logits_processor=None, **kwargs):
        """Replace transformers' own `use_mtp`, which builds other draft layers than this model has."""
        if not generation_config.use_mtp:
            return super()._get_candidate_generator(
                generation_config, *args, logits_processor=logits_processor, **kwargs
            )
        if self.draft is None:
            self.load_drafts()
        require_readable_features(self.config)
        drafting = DeepseekV41CandidateGenerator(
            self.draft, self.get_input_embeddings(), self.get_output_embeddings(), generation_config, logits_processor
        )
        self.draft_report = drafting.report
        return drafting


# The key is our own config class, so nothing of a later transformers release is replaced.
for _config in known_copies(DeepseekV41TextConfig):
    AutoModelForCausalLM.register(_config, DeepseekV41TextForCausalLM, exist_ok=True)
# Trainer looks here whether labels must be shifted when it smooths them.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(DeepseekV41TextConfig.model_type, DeepseekV41TextForCausalLM.__name__)

__all__ = ["DeepseekV41TextForCausalLM"]

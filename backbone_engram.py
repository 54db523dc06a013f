"""The models that memory can be added to; every other kind is refused in one sentence that says what it is."""

import dataclasses
import inspect
import os
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.auto import CONFIG_MAPPING

from .configuration_engram import EngramConfig
from .modeling_engram import CACHE_NAMES
from .safetensors_engram import EngramError

_ADAPTER = "is an adapter, or has one; merge it (merge_and_unload) and add memory to the model that comes out"
_CLASSIFIER = "is a classifier or reward model: it scores a text and predicts no token; give a causal language model"
_DIFFUSION = "is a diffusion model: it does not read a text token after token; give a causal language model"
_ENCODER = "is an encoder: each token sees those that come after it; give a causal language model"
_ENCODER_DECODER = "is an encoder-decoder, or the decoder of one; give a decoder-only causal language model"
_HEADLESS = (
    "generates no text: it is an encoder, or a decoder without its language-model head; give a causal language model"
)
_NO_CACHE = (
    "keeps no transformers Cache that counts positions, where the memory's history lives; use a backbone with attention layers "
    "and such a cache"
)
_NO_TOKENS = "reads no token ids of a text but sound or other signals, and memory is looked up by token id; give a language model"
_UNRETURNED = "does not return the cache that it takes: what it has read is somewhere else, where the memory's history cannot follow"
# These are parts of the names of classes whose heads predict no token.
_CLASSIFIERS = ("Classification", "Reward", "QuestionAnswering", "MultipleChoice")
# These arguments of `from_pretrained` say where a config is.
_LOCATION = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def require_backbone(backbone: object, options: Mapping[str, Any] | None = None) -> None:
    """Refuse a model that is not a language model that reads token ids and predicts the next one.

    Args:
        backbone: a model, or the folder or Hub id of one.
        options: options of `from_pretrained`, if the model must be loaded.

    Raises:
        ValueError: the message says what the model is.
    """
    if isinstance(backbone, (str, os.PathLike)):
        name, faults = os.fspath(backbone), _faults_of_stored(os.fspath(backbone), options or {})
    else:
        name = type(backbone).__name__
        faults = _faults_of_model(backbone) if isinstance(backbone, PreTrainedModel) else _faults_of_others(backbone)
    _refuse_first(name, faults)


def require_decoder(model: PreTrainedModel, config: EngramConfig) -> None:
    """Refuse a model without head that is not a decoder, or has no cache that can store the memory's history.

    Raises:
        ValueError: the message says what the model is.
    """
    _refuse_first(type(model).__name__, _faults_of_decoder(model, config.text_config))


def _refuse_first(name: str, faults: Iterator[str]) -> None:
    fault = next(faults, None)
    if fault is not None:
        raise EngramError(f"{name} {fault}.")


def _faults_of_stored(name: str, options: Mapping[str, Any]) -> Iterator[str]:
    files = set(os.listdir(name)) if os.path.isdir(name) else {"config.json"}
    if "model_index.json" in files:
        yield _DIFFUSION
    if "config.json" not in files:
        if "adapter_config.json" in files:
            yield _ADAPTER
        return  # transformers then reports what is missing.
    fields, _ = PreTrainedConfig.get_config_dict(name, **{key: options[key] for key in _LOCATION if key in options})
    model_type = fields.get("model_type")
    kind = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401 (its `get` finds nothing)
    if fields.get("is_encoder_decoder", getattr(kind, "is_encoder_decoder", False)):
        yield _ENCODER_DECODER
    if _names_classifier(fields.get("architectures")):
        yield _CLASSIFIER
    generates = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if kind is not None and not generates and "auto_map" not in fields:
        yield f"is of the kind {model_type!r}, of which transformers has no causal language model; give one that generates text"


def _faults_of_others(backbone: object) -> Iterator[str]:
    if hasattr(backbone, "peft_config"):
        yield _ADAPTER
    if type(backbone).__module__.partition(".")[0] == "diffusers":
        yield _DIFFUSION
    yield "is no model of transformers; give a causal language model, or the folder or name of one"


def _faults_of_model(model: PreTrainedModel) -> Iterator[str]:
    name, config = type(model).__name__, model.config
    if getattr(model, "_hf_peft_config_loaded", False):
        yield _ADAPTER
    if config.is_encoder_decoder or type(config).is_encoder_decoder is True:
        yield _ENCODER_DECODER
    if "Diffusion" in name:
        yield _DIFFUSION
    if _names_classifier((name, *(config.architectures or ()))):
        yield _CLASSIFIER
    if model.main_input_name != "input_ids" or hasattr(config, "audio_channels"):
        yield _NO_TOKENS
    if _is_encoder(config):
        yield f"{_ENCODER} (this kind is one if its config says is_decoder=True)"
    if not model.can_generate():
        yield _HEADLESS


def _faults_of_decoder(model: PreTrainedModel, config: PreTrainedConfig) -> Iterator[str]:
    signature = inspect.signature(model.forward)
    name = next((name for name in CACHE_NAMES if name in signature.parameters), None)
    if _is_encoder(config):
        yield _ENCODER
    if name is None or not _counts_positions(config):
        yield _NO_CACHE
    taken = [kind for kind in _types_in(signature.parameters[name].annotation) if issubclass(kind, Cache)]
    if taken and not any(issubclass(DynamicCache, kind) for kind in taken):
        yield f"takes a {taken[0].__name__} of its own and no other cache, and the memory's history has no place there"
    if getattr(config, "prompt_length", 0):
        yield "puts tokens of its own in front of a text, which have no ids, so that rows and positions would not agree"
    outputs = [kind for kind in _types_in(signature.return_annotation) if dataclasses.is_dataclass(kind)]
    names = {field.name for kind in outputs for field in dataclasses.fields(kind)}
    # The outputs of BERT and similar models do not name all of their fields.
    if outputs and not names & set(CACHE_NAMES) and not hasattr(config, "is_decoder"):
        yield _UNRETURNED


def _names_classifier(classes: typing.Iterable[str] | None) -> bool:
    return any(part in name for name in classes or () for part in _CLASSIFIERS)


def _is_encoder(config: PreTrainedConfig) -> bool:
    """Return whether a config that could be a decoder's is not; GPT-NeoX has the field too, and always is one."""
    return getattr(config, "is_decoder", True) is False and type(config) in MODEL_FOR_MASKED_LM_MAPPING


def _types_in(annotation: object) -> list[type]:
    """Return the types of an annotation such as `A | B | None`."""
    return [kind for kind in typing.get_args(annotation) or (annotation,) if isinstance(kind, type)]


def _counts_positions(config: PreTrainedConfig) -> bool:
    """Return whether the backbone's cache counts its positions; one with recurrent layers alone does not."""
    try:
        return DynamicCache(config=config).get_seq_length() == 0
    except ValueError:
        return False

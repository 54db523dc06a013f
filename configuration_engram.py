"""`EngramConfig`: a backbone's config plus the fields of its memory, under DeepSeek's names."""

import copy
import dataclasses
import difflib
import inspect
import itertools
import math
import os
import types
from collections.abc import Iterator
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.auto import CONFIG_MAPPING

from .safetensors_engram import VERSION, EngramError
from .table_format_engram import QUANTIZED_FORMATS, MemorySizes, draw_primes

# In version 2, parameters have the names of the backbone's own class, without the prefix `backbone.` of version 1.
FORMAT_VERSION = 2

# These limits are far beyond any use; larger values would take minutes to check.
_MOST_ORDERS, _MOST_HEADS = 64, 1024

# The demo's default is five buckets of every order for each token of the vocabulary.
_PAPER_BUCKETS_PER_TOKEN = 5

# In a folder with remote code, each Auto class has this module and class name.
_AUTO_CLASSES = {
    "AutoConfig": ("configuration_engram", "EngramConfig"),
    "AutoModel": ("modeling_engram", "EngramModel"),
    "AutoModelForCausalLM": ("modeling_engram", "EngramForCausalLM"),
}
_AUTO_CLASSES_WITH_IMAGES = {"AutoModelForImageTextToText": ("multimodal_engram", "EngramForConditionalGeneration")}
# These modules import a backbone that transformers lacks, and the classes here, by the backbone's model type.
_ENTRY_MODULES: dict[str, str] = {}

# A model is saved to this new folder: all files in it are of this save.
STAGED: ContextVar[os.PathLike | None] = ContextVar("folder of the save that runs", default=None)


def register_remote_backbone(model_type: str, module: str) -> None:
    """Make the flat file `module` (and its imports) the remote code of models on backbones of `model_type`."""
    _ENTRY_MODULES[model_type] = module


def remote_module(model_type: str) -> str | None:
    """Return the module that was registered for backbones of `model_type`, or None."""
    return _ENTRY_MODULES.get(model_type)


# Only these attributes belong to the outer config. All others are the backbone's, and are stored in `text_config`.
_OWN = {
    "text_config",
    "backbone",
    "backbone_config",
    "sub_configs",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "name_or_path",
    "num_labels",
    "problem_type",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
}
# transformers stores values of properties in these attributes, which the given arguments set.
_STORED_BY_PROPERTIES = {
    "_attn_implementation_internal": "attn_implementation",
    "_experts_implementation_internal": "experts_implementation",
    "_output_attentions": "output_attentions",
}
# This attribute stores attributes of the backbone until its config is made.
_UNSETTLED = "set before the backbone's config"
# Every config has these attributes on its class, where `__getattr__` is never called for them.
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PreTrainedConfig) if field.name not in _OWN}
_OF_EVERY_CONFIG = {
    *_DEFAULTS,
    "base_model_ep_plan",
    "base_model_fsdp_plan",
    "base_model_pp_plan",
    "base_model_tp_plan",
    "per_layer_config",
    # These are attributes of mixins, such as those that rotary embeddings need.
    *(
        name
        for mixin in PreTrainedConfig.__mro__[1:-1]
        for name, value in vars(mixin).items()
        if not name.startswith("_")
        and not callable(value)
        and not isinstance(value, (property, classmethod, staticmethod))
    ),
}


def needs_package(*_args, **_options):
    """Replace a function that a model folder's code leaves out, since a saved model runs without it.

    Raises:
        ValueError: always.
    """
    raise EngramError(
        "Adding memory, continuous batching and lookback_token_ids need the package engram-hf: install it, and import engram_hf."
    )


def _of_the_backbone(name: str) -> property:
    return property(lambda self: self.__getattr__(name), doc=f"`text_config.{name}`.")


def _left_to_the_backbone(self) -> None:
    """Skip a rule of every config, which the backbone's class checks in its own way."""


# Reads the backbone's attributes that a config has on its class, and leaves its rules to its own class.
_BackboneFields = type(
    "_BackboneFields",
    (),
    {name: _of_the_backbone(name) for name in sorted(_OF_EVERY_CONFIG)}
    | {name: _left_to_the_backbone for name in dir(PreTrainedConfig) if name.startswith("validate_")},
)


@lru_cache(maxsize=32)
def _primes(num_layers: int, bucket_counts: tuple[int, ...], heads: int) -> list[list[list[int]]]:
    return draw_primes(num_layers, bucket_counts, heads)


@strict
class EngramConfig(_BackboneFields, MemorySizes, PreTrainedConfig):
    r"""
    Configuration of a language model with Engram memory.

    The defaults are the `paper` variant; [`EngramConfig.for_backbone`] fills in either variant for a backbone.

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            Config of the backbone: any registered decoder. Beside `backbone_config` it is not given, but follows: the
            `EngramConfig` of the language model alone, which has the fields of the memory.
        engram_layer_ids (`list[int]`):
            0-based decoder layers that read memory, in the order the hash was laid out (it is not sorted).
        engram_max_ngram_size (`int`):
            Largest n-gram order; orders run from 2.
        engram_vocab_size (`int` or `list[int]`, *optional*):
            Base bucket count of a head: one number for every order, or one for each order. Five times the vocabulary
            if not given.
        engram_n_heads (`int`):
            Hash heads per order.
        engram_head_dim (`int`):
            Width of a table row.
        engram_pad_token_id (`int`):
            Token that stands for a look-back that is cut off.
        engram_compressed_vocab_size (`int`, *optional*):
            Size of the compressed vocabulary that the hash is drawn for. None: ids are hashed uncompressed.
        engram_added_tokens (`int`):
            Compressed ids appended since (tokens added later); the hash keeps the original size.
        engram_num_embeddings (`list[int]`, *optional*):
            Rows of each layer's table. Follows from the primes; if given, it is checked.
        engram_seed (`int`):
            Seed of the multipliers.
        engram_bias (`bool`):
            Whether the key and value projections have a bias.
        engram_conv_kernel_size (`int`):
            Taps of the short convolution, 0 for none. Its dilation is the largest n-gram order.
        engram_norm_eps (`float`, *optional*):
            Epsilon of the query and key norms; None for float32's (1.2e-7), the default of `torch.nn.RMSNorm`.
        engram_conv_norm_eps (`float`):
            Epsilon of the norm before the convolution.
        engram_zero_gate_sign (`int`):
            The sign that a dot product of exactly zero counts as: 1 in DeepSeek-V4.1, 0 in the demo.
        engram_table_dtype (`str`, *optional*):
            What frozen rows are stored as: `"float8_e4m3fn"`, `"int8"`, `"int4"`, `"int2"` or `"nvfp4"`
            (docs/row-bits.md); None for rows in the model's dtype.
        engram_format_version (`int`):
            Version of these fields; a later one than this code knows is refused.
        backbone_config (`PreTrainedConfig` or `dict`, *optional*):
            Config of a backbone of several parts, such as Gemma 3's with its vision tower. Attributes that are not the
            memory's are then read from and set on this one, except `text_config`.
    """

    model_type = "engram"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 (a class attribute by transformers' convention)
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012

    text_config: dict | PreTrainedConfig | None = None
    engram_layer_ids: list[int] | tuple[int, ...] = (1, 15)
    engram_max_ngram_size: int = 3
    engram_vocab_size: int | list[int] | tuple[int, ...] | None = None
    engram_n_heads: int = 8
    engram_head_dim: int = 64
    engram_pad_token_id: int = 2
    engram_compressed_vocab_size: int | None = None
    engram_added_tokens: int = 0
    engram_num_embeddings: list[int] | tuple[int, ...] | None = None
    engram_seed: int = 0
    engram_bias: bool = True
    engram_conv_kernel_size: int = 4
    engram_norm_eps: float | None = None
    engram_conv_norm_eps: float = 1e-5
    engram_zero_gate_sign: int = 0
    engram_table_dtype: str | None = None
    engram_format_version: int = FORMAT_VERSION
    backbone_config: dict | PreTrainedConfig | None = None
    # Called with a backbone's config, and with the version that saved a config; the package sets both (code beside a model is as new).
    for_backbone: ClassVar[Any] = staticmethod(needs_package)
    check_version: ClassVar[Any] = staticmethod(lambda version: None)

    def __post_init__(self, **kwargs):
        self.check_version(kwargs.pop("engram_hf_version", None))
        self._refuse_unknown(kwargs)
        # They are hidden from the base class, which would fill in defaults of attributes that the backbone has.
        text, whole = (vars(self).pop(name) for name in ("text_config", "backbone_config"))
        backbone = as_decoder_config(text) if whole is None else as_composite_config(whole, text)
        super().__post_init__(**kwargs)
        asked = vars(self).pop(_UNSETTLED, {})
        if whole is not None:
            memory = {name: vars(self).pop(name) for name in list(vars(self)) if name.startswith("engram_")}
            text = type(self)(text_config=backbone.text_config, dtype=self.dtype, **memory)
            vars(self).update(backbone_config=backbone, sub_configs=backbone.sub_configs)
            backbone = text
        vars(self).update(text_config=backbone)  # @strict would print it twice to check its type again
        for name, value in asked.items():
            if name in _DEFAULTS:
                was_given = value != _DEFAULTS[name]
            else:
                was_given = kwargs.get(_STORED_BY_PROPERTIES.get(name, name)) is not None
            if was_given:
                setattr(self, name, value)
        self.engram_layer_ids = list(self.engram_layer_ids)
        if self.engram_vocab_size is None:
            self.engram_vocab_size = _PAPER_BUCKETS_PER_TOKEN * self.vocab_size
        # Called here too, so that a bad config is a plain ValueError rather than one wrapped by @strict.
        self.validate_engram()
        self._set_rows()

    def __getattr__(self, name: str):
        """Return an attribute of the backbone's config; Python calls this for attributes that this config lacks."""
        own = vars(self)
        if name in own.get(_UNSETTLED, ()):
            return own[_UNSETTLED][name]
        if "text_config" in own and self._is_elsewhere(name):
            return getattr(self._config_with(name), name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value) -> None:
        """Set a field of the memory here, and any other attribute on the backbone's config, whether it has it yet or not."""
        if not self._is_elsewhere(name):
            super().__setattr__(name, value)
        elif not isinstance(vars(self).get("text_config"), PreTrainedConfig):
            vars(self).setdefault(_UNSETTLED, {})[name] = value
        else:
            setattr(self._config_with(name), name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute in the config that stores it; transformers sets `is_causal` for the time of a call."""
        if name in vars(self) or not self._is_elsewhere(name):
            super().__delattr__(name)
        else:
            delattr(self._config_with(name), name)

    def _is_elsewhere(self, name: str) -> bool:
        """Return whether another config stores an attribute: the backbone's, or that of its language model."""
        if name.startswith("engram_"):
            return self.is_composite
        return name in _STORED_BY_PROPERTIES or not (name in _OWN or name.startswith("_"))

    def _config_with(self, name: str) -> PreTrainedConfig:
        return self.text_config if name.startswith("engram_") else self.backbone

    @property
    def is_composite(self) -> bool:
        """Whether the backbone has other parts than its language model, such as a vision tower."""
        return isinstance(vars(self).get("text_config"), EngramConfig)

    @property
    def backbone(self) -> PreTrainedConfig:
        """The config of the whole backbone."""
        return vars(self)["backbone_config" if self.is_composite else "text_config"]

    @backbone.setter
    def backbone(self, config: PreTrainedConfig) -> None:
        if self.is_composite:
            self.backbone_config, self.text_config.text_config = config, config.text_config
        else:
            vars(self).update(text_config=as_decoder_config(config))

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Read the config as in transformers, but refuse another kind of model's, whose fields mean other things.

        Raises:
            ValueError: it is one.
        """
        found = config_dict.get("model_type")
        if found not in (None, cls.model_type):
            raise EngramError(
                f"This is the config of a {found!r} model, not an EngramConfig; load it with AutoModelForCausalLM (a release "
                "of DeepSeek's, too, after `import engram_hf`), or add memory to it with EngramForCausalLM.from_backbone."
            )
        return super().from_dict(config_dict, **kwargs)

    def _refuse_unknown(self, extras: dict[str, Any]) -> None:
        if self.engram_format_version > FORMAT_VERSION:
            raise EngramError(
                f"engram_format_version is {self.engram_format_version}, but this engram-hf reads up to {FORMAT_VERSION}; "
                "upgrade engram-hf."
            )
        unknown = [key for key in extras if key.startswith("engram_")]
        if unknown:
            # Names are compared without the prefix, which would make any two of them similar.
            known = {
                key.removeprefix("engram_"): key for key in type(self).__annotations__ if key.startswith("engram_")
            }
            guess = difflib.get_close_matches(unknown[0].removeprefix("engram_"), known, n=1)
            hint = f"did you mean {known[guess[0]]}?" if guess else f"the fields are {', '.join(known.values())}."
            raise EngramError(f"EngramConfig has no field {unknown[0]}; {hint}")

    def _set_rows(self) -> None:
        rows = [sum(map(sum, orders)) for orders in self.primes]
        if self.engram_num_embeddings not in (None, rows, tuple(rows)):
            raise EngramError(
                f"engram_num_embeddings is {list(self.engram_num_embeddings)}, but the primes of engram_vocab_size "
                f"{self.engram_vocab_size} with {self.engram_n_heads} heads sum to {rows} rows; leave it out, or "
                "restore the engram_vocab_size that the tables were built with."
            )
        self.engram_num_embeddings = rows

    def validate_engram(self) -> None:
        """Check every rule on a field of the memory, as a part of `@strict` validation.

        Raises:
            ValueError: names the field, its value and what it should be.
        """
        for holds, message in itertools.chain(self._hash_rules(), self._fusion_rules()):
            if not holds:
                raise EngramError(message)

    def _hash_rules(self) -> Iterator[tuple[bool, str]]:
        layers, ids = self.text_config.num_hidden_layers, self.engram_layer_ids
        yield len(ids) > 0, "engram_layer_ids is empty; name at least one decoder layer."
        yield (
            all(0 <= layer < layers for layer in ids),
            f"engram_layer_ids {ids} must lie in 0..{layers - 1}, the backbone's {layers} decoder layers (0-based).",
        )
        yield len(set(ids)) == len(ids), f"engram_layer_ids {ids} names a layer twice; name each once."
        largest = self.engram_max_ngram_size
        yield (
            2 <= largest <= _MOST_ORDERS,
            f"engram_max_ngram_size is {largest}, but n-grams have 2 to {_MOST_ORDERS} tokens; give 2 or more.",
        )
        heads = self.engram_n_heads
        yield 0 < heads <= _MOST_HEADS, f"engram_n_heads is {heads}; it must be positive, and at most {_MOST_HEADS}."
        counts = self.bucket_counts
        yield (
            len(counts) == largest - 1,
            f"engram_vocab_size lists {len(counts)} bucket counts, but orders 2..{largest} need {largest - 1}; give "
            "one number, or one for each order.",
        )
        yield min(counts) > 0, f"engram_vocab_size is {self.engram_vocab_size}; it must be positive."
        vocab_size = self.text_config.vocab_size
        yield (
            0 <= self.engram_pad_token_id < vocab_size,
            f"engram_pad_token_id is {self.engram_pad_token_id}, outside the vocabulary of {vocab_size} ids; name an "
            "id of the tokenizer.",
        )
        compressed, added = self.engram_compressed_vocab_size, self.engram_added_tokens
        yield added >= 0, f"engram_added_tokens is {added}; it must be 0 or more."
        yield (
            compressed is None or 0 < compressed <= vocab_size - added,
            f"engram_compressed_vocab_size is {compressed} (+ {added} added), but it must lie in 1..{vocab_size}, the "
            "backbone's vocabulary; take it from EngramTokenizer.compressed_vocab_size.",
        )
        yield self.engram_seed >= 0, f"engram_seed is {self.engram_seed}; it must be 0 or more."

    def _fusion_rules(self) -> Iterator[tuple[bool, str]]:
        width, kernel = self.engram_head_dim, self.engram_conv_kernel_size
        yield width > 0, f"engram_head_dim is {width}; it must be positive."
        yield kernel >= 0, f"engram_conv_kernel_size is {kernel}; give a number of taps, 0 for no convolution."
        for name in ("engram_norm_eps", "engram_conv_norm_eps"):
            # Zero is refused: a position without memory is all zeros, and its norm would be NaN.
            eps = getattr(self, name)
            yield eps is None or 0 < eps < math.inf, f"{name} is {eps}; it must be positive, and finite."
        yield (
            self.engram_zero_gate_sign in (0, 1),
            f"engram_zero_gate_sign is {self.engram_zero_gate_sign}; it must be 0 (the demo) or 1 (V4.1).",
        )
        table_dtype = self.engram_table_dtype
        yield (
            table_dtype is None or table_dtype in QUANTIZED_FORMATS,
            f"engram_table_dtype is {table_dtype!r}; it must be None (the model's dtype), "
            f"{' or '.join(map(repr, QUANTIZED_FORMATS))}.",
        )
        multiple = QUANTIZED_FORMATS[table_dtype].multiple if table_dtype in QUANTIZED_FORMATS else 1
        yield (
            width % multiple == 0,
            f"engram_head_dim is {width}, which {table_dtype} rows cannot have; make it a multiple of {multiple}.",
        )

    @property
    def primes(self) -> list[list[list[int]]]:
        """Bucket sizes `[layer][order][head]`; see [`~table_format_engram.draw_primes`]."""
        return _primes(len(self.engram_layer_ids), self.bucket_counts, self.engram_n_heads)

    @property
    def engram_streams_first(self) -> bool:
        """Whether the backbone has its streams before the batch, `[G, B, S, D]`."""
        return getattr(self.text_config, "altup_num_inputs", None) is not None

    def remote_code_map(self) -> dict[str, str]:
        """Return the `auto_map` of config.json: the place of each Auto class's class in a folder with remote code."""
        entry = self._remote_entry
        reads_images = self.is_composite or getattr(self.text_config, "vision_config", None) is not None
        classes = _AUTO_CLASSES | (_AUTO_CLASSES_WITH_IMAGES if reads_images else {})
        return {auto: f"{entry or module}.{name}" for auto, (module, name) in classes.items()}

    @property
    def _remote_entry(self) -> str | None:
        return "multimodal_engram" if self.is_composite else remote_module(self.text_config.model_type)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as in transformers, with the version of this code; remote code begins with the backbone's
        module.
        """
        fields = {**super().to_dict(), "engram_hf_version": VERSION}
        if self.is_composite:
            memory = {name: value for name, value in fields["text_config"].items() if name.startswith("engram_")}
            fields = {**memory, **fields}
            del fields["text_config"], fields["sub_configs"]  # which follow from the rest
        if "auto_map" in fields:
            fields["auto_map"]["AutoConfig"] = self.remote_code_map()["AutoConfig"]
        return fields

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Save as in transformers, with the code of a backbone that transformers lacks."""
        entry, config = self._remote_entry, self
        if entry is not None and self._auto_class is not None:
            os.makedirs(save_directory, exist_ok=True)
            package = __name__.rpartition(".")[0]
            custom_object_save(types.SimpleNamespace(__module__=f"{package}.{entry}"), save_directory)
        own_code = os.path.join(save_directory, os.path.basename(inspect.getfile(type(self))))
        if STAGED.get() == save_directory and os.path.exists(own_code):
            config = copy.copy(self)
            config._auto_class = None  # else the same code would be copied again
        super(EngramConfig, config).save_pretrained(save_directory, push_to_hub, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the fields as in transformers, without the backbone's folder, which other machines lack."""
        fields = super().to_diff_dict()
        part = "backbone_config" if self.is_composite else "text_config"
        backbone, alone = fields[part], self.backbone.to_diff_dict()
        # Parts of the backbone's config are saved as the backbone saves them: they may refuse fields of a complete config.
        backbone |= {name: alone[name] for name in self.backbone.sub_configs if name in alone}
        for config in (backbone, *(backbone[part] or {} for part in self.backbone.sub_configs if part in backbone)):
            name = config.get("_name_or_path", "")
            if not isinstance(name, str) or os.path.isabs(name) or os.path.exists(name):
                del config["_name_or_path"]
        return fields


def as_decoder_config(text_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """Return the backbone's config as an object; Mixtral's if there is none.

    Raises:
        ValueError: it is of no registered model type, or not that of one decoder.
    """
    if text_config is None:
        text_config = CONFIG_MAPPING["mixtral"]()
    if isinstance(text_config, dict):
        fields = dict(text_config)
        model_type = fields.pop("model_type", None)
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise EngramError(
                f"text_config has model_type {model_type!r}, which this transformers does not know; name a registered "
                "decoder, or register it with AutoConfig.register first."
            )
        text_config = CONFIG_MAPPING[model_type](**fields)
    if text_config.is_encoder_decoder:
        raise EngramError(
            f"text_config is an encoder-decoder ({text_config.model_type}); give the config of a decoder-only model."
        )
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if not hasattr(text_config, name):
            raise EngramError(
                f"text_config ({text_config.model_type}) has no {name}; give the config of one decoder, which in a "
                "composite model is config.get_text_config(), or the whole as backbone_config."
            )
    return text_config


def as_composite_config(config: dict | PreTrainedConfig, text_config: object = None) -> PreTrainedConfig:
    """Return the config of a backbone of several parts as an object.

    Raises:
        ValueError: it is of no registered model type or has no `text_config`, or one is given beside it.
    """
    if isinstance(config, dict) and config.get("model_type") in CONFIG_MAPPING:
        config = CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    if text_config is not None or not isinstance(getattr(config, "text_config", None), PreTrainedConfig):
        raise EngramError(
            "backbone_config must have a `text_config` of its own, as Gemma3Config has, and a model type that this "
            "transformers knows; give the config of a decoder alone as text_config instead, and never both."
        )
    as_decoder_config(config.text_config)
    return config


# A default, as a class attribute, would hide the value in a composite backbone's config.
for _field in dataclasses.fields(EngramConfig):
    if _field.name.startswith("engram_"):
        delattr(EngramConfig, _field.name)

EngramConfig.register_for_auto_class()

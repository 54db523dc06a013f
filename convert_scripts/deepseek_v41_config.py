"""Convert DeepSeek-V4.1's config.json in both directions, and derive from it: fewer layers, the constants of the
n-gram hash.

Upstream nests all fields of the language model, including Engram's, in `text_config`. Ours is that of an `EngramConfig`:
the backbone in `text_config`, Engram's fields at the top level under the same names, and the quantization in
transformers' terms.

Configs are plain dictionaries here, since importing transformers takes seconds.
"""

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import fields as dataclass_fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..fields_deepseek_v41 import DRAFT_FIELDS, ROPE_SCALING, TextFields, VisionFields
from ..plain_config_engram import DEFAULTS, VARIANTS, PlainConfig, StoredHash, as_plain_config, draw_hash
from ..safetensors_engram import VERSION, read_json
from ..table_format_engram import NO_ID, TableDescription, describe_table
from ..tokenization.vocabulary_compression import TOKEN_MAP_FILE, build_token_map, token_map_bytes
from .deepseek_v41 import DEEPSEEK_V41
from .import_plan import DTYPES, Additions
from .remote_code import code_files
from .safetensors_files import ConversionError
from .streaming import Literal, Tensor, json_bytes
from .tensor_rules import unquantized_modules

TEMPLATE = Path(__file__).with_name("chat_template_deepseek_v41.jinja")
# The chat template's inverse: by it, the tokenizer's `parse_response` and servers separate reasoning from the answer.
# A turn without reasoning begins after `</think>`.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<｜Assistant｜></think>", "<｜Assistant｜>"],
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "content": {"close": "<｜end▁of▁sentence｜>", "content": "text"},
    },
}
TOKENIZER_CONFIG = "tokenizer_config.json"

# The hash constants have this prefix in a state dict of this package.
HASHING = "model.hashing"
# The remote code of a converted model begins with this flat file.
_ENTRY = "auto_deepseek_v41"

_QUANTIZATION = {"quant_method": "fp8", "weight_block_size": [32, 32], "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
_ENGRAM_FIELDS = (
    "engram_layer_ids",
    "engram_max_ngram_size",
    "engram_vocab_size",
    "engram_n_heads",
    "engram_head_dim",
    "engram_pad_token_id",
    "engram_compressed_vocab_size",
    "engram_num_embeddings",
)


# The release's vision tower has these fields.
_VISION_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "rope_theta",
    "downsample_ratio",
    "max_image_tokens",
    "min_pixels",
    "max_wh_ratio",
)


# transformers writes these members into every config, besides those with a leading underscore, which describe the
# file.
_EVERY_CONFIG = (
    *("architectures", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id", "model_type"),
    *("output_attentions", "output_hidden_states", "problem_type", "return_dict", "transformers_version"),
)
# A config.json may have these members at its top level.
_TOP_FIELDS = (
    *("text_config", "vision_config", "image_token_id", "quantization_config", "auto_map", "torch_dtype"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
)
_TEXT_FIELDS = ("rope_scaling", "torch_dtype")
_FIXED = {"topk_method": "noaux_tc", "tie_word_embeddings": False}

# In DeepSeek-V4.1's config, the ratios of draft layers follow those of the decoder; sources are named by their layer.
_RATIOS = "compress_ratios"
_SOURCES, _LAST_SOURCE = ("kv_source_layer_ids", "index_source_layer_ids"), "candidate_source_layer_id"


def check_config(config: Mapping) -> None:
    """Refuse a config that is not a DeepSeek-V4.1 in the storage the table describes."""
    if config.get("model_type") != DEEPSEEK_V41.name or not isinstance(config.get("text_config"), Mapping):
        raise ConversionError(
            f"config.json has model_type {config.get('model_type')!r}, expected {DEEPSEEK_V41.name!r} with a text_config; "
            f"is SOURCE a DeepSeek-V4.1 checkpoint?"
        )
    found = config.get("quantization_config")
    found = found if isinstance(found, Mapping) else {}
    for key, expected in _QUANTIZATION.items():
        if found.get(key) != expected:
            raise ConversionError(
                f"quantization_config of config.json has {key} = {found.get(key)!r}, but only the release's "
                f"{expected!r} can be converted."
            )
    missing = [name for name in ("num_hidden_layers", *_ENGRAM_FIELDS) if name not in config["text_config"]]
    if missing:
        raise ConversionError(f"text_config of config.json lacks {missing[0]!r}; is it a DeepSeek-V4.1 config?")
    _refuse_unknown_fields(config)


def _refuse_unknown_fields(config: Mapping) -> None:
    """Refuse fields that nothing here reads: their meaning would be missing in the computation, without an error."""
    text, vision = config["text_config"], config.get("vision_config") or {}
    for fields in (config, text):
        for name, expected in _FIXED.items():
            if fields.get(name, expected) != expected:
                raise ConversionError(
                    f"config.json has {name} = {fields[name]!r}, but only the release's {expected!r} can be converted."
                )
    parts = (
        ("", config, {*_EVERY_CONFIG, *_TOP_FIELDS, *_FIXED}),
        ("text_config.", text, {*_EVERY_CONFIG, *_names(TextFields), *_TEXT_FIELDS, *DRAFT_FIELDS, *_FIXED}),
        ("vision_config.", vision, {*_EVERY_CONFIG, *_names(VisionFields)}),
    )
    for part, fields, known in parts:
        for name, value in fields.items():
            # `EngramConfig` refuses fields of the memory itself.
            others = ("_", "engram_") if part == "text_config." else "_"
            if name not in known and value is not None and not name.startswith(others):
                raise ConversionError(
                    f"config.json has {part + name!r}, which this version does not know, so the model would be computed without "
                    "it; a newer version may know it, and if you know that it changes nothing, take it out of config.json."
                )


def _names(fields_class: type) -> set[str]:
    return {field.name for field in dataclass_fields(fields_class)}


def first_layers(config: Mapping, count: int) -> dict:
    """Return the config of the first `count` layers. Draft layers keep their compress ratios, which are at the list's
    end.
    """
    text = dict(config["text_config"])
    total = text["num_hidden_layers"]
    if not 1 <= count <= total:
        raise ConversionError(f"--layers is {count}; give 1 to {total}, the layers of the checkpoint.")
    rows = dict(zip(text["engram_layer_ids"], text["engram_num_embeddings"], strict=True))
    if not any(layer < count for layer in rows):
        raise ConversionError(
            f"--layers is {count}, but the first memory is in layer {min(rows)}; keep at least {min(rows) + 1} layers."
        )
    text |= _first_layers_of(text, count)
    text["engram_layer_ids"] = [layer for layer in rows if layer < count]
    text["engram_num_embeddings"] = [rows[layer] for layer in text["engram_layer_ids"]]
    return {**config, "text_config": text}


def _first_layers_of(fields: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return the fields of a backbone's config that change when it keeps only its first `count` layers.

    Args:
        fields: those of the backbone with all its layers, by name.
    """
    total = fields["num_hidden_layers"]
    changed = {"num_hidden_layers": count}
    for name, value in fields.items():
        # Any list with one entry for each layer is cut (`layer_types`, ...), except lists of token ids, whose length may agree by chance.
        per_layer = isinstance(value, (list, tuple)) and len(value) == total and "token" not in name
        if name in _SOURCES and value is not None:
            changed[name] = [layer for layer in value if layer < count]
        elif name == _LAST_SOURCE:
            changed[name] = None if value is None or value >= count else value
        elif name == _RATIOS or (per_layer and not name.startswith(("_", "engram_"))):
            changed[name] = None if value is None else value[:count] + value[total:]
    return changed


def to_engram_fields(config: Mapping, dtype: str, dequantize_tables: bool) -> dict[str, Any]:
    """Return this package's config.json of an upstream one; `dtype` is as in `ImportOptions`.

    Raises:
        ConversionError: a field of the backbone breaks a rule; `EngramConfig` checks those of the memory.
    """
    text = {key: value for key, value in config["text_config"].items() if not key.startswith("engram_")}
    memory = {key: value for key, value in config["text_config"].items() if key.startswith("engram_")}
    ours = {
        "architectures": ["EngramForCausalLM"],
        "model_type": "engram",
        "dtype": "bfloat16" if dtype == "keep" else dtype,
        "engram_hf_version": VERSION,
        "transformers_version": version("transformers"),
        **DEFAULTS,
        **VARIANTS["v4.1"],
        **memory,
        "engram_table_dtype": None if dequantize_tables else "float8_e4m3fn",
        "text_config": _text_fields(text, config.get("vision_config"), config.get("image_token_id")),
    }
    if dtype == "keep":
        # transformers replaces all linear modules that are not named here by `fp8` ones.
        skipped = {"modules_to_not_convert": unquantized_modules(DEEPSEEK_V41)}
        ours["quantization_config"] = {**config["quantization_config"], **skipped}
    return ours


def _text_fields(text: Mapping, vision: Mapping | None, image_token_id: int | None) -> dict[str, Any]:
    """Return the backbone's part of our config.json, checked."""
    fields = _checked({**text, "vision_config": vision, "image_token_id": image_token_id})
    kept = {name: value for name, value in text.items() if name != "rope_scaling"}
    vision = fields.vision_config and {"model_type": "deepseek_v41_vision", **vars(fields.vision_config)}
    return {**kept, **vars(fields), "model_type": "deepseek_v41_text", "vision_config": vision}


def _checked(text: Mapping) -> TextFields:
    known = {name: text[name] for name in _names(TextFields) & text.keys()}
    try:
        fields = TextFields(**{**known, "vision_config": _vision_fields(text.get("vision_config"), known)})
        fields.fill_in(fields.rope_parameters or text.get("rope_scaling", ROPE_SCALING) or {})
        fields.check()
    except (ValueError, TypeError) as error:
        raise ConversionError(f"config.json of the checkpoint is not valid: {error}") from error
    return fields


def _vision_fields(vision: Mapping | None, text: Mapping) -> VisionFields | None:
    if vision is None or vision.get("num_hidden_layers") == 0:
        return None
    known = {name: vision[name] for name in _names(VisionFields) & vision.keys()}
    fields = VisionFields(**{**known, "out_hidden_size": text.get("hidden_size", TextFields.hidden_size)})
    fields.check()
    return fields


def require_plain(fields: Mapping[str, Any]) -> PlainConfig:
    """Return our config.json as an object.

    Raises:
        ConversionError: a field of the memory breaks a rule, for example a row count that is not the sum of the hash's primes.
    """
    plain = as_plain_config(fields)
    if plain is None:
        from .. import EngramConfig  # The class raises an error that says what is wrong; this imports transformers.

        try:
            EngramConfig.from_dict(copy.deepcopy(dict(fields)))
        except (ValueError, TypeError) as error:
            raise ConversionError(f"config.json of the checkpoint is not valid: {error}") from error
        raise ConversionError(
            "config.json of the checkpoint has a field of the memory in a form that cannot be converted; take the release's."
        )
    return plain


def to_upstream_config(ours: Mapping) -> dict:
    """Return the upstream config of our config.json, for a model without the record of a release."""
    text = {key: copy.deepcopy(value) for key, value in ours["text_config"].items() if not key.startswith("_")}
    missing = [name for name in _ENGRAM_FIELDS if name not in ours]
    if missing:
        raise ConversionError(f"config.json lacks {missing[0]!r}; is it the config of a model with memory?")
    text |= {name: ours[name] for name in _ENGRAM_FIELDS}
    rope_scaling = _checked(text).upstream_rope_scaling
    image_token_id, vision = text.pop("image_token_id", None), text.pop("vision_config", None)
    added = ("rope_parameters", "layer_types", "dtype", "transformers_version", "architectures", "draft")
    for derived in (*added, "dspark_confidence_threshold"):
        text.pop(derived, None)
    text["rope_scaling"] = rope_scaling
    return {
        "architectures": ["DeepseekV41ForCausalLM"],
        "model_type": DEEPSEEK_V41.name,
        "dtype": "bfloat16",
        "image_token_id": ours.get("image_token_id", image_token_id),
        "bos_token_id": text.get("bos_token_id"),
        "eos_token_id": text.get("eos_token_id"),
        "pad_token_id": text.get("pad_token_id"),
        "tie_word_embeddings": False,
        "quantization_config": {"fmt": "e4m3", "activation_scheme": "dynamic", **_QUANTIZATION},
        "text_config": text,
        **({} if vision is None else {"vision_config": {name: vision.get(name) for name in _VISION_FIELDS}}),
    }


def without_missing_parts(config: Mapping, names: Collection[str]) -> dict:
    """Return the upstream config of a model without the vision tower or the draft layers.

    Args:
        names: the model's tensors, by our names.
    """
    config = {**config, "text_config": dict(config["text_config"])}
    if not any(name.startswith("model.vision_tower.") for name in names):
        config.pop("vision_config", None)
    if not any(name.startswith("draft.") for name in names):
        config["text_config"]["num_nextn_predict_layers"] = 0
    return config


def build_hash(config: PlainConfig, tokenizer: Tokenizer) -> StoredHash:
    """Return the n-gram hash: token map from the checkpoint's tokenizer, multipliers and primes from the config.

    Raises:
        ConversionError: the tables were trained with another size of the compressed vocabulary.
    """
    token_map, size = build_token_map(tokenizer), config.text_config.vocab_size
    found, expected = int(token_map.max()) + 1, config.engram_compressed_vocab_size
    if found != expected or len(token_map) > size:
        raise ConversionError(
            f"tokenizer.json compresses {len(token_map)} ids to {found}, but the tables were trained with {expected} of "
            f"{size}; use the tokenizer of this very release."
        )
    return draw_hash(config, np.pad(token_map, (0, size - len(token_map)), constant_values=NO_ID))


def parsing_documents(folder: Path) -> dict[str, bytes]:
    """Return the tokenizer's config, which tells `parse_response` the form of answers; nothing if `folder` has none."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return {}
    return {path.name: json_bytes({"response_template": RESPONSE_TEMPLATE, **read_json(path)})}


def processor_config(config: PlainConfig) -> dict[str, bytes]:
    """Return the file by which `AutoProcessor` finds the processor of a model that reads images; it names remote code,
    if any.
    """
    names = ("patch_size", "downsample_ratio", "max_image_tokens", "min_pixels", "max_wh_ratio")
    fields = {name: getattr(config.text_config.vision_config, name) for name in names}
    classes = {
        "AutoProcessor": "processing_deepseek_v41.DeepseekV41Processor",
        "AutoImageProcessor": "image_processing_deepseek_v41.DeepseekV41ImageProcessor",
    }
    code = {"auto_map": classes} if hasattr(config, "auto_map") else {}
    images = {**code, "image_processor_type": "DeepseekV41ImageProcessor", **fields}
    return {
        "processor_config.json": json_bytes(
            {**code, "processor_class": "DeepseekV41Processor", "image_processor": images}
        )
    }


def auto_map(reads_images: bool) -> dict[str, str]:
    """Return the class of each Auto class in a converted folder, as [`~EngramConfig.remote_code_map`] gives it."""
    classes = {
        "AutoConfig": "EngramConfig",
        "AutoModel": "EngramModel",
        "AutoModelForCausalLM": "EngramForCausalLM",
    }
    if reads_images:
        classes["AutoModelForImageTextToText"] = "EngramForConditionalGeneration"
    return {auto: f"{_ENTRY}.{name}" for auto, name in classes.items()}


def remote_code() -> dict[str, bytes]:
    """Return the files by which a folder loads where this package is not installed."""
    return {path.name: path.read_bytes() for path in code_files(_ENTRY)}


def additions(
    fields: Mapping[str, Any], config: PlainConfig, folder: Path, documents: Mapping[str, bytes]
) -> Additions:
    """Return the additions of a conversion to the release's tensors: `documents`, the config, and parts that follow
    from the tokenizer.

    Args:
        fields: our config.json.
        config: the same config, as an object.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConversionError(
            f"{path} does not exist; the n-gram hash needs the release's tokenizer beside its weights."
        )
    tokenizer = Tokenizer.from_file(str(path))
    found = build_hash(config, tokenizer)
    own = {
        "config.json": json.dumps(fields, indent=2, sort_keys=True).encode("utf-8") + b"\n",
        TOKEN_MAP_FILE: token_map_bytes(found.token_map[found.token_map != NO_ID], tokenizer),
    }
    tensors = [
        Tensor(f"{HASHING}.{name}", "I64", array.shape, [Literal(array.astype("<i8").tobytes())])
        for name, array in (
            ("token_map", found.token_map),
            ("multipliers", found.multipliers),
            ("primes", found.primes),
        )
    ]
    return Additions({**documents, **own}, tensors, _describe_tables(config, found))


def _describe_tables(config: PlainConfig, found: StoredHash) -> dict[int, TableDescription]:
    dtype = "F8_E4M3" if config.engram_table_dtype else DTYPES[config.dtype]
    return {
        layer: describe_table(found, index, width=config.engram_head_dim, dtype=dtype)
        for index, layer in enumerate(config.engram_layer_ids)
    }

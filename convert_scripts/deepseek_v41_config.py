"""DeepSeek-V4.1's config.json, both ways, and what it implies: fewer layers, the constants of the n-gram hash.

Upstream nests everything of the language model, Engram's fields included, in `text_config`. Ours is an `EngramConfig`: the
backbone in `text_config`, Engram's fields on top under the same names, and the quantization in transformers' terms.
"""

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import get_relative_import_files

from .. import auto_deepseek_v41
from ..adding_engram import VARIANTS
from ..configuration_deepseek_v41 import DeepseekV41TextConfig
from ..configuration_engram import EngramConfig
from ..configuration_vision_deepseek_v41 import DeepseekV41VisionConfig
from ..draft_deepseek_v41 import DRAFT_FIELDS
from ..hashing_engram import NO_ID, NgramHasher
from ..safetensors_engram import read_json
from ..table_engram import SAFETENSORS_NAMES
from ..table_format_engram import TableDescription, describe_table
from ..tokenization.vocabulary_compression import TOKEN_MAP_FILE, build_token_map, token_map_bytes
from .deepseek_v41 import DEEPSEEK_V41
from .import_plan import Additions
from .safetensors_files import ConversionError
from .streaming import Literal, Tensor, json_bytes
from .tensor_rules import unquantized_modules

TEMPLATE = Path(__file__).with_name("chat_template_deepseek_v41.jinja")
# The other way: how the tokenizer's `parse_response`, and a server, tell reasoning from the answer. A turn that is not to
# reason begins after `</think>`.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": ["<｜Assistant｜></think>", "<｜Assistant｜>"],
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "content": {"close": "<｜end▁of▁sentence｜>", "content": "text"},
    },
}
TOKENIZER_CONFIG = "tokenizer_config.json"

# The prefix of the hash constants in a state dict of this package.
HASHING = "model.hashing"

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


# Fields of the release's vision tower.
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


# Members that a config.json may have at its top level.
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
                f"quantization_config of config.json has {key} = {found.get(key)!r}, the release's is {expected!r}; "
                f"other storage is not supported."
            )
    missing = [name for name in ("num_hidden_layers", *_ENGRAM_FIELDS) if name not in config["text_config"]]
    if missing:
        raise ConversionError(f"text_config of config.json lacks {missing[0]!r}; is it a DeepSeek-V4.1 config?")
    _refuse_unknown_fields(config)


def _refuse_unknown_fields(config: Mapping) -> None:
    """What a field means that nothing here reads would be left out of the computation, without an error."""
    text, vision = config["text_config"], config.get("vision_config") or {}
    for fields in (config, text):
        for name, expected in _FIXED.items():
            if fields.get(name, expected) != expected:
                raise ConversionError(
                    f"config.json has {name} = {fields[name]!r}, the release's is {expected!r}; another rule is not known here."
                )
    parts = (
        ("", config, {*PreTrainedConfig().to_dict(), *_TOP_FIELDS, *_FIXED}),
        ("text_config.", text, {*DeepseekV41TextConfig().to_dict(), *_TEXT_FIELDS, *DRAFT_FIELDS, *_FIXED}),
        ("vision_config.", vision, {*DeepseekV41VisionConfig().to_dict(), *_VISION_FIELDS}),
    )
    for part, fields, known in parts:
        for name, value in fields.items():
            # `EngramConfig` refuses fields of the memory itself.
            if name not in known and value is not None and not (part == "text_config." and name.startswith("engram_")):
                raise ConversionError(
                    f"config.json has {part + name!r}, which this version does not know, so the model would be computed without "
                    "it; a newer version may know it, and if you know that it changes nothing, take it out of config.json."
                )


def first_layers(config: Mapping, count: int) -> dict:
    """The config of the first `count` layers. Draft layers keep their compress ratios, which stand at the list's end."""
    text = dict(config["text_config"])
    total = text["num_hidden_layers"]
    if not 1 <= count <= total:
        raise ConversionError(f"--layers is {count}, expected 1 to {total}, the layers of the checkpoint.")
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
    """The fields of a backbone's config that change when it keeps only its first `count` layers.

    Args:
        fields: of the backbone with all its layers, by name.
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


def to_engram_config(config: Mapping, dtype: str, dequantize_tables: bool) -> EngramConfig:
    """Our config of an upstream one; `dtype` as in `ImportOptions`.

    Raises:
        ConversionError: a field breaks a rule, for example a row count that is not the sum of the hash's primes.
    """
    text = {key: value for key, value in config["text_config"].items() if not key.startswith("engram_")}
    fields = {key: value for key, value in config["text_config"].items() if key.startswith("engram_")}
    text.pop("model_type", None)
    try:
        ours = EngramConfig(
            text_config=DeepseekV41TextConfig(
                **text, vision_config=config.get("vision_config"), image_token_id=config.get("image_token_id")
            ),
            **{**VARIANTS["v4.1"], **fields},
            engram_table_dtype=None if dequantize_tables else "float8_e4m3fn",
            architectures=["EngramForCausalLM"],
            dtype="bfloat16" if dtype == "keep" else dtype,
        )
    except (ValueError, TypeError) as error:
        raise ConversionError(f"config.json of the checkpoint is not valid: {error}") from error
    if dtype == "keep":
        # transformers replaces all linear modules that are not named here by `fp8` ones.
        skipped = {"modules_to_not_convert": unquantized_modules(DEEPSEEK_V41)}
        ours.quantization_config = {**config["quantization_config"], **skipped}
    return ours


def to_upstream_config(ours: Mapping) -> dict:
    """The upstream config of our config.json, for a model without the record of a release."""
    text = {key: copy.deepcopy(value) for key, value in ours["text_config"].items() if not key.startswith("_")}
    missing = [name for name in _ENGRAM_FIELDS if name not in ours]
    if missing:
        raise ConversionError(f"config.json lacks {missing[0]!r}; is it the config of a model with memory?")
    text |= {name: ours[name] for name in _ENGRAM_FIELDS}
    rope = DeepseekV41TextConfig(**{key: value for key, value in text.items() if key != "model_type"})
    image_token_id, vision = text.pop("image_token_id", None), text.pop("vision_config", None)
    added = ("rope_parameters", "layer_types", "dtype", "transformers_version", "architectures", "draft")
    for derived in (*added, "dspark_confidence_threshold"):
        text.pop(derived, None)
    text["rope_scaling"] = rope.upstream_rope_scaling
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
    """The upstream config of a model of which the vision tower, or the draft layers, were left out.

    Args:
        names: the tensors that there are, by our names.
    """
    config = {**config, "text_config": dict(config["text_config"])}
    if not any(name.startswith("model.vision_tower.") for name in names):
        config.pop("vision_config", None)
    if not any(name.startswith("draft.") for name in names):
        config["text_config"]["num_nextn_predict_layers"] = 0
    return config


def build_hasher(config: EngramConfig, tokenizer: Tokenizer) -> NgramHasher:
    """The n-gram hash: token map from the checkpoint's tokenizer, multipliers and primes from the config.

    Raises:
        ConversionError: the tokenizer's compressed vocabulary is not of the size the tables were trained with.
    """
    token_map = torch.from_numpy(build_token_map(tokenizer))
    found, expected = int(token_map.max()) + 1, config.engram_compressed_vocab_size
    if found != expected or len(token_map) > config.vocab_size:
        raise ConversionError(
            f"tokenizer.json compresses {len(token_map)} ids to {found}, the tables were trained with {expected} of "
            f"{config.vocab_size}; use the tokenizer of this very release."
        )
    hasher = NgramHasher.from_config(config)
    hasher.token_map[: len(token_map)] = token_map
    for name, value in hasher.derive_constants().items():
        getattr(hasher, name).copy_(value)
    return hasher


def parsing_documents(folder: Path) -> dict[str, bytes]:
    """The tokenizer's config, by which its `parse_response` knows what answers look like; empty if `folder` has none."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return {}
    return {path.name: json_bytes({"response_template": RESPONSE_TEMPLATE, **read_json(path)})}


def processor_config(config: EngramConfig) -> dict[str, bytes]:
    """The file by which `AutoProcessor` finds the processor of a model that reads images; it names remote code if there is."""
    names = ("patch_size", "downsample_ratio", "max_image_tokens", "min_pixels", "max_wh_ratio")
    fields = {name: getattr(config.vision_config, name) for name in names}
    classes = {
        "AutoProcessor": "processing_deepseek_v41.DeepseekV41Processor",
        "AutoImageProcessor": "image_processing_deepseek_v41.DeepseekV41ImageProcessor",
    }
    code = {"auto_map": classes} if getattr(config, "auto_map", None) else {}
    images = {**code, "image_processor_type": "DeepseekV41ImageProcessor", **fields}
    return {
        "processor_config.json": json_bytes(
            {**code, "processor_class": "DeepseekV41Processor", "image_processor": images}
        )
    }


def remote_code(config: EngramConfig) -> dict[str, bytes]:
    """The files with which a folder loads where this package is not installed; `config` is made to name them."""
    config.auto_map = config.remote_code_map()
    entry = Path(auto_deepseek_v41.__file__)
    files = {entry, *map(Path, get_relative_import_files(entry))}
    return {path.name: path.read_bytes() for path in sorted(files)}


def additions(config: EngramConfig, folder: Path, documents: Mapping[str, bytes]) -> Additions:
    """What a conversion adds to the release's tensors: `documents`, the config, and all that follows from the tokenizer."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConversionError(
            f"{path} does not exist; the n-gram hash needs the release's tokenizer beside its weights."
        )
    tokenizer = Tokenizer.from_file(str(path))
    hasher = build_hasher(config, tokenizer)
    token_map = hasher.token_map[hasher.token_map != NO_ID].numpy()
    own = {
        "config.json": config.to_json_string().encode("utf-8"),
        TOKEN_MAP_FILE: token_map_bytes(token_map, tokenizer),
    }
    tensors = [
        Tensor(f"{HASHING}.{name}", "I64", tuple(buffer.shape), [Literal(buffer.numpy().tobytes())])
        for name, buffer in hasher.named_buffers()
    ]
    return Additions({**documents, **own}, tensors, _describe_tables(config, hasher))


def _describe_tables(config: EngramConfig, hasher: NgramHasher) -> dict[int, TableDescription]:
    dtype = "F8_E4M3" if config.engram_table_dtype else SAFETENSORS_NAMES[config.dtype]
    return {
        layer: describe_table(hasher, index, width=config.engram_head_dim, dtype=dtype)
        for index, layer in enumerate(config.engram_layer_ids)
    }

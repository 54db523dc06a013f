"""Adding memory to a backbone: the size of tables, the loaded parts, and modules that a quantizer must skip.

A saved model runs without this file, so its folder does not contain it; the package sets it on the classes.
"""

import copy
import itertools
import os
from bisect import bisect_left

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from .backbone_engram import require_backbone
from .configuration_engram import EngramConfig
from .hashing_engram import as_token_map
from .layer_engram import require_extensible
from .modeling_engram import EngramForCausalLM
from .plain_config_engram import VARIANTS, parameters_beside_table
from .safetensors_engram import EngramError
from .table_format_engram import is_prime


def config_for_backbone(
    config_class: type[EngramConfig],
    text_config: PreTrainedConfig,
    tokenizer=None,
    *,
    layer_ids: list[int],
    variant: str = "paper",
    rows: int | None = None,
    memory_fraction: float | None = None,
    **engram_fields,
) -> EngramConfig:
    """Return the config for adding memory to a backbone; as a method, `EngramConfig.for_backbone`.

    Args:
        text_config: the backbone's config. If that has a `text_config` itself, the memory is its language model's.
        tokenizer: an `EngramTokenizer`, another fast tokenizer or a token map, which gives the compressed
            vocabulary's size and the pad id; None if the fields say so themselves, or for no compression.
        layer_ids: decoder layers that get a memory.
        variant: `"paper"` or `"v4.1"`; any field can be overridden.
        rows: approximate rows of each layer's table. Without this, `memory_fraction` and `engram_vocab_size`, a table
            has the variant's: five buckets a head for each token of the vocabulary (paper), or the release's 384
            million rows (V4.1).
        memory_fraction: share of all parameters that the memory shall have, between 0 and 1 (exclusive).
        **engram_fields: fields of [`EngramConfig`], by name.

    Raises:
        ValueError: on a field that breaks a rule, or if both `rows` and `memory_fraction` are given.
    """
    if variant not in VARIANTS:
        raise EngramError(f"variant is {variant!r}; it must be one of {', '.join(map(repr, VARIANTS))}.")
    if sum(value is not None for value in (rows, memory_fraction, engram_fields.get("engram_vocab_size"))) > 1:
        raise EngramError("Give one of rows, memory_fraction and engram_vocab_size: each fixes the tables' size.")
    if not isinstance(text_config, PreTrainedConfig):
        raise EngramError(
            f"text_config is a {type(text_config).__name__}; give the backbone's config, for example "
            "AutoConfig.from_pretrained(name)."
        )
    whole = text_config.backbone if isinstance(text_config, EngramConfig) else text_config
    text_config = whole.get_text_config(decoder=True)
    # For older encoder-decoders, transformers returns a copy without the encoder.
    is_composite = text_config is not whole and getattr(whole, "text_config", None) is text_config
    engram_fields |= {"backbone_config": whole} if is_composite else {"text_config": text_config}
    fields = {**VARIANTS[variant], "engram_layer_ids": list(map(int, layer_ids)), **engram_fields}
    fields.setdefault("dtype", text_config.dtype)
    if tokenizer is not None:
        fields.setdefault("engram_compressed_vocab_size", _compressed_size(tokenizer, text_config))
    fields.setdefault("engram_pad_token_id", _first_id(tokenizer, text_config))
    if rows is not None or memory_fraction is not None:
        # The first config has an arbitrary size, so that every other field is checked before the search for the size.
        smallest = config_class(**{**fields, "engram_vocab_size": 1})
        fields["engram_vocab_size"] = find_buckets(smallest, rows, memory_fraction)
    return config_class(**fields)


def _first_id(tokenizer, text_config: PreTrainedConfig) -> int:
    """Return the pad id, or the next best special id, of the tokenizer (or a processor's) or else the backbone."""
    for source in (tokenizer, getattr(tokenizer, "tokenizer", None), text_config):
        for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
            value = getattr(source, name, None)
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and value >= 0:
                return value
    return 0


def _compressed_size(tokenizer, text_config: PreTrainedConfig) -> int:
    token_map = as_token_map(tokenizer)
    if token_map.numel() > text_config.vocab_size:
        raise EngramError(
            f"The tokenizer has {token_map.numel()} ids, but the backbone's vocab_size is {text_config.vocab_size}; "
            "resize the backbone with resize_token_embeddings(len(tokenizer)) first."
        )
    return int(token_map.max()) + 1


def count_parameters(config: PreTrainedConfig) -> int:
    """Count the parameters of the model of `config`, with its vision tower if it has one, without allocating it.

    The count comes from the config, since loaded weights may be quantized or packed.
    """
    auto_class = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    with torch.device("meta"):
        return auto_class.from_config(config).num_parameters()


def find_buckets(config: EngramConfig, rows: int | None, memory_fraction: float | None) -> int:
    """Return the `engram_vocab_size` for tables of about `rows` rows, or for the memory's share of all parameters.

    Args:
        config: of the model, with any `engram_vocab_size`.
        rows, memory_fraction: see [`config_for_backbone`]; one of them.

    Raises:
        ValueError: there are no such tables.
    """
    return _buckets_for_rows(config, _rows_for_fraction(config, memory_fraction) if rows is None else rows)


def _rows_for_fraction(config: EngramConfig, fraction: float) -> int:
    """Return the rows of each table that make the memory `fraction` of all parameters."""
    if not 0 < fraction < 1:
        raise EngramError(f"memory_fraction is {fraction}; it must lie between 0 and 1, both excluded.")
    memory = count_parameters(config.backbone) * fraction / (1 - fraction)
    rows = round((memory / len(config.engram_layer_ids) - parameters_beside_table(config)) / config.engram_head_dim)
    if rows <= 0:
        raise EngramError(
            f"memory_fraction {fraction} is used up by the projections ({parameters_beside_table(config):,} parameters a "
            "layer); raise it, or lower engram_head_dim or engram_n_heads."
        )
    return rows


def _buckets_for_rows(config: EngramConfig, rows: int) -> int:
    """Return the `engram_vocab_size` whose tables have closest to `rows` rows each.

    With one bucket count for every order, the layout takes just the next primes from it upwards, one for each head.
    """
    layers = len(config.engram_layer_ids)
    heads = layers * (config.engram_max_ngram_size - 1) * config.engram_n_heads

    def total(first: int) -> int:
        return sum(itertools.islice(filter(is_prime, itertools.count(first)), heads))

    if rows * layers < total(1):
        raise EngramError(
            f"The tables would have {rows} rows each, but distinct primes for {heads} heads in {layers} layers sum to "
            f"at least {total(1) // layers} a layer; raise rows (or memory_fraction), or lower engram_n_heads."
        )
    candidates = range(1, rows * layers // heads + 1)
    above = bisect_left(candidates, rows * layers, key=total)
    return min(candidates[max(above - 1, 0) : above + 1], key=lambda first: abs(total(first) - rows * layers))


def add_memory(
    model_class: type[EngramForCausalLM],
    backbone: str | os.PathLike | PreTrainedModel,
    tokenizer=None,
    *,
    layer_ids: list[int],
    variant: str = "paper",
    rows: int | None = None,
    memory_fraction: float | None = None,
    **kwargs,
) -> EngramForCausalLM:
    """Add memory to a pretrained causal language model, whose logits stay exactly as they are until trained.

    As a method, `EngramForCausalLM.from_backbone`.

    Args:
        backbone: a causal language model (changed in place), or a name or folder for `AutoModelForCausalLM`. If it is
            quantized, the memory is not.
        tokenizer, layer_ids, variant, rows, memory_fraction: see [`config_for_backbone`].
        **kwargs: `engram_*` fields of the config; the rest goes to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: see [`config_for_backbone`]; or the backbone is an encoder-decoder, has no layers, or is
            quantized in a way that cannot leave the memory out.
    """
    fields = {name: kwargs.pop(name) for name in list(kwargs) if name.startswith("engram_")}
    fields |= {"variant": variant, "rows": rows, "memory_fraction": memory_fraction}
    require_backbone(backbone, kwargs)
    if isinstance(backbone, PreTrainedModel):
        if kwargs:
            raise EngramError(f"{sorted(kwargs)} only apply to a backbone that is loaded by name; leave them out.")
        host = backbone
    else:
        host = model_class.host_class.from_pretrained(backbone, **kwargs)
        require_backbone(host)
    require_extensible(host)
    if any(parameter.is_meta for parameter in host.parameters()):
        raise EngramError(
            "Some of the backbone's weights are offloaded; add memory with all of them loaded, save the model, and "
            "load that with a device_map."
        )
    config = config_for_backbone(EngramConfig, host.config, tokenizer, layer_ids=layer_ids, **fields)
    config.dtype = host.dtype
    for module in host.modules():
        module._is_hf_initialized = True  # Its weights are trained.
    model = model_class(config, host)
    model.memory_model.hashing.to(host.device)
    model.generation_config = host.generation_config
    _leave_memory_unquantized(model)
    for memory in model.memory_model.memories().values():
        memory.zero_value_projection()
    if tokenizer is not None and config.engram_compressed_vocab_size is not None:
        model.set_token_map(tokenizer)
    return model.train(host.training)


def _leave_memory_unquantized(model: PreTrainedModel) -> None:
    """List the unquantized modules of a quantized host as skipped: loading quantizes every other layer.

    Raises:
        ValueError: the host is quantized in a way that cannot leave anything out.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return
    config = copy.deepcopy(model.hf_quantizer.quantization_config)
    names = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
    skipped = next((name for name in names if hasattr(config, name)), None)
    if skipped is None:
        raise EngramError(
            f"A {type(config).__name__} cannot leave the memory out of what it quantizes; add memory to the backbone "
            "before it is quantized."
        )
    setattr(config, skipped, _unquantized_modules(model))
    model.hf_quantizer.quantization_config = model.config.quantization_config = config
    vars(model.config.backbone).pop(
        "quantization_config", None
    )  # It describes the backbone alone, and no longer applies.


def _unquantized_modules(model: PreTrainedModel) -> list[str]:
    # The names are patterns from the root of a model, with or without head, because not every quantizer matches the end of a name.
    prefix = f"{model.base_model_prefix}."
    names = [name for name, module in model.named_modules() if _is_unquantized(module)]
    return [f"({prefix})?{name.removeprefix(prefix)}" if name.startswith(prefix) else name for name in names]


def _is_unquantized(module: nn.Module) -> bool:
    """Return whether a linear layer, or one of stacked experts, has only matrices of ordinary floats."""
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() > 1]
    is_candidate = isinstance(module, nn.Linear) or any(matrix.dim() > 2 for matrix in matrices)
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return is_candidate and all(type(matrix) is nn.Parameter and matrix.dtype in floats for matrix in matrices)

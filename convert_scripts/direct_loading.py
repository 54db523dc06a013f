"""The tensor table as transformers' weight conversions: loading without converting.

`stored_form_conversions` lets `from_pretrained` read the folders that an import with `--dtype keep` writes: experts quantized
and stacked, memory tables quantized. `upstream_conversions` adds the release's own names, so that an upstream folder loads.

transformers applies renamings first (the FP8 quantizer's `.scale` -> `.weight_scale_inv` before ours), then at most one
converter. Without a GPU its FP8 quantizer dequantizes while it loads.
"""

import re

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
)

from .. import processing_deepseek_v41
from ..configuration_engram import EngramConfig
from ..draft_deepseek_v41 import DeepseekV41DraftModel
from ..image_processing_deepseek_v41 import DeepseekV41ImageProcessor
from ..loading_engram import Checkpoint
from ..modeling_engram import EngramForCausalLM
from ..multimodal_engram import EngramForConditionalGeneration
from ..tokenization import EngramTokenizer
from ..tokenization.tokenization_engram import LOCATION_ARGUMENTS
from .deepseek_v41 import DEEPSEEK_V41
from .deepseek_v41_config import HASHING, TEMPLATE, check_config, to_engram_fields
from .number_formats import decode
from .safetensors_files import ConversionError, enumerate_names
from .storage import FP4_ROWS, FP8_BLOCKS
from .tensor_rules import Layout, Rule

_NO_NAME = "$^"  # It matches nothing: an end before a beginning.


class LoadingConverter(WeightConverter):
    """A converter that saving ignores: a model is saved under its own names, with the dtypes that it has in memory."""

    __slots__ = ()

    def reverse_transform(self) -> WeightConverter:
        """Return a converter that matches no name."""
        return WeightConverter(_NO_NAME, "unused", [TakeAsIs()])


class LoadingRenaming(WeightRenaming):
    """A renaming that saving ignores."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        """Return a renaming that matches no name."""
        return WeightRenaming(_NO_NAME, "unused")


class TakeStacked(ConversionOps):
    """Experts already stacked `[E, R, C]`, with or without a scale: kept quantized if the module is, else dequantized."""

    # transformers' loader does not cast the inputs of a converter if one of its operations is marked as a quantizer's.
    hf_quantizer = True

    @torch.no_grad()
    def convert(self, input_dict, target_patterns, full_layer_name=None, model=None, **kwargs):
        """Convert `input_dict`, pattern -> list of one tensor; see `ConversionOps.convert`."""
        target = target_patterns[0]
        tensors = {
            ("scale" if key.endswith("_scale_inv$") else "weight"): _only(value) for key, value in input_dict.items()
        }
        weight, scale = tensors["weight"], tensors.get("scale")
        parameter = _parameter(model, full_layer_name)
        if scale is None:
            return {target: _as_parameter(weight, model, full_layer_name)}
        if _parameter(model, f"{full_layer_name}_scale_inv") is not None:
            return {target: weight, f"{target}_scale_inv": scale}
        storage = FP4_ROWS if weight.dtype == torch.int8 else FP8_BLOCKS
        dtype = torch.bfloat16 if parameter is None else parameter.dtype
        pairs = zip(weight.view(torch.uint8), scale.view(torch.uint8), strict=True)
        return {target: torch.stack([decode(*pair, storage).to(dtype) for pair in pairs])}


class TakeAsIs(ConversionOps):
    """A tensor, unchanged except for its dtype."""

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        """Convert `input_dict`, pattern -> list of one tensor; see `ConversionOps.convert`."""
        (values,) = input_dict.values()
        value = _only(values)
        # transformers leaves the floats of a quantized checkpoint as they are stored; it has cast those of any other checkpoint by now.
        if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
            value = _as_parameter(value, model, full_layer_name)
        return {full_layer_name: value}


def _only(value):
    return value[0] if isinstance(value, list) else value


def _as_parameter(value: torch.Tensor, model: torch.nn.Module | None, name: str) -> torch.Tensor:
    """Return `value` in the model's dtype for it: the parameter's, or float32 where the model keeps that."""
    parameter = _parameter(model, name)
    if parameter is None or value.dtype.itemsize == 1:
        return value
    kept = model._get_dtype_plan(parameter.dtype)
    is_kept = kept and build_glob_alternation(list(kept))[0].search(name)
    return value.to(torch.float32 if is_kept else parameter.dtype)


def _parameter(model: torch.nn.Module | None, name: str | None) -> torch.Tensor | None:
    if model is None or name is None:
        return None
    module, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(module), leaf, None)


def stored_form_conversions(layout: Layout) -> list[LoadingConverter]:
    """Return conversions for folders of ours whose weights are kept quantized; in any other folder they change
    nothing.
    """
    stacked = [
        LoadingConverter([rf"{re.escape(name)}_scale_inv$", rf"{re.escape(name)}$"], name, [TakeStacked()])
        for name in dict.fromkeys(_leaf(rule) for rule in layout.rules if rule.is_stacked)
    ]
    return [*_own_scales(layout), *stacked, *_table_conversions(), _full_precision_conversion(layout)]


def _own_scales(layout: Layout) -> list[LoadingRenaming]:
    """Return renamings of parameters that are called `scale` but do not belong to a quantized weight: the FP8
    quantizer renames them, too.
    """
    leaves = {_leaf(rule).removesuffix(".scale") for rule in layout.rules if rule.ours.endswith(".scale")}
    names = "|".join(re.escape(leaf) for leaf in sorted(leaves))
    return [LoadingRenaming(rf"\b({names})\.weight_scale_inv$", r"\1.scale")]


def _leaf(rule: Rule) -> str:
    """Return our name below the layer, or below the model, of a rule's tensor."""
    return rule.ours.split("{layer}.")[-1].removeprefix("model.").removeprefix("draft.")


def _is_of_the_tower(rule: Rule) -> bool:
    return rule.ours.startswith("model.vision_tower.")


def _table_conversions() -> list[LoadingConverter]:
    """Return conversions of tables: the FP8 quantizer takes any `X.scale` for the scale of a linear weight `X.weight`,
    and would dequantize a whole table.

    (It does not recognize a pattern that ends in `$` as that of a weight.)
    """
    return [
        LoadingConverter(r"engram\.table\.weight_scale_inv$", "engram.table.scale", [TakeAsIs()]),
        LoadingConverter(r"engram\.table\.weight$", "engram.table.weight", [TakeAsIs()]),
    ]


def _full_precision_conversion(layout: Layout) -> LoadingConverter:
    """Return the conversion of tensors in full precision: the FP8 quantizer would keep the file's dtype, not use the
    model's.
    """
    kept = [_leaf(rule) for rule in layout.rules if rule.storage.block is None and not _is_of_the_tower(rule)]
    # Whole names are needed: below a layer, parameters are called like those of other backbones.
    kept += [rule.ours.removeprefix("model.") for rule in layout.rules if _is_of_the_tower(rule)]
    names = "|".join(
        re.escape(name).replace(re.escape("{layer}"), r"\d+")
        for name in dict.fromkeys(kept)
        if name.endswith((".weight", ".bias")) or "." not in name
    )
    return LoadingConverter(rf"\b({names})$", r"\1", [TakeAsIs()])


def upstream_conversions(layout: Layout) -> list[LoadingRenaming | LoadingConverter]:
    """Return conversions for folders with upstream names: the layout's table, then `stored_form_conversions`."""
    renamings = [_renaming(rule) for rule in layout.rules if not rule.is_stacked]
    stacked = [rule for rule in layout.rules if rule.is_stacked]
    renamings += [_stacked_renaming(rule) for rule in stacked]
    merged = {_leaf(rule): rule for rule in stacked}.values()  # Draft layers have the names of the text layers.
    return renamings + [_merge(rule) for rule in merged] + stored_form_conversions(layout)


def _renaming(rule: Rule) -> LoadingRenaming:
    """Return the renaming of a rule, which covers the scale of a quantized weight too: both have the same stem."""
    source, target = rule.upstream[0], rule.ours
    if rule.storage.block:
        source, target = source.removesuffix("weight"), target.removesuffix("weight")
    pattern = re.escape(source).replace(r"\{layer\}", r"(\d+)").replace(r"\{last_draft\}", r"\d+")
    return LoadingRenaming(f"^{pattern}" + ("" if rule.storage.block else "$"), target.replace("{layer}", r"\1"))


def _stacked_renaming(rule: Rule) -> LoadingRenaming:
    """Return the renaming of stacked experts: `...experts.E.w1.` keeps its expert and leaf, and the prefix is renamed."""
    prefix, leaves = rule.upstream[0].split("{expert}")[0], "|".join(_part_name(name) for name in rule.upstream)
    pattern = re.escape(prefix).replace(r"\{layer\}", r"(\d+)")
    target = rule.ours.rpartition(".")[0].replace("{layer}", r"\1")
    return LoadingRenaming(rf"^{pattern}(?=\d+\.(?:{leaves})\.)", f"{target}.")


def _part_name(upstream: str) -> str:
    return upstream.split("{expert}.")[1].removesuffix(".weight")


def _merge(rule: Rule) -> LoadingConverter:
    """Return the converter that joins experts as transformers joins DeepSeek-V4's; its quantizer adds the scales, or
    dequantizes first.
    """
    prefix = re.escape(_leaf(rule).rpartition(".")[0])
    sources = [rf"{prefix}.*.{_part_name(name)}.weight" for name in rule.upstream]
    operations = [MergeModulelist(dim=0)] + ([Concatenate(dim=1)] if len(sources) > 1 else [])
    return LoadingConverter(sources, _leaf(rule), operations)


class DeepseekV41Config(EngramConfig):
    """The release's config.json, read as ours."""

    model_type = DEEPSEEK_V41.name

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Return the config of `config_dict` in the release's layout; see `PreTrainedConfig.from_dict`."""
        check_config(config_dict)
        ours = to_engram_fields(config_dict, "keep", dequantize_tables=False)
        return super().from_dict({**ours, "model_type": cls.model_type}, **kwargs)


class _OfTheRelease:
    """A loader of folders in the release's layout; its result is an ordinary model with memory."""

    config_class = DeepseekV41Config

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._keys_to_ignore_on_load_unexpected |= {rf"^{re.escape(prefix)}" for prefix in DEEPSEEK_V41.passed_through}
        self._keys_to_ignore_on_load_missing |= {rf"^{re.escape(HASHING)}\."}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, engram_residency="auto", output_loading_info=False, **kwargs
    ):
        """Load a model as in transformers. The hash, which the release does not store, follows from its config and
        tokenizer.

        Args:
            engram_residency: as for `EngramForCausalLM`; the release's own shards can be mapped.

        Raises:
            ValueError: a tensor is missing, or the tables were trained with another compressed vocabulary.
        """
        checkpoint = Checkpoint(pretrained_model_name_or_path, kwargs)
        tables, kwargs = checkpoint.find_tables(engram_residency), checkpoint.kwargs
        if tables is not None:
            kwargs = {**kwargs, "engram_tables": tables}
        load = PreTrainedModel.from_pretrained.__func__
        model, info = load(cls, checkpoint.name_or_path, *args, output_loading_info=True, **kwargs)
        if info["missing_keys"]:
            raise ConversionError(
                f"{pretrained_model_name_or_path} lacks the weights of {enumerate_names(info['missing_keys'])}; fetch the "
                f"missing files."
            )
        location = {name: kwargs[name] for name in LOCATION_ARGUMENTS if name in kwargs}
        model.set_token_map(EngramTokenizer.from_pretrained(checkpoint.name_or_path, **location))
        # Nothing distinguishes the model from a converted one from here on, so it is saved as one.
        ordinary = next(base for base in cls.__mro__ if base in (EngramForCausalLM, EngramForConditionalGeneration))
        model.__class__, model.config.__class__ = ordinary.extending(model._extends[1]), EngramConfig
        model.model.settle_memory()
        return (model, info) if output_loading_info else model


class DeepseekV41ForCausalLM(_OfTheRelease, EngramForCausalLM):
    """The release's folder as a model of text."""


class DeepseekV41ForConditionalGeneration(_OfTheRelease, EngramForConditionalGeneration):
    """The release's folder as a model of text and images."""


class DeepseekV41Processor(processing_deepseek_v41.DeepseekV41Processor):
    """The processor of the release's folder, which has neither a file for it nor a chat template."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a processor as in transformers; the arguments of the image processor are in the config.

        Raises:
            ValueError: the config has no vision tower.
        """
        location = {name: kwargs[name] for name in LOCATION_ARGUMENTS if name in kwargs}
        vision = AutoConfig.from_pretrained(pretrained_model_name_or_path, **location).text_config.vision_config
        if vision is None:
            raise ValueError(
                f"The config of {pretrained_model_name_or_path} has no `vision_config`, so there are no images to process; "
                "use the tokenizer alone."
            )
        tokenizer = EngramTokenizer.from_pretrained(pretrained_model_name_or_path, **location)
        images = DeepseekV41ImageProcessor.from_vision_config(vision)
        return processing_deepseek_v41.DeepseekV41Processor(images, tokenizer, TEMPLATE.read_text(encoding="utf-8"))


def register() -> None:
    """Let the Auto classes load the release's folders, and kept quantized ones of ours.

    If transformers has a `deepseek_v41` of its own, that one is kept.
    """
    for name in ("EngramModel", "EngramForCausalLM", "EngramForConditionalGeneration"):
        register_checkpoint_conversion_mapping(name, stored_form_conversions(DEEPSEEK_V41), overwrite=True)
    if DeepseekV41Config.model_type not in CONFIG_MAPPING:
        AutoConfig.register(DeepseekV41Config.model_type, DeepseekV41Config)
        AutoModelForCausalLM.register(DeepseekV41Config, DeepseekV41ForCausalLM)
        AutoModelForImageTextToText.register(DeepseekV41Config, DeepseekV41ForConditionalGeneration)
        AutoProcessor.register(DeepseekV41Config, DeepseekV41Processor)
        for name in (DeepseekV41ForCausalLM.__name__, DeepseekV41ForConditionalGeneration.__name__):
            register_checkpoint_conversion_mapping(name, upstream_conversions(DEEPSEEK_V41), overwrite=True)
    # Draft layers are loaded separately, from a folder of either kind.
    name = DeepseekV41DraftModel.__name__
    register_checkpoint_conversion_mapping(name, upstream_conversions(DEEPSEEK_V41), overwrite=True)

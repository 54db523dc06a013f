"""The model card that `push_to_hub` writes: the backbone, the memory, sizes, and how to load the model."""

import os
import re
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from .plain_config_engram import PlainConfig, parameters_beside_table
from .safetensors_engram import tensor_bytes
from .table_format_engram import ROW_FORMATS, RowFormat

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .configuration_engram import EngramConfig

# transformers' `create_and_tag_model_card` writes this text for a repository without a card.
_PLACEHOLDER = "This model card has been automatically generated."
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_COUNT_PREFIXES, _BYTE_PREFIXES = "kMBT", "kMGT"
_PROMPT = "The capital of France is"
_LICENCE_FIELDS = ("license", "license_name", "license_link")


def model_card(
    config: "EngramConfig | PlainConfig",
    repo_id: str | None = None,
    backbone_parameters: int | None = None,
    **metadata: Any,
) -> str:
    """Return a model card: the YAML block that the Hub reads, and a description for readers.

    Args:
        config: of the model the card describes; a [`PlainConfig`] if that has no other parts than its language model.
        repo_id: Hub id of the model, for the title and the loading example.
        backbone_parameters: of the language model without its memory, if they are known. Otherwise they are counted with
            the backbone's own classes, which imports transformers.
        **metadata: fields of `huggingface_hub.ModelCardData`, such as `license`, `base_model`, `language` or
            `eval_results`. `tags` are added to the card's own, and `widget` replaces its example of a prompt.
    """
    model_type = config.backbone.model_type
    tags = list(dict.fromkeys(["engram", model_type, *(metadata.pop("tags", None) or ())]))
    task = "image-text-to-text" if config.is_composite else "text-generation"
    widget = {} if config.is_composite else {"widget": [{"text": _PROMPT}]}
    fields = {"library_name": "transformers", "pipeline_tag": task, **widget, **metadata}
    if fields.get("eval_results"):
        fields.setdefault("model_name", (repo_id or "this model").split("/")[-1])
    data = ModelCardData(tags=tags, **fields)
    return f"---\n{data.to_yaml()}\n---\n\n{_body(config, repo_id or 'path/to/this/model', data, backbone_parameters)}"


def write_model_card(
    path: str | os.PathLike, config: "EngramConfig", repo_id: str, token: str | bool | None = None
) -> None:
    """Replace the placeholder card that transformers saved at `path`; a card with any other text is left alone.

    The backbone is named as base model, with its licence, if `config` remembers it as a repository that the Hub knows.

    Args:
        path: the README.md about to be uploaded.
        config: of the model.
        repo_id: where it is going.
        token: as in `push_to_hub`.
    """
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if _PLACEHOLDER not in card.text:
        return
    text = model_card(config, repo_id, tags=card.data.tags, **_provenance(config.backbone, token))
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _provenance(text_config: "PreTrainedConfig", token: str | bool | None) -> dict[str, Any]:
    """Return `base_model` and the licence fields, as far as the Hub has them for the backbone's repository."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name = text_config.name_or_path or ""
    if not _HUB_ID.fullmatch(name) or os.path.exists(name):
        return {}
    try:
        card = HfApi(token=token).model_info(name).card_data
    except (HfHubHTTPError, HFValidationError):
        # A relative path looks like a Hub id, and a repository may be gone: then there is nothing to point at.
        return {}
    stated = {} if card is None else card.to_dict()
    return {"base_model": name, **{field: stated[field] for field in _LICENCE_FIELDS if stated.get(field)}}


def _body(config: Any, repo_id: str, data: ModelCardData, backbone_parameters: int | None) -> str:
    layers = f"layer{'s' if len(config.engram_layer_ids) > 1 else ''} {_enumerate(config.engram_layer_ids)}"
    facts = "\n".join(
        f"| {name} | {fact} |" for name, fact in _facts(config, data.base_model, backbone_parameters).items()
    )
    model, tokenizer = ("ImageTextToText", "Processor") if config.is_composite else ("CausalLM", "Tokenizer")
    return f"""# {repo_id.split("/")[-1]}

A `{config.backbone.model_type}` language model with [Engram](https://arxiv.org/abs/2601.07372) memory in decoder {layers}:
rows of large tables, chosen by hashes of the last {_orders(config)} tokens, are added to what the model computes.

| | |
|---|---|
{facts}

## Loading

```python
from transformers import AutoModelFor{model}, Auto{tokenizer}

{tokenizer.lower()} = Auto{tokenizer}.from_pretrained("{repo_id}", trust_remote_code=True)
model = AutoModelFor{model}.from_pretrained("{repo_id}", trust_remote_code=True, device_map="auto")
```

The tables can stay in their files, from which only the rows that a text reads are fetched:

```python
model = AutoModelFor{model}.from_pretrained("{repo_id}", trust_remote_code=True, engram_residency="mapped")
```

The model's code lies beside its weights, which is what `trust_remote_code` allows to run. Memory is addressed by token ids:
use this repository's tokenizer, and pass `input_ids` even where you pass `inputs_embeds`.

## Licence

{_licence_sentence(data)}
"""


def _facts(config: Any, base_model: str | None, backbone: int | None) -> dict[str, str]:
    if backbone is None:
        from .adding_engram import count_parameters

        backbone = count_parameters(config.backbone)
    text, memory = config.text_config, _memory_parameters(config)
    source = f"[{base_model}](https://huggingface.co/{base_model}), " if base_model else ""
    rows = _enumerate([f"{count:,}" for count in config.engram_num_embeddings])
    compressed = config.engram_compressed_vocab_size
    vocabulary = "not compressed" if compressed is None else f"{text.vocab_size:,} ids, {compressed:,} for n-grams"
    return {
        "Backbone": f"{source}`{config.backbone.model_type}`, {text.num_hidden_layers} layers, {_amount(backbone)} parameters",
        "Memory": f"{_amount(memory)} parameters, {memory / (memory + backbone):.1%} of the model",
        "Memory layers": f"{_enumerate(config.engram_layer_ids)} (counted from 0)",
        "N-grams": f"{_orders(config)} tokens, {config.engram_n_heads} hash heads each",
        "Tables": f"{rows} rows of {config.engram_head_dim} {_table_dtype(config)}, {_amount(_table_bytes(config), _BYTE_PREFIXES)}B",
        "Vocabulary": vocabulary,
        **(
            {"Images": "read by the backbone; their positions have no memory"}
            if config.is_composite
            else _other_parts(text)
        ),
    }


def _other_parts(text: Any) -> dict[str, str]:
    """Return the model's inputs and functions beside text, as its config has them."""
    vision, drafts, parts = getattr(text, "vision_config", None), getattr(text, "dspark_block_size", None), {}
    if vision is not None:
        import torch
        from transformers import AutoModel

        with torch.device("meta"):
            count = AutoModel.from_config(vision).num_parameters()
        tower = f"a tower of {vision.num_hidden_layers} layers, {_amount(count)} parameters"
        parts["Images"] = f"{tower}; open the model with `AutoModelForImageTextToText` and `AutoProcessor`"
    if drafts is not None and text.num_nextn_predict_layers:
        layers = f"{text.num_nextn_predict_layers} draft layers, {drafts} tokens a pass"
        parts["Drafts"] = f"{layers}; `generate(..., use_mtp=True)`"
    return parts


def _licence_sentence(data: ModelCardData) -> str:
    if data.license is None:
        return "That of the backbone; name it in the `license` field at the top of this file."
    name = getattr(data, "license_name", None) or data.license
    link = getattr(data, "license_link", None)
    stated = f"[{name}]({link})" if link else f"`{name}`"
    return f"{stated}, as the backbone's." if data.base_model else f"{stated}."


def _memory_parameters(config: Any) -> int:
    beside = len(config.engram_layer_ids) * parameters_beside_table(config)
    return sum(config.engram_num_embeddings) * config.engram_head_dim + beside


def _table_dtype(config: Any) -> str:
    return config.engram_table_dtype or str(config.dtype or "float32").removeprefix("torch.")


def _table_bytes(config: Any) -> int:
    """Return the bytes of all rows with their scales."""
    formats, width = {form.name: form for form in ROW_FORMATS.values()}, config.engram_head_dim
    form = formats.get(_table_dtype(config), RowFormat("float64", "F64"))
    row = tensor_bytes(form.dtype, [width // form.packed])
    row += tensor_bytes(form.scale_dtype, [form.scales(width)]) if form.scale_dtype else 0
    return sum(config.engram_num_embeddings) * row


def _orders(config: Any) -> str:
    largest = config.engram_max_ngram_size
    return f"2 to {largest}" if largest > 2 else "2"


def _amount(number: int, prefixes: str = _COUNT_PREFIXES) -> str:
    """Return `number` with three digits and a decimal prefix: `46.7 B`."""
    value, prefix = float(number), ""
    for larger in prefixes:
        if value < 999.5:
            break
        value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}"


def _enumerate(items) -> str:
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last

"""A complete checkpoint of a model whose tables are not parameters: transformers' files, and the tables beside them."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..claimed_saving_engram import ClaimedFolderWriter
from ..safetensors_engram import (
    EngramError,
    FileHeader,
    FileWriter,
    TensorSpan,
    find_weights,
    header_bytes,
    is_weights_file,
    link_or_copy,
    read_header,
    read_weight_map,
    write_json,
)
from .row_embedding import EmbeddingOfRows, TableReader
from .stored_tables import DIGESTS_MEMBER, digest_of

_TABLES_FILE = "model-tables-{:05d}-of-{:05d}.safetensors"
_IS_TABLES_FILE = re.compile(r"model-tables-\d{5}-of-\d{5}\.safetensors")


def save_with_tables(
    model: PreTrainedModel,
    save: Callable[..., Any],
    folder: str | os.PathLike,
    *args: Any,
    variant: str | None = None,
    is_main_process: bool = True,
    **kwargs: Any,
) -> None:
    """Save a model and its tables atomically.

    Args:
        model: a model with [`EmbeddingOfRows`] instead of its tables.
        save: transformers' own `save_pretrained` of it.
        folder, args, variant, is_main_process, kwargs: as for `save_pretrained`.

    Raises:
        EngramError: the tables are stored under names that do not fit the model's.
        OSError: the folder cannot be written.
    """
    if not is_main_process or getattr(model, "_hf_peft_config_loaded", False):
        # No tables are saved if another process saves, or if only an adapter is saved.
        save(folder, *args, variant=variant, is_main_process=is_main_process, **kwargs)
        return
    _require_saveable(model)
    with ClaimedFolderWriter(folder) as writer:
        save(writer.path, *args, variant=variant, **kwargs)
        index = _add_tables(model, writer.path, variant)
        writer.publish(
            lambda name: _IS_TABLES_FILE.fullmatch(name) is not None or is_weights_file(name, variant), last=index
        )


def _require_saveable(model: PreTrainedModel) -> None:
    """Refuse models that transformers itself cannot save and load again."""
    quantizer = getattr(model, "hf_quantizer", None)
    is_announced = getattr(model.config, "quantization_config", None) is not None
    is_quantized = any(
        reader.stored.dtype not in (torch.float32, torch.bfloat16, torch.float16) for reader in readers_of(model)
    )
    if is_quantized and not is_announced:
        reason = (
            "was dequantized while it was loaded, so its config does not say any more that its tables are quantized"
        )
    elif quantizer is not None and not callable(quantizer.is_serializable):
        reason = f"is quantized by {type(quantizer).__name__}, which this version of transformers cannot save"
    else:
        return
    raise EngramError(f"The model {reason}; copy the folder that it was loaded from ({model.name_or_path}) instead.")


def readers_of(model: PreTrainedModel) -> Iterator[TableReader]:
    """Return the readers of all tables of a model."""
    for module in model.modules():
        if isinstance(module, EmbeddingOfRows):
            yield from module.readers.values()


def _add_tables(model: PreTrainedModel, folder: Path, variant: str | None) -> str:
    """Add the tables to a folder with all other weights; return the name of the index."""
    weights, index = _weights_of(folder, variant)
    readers = list(readers_of(model))
    tensors = {span.name: (header, span) for reader in readers for header, span in reader.stored.parts}
    _require_same_names(tensors, weights)
    descriptors = {path: file for reader in readers for path, file in reader.source.files.items()}
    by_file = groupby(sorted(tensors.values(), key=_place), key=lambda part: part[0].path)
    parts = [list(some) for _, some in by_file]
    written: dict[str, str] = {}
    for number, some in enumerate(parts, 1):
        name = _TABLES_FILE.format(number, len(parts))
        _write_file(folder / name, some, descriptors)
        written |= {span.name: name for _, span in some}
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")
    digests = {name: digest_of(folder / name) for name in sorted(set(written.values()))}
    metadata = {"total_size": size, DIGESTS_MEMBER: digests}
    write_json(folder / index, {"metadata": metadata, "weight_map": dict(sorted((weights | written).items()))})
    return index


def _place(part: tuple[FileHeader, TensorSpan]) -> tuple[str, int]:
    return str(part[0].path), part[1].offset


def _weights_of(folder: Path, variant: str | None) -> tuple[dict[str, str], str]:
    """Return the file of each tensor that transformers saved, and the name of the new index with the tables."""
    single, index = find_weights(lambda name: path if (path := folder / name).exists() else None, variant)
    if index is not None:
        return read_weight_map(index), index.name
    if single is None:
        raise EngramError(
            f"{folder} got no safetensors file, so that the tables cannot be put beside it; save without other formats."
        )
    # The index is read only if there is no file of this name.
    ending = f"{variant}.safetensors" if variant else "safetensors"
    stem = f"model-00001-of-00001.{ending}" if not variant else f"model.{variant}-00001-of-00001.safetensors"
    renamed = single.rename(folder / stem)
    index_name = f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"
    return dict.fromkeys(read_header(renamed).tensors, renamed.name), index_name


def _require_same_names(tensors: Mapping[str, Any], weights: Mapping[str, str]) -> None:
    """Refuse tables under names that the saved model does not use, since loading would not find them."""
    for name in tensors:
        if name in weights:
            raise EngramError(
                f"The model has a parameter {name}, and a table of that name; save it with residency='resident'."
            )
        parent = re.sub(r"(?:\.shard_\d+)?\.[^.]+$", "", name).rpartition(".")[0]
        if not any(key.startswith(f"{parent}.") for key in weights):
            raise EngramError(
                f"The tables are stored as {name}, but the model is saved under other names, so that they would not be found again; "
                "load it with residency='resident' and save that."
            )


def _write_file(path: Path, parts: list[tuple[FileHeader, TensorSpan]], descriptors: Mapping[Path, int]) -> None:
    """Write a file with tensors of another one: a link if that contains nothing else, or a copy."""
    header = parts[0][0]
    if header.tensors.keys() == {span.name for _, span in parts}:
        link_or_copy(descriptors[header.path], header.path, path)
        return
    head = header_bytes([(span.name, span.dtype, span.shape) for _, span in parts])
    with FileWriter(path, head) as writer:
        for _, span in parts:
            writer.copy(span.name, span, descriptors[header.path])

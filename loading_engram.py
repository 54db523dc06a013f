"""Where the files of a checkpoint come from."""

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming, WeightTransform
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import extract_commit_hash

from .safetensors_engram import read_weight_map

_ORIGIN = ("cache_dir", "force_download", "proxies", "token", "revision", "subfolder", "local_files_only")


def _download_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where files come from."""
    return {name: kwargs[name] for name in _ORIGIN if kwargs.get(name) is not None}


def resolver(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> Callable[[str], Path | None]:
    """File name to local path; downloads from the Hub what is not there, None for what does not exist.

    Args:
        kwargs: of `from_pretrained`.
    """
    options = _download_options(kwargs)

    def resolve(file: str) -> Path | None:
        try:
            found = cached_file(str(name_or_path), file, **options)
        except OSError as error:
            if not _means_absent(error) and not _is_known_absent(name_or_path, file, options):
                raise
            found = None
        return None if found is None else Path(found).absolute()  # wherever the process goes later

    return resolve


def settle_revision(name_or_path: str | os.PathLike | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` by which all files come from one state of a Hub repository.

    Tables may take hours to download. Weights that are pushed meanwhile would be taken for theirs: no hash tells them apart.

    Args:
        name_or_path: a folder or Hub id.
        kwargs: what `from_pretrained` was called with.

    Raises:
        OSError: there is no config.json, without which transformers would build a backbone of its default size.
    """
    if name_or_path is None or kwargs.get("gguf_file"):
        return kwargs
    resolve = resolver(name_or_path, kwargs)
    config = resolve(CONFIG_NAME)
    if config is None:
        if kwargs.get("config") is None and resolve(ADAPTER_CONFIG_NAME) is None:
            raise OSError(f"{name_or_path} has no {CONFIG_NAME}; complete it, or name the folder of a saved model.")
        return kwargs
    commit = None if os.path.isdir(name_or_path) else extract_commit_hash(str(config), None)
    return kwargs if commit is None else {**kwargs, "revision": commit}


def _means_absent(error: OSError) -> bool:
    """Whether `cached_file` says that there is no such file, or that there is neither a network nor a cached one.

    A Hub that refuses to answer (busy, or forbidden) says nothing of what is there.
    """
    cause = error.__cause__
    if isinstance(cause, LocalEntryNotFoundError):
        return not isinstance(cause.__cause__, HfHubHTTPError)
    return cause is None and error.errno is None


def find_weights(resolve: Callable[[str], Path | None], variant: str | None) -> tuple[Path | None, Path | None]:
    """The one safetensors file of a checkpoint, or else the index of its shards; None for what there is not."""
    single, index = (_of_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    found = resolve(single)
    return (found, None) if found is not None else (None, resolve(index))


def is_weights_file(name: str, variant: str | None) -> bool:
    """Whether a file of a model folder is named as transformers names weights of this variant, their shards or index."""
    single, index = (_of_variant(file, variant) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    stem = re.escape(single.removesuffix(".safetensors"))
    return name in (single, index) or re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.safetensors", name) is not None


def find_weight_files(resolve: Callable[[str], Path | None], variant: str | None) -> list[Path]:
    """All safetensors files of a checkpoint's weights that are there."""
    single, index = find_weights(resolve, variant)
    names = set() if index is None else set(read_weight_map(index).values())
    paths = [single, *map(resolve, sorted(names))]
    return [path for path in paths if path is not None]


def _of_variant(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def _is_known_absent(name_or_path: str | os.PathLike, file: str, options: dict[str, Any]) -> bool:
    """Whether the cache has it that the repository, as it was when last asked, has no such file."""
    where = {name: options[name] for name in ("cache_dir", "revision") if name in options}
    path = os.path.join(options.get("subfolder", ""), file)
    try:
        return try_to_load_from_cache(str(name_or_path), path, **where) is _CACHED_NO_EXIST
    except HFValidationError:  # neither a folder nor a Hub id
        return False


def undo_renamings_of_memory(model: PreTrainedModel, mapping: list[WeightTransform]) -> list[WeightRenaming]:
    """Renamings that give the memory its names back, to be applied after those of the backbone.

    A backbone whose checkpoints have other names than its modules renames every key below it that fits a pattern, and
    the memory's may fit by accident: DeepSeek-V4 turns each `q_norm` into `q_a_norm`.
    """
    renamings = [copy.deepcopy(transform) for transform in mapping if isinstance(transform, WeightRenaming)]
    undo = {}
    for key in model.state_dict():
        renamed = key
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        if ".engram." in key and renamed != key:
            undo[renamed.split(".engram.")[1]] = key.split(".engram.")[1]
    return [WeightRenaming(f".engram.{renamed}", f".engram.{name}") for renamed, name in undo.items()]

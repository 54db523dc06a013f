"""Where the files of a checkpoint come from, and what of them a model of its first layers takes.

For such a model (`EngramConfig.first_layers`) transformers would fetch and open every shard that the index names. So it is
given the first shard with a tensor of the model, as if there were no index, and the others when it opens files.
"""

import copy
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, WeightTransform
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import cached_files, extract_commit_hash

from .configuration_engram import EngramConfig, as_decoder_config
from .safetensors_engram import read_json, read_weight_map

# Below its own loggers, so that the verbosity that is set for transformers holds here, too.
logger = logging.get_logger(f"transformers.{__name__}")

_ORIGIN = ("cache_dir", "force_download", "proxies", "token", "revision", "subfolder", "local_files_only")
# Rides on the config of the one call that loads the model, for want of another way through `from_pretrained`.
_NOTE = "_engram_first_layers"
# Stored with an entry for each memory.
_CONSTANTS = ("hashing.multipliers", "hashing.primes")


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


@dataclass
class FirstLayers:
    """What loading the first layers of a longer checkpoint takes besides the model.

    Args:
        count: decoder layers of the model.
        shards: paths of the shards it needs besides the first; none if all of the checkpoint is opened.
        weight_map: the file of every tensor in the shards it needs.
    """

    count: int
    shards: list[str] = field(default_factory=list)
    weight_map: dict[str, str] | None = None

    @property
    def left_out(self) -> str:
        """A pattern of the tensors of all later layers: of no others, since what cannot be told is needed."""
        kept = "|".join(map(str, range(self.count)))
        return rf"^(?:(?:model|backbone)\.)*layers\.(?!(?:{kept})\.)\d+\."

    def prepare(self, model, files: list[str], load_config):
        """Files to load into `model`, and how: nothing is said about layers that are not wanted."""
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {self.left_out}
        cuts = [WeightConverter(name, name, [_FirstRows()]) for name in _CONSTANTS]
        load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or ()), *cuts])
        if self.weight_map is None:
            return files, load_config
        vars(model.config).pop("transformers_weights")
        first, *more = files
        return [first, *self.shards, *more], replace(load_config, sharded_metadata={"weight_map": self.weight_map})


class _FirstRows(ConversionOps):
    """Of a constant with an entry for each memory, the entries of those that the model has."""

    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs):
        (values,) = input_dict.values()
        stored = values[0] if isinstance(values, list) else values
        return {target_patterns[0]: stored[: model.get_buffer(full_layer_name).shape[0]].clone()}

    @property
    def reverse_op(self) -> "_FirstRows":
        return self  # in a model's own constants there is nothing left to cut


def choose_first_layers(name_or_path: str | os.PathLike | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` with which a model that is shorter than its checkpoint loads no more than its part.

    Args:
        name_or_path: a folder or Hub id.
        kwargs: what `from_pretrained` was called with; returned as it is if the model has all the layers.

    Raises:
        FileFormatError: the index is damaged, or names a file outside its folder.
        OSError: a shard is missing, or cannot be downloaded.
    """
    config = kwargs.get("config")
    if (
        name_or_path is None
        or kwargs.get("gguf_file")
        or getattr(config, "model_type", None) != EngramConfig.model_type
    ):
        return kwargs
    resolve = resolver(name_or_path, kwargs)
    if not _is_shorter(config, resolve(CONFIG_NAME)):
        return kwargs
    layers, config = FirstLayers(config.num_hidden_layers), copy.deepcopy(config)
    setattr(config, _NOTE, layers)
    kwargs = {**kwargs, "config": config}
    if kwargs.get("use_safetensors") is False or getattr(config, "transformers_weights", None):
        return kwargs
    _, index = find_weights(resolve, kwargs.get("variant"))
    return kwargs if index is None else _choose_shards(name_or_path, kwargs, index)


def _is_shorter(config: PreTrainedConfig, stored: Path | None) -> bool:
    """Whether a checkpoint is told, by its own config, to have more layers than `config`."""
    fields = {} if stored is None else read_json(stored, constants=True)
    if fields.get("model_type") != EngramConfig.model_type:
        return False
    return config.num_hidden_layers < as_decoder_config(fields.get("text_config")).num_hidden_layers


def _choose_shards(name_or_path: str | os.PathLike, kwargs: dict[str, Any], index: Path) -> dict[str, Any]:
    config = kwargs["config"]
    layers, weight_map = getattr(config, _NOTE), read_weight_map(index)
    needed = sorted({file for key, file in weight_map.items() if not re.match(layers.left_out, key)})
    files = set(weight_map.values())
    if not needed or len(needed) == len(files) or not needed[0].endswith(".safetensors"):
        return kwargs
    logger.info(f"Loading {layers.count} layers of {name_or_path}: {len(needed)} of {len(files)} shards.")
    if len(needed) > 1:
        layers.shards = cached_files(str(name_or_path), needed[1:], **_download_options(kwargs))
    layers.weight_map = {key: file for key, file in weight_map.items() if file in needed}
    config.transformers_weights = needed[0]
    return kwargs


def take_first_layers(config: PreTrainedConfig) -> FirstLayers | None:
    """What [`choose_first_layers`] left on the config for the load of this model; the config loses it."""
    return vars(config).pop(_NOTE, None)


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

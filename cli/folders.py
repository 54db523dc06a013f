"""Read the folders that commands are given: config, weights, tables and hash."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram_hf.configuration_engram import EngramConfig
    from engram_hf.plain_config_engram import StoredHash
    from engram_hf.safetensors_engram import TensorSpan
    from engram_hf.table_format_engram import StoredTable


# Names of the memory's tensors in a checkpoint match this pattern.
_OF_THE_MEMORY = re.compile(r"(^|\.)(engram|hashing)\.")


def require_folder(name: str, only: list[str] | None = None) -> Path:
    """Return the folder `name`, or the files of the Hub repository `name`, which are downloaded if they are not
    cached.

    Args:
        only: patterns of the files that are downloaded of a repository; None for all.

    Raises:
        ValueError: there is neither a folder nor a repository of this name.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from engram_hf.convert_scripts.command_line import local_folder

    return local_folder(name, only=only)


def is_hub_id(name: str) -> bool:
    """Return whether `name` has the form of a Hub id, and nothing here has that name."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def require_tokenizer(folder: Path) -> None:
    """Raise ValueError if `folder` has no tokenizer."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{folder} has no tokenizer; tokenizer.save_pretrained puts one there.")


def read_utf8(path: Path) -> str:
    """Return the content of a text file.

    Raises:
        ValueError: the file is not text in UTF-8.
        OSError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}); save it in that encoding."
        ) from error


def is_model(folder: Path) -> bool:
    """Return whether `folder` holds a model, and not only tables."""
    return (folder / "config.json").exists()


def has_memory(folder: Path) -> bool:
    """Return whether `folder` has tables of this package, or a config whose model has some."""
    from engram_hf.safetensors_engram import FileFormatError, read_json
    from engram_hf.table_format_engram import MANIFEST_NAME

    if (folder / MANIFEST_NAME).exists():
        return True
    if not is_model(folder):
        return False
    try:
        fields = read_json(folder / "config.json", constants=True)
    except FileFormatError:
        return True  # transformers raises its own error for a damaged config.
    text = fields.get("text_config")  # The release of DeepSeek-V4.1 has its fields in `text_config`.
    return "engram_layer_ids" in fields or (isinstance(text, dict) and "engram_layer_ids" in text)


def read_config(folder: Path) -> Any:
    """Return the checked config of a model folder: its plain fields if these are complete, else an `EngramConfig`.

    Raises:
        ValueError: the folder holds another kind of model, a damaged config, or none.
    """
    from engram_hf.plain_config_engram import read_plain_config

    return read_plain_config(folder) or read_whole_config(folder)


def read_whole_config(folder: Path) -> "EngramConfig":
    """Return the checked config of a model folder as transformers reads it, with defaults and methods.

    Raises:
        ValueError: the folder holds another kind of model, a damaged config, or none.
    """
    from transformers import AutoConfig

    from engram_hf import EngramConfig

    if not is_model(folder):
        raise ValueError(f"{folder} has no config.json; name the folder of a saved model.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError):
        raise
    except Exception as error:  # A field of a wrong type can raise any error in the backbone's config.
        raise ValueError(
            f"{folder / 'config.json'} cannot be read ({type(error).__name__}: {error}); restore the file that was saved."
        ) from error
    if not isinstance(config, EngramConfig):
        raise ValueError(
            f"{folder} holds a plain {config.model_type!r} model without memory; EngramForCausalLM.from_backbone adds one."
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that a model is loaded from, and those that a manifest names.

    They are chosen as in `from_pretrained`: one file, or else the shards of the index. A folder without either may hold tables alone.

    Raises:
        ValueError: the index or the manifest is damaged.
    """
    from engram_hf.safetensors_engram import read_weight_map
    from engram_hf.table_format_engram import MANIFEST_NAME, TOKEN_MAP_NAME, read_manifest

    named = set()
    if (folder / MANIFEST_NAME).exists():
        entries = read_manifest(folder / MANIFEST_NAME).values()
        named = {location["file"] for entry in entries for location in entry["weight"]}
    single, index = _find_weights(folder)
    if index is not None:
        named |= set(read_weight_map(index).values())
    elif single is not None:
        named.add(single.name)
    else:
        return [path for path in sorted(folder.glob("*.safetensors")) if path.name != TOKEN_MAP_NAME]
    return [path for path in sorted(folder.glob("*.safetensors")) if path.name in named]


def find_index(folder: Path) -> Path | None:
    """Return the index of a model's shards; None if one file has all weights, beside which an older index may lie."""
    return _find_weights(folder)[1]


def _find_weights(folder: Path) -> tuple[Path | None, Path | None]:
    from engram_hf.safetensors_engram import find_weights

    return find_weights(lambda name: path if (path := folder / name).exists() else None, None)


def count_stored_parameters(folder: Path, name: str) -> int | None:
    """Return the number of parameters of a language model without its memory, from the headers of its weights.

    The result is None if headers cannot be read, and for quantized weights, whose files hold other numbers than the
    model computes with.

    Args:
        folder: the model folder.
        name: the argument of the command. For a Hub id, the headers are read over the network.
    """
    from engram_hf.convert_scripts.command_line import Source
    from engram_hf.safetensors_engram import read_weight_map

    source, index = Source(folder, None if Path(name).is_dir() else name), find_index(folder)
    try:
        files = ["model.safetensors"] if index is None else sorted(set(read_weight_map(index).values()))
        tensors = {name: span for file in files for name, span in source.read_shard(folder / file).tensors.items()}
    except (ValueError, OSError):
        return None
    counted = [span for name, span in tensors.items() if not _OF_THE_MEMORY.search(name)]
    if not all(span.dtype in ("F64", "F32", "BF16", "F16") for span in counted):
        return None
    return sum(math.prod(span.shape) for span in counted)


def require_shards(folder: Path) -> None:
    """Raise ValueError if the index of a model folder names a missing file."""
    from engram_hf.safetensors_engram import read_weight_map

    index = find_index(folder)
    files = set() if index is None else set(read_weight_map(index).values())
    missing = sorted(file for file in files if not (folder / file).exists())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} shards of its index, such as {missing[0]}; complete it.")


def read_stored_tables(folder: Path) -> "dict[int, StoredTable]":
    """Return the tables of a model folder or table folder, by layer; only headers are read.

    Raises:
        ValueError: there are no tables, or they break a rule of the table format.
    """
    from engram_hf.table_format_engram import MANIFEST_NAME, read_tables, tables_in_checkpoint

    tables = read_tables(folder) if (folder / MANIFEST_NAME).exists() else {}
    named = {part.file.path for table in tables.values() for part in table.parts}
    # Tables among the weights take precedence over files of an earlier save, as in `from_pretrained`.
    among_weights = [path for path in weight_files(folder) if path not in named]
    table_dtype = read_config(folder).engram_table_dtype if is_model(folder) and among_weights else None
    tables |= tables_in_checkpoint(among_weights, table_dtype)
    if not tables:
        raise ValueError(
            f"{folder} holds no memory tables: no {MANIFEST_NAME}, and no safetensors file with tensors named "
            "*.engram.table.weight. Name a folder written by save_pretrained, `engram convert` or `engram quantize`."
        )
    return tables


def check_model(folder: Path) -> "tuple[StoredHash, dict[int, StoredTable]]":
    """Compare the tables, the stored hash and the token map of the model in `folder` with its config.

    Returns:
        The hash, and the table of every layer that the config lists, in its order.

    Raises:
        ValueError: a part is missing, or the parts belong to different models.
    """
    from engram_hf.table_format_engram import require_fit, require_same_hash

    config, stored = read_config(folder), read_stored_tables(folder)
    tables: dict[int, StoredTable] = {}
    stored_hash = _read_hash(folder, config)
    for index, (layer, rows) in enumerate(zip(config.engram_layer_ids, config.engram_num_embeddings, strict=True)):
        table = tables[layer] = require_fit(stored, layer, rows, config.engram_head_dim, config.engram_table_dtype)
        if table.description is not None:
            require_same_hash(table.description, stored_hash, index)
    _require_same_token_map(folder, stored_hash)
    return stored_hash, tables


def _read_hash(folder: Path, config: Any) -> "StoredHash":
    """Return the hash of a saved model: the constants and the token map stored beside its weights."""
    from engram_hf.plain_config_engram import read_plain_hash
    from engram_hf.safetensors_engram import read_header

    tensors = [tensor for path in weight_files(folder) for tensor in read_header(path).tensors.items()]
    spans = {name.rpartition(".")[2]: span for name, span in tensors if ".hashing." in f".{name}"}
    spans = {name: span for name, span in spans.items() if name in ("token_map", "multipliers", "primes")}
    return read_plain_hash(config, spans) or _load_hash(folder, read_whole_config(folder), spans)


def _load_hash(folder: Path, config: "EngramConfig", spans: "dict[str, TensorSpan]") -> "StoredHash":
    """Return the stored hash as the model's own module loads it, with casts of its tensors reversed.

    Raises:
        ValueError: tensors are missing or do not belong to the config.
    """
    import torch
    from safetensors import safe_open

    from engram_hf import EngramConfig
    from engram_hf.hashing_engram import NgramHasher
    from engram_hf.plain_config_engram import StoredHash

    with torch.device("meta"):  # On the meta device, a size that only a config states takes no memory.
        expected = NgramHasher.from_config(config).state_dict()
    if missing := sorted(expected.keys() - spans.keys()):
        if config.model_type != EngramConfig.model_type:
            raise ValueError(f"{folder} is in the layout of {config.model_type}; `engram convert` it first.")
        raise ValueError(f"{folder} lacks the hash tensors {', '.join(missing)}; complete it (a shard may be absent).")
    state: dict[str, torch.Tensor] = {}
    for name in expected:
        with safe_open(spans[name].path, framework="pt") as file:
            state[name] = file.get_tensor(spans[name].name)
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"The hash tensor {name} in {folder} has shape {list(state[name].shape)}, but the config asks for "
                f"{list(expected[name].shape)}; take weights and config.json of one model."
            )
    hasher = NgramHasher.from_config(config)
    hasher.load_state_dict(state)
    hasher.verify_constants()
    arrays = {"token_map": None, **{name: buffer.numpy() for name, buffer in hasher.named_buffers()}}
    return StoredHash(hasher.layer_ids, hasher.pad_token_id, hasher.hash_vocab_size, **arrays)


def _require_same_token_map(folder: Path, stored_hash: "StoredHash") -> None:
    from engram_hf.table_check_engram import read_token_map
    from engram_hf.table_format_engram import TOKEN_MAP_NAME

    found, own = read_token_map(folder / TOKEN_MAP_NAME), stored_hash.token_map
    if found is None or own is None or not (own >= 0).any():
        return
    ids = min(len(found), len(own))
    own, found = own[:ids], found[:ids]
    hashed = (own >= 0) & (own < stored_hash.hash_vocab_size)  # Tokens that were added later may have other ids.
    if (own[hashed] != found[hashed]).any():
        raise ValueError(
            f"{folder / TOKEN_MAP_NAME} is that of another tokenizer than the model's; put the one back that belongs to it."
        )

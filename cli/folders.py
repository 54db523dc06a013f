"""What the folders that commands are given hold."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram_hf.configuration_engram import EngramConfig
    from engram_hf.hashing_engram import NgramHasher
    from engram_hf.table_format_engram import StoredTable


def require_folder(name: str, only: list[str] | None = None) -> Path:
    """The folder `name`, or the files of the Hub repository `name`, which are fetched if they are not here yet.

    Args:
        only: patterns of the files that are needed of a repository; None for all.

    Raises:
        ValueError: there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    from engram_hf.convert_scripts.command_line import local_folder

    return local_folder(name, only=only)


def is_model(folder: Path) -> bool:
    """Whether `folder` holds a model, and not only tables."""
    return (folder / "config.json").exists()


def has_memory(folder: Path) -> bool:
    """Whether `folder` has tables of this package, or says that its model has some."""
    from engram_hf.safetensors_engram import FileFormatError, read_json
    from engram_hf.table_format_engram import MANIFEST_NAME

    if (folder / MANIFEST_NAME).exists():
        return True
    if not is_model(folder):
        return False
    try:
        fields = read_json(folder / "config.json", constants=True)
    except FileFormatError:
        return True  # transformers says what is wrong with it
    text = fields.get("text_config")  # where DeepSeek-V4.1's release has them
    return "engram_layer_ids" in fields or (isinstance(text, dict) and "engram_layer_ids" in text)


def read_config(folder: Path) -> "EngramConfig":
    """The checked config of a model folder.

    Raises:
        ValueError: it holds another kind of model, a damaged config, or none.
    """
    from transformers import AutoConfig

    from engram_hf.configuration_engram import EngramConfig

    if not is_model(folder):
        raise ValueError(f"{folder} has no config.json; name the folder of a saved model.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError):
        raise
    except Exception as error:  # what a field of a wrong type leads to is up to the backbone's config
        raise ValueError(f"{folder / 'config.json'} cannot be read: {type(error).__name__}, {error}.") from error
    if not isinstance(config, EngramConfig):
        raise ValueError(
            f"{folder} holds a plain {config.model_type!r} model without memory; EngramForCausalLM.from_backbone adds one."
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from, and those that a manifest names.

    As `from_pretrained` does: one file, or else the shards of the index. A folder without either may hold tables alone.

    Raises:
        ValueError: index or manifest are damaged.
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
    """The index of a model's shards; None where one file has all weights, beside which an older index may lie."""
    return _find_weights(folder)[1]


def _find_weights(folder: Path) -> tuple[Path | None, Path | None]:
    from engram_hf.loading_engram import find_weights

    return find_weights(lambda name: path if (path := folder / name).exists() else None, None)


def require_shards(folder: Path) -> None:
    """Raise ValueError if the index of a model folder names a file that is not there."""
    from engram_hf.safetensors_engram import read_weight_map

    index = find_index(folder)
    files = set() if index is None else set(read_weight_map(index).values())
    missing = sorted(file for file in files if not (folder / file).exists())
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} shards of its index, such as {missing[0]}; complete it.")


def read_stored_tables(folder: Path) -> "dict[int, StoredTable]":
    """The tables of a model folder or table folder, by layer; only headers are read.

    Raises:
        ValueError: there are none, or they break a rule of the table format.
    """
    from engram_hf.table_format_engram import MANIFEST_NAME, read_tables, tables_in_checkpoint

    tables = read_tables(folder) if (folder / MANIFEST_NAME).exists() else {}
    named = {part.file.path for table in tables.values() for part in table.parts}
    # As for `from_pretrained`, they come before what an older save left in files of its own.
    among_weights = [path for path in weight_files(folder) if path not in named]
    table_dtype = read_config(folder).engram_table_dtype if is_model(folder) and among_weights else None
    tables |= tables_in_checkpoint(among_weights, table_dtype)
    if not tables:
        raise ValueError(
            f"{folder} holds no memory tables: no {MANIFEST_NAME}, and no safetensors file with tensors named "
            "*.engram.table.weight. Name a folder written by save_pretrained, `engram convert` or `engram quantize`."
        )
    return tables


def check_model(folder: Path) -> "tuple[NgramHasher, dict[int, StoredTable]]":
    """Compare the tables, the stored hash and the token map of the model in `folder` with its config.

    Returns:
        The hash, and the table of every layer that the config lists, in its order.

    Raises:
        ValueError: something is missing, or they are not of one model.
    """
    from engram_hf.table_format_engram import require_fit, require_same_hash

    config, stored = read_config(folder), read_stored_tables(folder)
    tables: dict[int, StoredTable] = {}
    hasher = _read_hasher(folder, config)
    for index, (layer, rows) in enumerate(zip(config.engram_layer_ids, config.engram_num_embeddings, strict=True)):
        table = tables[layer] = require_fit(stored, layer, rows, config.engram_head_dim, config.engram_table_dtype)
        if table.description is not None:
            require_same_hash(table.description, hasher, index)
    _require_same_token_map(folder, hasher)
    return hasher, tables


def _read_hasher(folder: Path, config: "EngramConfig") -> "NgramHasher":
    """The hash of a saved model, with the constants and the token map stored beside its weights."""
    import torch
    from safetensors import safe_open

    from engram_hf.configuration_engram import EngramConfig
    from engram_hf.hashing_engram import NgramHasher
    from engram_hf.safetensors_engram import read_header

    with torch.device("meta"):  # the word of a config alone takes no memory
        expected = NgramHasher.from_config(config).state_dict()
    state: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        names = {name.rpartition(".")[2]: name for name in read_header(path).tensors if ".hashing." in f".{name}"}
        with safe_open(path, framework="pt") as file:
            state |= {short: file.get_tensor(name) for short, name in names.items() if short in expected}
    if missing := sorted(expected.keys() - state.keys()):
        if config.model_type != EngramConfig.model_type:
            raise ValueError(f"{folder} is in the layout of {config.model_type}; `engram convert` it first.")
        raise ValueError(f"{folder} lacks the hash tensors {', '.join(missing)}; complete it (a shard may be absent).")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"The hash tensor {name} in {folder} has shape {list(tensor.shape)}, but the config asks for "
                f"{list(expected[name].shape)}; weights and config.json are not of one model."
            )
    hasher = NgramHasher.from_config(config)
    hasher.load_state_dict(state)
    hasher.verify_constants()
    return hasher


def _require_same_token_map(folder: Path, hasher: "NgramHasher") -> None:
    from engram_hf.table_check_engram import read_token_map
    from engram_hf.table_format_engram import TOKEN_MAP_NAME

    found = read_token_map(folder / TOKEN_MAP_NAME)
    if found is None or not hasher.has_token_map or hasher.token_map is None:
        return
    ids = min(len(found), len(hasher.token_map))
    own, found = hasher.token_map[:ids], found[:ids].to(hasher.token_map.dtype)
    hashed = (own >= 0) & (own < hasher.hash_vocab_size)  # tokens that were added since may have other ids
    if not own[hashed].equal(found[hashed]):
        raise ValueError(
            f"{folder / TOKEN_MAP_NAME} is that of another tokenizer than the model's; put the one back that belongs to it."
        )

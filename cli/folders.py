"""What the folders that commands are given hold."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram_hf.configuration_engram import EngramConfig
    from engram_hf.table_format_engram import StoredTable


def require_folder(name: str) -> Path:
    """The folder `name`.

    Raises:
        ValueError: there is none.
    """
    folder = Path(name)
    if not folder.is_dir():
        hint = (
            f"`hf download {name} --local-dir FOLDER` fetches one from the Hub" if name.count("/") == 1 else "name one"
        )
        raise ValueError(f"{name} is not a folder here; {hint}.")
    return folder


def is_model(folder: Path) -> bool:
    """Whether `folder` holds a model, and not only tables."""
    return (folder / "config.json").exists()


def read_config(folder: Path) -> "EngramConfig":
    """The checked config of a model folder.

    Raises:
        ValueError: it holds another kind of model, or none.
    """
    from transformers import AutoConfig

    from engram_hf.configuration_engram import EngramConfig

    if not is_model(folder):
        raise ValueError(f"{folder} has no config.json; name the folder of a saved model.")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, EngramConfig):
        raise ValueError(
            f"{folder} holds a plain {config.model_type!r} model without memory; EngramForCausalLM.from_backbone adds one."
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, the token map apart."""
    from engram_hf.table_format_engram import TOKEN_MAP_NAME

    return [path for path in sorted(folder.glob("*.safetensors")) if path.name != TOKEN_MAP_NAME]


def read_stored_tables(folder: Path) -> "dict[int, StoredTable]":
    """The tables of a model folder or table folder, by layer; only headers are read.

    Raises:
        ValueError: there are none, or they break a rule of the table format.
    """
    from engram_hf.table_format_engram import MANIFEST_NAME, read_tables, tables_in_checkpoint

    if (folder / MANIFEST_NAME).exists():
        return read_tables(folder)
    tables = tables_in_checkpoint(weight_files(folder))
    if not tables:
        raise ValueError(
            f"{folder} holds no memory tables: no {MANIFEST_NAME}, and no safetensors file with tensors named "
            "*.engram.table.weight. Name a folder written by save_pretrained, `engram convert` or `engram quantize`."
        )
    return tables

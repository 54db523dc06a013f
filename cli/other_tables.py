"""Describe, for `engram inspect`, the id-addressed tables of other projects' models, from names and headers of files."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class _Tensor(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


def describe_folder_of_others(folder: Path) -> dict[str, Any] | None:
    """Describe the id-addressed tables of another project's model; return None if it has no table of a known kind.

    Raises:
        ValueError: a file is damaged.
    """
    from engram_hf.safetensors_engram import read_header, read_json

    from .folders import is_model, weight_files

    headers = [read_header(path) for path in weight_files(folder)]
    tensors = [
        _Tensor(name, span.dtype, span.shape, header.path.name)
        for header in headers
        for name, span in header.tensors.items()
    ]
    config = read_json(folder / "config.json", constants=True) if is_model(folder) else {}
    return _describe({"folder": str(folder)}, config, tensors)


def describe_repository(name: str) -> dict[str, Any]:
    """Describe the tables of a Hub repository, of which only the config and the headers of its files are downloaded.

    Raises:
        ValueError: the Hub does not serve the repository, or it has no table of a known kind.
    """
    from huggingface_hub import HfApi

    from engram_hf.convert_scripts.command_line import reason_of
    from engram_hf.safetensors_engram import read_json

    api = HfApi()
    try:
        config = read_json(Path(api.hf_hub_download(name, "config.json")), constants=True)
        files = [file for file in api.list_repo_files(name) if file.endswith(".safetensors")]
        headers = {file: api.parse_safetensors_file_metadata(name, file) for file in files}
    except Exception as error:  # The HTTP library of the client decides the type of error for a failed connection.
        raise ValueError(
            f"{name} is no folder here, and the Hub did not give the headers of its files ({reason_of(error)}); check the "
            "name, the connection and your token."
        ) from error
    tensors = [
        _Tensor(tensor, info.dtype, tuple(info.shape), file)
        for file, header in headers.items()
        for tensor, info in header.tensors.items()
    ]
    found = _describe({"repository": name}, config, tensors)
    if found is None:
        raise ValueError(f"{name} has no id-addressed table of a known kind; docs/other-models.md lists the kinds.")
    return found


def _describe(place: dict[str, Any], config: Mapping[str, Any], tensors: Iterable[_Tensor]) -> dict[str, Any] | None:
    from engram_hf.other_models.kinds import text_config

    tables = _tables(text_config(config), tensors)
    if not tables:
        return None
    held = sum(table["bytes"] for table in tables)
    return {
        **place,
        "model_type": config.get("model_type"),
        "kinds": sorted({table.pop("kind") for table in tables}),
        "table_bytes": held,
        "residency": {
            "mapped": {"memory_bytes": 0, "read_bytes_per_token": sum(table["bytes_per_token"] for table in tables)},
            "pinned": {"locked_host_bytes": held},
            "resident": {
                "memory_bytes": held,
                "peak_bytes": held * (2 if any(t["shards"] > 1 for t in tables) else 1),
            },
        },
        "tables": tables,
    }


def _tables(config: Mapping[str, Any], tensors: Iterable[_Tensor]) -> list[dict[str, Any]]:
    from engram_hf.other_models.kinds import MEMORY, kind_of
    from engram_hf.safetensors_engram import tensor_bytes

    by_table: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        stem = re.sub(r"(?:\.shard_\d+)?\.[^.]+$", "", tensor.name)
        if (kind_of(stem) or MEMORY.module.search(stem)) and len(tensor.shape) > 1:
            by_table.setdefault(stem, []).append(tensor)
    found = []
    for stem, parts in sorted(by_table.items()):
        kind = kind_of(stem) or MEMORY
        widest = max(parts, key=lambda part: part.shape[1])
        rows = sum(part.shape[0] for part in parts if part.name.rpartition(".")[2] == widest.name.rpartition(".")[2])
        held = sum(tensor_bytes(part.dtype, part.shape) for part in parts)
        per_token = kind.rows_per_token(config)
        found.append(
            {
                "table": stem,
                "kind": kind.name,
                "rows": rows,
                "width": widest.shape[1],
                "dtype": widest.dtype,
                "shards": sum(part.dtype == widest.dtype for part in parts),
                "rows_per_token": per_token,
                "bytes_per_token": per_token * held // max(rows, 1),
                "files": len({part.file for part in parts}),
                "bytes": held,
            }
        )
    return found

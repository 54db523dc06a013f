"""`engram inspect` and `engram card` describe a folder from its config and file headers alone."""

import argparse
import ctypes
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .folders import (
    count_stored_parameters,
    has_memory,
    is_hub_id,
    is_model,
    read_config,
    read_stored_tables,
    read_whole_config,
    require_folder,
    weight_files,
)
from .other_tables import describe_folder_of_others, describe_repository
from .output import columns, print_json, printable, size

# These patterns match names of layers in the vision tower and the draft layers, in this package and in the release.
_VISION = re.compile(r"\bvision(?:_tower\.layers|\.blocks)\.(\d+)\.")
_DRAFTS = re.compile(r"^(?:draft\.layers|mtp)\.(\d+)\.")


def add_commands(commands: Any) -> None:
    """Add the commands of this module to an argparse subparsers object."""
    inspect = commands.add_parser(
        "inspect",
        help="what memory a model or a folder of tables holds",
        description="Show layers, rows, bytes and dtypes of the memory in a folder, and where it would live when loaded. Of a "
        "model of another project, or a Hub id, show the id-addressed tables and what each residency costs. Only the config "
        "and file headers are read.",
    )
    inspect.add_argument("folder", help="a saved model, a folder with engram_tables.json, or a Hub id")
    inspect.add_argument("--json", action="store_true", help="print one JSON document")
    inspect.set_defaults(run=run_inspect, runs_no_model=True)
    card = commands.add_parser(
        "card",
        help="the model card of a model, as push_to_hub writes it",
        description="Print a model card (README.md) for a model folder that is uploaded by other means than push_to_hub.",
    )
    card.add_argument("folder", help="a saved model, or a Hub id")
    card.add_argument(
        "--repo-id", metavar="ID", help="Hub id of the model, for the loading example (default: FOLDER, if it is one)"
    )
    card.add_argument("--base-model", metavar="ID", help="Hub id of the backbone")
    card.add_argument("--license", help="licence identifier, such as apache-2.0")
    card.add_argument(
        "--results",
        metavar="FILE",
        help='evaluation results as JSON: [{"task": "text-generation", "dataset": "NAME", "metric": "loss", "value": 2.5}, ...]',
    )
    card.add_argument("--json", action="store_true", help="print one JSON document: the metadata, and the whole card")
    card.set_defaults(run=run_card, runs_no_model=True)


def run_inspect(options: argparse.Namespace) -> None:
    """Print the contents of `options.folder`."""
    found = _find(options.folder)
    if options.json:
        print_json(found)
        return
    tables = [{**table, "bytes": size(table["bytes"])} for table in found.pop("tables")]
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<16}{_for_people(value)}")
    print()
    print(columns(list(tables[0]), [list(table.values()) for table in tables]))


def _find(name: str) -> dict[str, Any]:
    if is_hub_id(name):
        from huggingface_hub import is_offline_mode

        if not is_offline_mode():
            return describe_repository(name)
    folder = require_folder(name)
    return (None if has_memory(folder) else describe_folder_of_others(folder)) or describe_folder(folder)


def run_card(options: argparse.Namespace) -> None:
    """Print the card of the model in `options.folder`."""
    from huggingface_hub import ModelCard

    from engram_hf.card_engram import model_card

    fields = {
        "base_model": options.base_model,
        "license": options.license,
        "eval_results": _read_results(options.results),
    }
    folder = require_folder(options.folder, only=["*.json", "*.py"])
    config, count = read_config(folder), count_stored_parameters(folder, options.folder)
    if count is None or not _is_language_model_alone(config):
        config, count = read_whole_config(folder), None  # The backbone's own classes count parameters.
    given = {name: value for name, value in fields.items() if value}
    repo_id = options.repo_id or (options.folder if is_hub_id(options.folder) else None)
    text = model_card(config, repo_id, count, **given)
    if options.json:
        print_json({"metadata": ModelCard(text).data.to_dict(), "card": text})
    else:
        print(text, end="")


def _is_language_model_alone(config: Any) -> bool:
    """Return whether a model has neither a vision tower nor draft layers, which a card lists separately."""
    parts = (getattr(config.text_config, name, None) for name in ("vision_config", "dspark_block_size"))
    return not config.is_composite and not any(parts)


def _read_results(name: str | None) -> list[Any]:
    """Return evaluation results in the Hub's form, read from a JSON file.

    Raises:
        ValueError: the file is not a list of results with a dataset, a metric and a number.
    """
    from huggingface_hub import EvalResult

    if name is None:
        return []
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{name} is no JSON file ({error}); write a list of results, as `engram card --help` shows."
        ) from error
    types = {"task": str, "dataset": str, "metric": str, "value": (int, float)}
    for result in found if isinstance(found, list) else [None]:
        if not isinstance(result, dict) or not all(isinstance(result.get(key), types[key]) for key in types):
            raise ValueError(
                f"{name} holds {result!r}; expected a list of objects with task, dataset and metric, which are texts, and "
                "value, a number."
            )
    return [
        EvalResult(
            task_type=result["task"],
            dataset_type=result["dataset"],
            dataset_name=result["dataset"],
            metric_type=result["metric"],
            metric_value=result["value"],
        )
        for result in found
    ]


def describe_folder(folder: Path) -> dict[str, Any]:
    """Describe a model folder or table folder as JSON values, with the tables last.

    Raises:
        ValueError: the folder is neither, or a file in it is broken.
    """
    from engram_hf.table_format_engram import choose_residency, free_host_memory

    tables = read_stored_tables(folder)
    in_tables = sum(table.size for table in tables.values())
    found: dict[str, Any] = {"folder": str(folder)}
    if is_model(folder):
        found |= _describe_model(folder, in_tables)
    return {
        **found,
        "table_bytes": in_tables,
        "residency": {"auto": choose_residency(in_tables, free_host_memory(), None), "options": _residencies()},
        "tables": [
            {
                "layer": table.layer,
                "rows": table.num_rows,
                "width": table.width,
                "dtype": table.dtype,
                "files": " ".join(dict.fromkeys(part.file.path.name for part in table.parts)),
                "bytes": table.size,
            }
            for table in tables.values()
        ],
    }


def _describe_model(folder: Path, in_tables: int) -> dict[str, Any]:
    config = read_config(folder)
    text = config.text_config
    stored = sum(path.stat().st_size for path in weight_files(folder))
    return {
        "backbone": f"{config.backbone.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}",
        "holds": _parts(text, _tensor_names(folder)),
        "memory_layers": list(config.engram_layer_ids),
        "ngrams": list(range(2, config.engram_max_ngram_size + 1)),
        "heads": config.engram_n_heads,
        "token_ids": text.vocab_size,
        "compressed_ids": config.engram_compressed_vocab_size,
        "weight_bytes": stored,
        "table_share": round(in_tables / max(stored, in_tables), 4),
    }


def _tensor_names(folder: Path) -> set[str]:
    from engram_hf.safetensors_engram import read_header

    return {name for path in weight_files(folder) for name in read_header(path).tensors}


def _parts(text: Any, names: Iterable[str]) -> list[str]:
    """Return the parts that a model with this backbone config has besides text, if the folder has their tensors."""
    vision = getattr(text, "vision_config", None)
    expected = {
        "images": (_VISION, getattr(vision, "num_hidden_layers", 0)),
        "drafts": (_DRAFTS, getattr(text, "num_nextn_predict_layers", 0) or 0),
    }
    parts = ["text"]
    for part, (pattern, layers) in expected.items():
        found = {int(match[1]) for name in names if (match := pattern.search(name))} & set(range(layers))
        if found:
            missing = layers - len(found)
            parts.append(f"{part} ({missing} of {layers} layers missing)" if missing else part)
    return parts


def _residencies() -> list[str]:
    """Return the values of `engram_residency` that work on this machine, without `auto`."""
    return ["resident", "mapped", *(["pinned"] if _has_gpu() else [])]


def _has_gpu() -> bool:
    """Return whether NVIDIA's driver has a GPU for this process; importing torch to ask it would take seconds."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _for_people(value: Any) -> str:
    if isinstance(value, dict) and "auto" not in value:
        return "; ".join(f"{name}: {_costs(costs)}" for name, costs in value.items())
    if isinstance(value, dict):
        return f"auto is {value['auto']}; can be {', '.join(value['options'])}"
    if isinstance(value, list):
        return ", ".join(map(printable, value))
    if isinstance(value, float):
        return f"{value:.1%}"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else printable(value)


def _costs(costs: dict[str, int]) -> str:
    return ", ".join(
        f"{size(count)} {name.replace('bytes_', '').replace('_bytes', '').replace('_', ' ')}"
        for name, count in costs.items()
    )

"""Checkpoints of models with tables in shards, and ordinary folders made from them: every process writes and reads its
own rows.

Files are written by torch.distributed.checkpoint, as safetensors: `engram_shards.json` names them and describes their contents,
and any number of processes can read parts of each. Every save replaces the former one as a whole; see `saving_engram`.

Shape letters: K rows of a table that ever had a gradient in one process, W channels of a row.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..row_sources_engram import MappedRows
from ..safetensors_engram import EngramError, is_file_name, read_header, read_json, write_json
from ..saving_engram import FolderWriter, manifest_entry, require_settled, table_file_name, write_manifest
from ..table_format_engram import ROW_FORMATS, describe_table, parse_description, read_tables, require_same_hash
from ..table_writer_engram import TableWriter
from .memory import find_engram
from .row_shards import RowShard, own_rows
from .sharding import TableInShards
from .sparse_adam import SparseAdamW
from .sparse_gradients import shard_of

FORMAT_VERSION = 1
MANIFEST_NAME = "engram_shards.json"
_MOMENTS = ("rows", "exp_avg", "exp_avg_sq")
_IS_SHARD_FILE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def save_shards(
    model: nn.Module,
    folder: str | os.PathLike,
    optimizer: SparseAdamW | None = None,
    progress: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint of a model with tables in shards. Every process calls this, and writes its own part.

    The folder, which all processes see, holds the old checkpoint until the new one is complete.

    Args:
        model: a model after [`shard_tables`], plain or wrapped by PEFT, DDP or FSDP2.
        folder: folder of the checkpoint.
        optimizer: the optimizer whose moments are saved too.
        progress: other values needed to resume training, such as the step, as JSON values.

    Raises:
        EngramError: in every process, if one could not write its part; the old checkpoint is unchanged.
    """
    model = _unwrapped(model)
    shards = _shards(model)
    shard = next(iter(shards.values()))
    tensors = _model_tensors(model)
    if optimizer is not None:
        tensors |= _optimizer_tensors(model, optimizer)
    with _staged(folder, shard) as (path, publish):
        files = {f"model.{name}": 2 + index for index, name in enumerate(shards)}
        numbers = {name: files.get(f"model.{_table_of(name)}", 1) for name in _all_names(tensors, shard)}
        writer = dcp.HuggingFaceStorageWriter(str(path), numbers, save_distributed=True)
        _together(shard, "write its part of the checkpoint", lambda: _save(tensors, writer, shard))
        if shard.rank == 0:
            write_json(path / MANIFEST_NAME, _manifest(path, model, optimizer, progress, shard))
        publish(lambda name: _IS_SHARD_FILE.fullmatch(name) is not None or name == MANIFEST_NAME, MANIFEST_NAME)


def load_shards(model: nn.Module, folder: str | os.PathLike, optimizer: SparseAdamW | None = None) -> dict[str, Any]:
    """Fill a model with tables in shards from a checkpoint, which any number of processes may have written.

    Args:
        model: a model after [`shard_tables`], built like the saved one.
        folder: folder of the checkpoint.
        optimizer: an optimizer of the same parameters, which is filled too.

    Returns:
        The saved value of `progress`.

    Raises:
        EngramError: in every process, if the checkpoint is damaged, or of another model. Tensors that were filled by then stay filled.
    """
    model = _unwrapped(model)
    shard = next(iter(_shards(model).values()))
    manifest = _together(shard, "read the checkpoint", lambda: _read_manifest(Path(folder), model))
    reader = dcp.HuggingFaceStorageReader(str(folder))
    tensors = _model_tensors(model)
    _together(shard, "read its part of the checkpoint", lambda: _load(tensors, reader))
    if optimizer is not None:
        _together(shard, "read its part of the optimizer", lambda: _load_optimizer(model, optimizer, reader, manifest))
    return manifest["progress"]


def export_model(model: nn.Module, folder: str | os.PathLike) -> None:
    """Save a model with tables in shards as an ordinary folder for `from_pretrained`. Every process calls this.

    Each writes its rows to a file of its own; the first process writes everything else, and gathers sharded tensors for it.

    Args:
        model: a model after [`shard_tables`], plain or wrapped by DDP or FSDP2.
        folder: a folder that all processes see.

    Raises:
        EngramError: in every process, if one could not write its part; the folder is unchanged.
    """
    model = _unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise EngramError(
            f"A {type(model).__name__} cannot be exported; merge its adapters or take get_base_model() first."
        )
    engram, shards = find_engram(model), _shards(model)
    shard = next(iter(shards.values()))
    others = {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] + ".weight" not in shards
    }
    with _staged(folder, shard) as (path, _):
        _together(shard, "write its rows", lambda: _write_rows(engram, path))
        # These files are not published: the saved model links them.
        if_first = (lambda: _save_around(model, path, folder, others)) if shard.rank == 0 else (lambda: None)
        _together(shard, "save the model", if_first)


def _write_rows(engram: Any, path: Path) -> None:
    """Write this process's rows of every table."""
    for index, memory in enumerate(engram.memories().values()):
        table = memory.table
        description = _describe(engram, index, table).with_rows(table.shard.first, table.shard.stop)
        name = table_file_name(description.layer, table.shard.rank, table.shard.processes)
        with TableWriter(path / name, description, table.global_scale) as writer:
            scale = None if table.scale is None else own_rows(table.scale)
            writer.write(table.shard.first, own_rows(table.weight), scale)


def _save_around(model: Any, path: Path, folder: str | os.PathLike, others: dict[str, torch.Tensor]) -> None:
    """Save a model whose rows are in `path`, in the same way as models with mapped tables."""
    engram, entries = find_engram(model), {}
    for index, memory in enumerate(engram.memories().values()):
        shard, description = cast(RowShard, memory.table.shard), _describe(engram, index, memory.table)
        ranges = [shard._replace(rank=rank) for rank in range(shard.processes)]
        names = [table_file_name(description.layer, rank, shard.processes) for rank in range(shard.processes)]
        parts = [(name, (one.first, one.stop), description.tensors) for name, one in zip(names, ranges, strict=True)]
        entries[description.layer] = manifest_entry(parts)
    write_manifest(path, entries)
    stored = read_tables(path)
    tables = {layer: memory.table for layer, memory in engram.memories().items()}
    kept = {layer: (table.weight, table.scale, table.global_scale) for layer, table in tables.items()}
    try:
        for layer, table in tables.items():
            table.mount(MappedRows(stored[layer]))
        model.save_pretrained(folder, state_dict=others)
    finally:
        for layer, table in tables.items():
            table.source = None
            table.weight, table.scale, table.global_scale = kept[layer]


def _describe(engram: Any, index: int, table: Any) -> Any:
    stored_as = table.table_dtype or str(table.weight.dtype).removeprefix("torch.")
    dtype = next(name for name, row_format in ROW_FORMATS.items() if row_format.name == stored_as)
    return describe_table(engram.hashing, index, width=table.width, dtype=dtype)


# --- what is saved -------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
    while isinstance(model, DistributedDataParallel):
        model = model.module
    return model


def _shards(model: nn.Module) -> dict[str, RowShard]:
    """Return the shard of every table in this process, by the name of its weight."""
    shards = {
        f"{name}.weight": module.shard for name, module in model.named_modules() if isinstance(module, TableInShards)
    }
    if not shards:
        raise EngramError("This model's tables are not in shards; call shard_tables(model), or save_pretrained.")
    return shards


def _model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters, each once, and buffers that are saved; the hash is compared and not loaded."""
    kept = model.state_dict(keep_vars=True)
    tensors = {id(tensor): (name, tensor) for name, tensor in reversed(kept.items()) if ".hashing." not in f".{name}"}
    return {f"model.{name}": tensor.detach() for name, tensor in tensors.values()}


def _optimizer_tensors(model: nn.Module, optimizer: SparseAdamW) -> dict[str, torch.Tensor]:
    """Return the state of every parameter. A table's is one tensor for every process, in ascending order of its rows."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        state, shard = optimizer.state.get(parameter, {}), shard_of(parameter)
        found = optimizer.moments_of(parameter)
        if found is not None and shard is not None:
            order = torch.argsort(found["rows"])
            tensors |= {_moments_name(name, kind, shard.rank): found[kind][order] for kind in _MOMENTS}
            tensors[f"optimizer.{name}.step"] = state["step"].reshape(1)
        else:
            tensors |= {f"optimizer.{name}.{kind}": some.reshape(some.shape or (1,)) for kind, some in state.items()}
    return tensors


def _moments_name(name: str, kind: str, rank: int) -> str:
    return f"optimizer.{name}.{kind}.{rank}"


def _table_of(name: str) -> str:
    """Return the name of the table's weight whose file has a tensor (its moments, too); empty if it is not a table's."""
    match = re.match(r"(?:model|optimizer)\.(.*\.table)\.(?:weight|scale)", name)
    return "" if match is None else f"{match[1]}.weight"


def _all_names(tensors: dict[str, torch.Tensor], shard: RowShard) -> list[str]:
    """Return the names of the tensors of all processes."""
    found: list[Any] = [None] * shard.processes
    dist.all_gather_object(found, list(tensors), group=shard.group)
    return sorted({name for names in found for name in names})


def _manifest(path: Path, model: nn.Module, optimizer: Any, progress: dict | None, shard: RowShard) -> dict[str, Any]:
    engram = find_engram(model)
    groups = [] if optimizer is None else _groups(model, optimizer)
    tables = [
        asdict(_describe(engram, index, memory.table)) for index, memory in enumerate(engram.memories().values())
    ]
    return {
        "format_version": FORMAT_VERSION,
        "processes": shard.processes,
        "files": {file.name: file.stat().st_size for file in sorted(path.glob("*.safetensors"))},
        "tables": tables,
        "optimizer": groups,
        "progress": progress or {},
    }


def _groups(model: nn.Module, optimizer: SparseAdamW) -> list[dict[str, Any]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "params": [names[id(p)] for p in group["params"]],
        }
        for group in optimizer.param_groups
    ]


# --- what is loaded ------------------------------------------------------------------------


def _read_manifest(folder: Path, model: nn.Module) -> dict[str, Any]:
    """Return the checked manifest of a checkpoint of this model."""
    require_settled(folder)
    manifest = read_json(folder / MANIFEST_NAME)
    files, tables = manifest.get("files"), manifest.get("tables")
    if manifest.get("format_version") != FORMAT_VERSION or not isinstance(files, dict) or not isinstance(tables, list):
        raise EngramError(
            f"{folder / MANIFEST_NAME} is no manifest of format_version {FORMAT_VERSION}; restore it, or upgrade engram-hf."
        )
    for name, size in files.items():
        if not is_file_name(name) or read_header(folder / name).size != size:
            raise EngramError(f"{folder / name} is not the file that was saved ({size} bytes); restore it.")
    others = {path.name for path in folder.glob("*.safetensors")} - files.keys()
    if others:
        raise EngramError(f"{folder} has {sorted(others)[0]}, which is not of this checkpoint; remove it.")
    engram = find_engram(model)
    described = [parse_description(members, str(folder / MANIFEST_NAME)) for members in tables]
    layers = list(engram.memories())
    if [one.layer for one in described] != layers:
        raise EngramError(f"{folder} has tables of other layers than {layers}, those of this model.")
    for index, one in enumerate(described):
        require_same_hash(one, engram.hashing, index)
    return manifest


def _save(tensors: dict[str, torch.Tensor], writer: Any, shard: RowShard) -> None:
    try:
        dcp.save(tensors, storage_writer=writer, process_group=shard.group)
    except dcp.CheckpointException as error:  # The error is raised in all processes.
        own = error.failures.get(shard.rank)
        if own is not None:
            raise own[0] from error
        if not error.failures:
            raise


def _load(tensors: dict[str, torch.Tensor], reader: Any) -> None:
    """Read this process's part of each tensor into it."""
    found = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        stored = found.get(name)
        if stored is None or stored.size != tensor.shape:
            what = "lacks" if stored is None else f"has {list(stored.size)} of {list(tensor.shape)}"
            raise EngramError(f"The checkpoint {what} {name}; it is of another model, or of one with other adapters.")
        _require_tiled(name, stored)
    # The processes read different tensors, and some may read none.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load({name: some for name, some in tensors.items() if some.numel()}, storage_reader=reader, no_dist=True)


def _require_tiled(name: str, stored: Any) -> None:
    """Refuse a tensor whose parts leave rows out, which would stay unchanged."""
    end = 0
    for chunk in sorted(stored.chunks, key=lambda chunk: tuple(chunk.offsets)):
        if tuple(chunk.offsets[1:]) != (0,) * (len(stored.size) - 1) or chunk.sizes[1:] != stored.size[1:]:
            raise EngramError(f"{name} is not divided by row; restore the checkpoint.")
        if stored.size and chunk.offsets[0] != end and chunk.sizes[0]:
            raise EngramError(f"The checkpoint lacks rows {end} to {chunk.offsets[0]} of {name}; it is damaged.")
        end = end + chunk.sizes[0] if stored.size else 0


def _load_optimizer(model: nn.Module, optimizer: SparseAdamW, reader: Any, manifest: dict[str, Any]) -> None:
    groups, own = manifest["optimizer"], _groups(model, optimizer)
    if [group["params"] for group in groups] != [group["params"] for group in own]:
        raise EngramError(
            "The checkpoint has the optimizer of other parameters, or none; build it as the one that was saved, or leave it out."
        )
    found = reader.read_metadata().state_dict_metadata
    for name, parameter in model.named_parameters():
        shard = shard_of(parameter)
        if shard is not None:
            moments = _read_moments(name, shard, manifest["processes"], reader, found)
            if moments is not None:
                optimizer.set_moments(parameter, moments)
            continue
        kinds = {
            key.rpartition(".")[2]: meta
            for key, meta in found.items()
            if key.rpartition(".")[0] == f"optimizer.{name}"
        }
        if not kinds:
            continue
        state = {kind: _empty(meta, parameter) for kind, meta in kinds.items()}
        _load({f"optimizer.{name}.{kind}": tensor for kind, tensor in state.items()}, reader)
        optimizer.state[parameter] = state | {"step": state["step"].reshape(())}
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(
            {key: tuple(value) if key == "betas" else value for key, value in saved.items() if key != "params"}
        )


def _empty(stored: Any, parameter: torch.Tensor) -> torch.Tensor:
    dtype = stored.properties.dtype
    if stored.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(stored.size, dtype=dtype)


def _read_moments(
    name: str, shard: RowShard, processes: int, reader: Any, found: dict[str, Any]
) -> dict[str, torch.Tensor] | None:
    """Return moments of this process's present rows, from those of the rows that each process had before."""
    if f"optimizer.{name}.step" not in found:
        return None
    parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in _MOMENTS}
    for rank in range(processes):
        then = shard._replace(rank=rank, processes=processes)
        first, stop = max(then.first, shard.first), min(then.stop, shard.stop)
        if first >= stop:
            continue
        names = {kind: _moments_name(name, kind, rank) for kind in _MOMENTS}
        if not set(names.values()) <= found.keys():
            raise EngramError(f"The checkpoint lacks the moments that process {rank} had of {name}; it is damaged.")
        tensors = {key: torch.empty(found[key].size, dtype=found[key].properties.dtype) for key in names.values()}
        _load(tensors, reader)
        rows = tensors[names["rows"]]
        begin, end = torch.searchsorted(rows, torch.tensor([first, stop])).tolist()
        for kind, key in names.items():
            parts[kind].append(tensors[key][begin:end].clone())
    step = torch.empty(1)
    _load({f"optimizer.{name}.step": step}, reader)
    return {kind: torch.cat(some) for kind, some in parts.items()} | {"step": step.reshape(())}


# --- all processes together ----------------------------------------------------------------


def _together(shard: RowShard, what: str, act: Callable[[], Any]) -> Any:
    """Call a function in every process; if it fails in one, raise an error in all of them.

    Raises:
        EngramError: a process failed; the message names it and its error.
    """
    result, failure = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    said: list[Any] = [None] * shard.processes
    dist.all_gather_object(
        said, None if failure is None else f"{type(failure).__name__}: {failure}", group=shard.group
    )
    failed = {rank: text for rank, text in enumerate(said) if text is not None}
    if failed:
        rank, text = next(iter(failed.items()))
        raise EngramError(f"Process {rank} could not {what} ({text}).") from failure
    return result


@contextlib.contextmanager
def _staged(folder: str | os.PathLike, shard: RowShard) -> Iterator[tuple[Path, Callable[..., None]]]:
    """Yield a hidden folder inside of `folder`, which all processes write to, and a function that puts its files in
    place.
    """
    with contextlib.ExitStack() as stack:
        writer = None

        def begin() -> str | None:
            nonlocal writer
            if shard.rank:
                return None
            writer = stack.enter_context(FolderWriter(folder))
            return str(writer.path)

        path = [_together(shard, "begin to write", begin)]
        dist.broadcast_object_list(path, group=shard.group, group_src=0)

        def publish(is_stale: Callable[[str], bool], last: str) -> None:
            put = (lambda: None) if writer is None else (lambda: writer.publish(is_stale, last))
            _together(shard, "put the checkpoint in place", put)

        yield Path(path[0]), publish

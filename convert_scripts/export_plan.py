"""Plan an export: the release's names, dtypes and shards from a model folder of this package.

If the folder has the record of an import (`upstream/`: the header of each shard and the release's documents), the export
follows it, so that an unmodified conversion is exported byte for byte. Without a record it follows the release's shard rule:
vision tower and embedding, one shard a layer, final norm and head, draft layers, one shard for each Engram layer.

Every tensor may be in the release's quantized form, which is copied, or in floats, which are quantized by its rules.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..safetensors_engram import FileHeader, TensorSpan, json_bytes, parse_head
from ..table_format_engram import MANIFEST_NAME as TABLES_NAME
from ..table_format_engram import read_manifest
from .import_plan import RECORD_FOLDER, SHARED_DOCUMENTS, aligned, describe_source
from .safetensors_files import (
    INDEX_NAME,
    Checkpoint,
    ConversionError,
    enumerate_names,
    read_checkpoint,
    read_shard,
)
from .streaming import Copy, OutputFile, Part, Plan, Tensor, copy_of, tensor_file
from .tensor_parts import cast, encoded
from .tensor_rules import Layout, TensorMapping, UpstreamTensor, iterate_upstream

# The release derives these tensors of this package's state dict from its config.
DERIVED = re.compile(r"model\.hashing\.")


@dataclass(frozen=True)
class Model:
    """A model folder of ours: its tensors by state-dict name, tables included, and the passed-through ones by upstream name."""

    folder: Path
    tensors: dict[str, TensorSpan]
    passed_through: dict[str, TensorSpan]
    shards: dict[str, FileHeader]


def read_model(folder: Path, record: Path) -> Model:
    """Read the headers of a model folder; passed-through tensors come from `record`, which may be the same folder.

    The vision tower and the draft layers also come from `record` if the model was saved without them.
    """
    source = _read_weights(folder)
    shards = dict(source.shards)
    tensors = dict(source.tensors)
    if record != folder:
        recorded = _read_weights(record)
        missing = {name: span for name, span in recorded.tensors.items() if _may_be_left_out(name)}
        if missing.keys() - tensors.keys():
            shards |= recorded.shards
            tensors = missing | tensors
    if (folder / TABLES_NAME).is_file():
        tensors |= _read_tables(folder, shards)
    passed_through = {path.name: read_shard(path) for path in sorted(record.glob("carried-*.safetensors"))}
    spans = {name: span for shard in passed_through.values() for name, span in shard.tensors.items()}
    return Model(folder, tensors, spans, shards | passed_through)


def _may_be_left_out(name: str) -> bool:
    """Return whether a complete model of text may have been saved without this tensor."""
    return name.startswith(("draft.", "model.vision_tower.", "model.image_"))


def _read_weights(folder: Path) -> Checkpoint:
    single = folder / "model.safetensors"
    if (folder / INDEX_NAME).is_file() or not single.is_file():
        return read_checkpoint(folder)
    shard = read_shard(single)
    return Checkpoint(folder, {single.name: shard}, dict(shard.tensors))


def _read_tables(folder: Path, shards: dict[str, FileHeader]) -> dict[str, TensorSpan]:
    """Return the tables that the folder's manifest names, under their names in a state dict."""
    entries = read_manifest(folder / TABLES_NAME)
    return {
        f"model.layers.{layer}.engram.table.{kind}": _read_piece(folder, entry[kind], shards)
        for layer, entry in entries.items()
        for kind in ("weight", "scale")
        if kind in entry
    }


def _read_piece(folder: Path, pieces: list[dict], shards: dict[str, FileHeader]) -> TensorSpan:
    if len(pieces) != 1:
        raise ConversionError(
            f"{folder / TABLES_NAME} splits a table in {len(pieces)}; save the model with whole tables."
        )
    file, tensor = pieces[0]["file"], pieces[0]["tensor"]
    shard = shards.setdefault(file, read_shard(folder / file))
    if tensor not in shard.tensors:
        raise ConversionError(
            f"{folder / TABLES_NAME} names {tensor!r} in {file}, which does not hold it; convert again."
        )
    return shard.tensors[tensor]


def plan_export(layout: Layout, model: Model, record: Path, config: Mapping, mappings: list[TensorMapping]) -> Plan:
    """Plan the upstream folder.

    Args:
        record: folder whose `upstream/` holds the record to follow; without one, the release's shard rule.
        config: the upstream config, for a folder without a record.
        mappings: the tensors of that config.
    """
    sources = {tensor.name: (mapping, tensor) for mapping, tensor in iterate_upstream(mappings)}
    _check_model(model, mappings)
    if (record / RECORD_FOLDER).is_dir():
        files = _recorded_shards(layout, model, record / RECORD_FOLDER, sources)
        documents = _recorded_documents(record / RECORD_FOLDER)
    else:
        files = _ruled_shards(model, sources)
        documents = [*_shared(model.folder)]
        files_of = {name: file.name for file in files for name in file.tensors}
        total = sum(file.size - file.parts[0].size for file in files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files_of.items()))}
        made = {"config.json": json_bytes(config), INDEX_NAME: json_bytes(index)}
        return Plan(files + documents, made, _provenance(layout, model))
    return Plan(files + documents, {}, _provenance(layout, model))


def _provenance(layout: Layout, model: Model) -> dict:
    source = Checkpoint(model.folder, model.shards, model.tensors)
    return {"family": layout.name, "direction": "export", "source": describe_source(source)}


def _check_model(model: Model, mappings: list[TensorMapping]) -> None:
    expected = {name for mapping in mappings for name in (mapping.ours, mapping.ours_scale) if name}
    unknown = [name for name in model.tensors if name not in expected and not DERIVED.match(name)]
    if unknown:
        raise ConversionError(
            f"{model.folder} holds {enumerate_names(unknown)}, which has no place upstream; merge adapters into the model "
            f"(merge_and_unload) and save it again."
        )
    for mapping in mappings:
        _check_binding(model, mapping)


def _check_binding(model: Model, mapping: TensorMapping) -> None:
    span = model.tensors.get(mapping.ours)
    if span is None:
        raise ConversionError(f"{model.folder} lacks the tensor {mapping.ours!r}; export a complete model.")
    storage = mapping.rule.storage
    stored = storage.block is not None and span.dtype == storage.dtype
    if not stored and span.dtype not in ("BF16", "F16", "F32"):
        raise ConversionError(
            f"Tensor {mapping.ours!r} of {span.path} is {span.dtype}, expected floats or the release's own quantized form; save "
            f"the model in one of them."
        )
    shape = storage.weight_shape(mapping.shape) if stored else mapping.shape
    if span.shape != shape:
        raise ConversionError(
            f"Tensor {mapping.ours!r} is {list(span.shape)}, but the config asks for {list(shape)}; save the model again."
        )
    scale = model.tensors.get(mapping.ours_scale)
    if stored != (scale is not None):
        problem = "has no scale" if stored else f"is {span.dtype} but has a scale"
        raise ConversionError(f"Tensor {mapping.ours!r} of {span.path} {problem}; save the model again.")
    if stored and (scale.dtype, scale.shape) != ("F8_E8M0", storage.scale_shape(mapping.shape)):
        raise ConversionError(
            f"Tensor {mapping.ours_scale!r} is {scale.dtype} {list(scale.shape)}, expected F8_E8M0 "
            f"{list(storage.scale_shape(mapping.shape))}; save the model again."
        )


def _recorded_shards(
    layout: Layout, model: Model, folder: Path, sources: dict[str, tuple[TensorMapping, UpstreamTensor]]
) -> list[OutputFile]:
    files, placed = [], set()
    for path in sorted(folder.glob("*.safetensors.header")):
        spans = parse_head(path, path.read_bytes()).tensors
        tensors = []
        for span in sorted(spans.values(), key=lambda span: span.offset):
            is_passed_through = span.name not in sources and layout.may_pass_through(span.name)
            part = _passed_through_part(model, span) if is_passed_through else _recorded_part(model, span, sources)
            tensors.append(Tensor(span.name, span.dtype, span.shape, [part]))
        placed |= spans.keys()
        files.append(tensor_file(path.name.removesuffix(".header"), tensors, head=path.read_bytes()))
    missing = sources.keys() - placed
    if missing:
        raise ConversionError(f"The record in {folder} has no place for {enumerate_names(missing)}; convert again.")
    return files


def _passed_through_part(model: Model, span: TensorSpan) -> Part:
    found = model.passed_through.get(span.name)
    if found is None or (found.dtype, found.shape) != (span.dtype, span.shape):
        raise ConversionError(
            f"{span.name!r}, which the model does not use but the release holds, is not in a carried-*.safetensors beside the record; convert again."
        )
    return copy_of(found)


def _recorded_part(model: Model, span: TensorSpan, sources: dict[str, tuple[TensorMapping, UpstreamTensor]]) -> Part:
    if span.name not in sources or not sources[span.name][1].matches(span):
        raise ConversionError(
            f"The record has {span.name!r} as {span.dtype} {list(span.shape)}, but the config of {model.folder} does not; "
            f"give the record of this model."
        )
    return upstream_part(model, *sources[span.name], span.dtype)


def upstream_part(model: Model, mapping: TensorMapping, tensor: UpstreamTensor, dtype: str) -> Part:
    """Return the bytes of an upstream tensor: copied if ours is stored in the upstream format, quantized if it is in
    floats.

    `dtype` is that of an unquantized upstream tensor.
    """
    storage, ours = mapping.rule.storage, model.tensors[mapping.ours]
    if storage.block is None:
        return cast(ours, dtype)
    if ours.dtype == storage.dtype:
        return copy_of(_slice(model.tensors[mapping.ours_scale] if tensor.is_scale else ours, mapping, tensor))
    return encoded(_slice(ours, mapping, tensor), storage, tensor.is_scale)


def _slice(span: TensorSpan, mapping: TensorMapping, tensor: UpstreamTensor) -> TensorSpan:
    """Return the rows of ours that one upstream tensor holds; scales have one row for every block of rows."""
    matrix = span if tensor.expert is None else span[tensor.expert]
    rows = matrix.shape[0] // len(mapping.rule.upstream)
    start = tensor.part * rows
    return matrix.rows(start, start + rows)


def _recorded_documents(folder: Path) -> list[OutputFile]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".header"]
    return [OutputFile(path.relative_to(folder).as_posix(), [Copy(path, 0, path.stat().st_size)]) for path in paths]


def _shared(folder: Path) -> list[OutputFile]:
    names = [name for name in (*SHARED_DOCUMENTS, "chat_template.jinja") if (folder / name).is_file()]
    return [OutputFile(name, [Copy(folder / name, 0, (folder / name).stat().st_size)]) for name in names]


def _ruled_shards(model: Model, sources: dict[str, tuple[TensorMapping, UpstreamTensor]]) -> list[OutputFile]:
    """Return shards by the release's rule: vision and embedding, one layer a shard, norm and head, drafts, one Engram
    layer a shard.
    """
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for mapping, tensor in sources.values():
        part = upstream_part(model, mapping, tensor, tensor.dtype)
        groups.setdefault(_shard_key(mapping, tensor), []).append(
            Tensor(tensor.name, tensor.dtype, tensor.shape, [part])
        )
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [tensor_file(name, aligned(groups[key])) for name, key in zip(names, sorted(groups), strict=True)]


def _shard_key(mapping: TensorMapping, tensor: UpstreamTensor) -> tuple[int, int]:
    if mapping.rule.file == "draft":
        return (3, 0)
    if mapping.layer is None or mapping.rule.where == "vision":
        return (2, 0) if tensor.name.startswith(("norm.", "head.")) else (0, 0)
    return (4 if ".engram." in tensor.name else 1, mapping.layer)

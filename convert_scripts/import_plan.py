"""Plan an import: the files that a conversion writes, and the sources of their bytes.

The target folder holds

- `model-00001-of-00044.safetensors`, ... and their index: the state dict without memory tables, the first file has all tensors
  outside of the layers of the text model, including the vision tower; then follow one file a layer and one a draft layer;
- `engram-layer-00001.safetensors`, ...: the memory table of one layer, a copy of the upstream shard or a link to it;
  `engram_tables.json` has the names of its tensors in both cases;
- `carried-00001-of-00005.safetensors`, ...: upstream tensors the model does not use, under upstream names and in no index;
- `upstream/`: the release's documents and the header of each of its shards, from which an export rebuilds it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from ..safetensors_engram import ITEM_BITS, FileHeader, TensorSpan, header_bytes, json_bytes
from ..table_format_engram import FORMAT_VERSION as TABLE_FORMAT_VERSION
from ..table_format_engram import MANIFEST_NAME as TABLES_NAME
from ..table_format_engram import METADATA_KEY, PAGE, TableDescription
from .safetensors_files import INDEX_NAME, Checkpoint, ConversionError
from .streaming import MANIFEST_NAME, Copy, OutputFile, Part, Plan, Tensor, copy_of, tensor_file
from .tensor_parts import cast, decoded
from .tensor_rules import Layout, TensorMapping

RECORD_FOLDER = "upstream"
# Every loader looks for these documents beside the weights.
SHARED_DOCUMENTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
DTYPES = {"keep": None, "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class ImportOptions:
    """The options of a conversion.

    Args:
        dtype: `"keep"` leaves quantized weights as they are, `"bfloat16"` and `"float32"` dequantize them. Tensors which the
            release keeps in float32 stay float32.
        link_tables: reference the upstream shards that hold memory tables instead of copying them.
        dequantize_tables: apply `dtype` to memory tables too. Otherwise they stay quantized and rows are dequantized after
            they are gathered.
        layers: convert the first `layers` decoder layers only; None for all.
    """

    dtype: str = "keep"
    link_tables: bool = False
    dequantize_tables: bool = False
    layers: int | None = None

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ConversionError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}.")
        if self.dequantize_tables and (self.link_tables or self.dtype == "keep"):
            raise ConversionError(
                "Dequantized tables need a dtype other than 'keep', and cannot be linked; give --dtype without --link-tables."
            )

    @classmethod
    def from_record(cls, record) -> "ImportOptions":
        """Return the options that a finished conversion recorded.

        Raises:
            ConversionError: they are not options of this version.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(record, dict) or not set(record) <= set(names):
            raise ConversionError(
                f"The options on record are {record!r}, expected {', '.join(names)}; verify with the release that "
                "converted."
            )
        return cls(**record)

    def target_dtype(self, mapping: TensorMapping) -> str | None:
        """Return the dtype of a mapping's converted values; None if they keep the release's."""
        if mapping.rule.file == "table" and not self.dequantize_tables:
            return None
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Additions:
    """The parts of a converted model that no upstream tensor gives.

    Args:
        documents: files beside the weights: config, chat template, token map.
        tensors: tensors of the state dict: the constants of the hash.
        tables: the description of each layer's table.
    """

    documents: Mapping[str, bytes]
    tensors: list[Tensor]
    tables: Mapping[int, TableDescription]


def plan_import(
    layout: Layout,
    source: Checkpoint,
    config: Mapping,
    mappings: list[TensorMapping],
    options: ImportOptions,
    additions: Additions,
) -> Plan:
    """Plan the whole target folder.

    Args:
        config: the upstream config the target corresponds to (that of fewer layers than `source` has, for a prefix).
        mappings: the tensors to convert, checked against `source`.
    """
    used = {tensor.name for mapping in mappings for tensor in mapping.upstream}
    kept = _keep_tensors(source, lambda name: name in used or layout.may_pass_through(name))
    models = _model_files(source, mappings, options, additions.tensors)
    tables, entries = _table_files(source, mappings, options, additions.tables)
    own = {
        INDEX_NAME: _index([*models, *(table for table in tables if not table.link)]),
        TABLES_NAME: json_bytes({"format_version": TABLE_FORMAT_VERSION, "tables": entries}),
    }
    record = _record_documents(source, config, kept)
    provenance = {
        "family": layout.name,
        "direction": "import",
        "options": vars(options),
        "source": describe_source(source),
    }
    files = [*models, *tables, *_passed_through_files(used, kept), *_record_files(source)]
    return Plan(files, _shared_documents(source) | dict(additions.documents) | own | record, provenance)


def describe_source(source: Checkpoint) -> dict[str, dict]:
    """Return size and header digest of every shard read, and digests of the documents, which identify a source."""
    shards = {
        file: {"size": shard.size, "header_sha256": hashlib.sha256(shard.head).hexdigest()}
        for file, shard in source.shards.items()
    }
    present = (name for name in ("config.json", INDEX_NAME, *SHARED_DOCUMENTS) if (source.folder / name).is_file())
    documents = {name: {"sha256": hashlib.sha256((source.folder / name).read_bytes()).hexdigest()} for name in present}
    return shards | documents


def _model_files(
    source: Checkpoint, mappings: list[TensorMapping], options: ImportOptions, extra: list[Tensor]
) -> list[OutputFile]:
    groups: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    groups[_FIRST_FILE] += extra
    for mapping in mappings:
        if mapping.rule.file != "table":
            groups[_file_of(mapping)] += import_tensors(source, mapping, options)
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [tensor_file(name, aligned(groups[key])) for name, key in zip(names, sorted(groups), strict=True)]


_FIRST_FILE = (0, 0)


def _file_of(mapping: TensorMapping) -> tuple[int, int]:
    """Return a sort key of a tensor's file: the first one, its layer's, or its draft layer's."""
    if mapping.rule.file == "draft":
        return 2, mapping.layer or 0
    is_of_a_layer = mapping.layer is not None and mapping.rule.where != "vision"
    return (1, mapping.layer) if is_of_a_layer else _FIRST_FILE


def aligned(tensors: list[Tensor]) -> list[Tensor]:
    """Return tensors in the order of safetensors' own writer: wide dtypes first, which aligns each tensor; then by
    name.
    """
    return sorted(tensors, key=lambda tensor: (-ITEM_BITS[tensor.dtype], tensor.name))


def import_tensors(source: Checkpoint, mapping: TensorMapping, options: ImportOptions) -> list[Tensor]:
    """Return our tensor of a mapping, with its scale if it stays quantized."""
    storage, dtype = mapping.rule.storage, options.target_dtype(mapping)
    weights = [source.tensors[tensor.name] for tensor in mapping.weights]
    scales = [source.tensors[tensor.name] for tensor in mapping.scales]
    if storage.block is None:
        kept = storage.dtype if storage.is_certain else weights[0].dtype
        dtype = kept if dtype is None or storage.dtype == "F32" else dtype
        return [Tensor(mapping.ours, dtype, mapping.shape, [cast(span, dtype) for span in weights])]
    if dtype is None:
        weight = Tensor(mapping.ours, storage.dtype, storage.weight_shape(mapping.shape), list(map(copy_of, weights)))
        return [
            weight,
            Tensor(mapping.ours_scale, "F8_E8M0", storage.scale_shape(mapping.shape), list(map(copy_of, scales))),
        ]
    return [Tensor(mapping.ours, dtype, mapping.shape, _decoded(mapping, weights, scales, dtype))]


def _decoded(mapping: TensorMapping, weights: list[TensorSpan], scales: list[TensorSpan], dtype: str) -> list[Part]:
    pairs = zip(weights, scales, strict=True)
    return [decoded(weight, scale, mapping.rule.storage, mapping.part_shape, dtype) for weight, scale in pairs]


def _table_files(
    source: Checkpoint, mappings: list[TensorMapping], options: ImportOptions, tables: Mapping[int, TableDescription]
) -> tuple[list[OutputFile], dict[str, dict]]:
    """Return the table files and the entries of their manifest (`docs/engram-table-format.md`)."""
    files, entries = [], {}
    for mapping in mappings:
        if mapping.rule.file == "table":
            make = _linked_table if options.link_tables else _copied_table
            file, names, more = make(source, mapping, options, tables[mapping.layer])
            files.append(file)
            rows = [0, mapping.shape[0]]
            pieces = {kind: [{"file": file.name, "tensor": tensor, "rows": rows}] for kind, tensor in names.items()}
            entries[str(mapping.layer)] = pieces | more
    return files, entries


def _table_name(mapping: TensorMapping) -> str:
    return f"engram-layer-{mapping.layer:05d}.safetensors"


def _copied_table(
    source: Checkpoint, mapping: TensorMapping, options: ImportOptions, description: TableDescription
) -> tuple[OutputFile, dict[str, str], dict]:
    """Return a file in the table format: rows first, aligned to a page; then their scales."""
    tensors = import_tensors(source, mapping, options)
    described = ((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors)
    head = header_bytes(described, {METADATA_KEY: description.to_json()}, PAGE)
    return tensor_file(_table_name(mapping), tensors, head), description.tensors, {}


def _linked_table(
    source: Checkpoint, mapping: TensorMapping, options: ImportOptions, description: TableDescription
) -> tuple[OutputFile, dict[str, str], dict]:
    """Return the unchanged upstream shard; the manifest has the description that the file lacks."""
    weight, scale = source.tensors[mapping.weights[0].name], source.tensors[mapping.scales[0].name]
    if weight.path != scale.path:
        raise ConversionError(
            f"{weight.name!r} and {scale.name!r} lie in different shards and cannot be linked as one table; "
            f"convert without --link-tables."
        )
    shard = source.shards[weight.path.name]
    tensors = {span.name: (span.dtype, span.shape) for span in shard.tensors.values()}
    members = {key: value for key, value in vars(description).items() if key not in ("rows", "tensors")}
    names = {"weight": weight.name, "scale": scale.name}
    whole = [Copy(shard.path, 0, shard.size)]
    return OutputFile(_table_name(mapping), whole, tensors, link=shard.path), names, {"description": members}


def _index(models: list[OutputFile]) -> bytes:
    weight_map = {name: file.name for file in models for name in file.tensors}
    total = sum(file.size - file.parts[0].size for file in models)
    return json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _keep_tensors(source: Checkpoint, is_kept) -> dict[str, FileHeader]:
    """Return the shards with the tensors of the target; a shard that loses some gets a new header."""
    kept = {}
    for file, shard in source.shards.items():
        spans = sorted((span for span in shard.tensors.values()), key=lambda span: span.offset)
        remaining = [span for span in spans if is_kept(span.name)]
        if not remaining:
            continue
        complete = len(remaining) == len(spans)
        head = shard.head if complete else header_bytes((span.name, span.dtype, span.shape) for span in remaining)
        kept[file] = replace(shard, head=head, tensors={span.name: span for span in remaining})
    return kept


def _passed_through_files(used: set[str], kept: dict[str, FileHeader]) -> list[OutputFile]:
    groups = []
    for shard in kept.values():
        spans = [span for span in shard.tensors.values() if span.name not in used]
        if spans:
            groups.append([Tensor(span.name, span.dtype, span.shape, [copy_of(span)]) for span in spans])
    names = [f"carried-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [tensor_file(name, tensors) for name, tensors in zip(names, groups, strict=True)]


def _shared_documents(source: Checkpoint) -> dict[str, bytes]:
    present = [name for name in SHARED_DOCUMENTS if (source.folder / name).is_file()]
    return {name: (source.folder / name).read_bytes() for name in present}


def _record_files(source: Checkpoint) -> list[OutputFile]:
    """Return the release's other files, of any kind: licence, encoder, model card."""
    files = []
    for path in sorted(source.folder.rglob("*")):
        relative = path.relative_to(source.folder)
        written = relative.as_posix() in ("config.json", INDEX_NAME, MANIFEST_NAME)
        hidden = any(name.startswith(".") for name in relative.parts)
        if path.is_file() and not (written or hidden or path.suffix == ".safetensors"):
            files.append(OutputFile(f"{RECORD_FOLDER}/{relative.as_posix()}", [Copy(path, 0, path.stat().st_size)]))
    return files


def _record_documents(source: Checkpoint, config: Mapping, kept: dict[str, FileHeader]) -> dict[str, bytes]:
    heads = {f"{RECORD_FOLDER}/{file}.header": shard.head for file, shard in kept.items()}
    names = ("config.json", INDEX_NAME)
    if not source.elsewhere and sum(len(shard.tensors) for shard in kept.values()) == len(source.tensors):
        originals = {name: (source.folder / name).read_bytes() for name in names}
    else:
        weight_map = {name: file for file, shard in kept.items() for name in shard.tensors}
        total = sum(span.size for shard in kept.values() for span in shard.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        originals = dict(zip(names, (json_bytes(config), json_bytes(index)), strict=True))
    return heads | {f"{RECORD_FOLDER}/{name}": data for name, data in originals.items()}

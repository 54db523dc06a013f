"""The table format: the description of a folder of memory tables, read as untrusted input.

The format is defined in `docs/engram-table-format.md`. Nothing here touches table data: headers and manifests are
parsed, and every number in them is checked against the others and against the size of the files.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .safetensors_engram import (
    FileFormatError,
    FileHeader,
    TensorSpan,
    are_counts,
    is_file_name,
    parse_json,
    read_header,
    read_json,
)

try:
    import psutil
except ImportError:  # It comes with accelerate.
    psutil = None

FORMAT_VERSION = 1
MANIFEST_NAME = "engram_tables.json"
TOKEN_MAP_NAME = "engram_token_map.safetensors"
METADATA_KEY = "engram_table"
PAGE = 4096
# The last part of a tensor's name tells its kind: in this package and DeepSeek's, or in compressed-tensors' and NVIDIA
# ModelOpt's 4-bit numbers. ModelOpt's second scale multiplies where the other libraries' global scale divides.
KINDS = {
    **{kind: kind for kind in ("weight", "scale", "global_scale")},
    **{
        "weight_packed": "weight",
        "weight_scale": "scale",
        "weight_global_scale": "global_scale",
        "weight_scale_2": "scale_2",
    },
}


# This is a position without a compressed id: padding, an image, an unknown token, or before the start of the sequence.
NO_ID = -1
# `auto` lets tables use this share of the free memory: the backbone, a cache and other processes need the rest.
_RESIDENT_SHARE, _PINNED_SHARE = 0.25, 0.5
_INT64_MAX = np.iinfo(np.int64).max
_SEED_STRIDE = 10007
# These are deterministic Miller-Rabin witnesses for every integer below 3.3e24 (Sorenson and Webster, 2015).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


class RowFormat(NamedTuple):
    """A stored format of rows.

    Args:
        name: the value of `engram_table_dtype`.
        dtype: the dtype of the stored numbers, by safetensors' name.
        scale_dtype: the dtype of their scales; None for rows without.
        block: channels that share a scale; 0 for all of a row.
        multiple: the width of a row must be a multiple of this.
        packed: channels in a stored number.
        has_global: whether one number of the whole table divides all scales.
    """

    name: str
    dtype: str
    scale_dtype: str | None = None
    block: int = 0
    multiple: int = 1
    packed: int = 1
    has_global: bool = False

    @property
    def kinds(self) -> list[str]:
        """The tensors of a table, in their order in files."""
        return ["weight", *["global_scale"] * self.has_global, *["scale"] * (self.scale_dtype is not None)]

    def scales(self, width: int) -> int:
        """Return the number of scales of a row of `width` channels."""
        return 0 if self.scale_dtype is None else width // (self.block or width)


# This is the only list of the formats of tables (docs/engram-table-format.md).
ROW_FORMATS = {
    "F32": RowFormat("float32", "F32"),
    "BF16": RowFormat("bfloat16", "BF16"),
    "F16": RowFormat("float16", "F16"),
    "F8_E4M3": RowFormat("float8_e4m3fn", "F8_E4M3", "F8_E8M0", 32, 32),  # DeepSeek-V4.1 uses it.
    "I8": RowFormat("int8", "I8", "F32", 0, 4),
    "I4": RowFormat("int4", "U8", "BF16", 0, 4, packed=2),
    "I2": RowFormat("int2", "U8", "BF16", 0, 8, packed=4),
    "NVFP4": RowFormat("nvfp4", "U8", "F8_E4M3", 16, 16, packed=2, has_global=True),
}
# These are the values of `engram_table_dtype`, beside None.
QUANTIZED_FORMATS = {row_format.name: row_format for row_format in ROW_FORMATS.values() if row_format.scale_dtype}


class TableFormatError(FileFormatError):
    """A manifest or table file that breaks a rule of the table format, explained in one sentence."""


def require_version(version, what: str) -> None:
    """Refuse a `format_version` that this code does not know.

    Raises:
        TableFormatError: it is not a version, or a later one.
    """
    if type(version) is not int or version < 1:
        raise TableFormatError(f"{what} has format_version {version!r}, expected {FORMAT_VERSION}; fetch it again.")
    if version > FORMAT_VERSION:
        raise TableFormatError(
            f"{what} has format_version {version}, but this engram-hf reads up to {FORMAT_VERSION}; upgrade engram-hf."
        )


def is_prime(number: int) -> bool:
    """Return whether `number` is prime (deterministic Miller-Rabin, exact below 3.3e24)."""
    if number < 2 or any(number % witness == 0 for witness in _WITNESSES):
        return number in _WITNESSES
    twos = ((number - 1) & (1 - number)).bit_length() - 1  # This counts how often two divides `number - 1`.
    for witness in _WITNESSES:
        powers = [pow(witness, (number - 1) >> shift, number) for shift in range(twos, 0, -1)]
        if powers[0] != 1 and number - 1 not in powers:
            return False
    return True


def draw_primes(num_layers: int, bucket_counts: Sequence[int], heads: int) -> list[list[list[int]]]:
    """Return bucket sizes `[layer][order][head]`, all distinct primes.

    Every (layer, order) starts at `bucket_counts[order] - 1`, and each head takes the next prime that no earlier head
    of any layer has taken, so that no two heads of a model share a modulus (`NgramHashMapping` of the demo).

    Args:
        num_layers: number of Engram layers.
        bucket_counts: base bucket count of each order 2..N.
        heads: hash heads per order.
    """
    taken: set[int] = set()
    known_prime = functools.cache(is_prime)  # Every (layer, order) visits the same numbers again.

    def next_free_prime(candidate: int) -> int:
        candidate += 1
        while candidate in taken or not known_prime(candidate):
            candidate += 1
        taken.add(candidate)
        return candidate

    layout = []
    for _ in range(num_layers):
        orders = []
        for count in bucket_counts:
            sizes, previous = [], count - 1
            for _ in range(heads):
                previous = next_free_prime(previous)
                sizes.append(previous)
            orders.append(sizes)
        layout.append(orders)
    return layout


class MemorySizes:
    """Sizes that follow from the fields of a config: an `EngramConfig`, or the plain fields of its config.json."""

    @property
    def bucket_counts(self: Any) -> tuple[int, ...]:
        """Base bucket count of each order 2..N."""
        counts = self.engram_vocab_size
        return (counts,) * (self.engram_max_ngram_size - 1) if isinstance(counts, int) else tuple(counts)

    @property
    def engram_row_width(self: Any) -> int:
        """Channels a position gathers in one layer: heads of all orders times `engram_head_dim`."""
        return (self.engram_max_ngram_size - 1) * self.engram_n_heads * self.engram_head_dim

    @property
    def engram_streams(self: Any) -> int:
        """The backbone's residual streams: 1, or the number of its hyper-connections or alternating updates."""
        counts = (getattr(self.text_config, name, None) for name in ("hc_mult", "hc_count", "altup_num_inputs"))
        return next(filter(None, counts), 1)


def draw_multipliers(layer_ids: Sequence[int], max_ngram: int, vocab_size: int, seed: int) -> np.ndarray:
    """Return odd hash multipliers, int64 `[L, N]`: one for each layer and look-back distance.

    The bound keeps `id * multiplier` inside int64 for every id below `vocab_size`. NumPy does not promise a stable
    random stream, so a model stores these numbers and only compares them with a fresh draw.

    Args:
        layer_ids: 0-based decoder layers with memory; the id itself seeds the draw.
        max_ngram: N.
        vocab_size: size of the compressed vocabulary (of the vocabulary, without compression).
        seed: `engram_seed`; 0 in DeepSeek-V4.1.
    """
    bound = max(1, (_INT64_MAX // vocab_size) // 2)
    draws = [
        np.random.default_rng(seed + _SEED_STRIDE * layer_id).integers(0, bound, size=max_ngram, dtype=np.int64)
        for layer_id in layer_ids
    ]
    return np.stack(draws) * 2 + 1


@dataclass(frozen=True)
class TableDescription:
    """The description of a table: section 3 of the format.

    Args:
        layer: decoder layer, counted from 0.
        num_rows: R of the whole table.
        rows: `(first, stop)`, the rows of this file.
        width: W.
        dtype: the dtype of the rows, a key of `ROW_FORMATS`.
        scale_dtype: safetensors name; None without scales.
        scale_block: channels that share a scale; None without scales.
        tensors: names of the tensors of this file, by kind: `"weight"`, `"scale"`, `"global_scale"`.
        orders, heads, primes, offsets, multipliers, pad_id, vocab_size: the hash; see `hashing_engram`.
        token_map_sha256, token_map_ids: digest of the map's first `token_map_ids` entries; None without compression.
    """

    layer: int
    num_rows: int
    rows: tuple[int, int]
    width: int
    dtype: str
    scale_dtype: str | None
    scale_block: int | None
    tensors: dict[str, str]
    orders: list[int]
    heads: int
    primes: list[list[int]]
    offsets: list[list[int]]
    multipliers: list[int]
    pad_id: int
    vocab_size: int
    token_map_sha256: str | None = None
    token_map_ids: int | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the text of the header's `engram_table`."""
        return json.dumps(asdict(self))

    def with_rows(self, first: int, stop: int) -> "TableDescription":
        """Return the description of a file with the rows `first..stop-1`."""
        return replace(self, rows=(first, stop))


def tensor_names(layer: int, dtype: str, kinds: Collection[str] | None = None) -> dict[str, str]:
    """Return our names of the tensors of a table file, by kind.

    Args:
        kinds: the existing ones, instead of all that rows of `dtype` have.
    """
    ends = {kind: name for name, kind in KINDS.items()} if ROW_FORMATS[dtype].has_global else {}
    found = [kind if kinds is None or kind in kinds else "scale_2" for kind in ROW_FORMATS[dtype].kinds]
    return {kind: f"model.layers.{layer}.engram.table.{ends.get(kind, kind)}" for kind in found}


def describe_table(
    hasher, index: int, *, width: int, dtype: str, kinds: Collection[str] | None = None
) -> TableDescription:
    """Describe the table of the `index`-th Engram layer of a model, as one file.

    Args:
        hasher: the model's `NgramHasher`, with its token map set.
        width: W.
        dtype: the dtype of the rows, a key of `ROW_FORMATS`.
        kinds: as in [`tensor_names`].
    """
    layer, pad = hasher.layer_ids[index], hasher.pad_token_id
    primes = hasher.primes[index].tolist()
    known = _count_known_ids(hasher.token_map)
    return TableDescription(
        layer=layer,
        rows=(0, sum(map(sum, primes))),
        width=width,
        dtype=dtype,
        tensors=tensor_names(layer, dtype, kinds),
        primes=primes,
        multipliers=hasher.multipliers[index].tolist(),
        pad_id=pad if hasher.token_map is None else int(hasher.token_map[pad]),
        vocab_size=hasher.hash_vocab_size,
        token_map_sha256=None if known is None else token_map_digest(hasher.token_map[:known]),
        token_map_ids=known,
        **_derived(dtype, width, primes),
    )


def _derived(dtype: str, width: int, primes: list[list[int]]) -> dict[str, Any]:
    """Return the members of a description that follow from others."""
    row_format = ROW_FORMATS[dtype]
    scale_dtype = row_format.scale_dtype
    ends = iter(accumulate((size for order in primes for size in order), initial=0))
    return {
        "num_rows": sum(map(sum, primes)),
        "scale_dtype": scale_dtype,
        "scale_block": (row_format.block or width) if scale_dtype else None,
        "orders": list(range(2, len(primes) + 2)),
        "heads": len(primes[0]),
        "offsets": [[next(ends) for _ in order] for order in primes],  # This is the running sum of the bucket sizes.
    }


def require_same_hash(described: TableDescription, hasher, index: int) -> None:
    """Refuse a table that was written for another hash or token map than a model's, and would be read as noise.

    Args:
        described: the description of the table of the model's `index`-th Engram layer.
        hasher: the model's `NgramHasher`.

    Raises:
        TableFormatError: the message names the difference.
    """
    own = describe_table(hasher, index, width=described.width, dtype=described.dtype)
    for name in ("primes", "multipliers", "vocab_size", "pad_id"):
        if getattr(own, name) != getattr(described, name):
            raise TableFormatError(
                f"The table of layer {own.layer} was written for the {name} {getattr(described, name)}, but the model "
                f"hashes with {getattr(own, name)}; take tables and weights of one model."
            )
    if (described.token_map_sha256 is None) != (own.token_map_sha256 is None) and not _keeps_ids(hasher):
        raise TableFormatError(f"Only model or table of layer {own.layer} compresses ids; take both of one model.")
    # A new model does not know its tokenizer yet, and tokens may have been added since.
    if described.token_map_ids is not None and own.token_map_ids and not covers_token_map(described, hasher.token_map):
        raise TableFormatError(
            f"The table of layer {own.layer} was written for another token map than the model has; use the tokenizer and "
            "weights that belong to the tables."
        )


def _keeps_ids(hasher) -> bool:
    """Return whether a token map is the identity, as that of a model which was made without one, and then got tokens."""
    token_map, size = hasher.token_map, hasher.hash_vocab_size
    return token_map is not None and token_map[:size].tolist() == list(range(size))


def _count_known_ids(token_map) -> int | None:
    """Return the number of ids in a model's token map; the vocabulary may be padded with ids without tokens."""
    if token_map is None:
        return None
    known = np.flatnonzero(np.array(token_map.tolist()) >= 0)
    return int(known[-1]) + 1 if known.size else 0


def token_map_digest(token_map) -> str:
    """Return the SHA-256 of a token map `[ids]`, a tensor or an array, as little-endian int32, in hex."""
    return hashlib.sha256(np.array(token_map.tolist(), dtype="<i4").tobytes()).hexdigest()


def covers_token_map(described: TableDescription, token_map) -> bool:
    """Return whether a token map `[ids]` begins with the one that a table was written for."""
    covered = token_map[: described.token_map_ids]
    return len(covered) == described.token_map_ids and token_map_digest(covered) == described.token_map_sha256


def parse_description(members: dict, what: str) -> TableDescription:
    """Check a description (section 3 of the format) against itself.

    Args:
        members: the parsed JSON object; members that version 1 does not define are ignored.
        what: begins the sentence of an error, such as "The header of x.safetensors".

    Raises:
        TableFormatError: a member is missing, of the wrong type, or contradicts another.
    """
    require_version(members.get("format_version"), what)
    known = {field.name for field in fields(TableDescription)}
    if absent := sorted(known - members.keys()):
        raise TableFormatError(f"{what} lacks {absent[0]!r} in its table description; write the file again.")
    for holds, name, expected in _description_rules(members):
        if not holds:
            raise TableFormatError(
                f"{what} contradicts itself: {name} is {members[name]!r}, expected {expected}; write the file again."
            )
    described = {name: members[name] for name in known}
    return TableDescription(**described | {"rows": tuple(members["rows"])})


def _description_rules(d: dict) -> Iterator[tuple[bool, str, str]]:
    """Yield whether each member is valid, its name, and the expected value. Each rule relies on those before it."""
    for name in ("layer", "width", "pad_id", "vocab_size"):
        yield are_counts([d[name]]), name, "a count"
    yield isinstance(d["dtype"], str) and d["dtype"] in ROW_FORMATS, "dtype", f"one of {', '.join(ROW_FORMATS)}"
    row_format = ROW_FORMATS[d["dtype"]]
    yield d["width"] > 0 and d["width"] % row_format.packed == 0, "width", f"a multiple of {row_format.packed}"
    names = d["tensors"]
    yield isinstance(names, dict) and all(isinstance(name, str) for name in names.values()), "tensors", "names by kind"
    yield sorted(map(_global_kind, names)) == sorted(row_format.kinds), "tensors", f"names of {row_format.kinds}"
    primes = d["primes"]
    is_grid = isinstance(primes, list) and all(map(are_counts, primes)) and len(set(map(len, primes))) == 1
    yield is_grid and all(map(all, primes)), "primes", "a list for every order, with as many positive numbers each"
    for name, value in _derived(d["dtype"], d["width"], primes).items():
        yield type(d[name]) is type(value) and d[name] == value, name, f"{value}, as the others imply"
    rows = d["rows"]
    is_part = are_counts(rows) and len(rows) == 2 and rows[0] < rows[1] <= d["num_rows"]
    yield is_part, "rows", f"[first, stop] of {d['num_rows']} rows"
    odd = are_counts(d["multipliers"]) and all(number % 2 for number in d["multipliers"])
    yield odd and len(d["multipliers"]) == len(primes) + 1, "multipliers", f"{len(primes) + 1} odd numbers below 2^63"
    yield d["pad_id"] < d["vocab_size"], "pad_id", f"a compressed id below {d['vocab_size']}"
    digest, ids = d["token_map_sha256"], d["token_map_ids"]
    has_map = isinstance(digest, str) and are_counts([ids])
    yield has_map or digest is ids is None, "token_map_ids", "a count beside token_map_sha256, or both null"


def _global_kind(kind: str) -> str:
    return "global_scale" if kind == "scale_2" else kind


@dataclass(frozen=True)
class TablePart:
    """The rows `first..stop-1` of a table, in one file.

    Args:
        dtype: the dtype of the rows, a key of `ROW_FORMATS`.
        spans: the tensors by kind: `"weight"`, `"scale"`, `"global_scale"` (divides) or `"scale_2"` (multiplies).
    """

    first: int
    stop: int
    file: FileHeader
    dtype: str
    spans: dict[str, TensorSpan]

    @property
    def weight(self) -> TensorSpan:
        """The span of the rows."""
        return self.spans["weight"]

    @property
    def scale(self) -> TensorSpan | None:
        """The span of their scales."""
        return self.spans.get("scale")

    @property
    def row_spans(self) -> dict[str, TensorSpan]:
        """The spans that have an entry for every row."""
        return {kind: self.spans[kind] for kind in ("weight", "scale") if kind in self.spans}

    @property
    def names(self) -> dict[str, str]:
        """The tensor names, by kind like `spans`."""
        return {kind: span.name for kind, span in self.spans.items()}

    @property
    def width(self) -> int:
        """W."""
        return self.weight.shape[1] * ROW_FORMATS[self.dtype].packed


@dataclass(frozen=True)
class StoredTable:
    """One layer's stored table: parts in row order, without gap or overlap.

    Args:
        description: the description of its hash in the files or the manifest; None if there is none.
    """

    layer: int
    parts: tuple[TablePart, ...]
    description: TableDescription | None = None

    @property
    def num_rows(self) -> int:
        """R."""
        return self.parts[-1].stop

    @property
    def width(self) -> int:
        """W."""
        return self.parts[0].width

    @property
    def dtype(self) -> str:
        """The dtype of the rows, a key of `ROW_FORMATS`."""
        return self.parts[0].dtype

    @property
    def has_own_files(self) -> bool:
        """Whether its files contain nothing else."""
        return all(part.file.tensors.keys() == set(part.names.values()) for part in self.parts)

    @property
    def size(self) -> int:
        """The bytes of rows and scales."""
        return sum(span.size for part in self.parts for span in part.spans.values())


def require_fit(
    tables: Mapping[int, StoredTable], layer: int, num_rows: int, width: int, table_dtype: str | None
) -> StoredTable:
    """Return the table of a layer, if it is the one that a model's config requires.

    Args:
        tables: by layer.
        num_rows, width, table_dtype: R, W and `engram_table_dtype`.

    Raises:
        TableFormatError: there is none for this layer, or it has another size or dtype.
    """
    stored = tables.get(layer)
    if stored is None:
        raise TableFormatError(
            f"There is no table for layer {layer} (only for {sorted(tables)}); complete the folder (a shard or {MANIFEST_NAME} "
            "may be absent)."
        )
    require_size(layer, (stored.num_rows, stored.width), (num_rows, width))
    row_format = ROW_FORMATS[stored.dtype]
    expected = row_format.name if row_format.scale_dtype else None
    if expected != table_dtype:
        raise TableFormatError(
            f"The table of layer {layer} is stored as {row_format.name}, but the config says engram_table_dtype "
            f"{table_dtype!r}; set it to {expected!r}."
        )
    return stored


def require_size(layer: int, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuse the table of a layer that has other rows and channels than a model's config requires."""
    if found != expected:
        raise TableFormatError(
            f"The table of layer {layer} has {' rows of '.join(map(str, found))} channels, but the config asks for "
            f"{' of '.join(map(str, expected))}; take tables and config.json of one model."
        )


def read_tables(
    folder: str | os.PathLike,
    resolve: Callable[[str], Path] | None = None,
    layers: Collection[int] | None = None,
) -> dict[int, StoredTable]:
    """Return every table that the manifest of `folder` names, by layer; no table data is read.

    Args:
        resolve: returns the path of a file that the manifest names; by default it lies in `folder`.
        layers: read only those of these layers, and resolve no file of others.

    Raises:
        FileFormatError: a file is damaged, or breaks a rule of the format (then it is a `TableFormatError`).
    """
    folder = Path(folder)
    entries = read_manifest(folder / MANIFEST_NAME)
    headers: dict[str, FileHeader] = {}

    def header(name: str) -> FileHeader:
        if name not in headers:
            headers[name] = read_header(folder / name if resolve is None else resolve(name))
        return headers[name]

    tables = {
        layer: _read_table(layer, entry, header, folder / MANIFEST_NAME)
        for layer, entry in entries.items()
        if layers is None or layer in layers
    }
    require_disjoint([part for table in tables.values() for part in table.parts])
    return tables


def read_manifest(path: str | os.PathLike) -> dict[int, dict]:
    """Return the entries of a manifest, by layer, checked as far as possible without the files.

    Raises:
        FileFormatError: it is not a JSON object, or breaks a rule of section 1 of the format.
    """
    manifest = read_json(Path(path))
    require_version(manifest.get("format_version"), str(path))
    tables = manifest.get("tables")
    if not isinstance(tables, dict) or not tables:
        raise TableFormatError(f"{path} has no object `tables` with an entry for every layer; fetch it again.")
    for layer, entry in tables.items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", layer) or not isinstance(entry, dict):
            raise TableFormatError(f"{path} has an entry {layer!r}: {entry!r}, not a layer's object; fetch it again.")
        for kind in ("weight", *(kind for kind in ("scale", "global_scale", "scale_2") if kind in entry)):
            _check_locations(entry.get(kind), f"{kind} of layer {layer} in {path}")
    return {int(layer): entry for layer, entry in tables.items()}


def _check_locations(locations, where: str) -> None:
    if not isinstance(locations, list) or not locations:
        raise TableFormatError(f"The {where} must list the tensors that hold it, not {locations!r}; fetch it again.")
    for location in locations:
        if not isinstance(location, dict) or not {"file", "tensor", "rows"} <= location.keys():
            raise TableFormatError(f"The {where} has {location!r}, expected file, tensor and rows; fetch it again.")
        if not isinstance(location["tensor"], str) or not is_file_name(location["file"]):
            raise TableFormatError(f"The {where} has {location['file']!r}; name a file beside it, without a path.")
        if not are_counts(location["rows"]) or len(location["rows"]) != 2:
            raise TableFormatError(f"The {where} has rows {location['rows']!r}, not [first, stop]; fetch it again.")
    ranges = [tuple(location["rows"]) for location in locations]
    for (_, stop), (first, _) in pairwise([(0, 0), *ranges]):
        if first != stop:
            raise TableFormatError(
                f"The {where} goes on with row {first} where row {stop} is due: a gap or an overlap; fetch it again."
            )
    if not all(first < stop for first, stop in ranges):
        raise TableFormatError(f"The {where} has a range without rows: {ranges}; fetch it again.")


def _read_table(layer: int, entry: dict, header: Callable[[str], FileHeader], manifest: Path) -> StoredTable:
    where = f"layer {layer} in {manifest}"
    locations = {kind: entry[kind] for kind in ("weight", "scale", "global_scale", "scale_2") if kind in entry}
    weights, parts = locations["weight"], []
    if any([one["rows"] for one in others] != [one["rows"] for one in weights] for others in locations.values()):
        raise TableFormatError(f"Rows and scales of {where} are split differently; split both alike.")
    for index, weight in enumerate(weights):
        names = {kind: some[index]["tensor"] for kind, some in locations.items()}
        if any(some[index]["file"] != weight["file"] for some in locations.values()):
            raise TableFormatError(f"Rows and scales of {where} lie in different files; put both into one.")
        file = header(weight["file"])
        spans = {kind: _tensor(file, name, where) for kind, name in names.items()}
        parts.append(_checked_part(*weight["rows"], file, spans, _said_dtype(file, entry)))
    if any((part.dtype, part.width) != (parts[0].dtype, parts[0].width) for part in parts):
        raise TableFormatError(f"The parts of {where} differ in dtype or width; write them again.")
    return StoredTable(layer, tuple(parts), _description(layer, entry, parts, manifest))


def _said_dtype(file: FileHeader, entry: dict) -> str | None:
    """Return the dtype of a file's rows, from its description or the manifest's, which is checked later."""
    said = parse_json(file.metadata.get(METADATA_KEY, "{}"), f"The header of {file.path}") or entry.get("description")
    return said.get("dtype") if isinstance(said, dict) else None


def _tensor(file: FileHeader, name: str, where: str) -> TensorSpan:
    if name not in file.tensors:
        raise TableFormatError(f"{file.path} has no tensor {name!r}, which {where} names; fetch the file again.")
    return file.tensors[name]


def _checked_part(
    first: int, stop: int, file: FileHeader, spans: dict[str, TensorSpan], said: object = None
) -> TablePart:
    """Return some rows of a table.

    Args:
        said: the `dtype` in a description; without one, numbers of four bits and of two cannot be distinguished.
    """
    weight, scale = spans["weight"], spans.get("scale")
    where, dtype = f"Tensor {weight.name!r} of {file.path}", weight.dtype
    if dtype == "U8":
        dtype = "NVFP4" if scale is not None and scale.dtype == "F8_E4M3" else said
        if dtype not in ("NVFP4", "I4", "I2"):
            raise TableFormatError(
                f"{where} is U8, packed numbers, but nothing says of how many bits; describe the table in {MANIFEST_NAME}, or "
                "have engram_table_dtype in config.json say it."
            )
    if dtype not in ROW_FORMATS:
        raise TableFormatError(f"{where} is {dtype}, expected one of {', '.join(ROW_FORMATS)}; write it again.")
    if len(weight.shape) != 2 or weight.shape[0] != stop - first or weight.shape[1] == 0:
        raise TableFormatError(
            f"{where} has shape {list(weight.shape)}, expected {stop - first} rows; write the file again, or list the "
            "rows that it has."
        )
    row_format, width = ROW_FORMATS[dtype], weight.shape[1] * ROW_FORMATS[dtype].packed
    scale_dtype, per_row = row_format.scale_dtype, row_format.scales(width)
    if (scale is None) != (scale_dtype is None):
        raise TableFormatError(
            f"{where} is {dtype}, which needs {'scales' if scale_dtype else 'no scales'}; write it again."
        )
    expected = (width % row_format.multiple, scale_dtype, (stop - first, per_row))
    if scale is not None and expected != (0, scale.dtype, scale.shape):
        raise TableFormatError(
            f"{where} is {dtype} of width {width} with scales {scale.dtype} {list(scale.shape)}, expected a width that "
            f"is a multiple of {row_format.multiple} and scales {scale_dtype} {[stop - first, per_row]}; write it again."
        )
    globals_ = [span for kind, span in spans.items() if _global_kind(kind) == "global_scale"]
    if [(span.dtype, math.prod(span.shape)) for span in globals_] != [("F32", 1)] * row_format.has_global:
        needed = "one global scale, a single F32 number" if row_format.has_global else "no global scale"
        raise TableFormatError(f"{where} is {dtype}, which needs {needed}; write it again.")
    return TablePart(first, stop, file, dtype, spans)


def _description(layer: int, entry: dict, parts: list[TablePart], manifest: Path) -> TableDescription | None:
    """Return the description of a table in its files, or else in the manifest."""
    where = f"layer {layer} in {manifest}"
    found = [file_description(part.file) for part in parts]
    if any(found):
        for part, described in zip(parts, found, strict=True):
            if described is None:
                raise TableFormatError(
                    f"{part.file.path} does not describe itself, as other files of {where} do; write it again."
                )
            _compare(part, described, layer)
    elif isinstance(entry.get("description"), dict):
        members = {**entry["description"], "rows": [0, parts[-1].stop], "tensors": parts[0].names}
        found = [parse_description(members, f"The description of {where}")]
    elif "description" in entry:
        raise TableFormatError(f"{where} has the description {entry['description']!r}; write an object.")
    else:
        return None
    first, *others = (replace(described, rows=(0, described.num_rows), tensors={}) for described in found)
    if any(other != first for other in others):
        raise TableFormatError(f"The files of {where} describe different tables; write them again.")
    stored = (layer, parts[-1].stop, parts[0].width, parts[0].dtype)
    if stored != (first.layer, first.num_rows, first.width, first.dtype):
        raise TableFormatError(
            f"For {where} the files hold layer, rows, width and dtype {stored}, but describe "
            f"{(first.layer, first.num_rows, first.width, first.dtype)}; write them again."
        )
    return first


def file_description(file: FileHeader) -> TableDescription | None:
    """Return the description in a file; None for one that does not follow the format, such as an upstream shard.

    Raises:
        TableFormatError: it contradicts itself or its tensors.
    """
    if METADATA_KEY not in file.metadata:
        return None
    what = f"The header of {file.path}"
    description = parse_description(parse_json(file.metadata[METADATA_KEY], what), what)
    if set(description.tensors.values()) != set(file.tensors):
        raise TableFormatError(
            f"{what} names the tensors {sorted(description.tensors.values())}, but holds others; write the file again."
        )
    spans = {kind: file.tensors[name] for kind, name in description.tensors.items()}
    part = _checked_part(*description.rows, file, spans, description.dtype)
    _compare(part, description, description.layer)
    if part.weight.offset % PAGE:
        raise TableFormatError(
            f"The rows of {file.path} begin at byte {part.weight.offset}, not at a page of {PAGE}; write the file again."
        )
    return description


def _compare(part: TablePart, description: TableDescription, layer: int) -> None:
    found = (layer, (part.first, part.stop), part.width, part.dtype)
    said = (description.layer, description.rows, description.width, description.dtype)
    names = part.names
    if found != said or names != description.tensors:
        raise TableFormatError(
            f"{part.file.path} describes layer, rows, width and dtype as {said} in {sorted(description.tensors.values())}, "
            f"but is used as {found} in {sorted(names.values())}; write it again."
        )


def require_disjoint(parts: Sequence[TablePart]) -> None:
    """Refuse two references to one region of a file.

    Raises:
        TableFormatError: the message names the tensors.
    """
    # Files are compared by inode, since one may have several names.
    spans = [(part.file.stamp[:2], span.offset, span) for part in parts for span in part.spans.values()]
    spans.sort(key=lambda entry: entry[:2])
    for (file, start, span), (other_file, other_start, other) in pairwise(spans):
        if file == other_file and other_start < start + span.size:
            raise TableFormatError(
                f"{span.path} is claimed twice: tensors {span.name!r} and {other.name!r} share bytes; every layer needs a "
                "region of its own."
            )


def table_keys(layers: Collection[int] | None = None) -> re.Pattern[str]:
    """Return a pattern for the ends of table names in our models and DeepSeek's; groups: layer, one of `KINDS`.

    Args:
        layers: only of these layers.
    """
    numbers = "[0-9]{1,9}" if layers is None else "|".join(map(str, layers))
    return re.compile(rf"\b\w+\.({numbers})\.engram\.(?:table|embed)\.({'|'.join(KINDS)})$")


def tables_in_checkpoint(files: Sequence[str | os.PathLike], table_dtype: str | None = None) -> dict[int, StoredTable]:
    """Return tables among the ordinary tensors of a checkpoint, by layer, found by their names.

    Args:
        files: the safetensors files of the checkpoint.
        table_dtype: `engram_table_dtype` of its config.
    """
    found: dict[int, dict[str, tuple[FileHeader, TensorSpan]]] = {}
    for file in map(read_header, files):
        for name, span in file.tensors.items():
            match = table_keys().search(name)
            kind = KINDS[match[2]] if match else ""
            if match and found.setdefault(int(match[1]), {}).setdefault(kind, (file, span)) != (file, span):
                _, other = found[int(match[1])][kind]
                raise TableFormatError(
                    f"Both {other.name!r} of {other.path} and {name!r} of {span.path} are the {kind} of the table of layer "
                    f"{match[1]}; take one of them out."
                )
    tables, names = {}, {row_format.name: dtype for dtype, row_format in ROW_FORMATS.items()}
    for layer, spans in found.items():
        files_of_table = {file.path for file, _ in spans.values()}
        # A scale in another shard than its rows is valid there, but not worth a second reader.
        if "weight" in spans and len(files_of_table) == 1:
            file, weight = spans["weight"]
            rows = weight.shape[0] if weight.shape else 0
            part = _checked_part(
                0, rows, file, {kind: span for kind, (_, span) in spans.items()}, names.get(table_dtype)
            )
            tables[layer] = StoredTable(layer, (part,))
    return tables


def choose_residency(size: int, free_host: int, free_device: int | None) -> str:
    """Return the residency of tables of `size` bytes with `"auto"`, by the free bytes of host and GPU (or None)."""
    if size <= _RESIDENT_SHARE * (free_host if free_device is None else free_device):
        return "resident"
    return "mapped" if free_device is None or size > _PINNED_SHARE * free_host else "pinned"


# These files of both versions of control groups have the limit, the memory in use, and the reclaimable memory.
_GROUP_FILES = [
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
]


def free_host_memory() -> int:
    """Return the bytes of memory that this process can still allocate, with a container's limit."""
    free = _memory_of_the_system() if psutil is None else psutil.virtual_memory().available
    for names in _GROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # There is no such group, or no limit ("max").
            limit, used, counts = (Path("/sys/fs/cgroup", name).read_text() for name in names)
            (unused,) = re.findall(r"^(?:total_)?inactive_file (\d+)$", counts, re.MULTILINE)[-1:]
            free = min(free, int(limit) - int(used) + int(unused))
    return max(free, 0)


def _memory_of_the_system() -> int:
    """Return the free memory from `sysconf`, else half of the total, or 16 GB on systems that report neither."""
    names = getattr(os, "sysconf_names", {})
    for name, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        if name in names:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
    return 1 << 34

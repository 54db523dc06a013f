"""The place of a table in a checkpoint of another project: one tensor or numbered shards, in one file or many.

Only names and headers are read, and both are checked against the module that the table belongs to.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..loading_engram import resolver
from ..row_sources_engram import FileMap
from ..safetensors_engram import (
    EngramError,
    FileFormatError,
    FileHeader,
    TensorSpan,
    find_weights,
    read_header,
    read_json,
    read_weight_map,
    reading,
)
from ..table_format_engram import StoredTable, TablePart
from .kinds import TableKind, text_config

# This member of an index's metadata has, by name, the digest of samples of each file with tables.
DIGESTS_MEMBER = "tables_sha256"
# This matches a tensor of a table, or of one of its shards: `STEM.weight` or `STEM.shard_7.weight`.
_NAME = re.compile(r"(?P<stem>.+?)(?:\.shard_(?P<shard>[0-9]{1,6}))?\.(?P<leaf>[^.]+)")
# These stored dtypes are accepted for a parameter of each dtype. Floats are cast as transformers casts them.
_FLOATS = ("BF16", "F16", "F32")
_STORED_AS = {
    **dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), _FLOATS),
    torch.float8_e4m3fn: ("F8_E4M3",),
    torch.uint8: ("U8",),
    torch.int8: ("I8",),
}
TORCH_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
}


@dataclass(frozen=True)
class StoredTensor:
    """A stored tensor with a row for every id: its parts in row order."""

    name: str
    parts: tuple[tuple[FileHeader, TensorSpan], ...]

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return TORCH_DTYPES[self.parts[0][1].dtype]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self.parts[0][1].shape[1:]

    @property
    def size(self) -> int:
        """The size in bytes."""
        return sum(span.size for _, span in self.parts)

    def as_bytes(self) -> StoredTable:
        """Return the table as rows of bytes, which every row source accepts for any dtype."""
        stops = accumulate(span.shape[0] for _, span in self.parts)
        return StoredTable(
            _layer_of(self.name),
            tuple(
                TablePart(stop - span.shape[0], stop, header, "I8", {"weight": _bytes_of(span)})
                for stop, (header, span) in zip(stops, self.parts, strict=True)
            ),
        )


def _layer_of(name: str) -> int:
    match = re.search(r"\blayers\.([0-9]{1,9})\b", name)
    return int(match[1]) if match else 0


def _bytes_of(span: TensorSpan) -> TensorSpan:
    return replace(span, dtype="I8", shape=(span.shape[0], span.size // span.shape[0]))


class CheckpointNames:
    """The tensors of a checkpoint by name; their files are resolved on first use.

    Args:
        where: the folder or Hub id, for errors.
        files: the file of every tensor, by the tensor's name.
        resolve: returns the path of a file.
    """

    def __init__(self, where: str, files: Mapping[str, str], resolve: Callable[[str], Path | None]):
        self.where, self.files = where, files
        self._resolve = resolve
        self._headers: dict[str, FileHeader] = {}

    @classmethod
    def of_checkpoint(
        cls, where: str, resolve: Callable[[str], Path | None], variant: str | None
    ) -> "CheckpointNames":
        """Return the names of the weights that transformers would load; none if there are no safetensors files."""
        single, index = find_weights(resolve, variant)
        if index is not None:
            return cls(where, read_weight_map(index), resolve)
        return cls.of_files(where, [] if single is None else [single])

    @classmethod
    def of_files(cls, where: str, paths: Iterable[Path]) -> "CheckpointNames":
        """Collect the tensors of some files.

        Raises:
            FileFormatError: a file is damaged, or two of them have a tensor of one name.
        """
        by_name, headers = {path.name: path for path in paths}, {}
        files: dict[str, str] = {}
        for name, path in by_name.items():
            headers[name] = read_header(path)
            for tensor in headers[name].tensors:
                if files.setdefault(tensor, name) != name:
                    raise FileFormatError(
                        f"{where} has the tensor {tensor!r} in {files[tensor]} and in {name}; keep one."
                    )
        found = cls(where, files, by_name.get)
        found._headers = headers
        return found

    def header(self, file: str) -> FileHeader:
        """Return the checked header of a file.

        Raises:
            FileFormatError: it is missing or damaged.
        """
        if file not in self._headers:
            path = self._resolve(file)
            if path is None:
                raise FileFormatError(f"{self.where} lacks {file}, which its index names; fetch the missing file.")
            self._headers[file] = read_header(path)
        return self._headers[file]

    def tensor(self, name: str) -> tuple[FileHeader, TensorSpan]:
        """Return a tensor and its file.

        Raises:
            FileFormatError: the file does not have the tensor that the index names.
        """
        header = self.header(self.files[name])
        if name not in header.tensors:
            raise FileFormatError(
                f"{header.path} has no tensor {name!r}, which the index of {self.where} names; fetch it again."
            )
        return header, header.tensors[name]

    def stem_of(self, module: str) -> str | None:
        """Return the stored name of a module's tensors; None if they are not stored.

        Prefixes differ between a model and its text part. The name with the longest common end is chosen, if the
        numbers in both are equal.

        Raises:
            EngramError: two names fit equally well.
        """
        stems = {match["stem"] for name in self.files if (match := _NAME.fullmatch(name))}
        ranked: dict[int, list[str]] = {}
        for stem in stems:
            if _numbers(stem) == _numbers(module):
                ranked.setdefault(_common_end(stem, module), []).append(stem)
        ranked.pop(0, None)
        if not ranked:
            return None
        best = sorted(ranked[max(ranked)])
        if len(best) > 1:
            raise EngramError(
                f"The table {module} may be any of {', '.join(best)} in {self.where}; take tables with the model's own names."
            )
        return best[0]

    def table(
        self, module: str, parameters: Mapping[str, torch.Tensor], others: Iterable[str]
    ) -> "dict[str, StoredTensor]":
        """Return the tensors of a table by the names of its module's parameters.

        Args:
            module: its name in the model.
            parameters: its parameters with a row for every id; only shapes and dtypes are used.
            others: names of its other parameters and buffers, which transformers loads.

        Raises:
            FileFormatError: a tensor is missing, or shards do not add up, or have another shape or dtype.
            EngramError: it is quantized in a way that the module does not know.
        """
        stem = self.stem_of(module)
        if stem is None:
            raise FileFormatError(
                f"{self.where} has no tensors of the table {module}; name a checkpoint that has, or tables_from."
            )
        found: dict[str, dict[int | None, str]] = {}
        for name in self.files:
            match = _NAME.fullmatch(name)
            if match and match["stem"] == stem:
                shard = None if match["shard"] is None else int(match["shard"])
                found.setdefault(match["leaf"], {})[shard] = name
        unknown = sorted(found.keys() - parameters.keys() - set(others))
        if unknown:
            raise EngramError(
                f"{self.where} stores {stem} with {', '.join(unknown)}, a quantization that the model's "
                f"config does not announce and that is not known here; load it with the stock from_pretrained."
            )
        return {
            leaf: self._assemble(f"{stem}.{leaf}", found.get(leaf, {}), parameter)
            for leaf, parameter in parameters.items()
        }

    def small(self, module: str, leaf: str) -> bytes | None:
        """Return the bytes of a small tensor beside a table, such as its single scale; None if there is none."""
        name = f"{self.stem_of(module)}.{leaf}"
        if name not in self.files:
            return None
        _, span = self.tensor(name)
        with reading(span.path), span.path.open("rb") as file:
            file.seek(span.offset)
            return span.dtype.encode() + file.read(span.size)

    def _assemble(self, name: str, shards: dict[int | None, str], parameter: torch.Tensor) -> StoredTensor:
        if not shards:
            raise FileFormatError(f"{self.where} has no tensor {name}; complete it, or name tables_from.")
        numbers = sorted(number for number in shards if number is not None)
        if None in shards and numbers:
            raise FileFormatError(f"{self.where} has {name} whole and in {len(numbers)} shards; take one of them out.")
        if numbers != list(range(len(numbers))):
            absent = min(set(range(numbers[-1])) - set(numbers))
            raise FileFormatError(
                f"{self.where} has {len(numbers)} shards of {name}, but not shard_{absent}; complete it."
            )
        ordered = [shards[None]] if None in shards else [shards[number] for number in numbers]
        parts = tuple(map(self.tensor, ordered))
        self._require_fit(name, [span for _, span in parts], parameter)
        return StoredTensor(name, parts)

    def _require_fit(self, name: str, spans: list[TensorSpan], parameter: torch.Tensor) -> None:
        allowed = _STORED_AS.get(parameter.dtype, ())
        for span in spans:
            if span.dtype not in allowed or span.dtype != spans[0].dtype:
                raise EngramError(
                    f"{span.name} of {self.where} is stored as {span.dtype}, but the model has {name} in {parameter.dtype}, "
                    f"which can be stored as {' or '.join(allowed) or 'nothing known here'}, all shards alike; tables and model "
                    "do not belong together, or the table is quantized in a way that is not known here."
                )
            if len(span.shape) != parameter.ndim or span.shape[1:] != parameter.shape[1:] or not span.size:
                raise FileFormatError(
                    f"{span.name} of {self.where} has shape {list(span.shape)}, but the model has rows of "
                    f"{list(parameter.shape[1:])}; tables and model do not belong together."
                )
        rows = sum(span.shape[0] for span in spans)
        if rows != parameter.shape[0]:
            raise FileFormatError(
                f"The {len(spans)} tensors of {name} in {self.where} have {rows} rows together, but the model has "
                f"{parameter.shape[0]}; a shard is missing, or they are of another vocabulary."
            )


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


def _common_end(first: str, second: str) -> int:
    """Return the number of equal parts of two dotted names, from the end."""
    count = 0
    for one, other in zip(reversed(first.split(".")), reversed(second.split(".")), strict=False):
        if one != other:
            break
        count += 1
    return count


def unexpected_keys(stored: str, name: str) -> str:
    """Return a pattern of the names under which transformers finds tensors of a table that the model no longer has.

    Args:
        stored: the name of the tensor in the checkpoint, without a shard.
        name: the name of the parameter in the model.
    """
    *stem, leaf = name.split(".")[-_common_end(stored, name) :]
    return rf"(?:^|\.){re.escape('.'.join(stem))}(?:\.shard_\d+)?\.{re.escape(leaf)}$"


def open_tables_folder(
    name_or_path: str, options: Mapping[str, Any]
) -> tuple[CheckpointNames, Callable[[str], Path | None]]:
    """Return the tensors of a folder or Hub repository that has tables, perhaps without a model; and the resolver of
    its files.

    Args:
        options: options of `from_pretrained` for reaching the Hub.

    Raises:
        FileFormatError: there is no safetensors file.
    """
    resolve = resolver(name_or_path, dict(options))
    names = CheckpointNames.of_checkpoint(name_or_path, resolve, None)
    if not names.files:
        folder = Path(name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(name_or_path, allow_patterns=["*.safetensors"], **_download_options(options))
            )
        names = CheckpointNames.of_files(name_or_path, sorted(folder.glob("*.safetensors")))
    if not names.files:
        raise FileFormatError(
            f"{name_or_path} has no safetensors files; name the folder or repository that has the tables."
        )
    return names, resolve


def _download_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: options[name] for name in ("cache_dir", "token", "local_files_only") if options.get(name) is not None
    }


def require_same_ids(kind: TableKind | None, model: Mapping[str, Any], other: Path | None, where: str) -> None:
    """Refuse tables whose rows belong to other ids than the model's.

    Args:
        kind: the kind of the tables; None if it is not known, and only the vocabulary can be compared.
        model: the model's config, as a dictionary.
        other: the config.json beside the tables; None if there is none.
        where: the place of the tables, for errors.

    Raises:
        EngramError: a field differs; the message names it.
    """
    if other is None:
        return
    ours, theirs = text_config(model), text_config(read_json(other, constants=True))
    for field in ("vocab_size",) if kind is None else kind.depends_on:
        if field in ours and field in theirs and ours[field] != theirs[field]:
            raise EngramError(
                f"The tables of {where} were made for {field} {theirs[field]!r}, but the model has {ours[field]!r}: the same id "
                "would read another row; take the tables that belong to the model."
            )


def recorded_digests(index: Path | None) -> dict[str, str]:
    """Return the digests of samples of files with tables in a checkpoint's index, by name."""
    metadata = {} if index is None else read_json(index).get("metadata", {})
    digests = metadata.get(DIGESTS_MEMBER, {}) if isinstance(metadata, dict) else {}
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise FileFormatError(
            f"{index} says {DIGESTS_MEMBER} is {digests!r}, expected digests by file name; fetch it again."
        )
    return digests


def require_same_files(recorded: Mapping[str, str], digests: Mapping[Path, bytes], where: str) -> None:
    """Compare files of tables with the digests that an index records, if it records any.

    Files may have been renamed since, so a digest is looked up under any name.

    Raises:
        FileFormatError: a file is not among them.
    """
    for path, digest in digests.items():
        if recorded and digest.hex() not in recorded.values():
            raise FileFormatError(
                f"{path} is not the file of tables that {where} was saved with; fetch it again (if it was changed on purpose, "
                f"delete {DIGESTS_MEMBER!r} from the index)."
            )


def digest_of(path: Path) -> str:
    """Return the digest of samples of a file, in hex."""
    return FileMap(read_header(path)).digest.hex()

"""Where the rows of a table live: in the module, in page-locked host memory, or in the file.

A model folder is looked through before the model is built (`find_tables`); the tables that shall not be parameters are
then mounted on its `EngramTable` modules, so that transformers never allocates, initializes, moves or saves them.
"""

import mmap
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .memory_engram import EngramTable, gather_stored
from .table_files_engram import pass_on, write_manifest
from .table_format_engram import (
    MANIFEST_NAME,
    TORCH_DTYPES,
    StoredTable,
    TableFormatError,
    TablePart,
    TensorSpan,
    describe_table,
    parse_json,
    read_tables,
    tables_in_checkpoint,
    token_map_digest,
)

logger = logging.get_logger(__name__)

RESIDENCIES = ("auto", "resident", "mapped", "pinned")
# What `auto` lets tables take of the memory that is free: beside them the backbone, a cache and other processes live.
_RESIDENT_SHARE, _PINNED_SHARE = 0.25, 0.5
_READ_BYTES = 16 << 20
_TABLE_KEYS = r"layers\.{layer}\.engram\.table\.(weight|scale)$"


class MappedRows:
    """A table in its files, paged in as rows are read: see [`~memory_engram.RowSource`].

    Opening costs no memory whatever the size; processes that map the same file share its pages. It is never copied:
    `deepcopy` and pickling (spawned workers) give another view of the same files.

    Args:
        stored: the checked table.

    Attributes:
        parts: first row, rows and scales (or None) of every part, as tensors over the files.

    Raises:
        TableFormatError: a file is not the one that was checked any more.
    """

    residency = "mapped"

    def __init__(self, stored: StoredTable):
        self.stored = stored
        self.num_rows, self.width = stored.num_rows, stored.width
        paths = {part.file.path for part in stored.parts}
        self._maps = {path: FileMap(path) for path in sorted(paths)}
        for part in stored.parts:
            if self._maps[part.file.path].size != part.file.size:
                raise _changed(part.file.path)
        self.parts = [(part.first, *self._views(part)) for part in stored.parts]

    def _views(self, part: TablePart) -> list[torch.Tensor | None]:
        view = self._maps[part.file.path].view
        return [view(span.offset, span.dtype, span.shape) if span else None for span in (part.weight, part.scale)]

    def __repr__(self) -> str:
        return f"{self.residency}, dtype={self.parts[0][1].dtype}"

    def __deepcopy__(self, memo: dict) -> "MappedRows":
        return self

    def __reduce__(self):
        return type(self), (self.stored,)

    @property
    def files(self) -> dict[Path, int]:
        """File descriptors of the open files, by path; they have been checked not to have changed."""
        self.require_unchanged()
        return {path: opened.descriptor for path, opened in self._maps.items()}

    def fetch(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in [`~memory_engram.RowSource`].

        Raises:
            TableFormatError: a file was cut off or overwritten under the running process.
        """
        self.require_unchanged()
        if len(self.parts) == 1:
            _, weight, scale = self.parts[0]
            return gather_stored(weight, row_ids), None if scale is None else gather_stored(scale, row_ids)
        return self._fetch_from_parts(row_ids)

    def _fetch_from_parts(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        _, weight, scale = self.parts[0]
        values = weight.new_empty((row_ids.numel(), weight.shape[1]))
        scales = None if scale is None else scale.new_empty((row_ids.numel(), scale.shape[1]))
        for first, weight, scale in self.parts:
            (here,) = torch.where((row_ids >= first) & (row_ids < first + weight.shape[0]))
            local = row_ids[here] - first
            values.view(torch.uint8)[here] = gather_stored(weight, local).view(torch.uint8)
            if scales is not None:
                scales.view(torch.uint8)[here] = gather_stored(scale, local).view(torch.uint8)
        return values, scales

    def read(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in [`~memory_engram.RowSource`], by large reads instead of page faults."""
        self.require_unchanged()
        pieces: dict[str, list[torch.Tensor]] = {}
        for part in self.stored.parts:
            begin, end = max(first, part.first), min(stop, part.stop)
            for kind, span in part.spans.items() if begin < end else ():
                piece = self._maps[part.file.path].read(span, begin - part.first, end - part.first)
                pieces.setdefault(kind, []).append(piece)
        joined = {kind: some[0] if len(some) == 1 else _joined(some) for kind, some in pieces.items()}
        return joined["weight"], joined.get("scale")

    def scan(self, kinds: Sequence[str], step: int) -> Iterator[tuple[int, str, torch.Tensor]]:
        """All rows in file order, `step` at a time: first row, `"weight"` or `"scale"`, and the numbers `[n, ...]`.

        Args:
            kinds: which of the two.
        """
        self.require_unchanged()
        for part in self.stored.parts:
            for kind in kinds:
                span = part.spans.get(kind)
                for first in range(0, 0 if span is None else span.shape[0], step):
                    stop = min(first + step, span.shape[0])
                    yield part.first + first, kind, self._maps[part.file.path].read(span, first, stop)

    def require_unchanged(self) -> None:
        """Raise `TableFormatError` if a file was cut off or overwritten since it was opened."""
        # A page behind the end of a file that was cut off kills the process, so the size is asked for every time.
        for path, opened in self._maps.items():
            if opened.changed():
                raise _changed(path)


class PinnedRows(MappedRows):
    """A table copied once into page-locked host memory, from which rows reach a GPU without another copy.

    Raises:
        ValueError: there is no GPU, whose driver would lock the pages.
    """

    residency = "pinned"

    def _views(self, part: TablePart) -> list[torch.Tensor | None]:
        if not torch.cuda.is_available():
            raise ValueError(
                "engram_residency='pinned' keeps tables in page-locked memory for a GPU, but there is none; use 'mapped'."
            )
        return [self._pinned(part, span) for span in (part.weight, part.scale)]

    def _pinned(self, part: TablePart, span: TensorSpan | None) -> torch.Tensor | None:
        if span is None:
            return None
        copy = torch.empty(span.shape, dtype=TORCH_DTYPES[span.dtype], pin_memory=True)
        step = max(1, _READ_BYTES // copy[:1].nbytes)
        for first in range(0, len(copy), step):
            rows = copy[first : first + step]
            rows.copy_(self._maps[part.file.path].read(span, first, first + len(rows)))
        return copy


def _changed(path: Path) -> TableFormatError:
    return TableFormatError(
        f"{path} was changed while it was in use (cut off or overwritten); restore the file and load the model again."
    )


def _joined(pieces: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([piece.view(torch.uint8) for piece in pieces]).view(pieces[0].dtype)


class FileMap:
    """A whole file mapped for random reads, and the means to tell whether it is still the same."""

    def __init__(self, path: Path):
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise TableFormatError(f"{path} cannot be opened ({error.strerror}); fetch the missing file.") from error
        status = os.fstat(self.descriptor)
        self.size, self._modified = status.st_size, status.st_mtime_ns
        # Shared and read-only: a private mapping counts as memory that may be needed, and is refused beyond what there is.
        self._map = mmap.mmap(self.descriptor, self.size, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)

    def __del__(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def changed(self) -> bool:
        """Whether the open file has another size or modification time than when it was opened."""
        status = os.fstat(self.descriptor)
        return status.st_size != self.size or status.st_mtime_ns != self._modified

    def read(self, span: TensorSpan, first: int, stop: int) -> torch.Tensor:
        """Rows `first..stop-1` of a tensor, in memory of their own."""
        rows = torch.empty((stop - first, *span.shape[1:]), dtype=TORCH_DTYPES[span.dtype])
        target = memoryview(rows.view(torch.uint8).numpy()).cast("B")
        offset = span.offset + first * rows[:1].nbytes
        while target:
            count = os.preadv(self.descriptor, [target], offset)
            if count == 0:
                raise TableFormatError(f"Tensor {span.name!r} ends too early: its file was cut off; fetch it again.")
            target, offset = target[count:], offset + count
        return rows

    def view(self, offset: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor over part of the file."""
        torch_dtype = TORCH_DTYPES[dtype]
        count = shape[0] * shape[1] * torch_dtype.itemsize
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # nothing writes to it
            raw = torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=offset)
        # A view in the file's dtype must begin at a multiple of its size, which upstream files need not do.
        return (raw if offset % torch_dtype.itemsize == 0 else raw.clone()).view(torch_dtype).view(shape)


@dataclass
class FoundTables:
    """The tables of a model folder, and where they shall live.

    Args:
        tables: by layer.
        residency: `"resident"`, `"mapped"` or `"pinned"`.
    """

    tables: dict[int, StoredTable]
    residency: str

    def mount(self, model) -> None:
        """Give an `EngramModel` without weights its tables.

        Mapped and pinned tables replace the parameters. Resident ones are noted, to be read where transformers would
        initialize what a checkpoint lacks: the ordinary weights may not include them.

        Raises:
            TableFormatError: a layer has no table, or one that does not fit the config.
        """
        for layer, memory in model.memories().items():
            stored = self._require_fit(layer, memory.table)
            if self.residency == "resident":
                memory.table.unread = MappedRows(stored)
            else:
                memory.table.mount((MappedRows if self.residency == "mapped" else PinnedRows)(stored))
        # transformers hands these on to the model that holds this one.
        patterns = {_TABLE_KEYS.format(layer=layer) for layer in model.memories()}
        model._keys_to_ignore_on_load_missing = patterns | set(model._keys_to_ignore_on_load_missing or ())
        if self.residency != "resident":
            model._keys_to_ignore_on_load_unexpected = patterns | set(model._keys_to_ignore_on_load_unexpected or ())

    def _require_fit(self, layer: int, table: EngramTable) -> StoredTable:
        stored = self.tables.get(layer)
        if stored is None:
            raise TableFormatError(
                f"There is no table for layer {layer} (only for {sorted(self.tables)}); complete the folder."
            )
        stored_dtype = str(TORCH_DTYPES[stored.dtype]).removeprefix("torch.")
        is_quantized = stored.dtype in ("F8_E4M3", "I8")
        if (stored.num_rows, stored.width) != (table.num_rows, table.width):
            raise TableFormatError(
                f"The table of layer {layer} has {stored.num_rows} rows of {stored.width} channels, but the config asks "
                f"for {table.num_rows} of {table.width}; tables and config.json are not of one model."
            )
        if (stored_dtype if is_quantized else None) != table.table_dtype:
            raise TableFormatError(
                f"The table of layer {layer} is stored as {stored_dtype}, but the config says engram_table_dtype "
                f"{table.table_dtype!r}; set it to {stored_dtype if is_quantized else None!r}."
            )
        return stored

    def verify(self, model) -> None:
        """Compare what the tables say about their hash with that of the loaded `EngramModel`.

        Raises:
            TableFormatError: they were written for another hash or token map, and would be read as noise.
        """
        for index, (layer, memory) in enumerate(model.memories().items()):
            memory.table.unread = None
            described = self.tables[layer].description
            if described is None:
                continue
            own = describe_table(model.hashing, index, width=described.width, dtype=described.dtype)
            for name in ("primes", "multipliers", "vocab_size", "pad_id"):
                if getattr(own, name) != getattr(described, name):
                    raise TableFormatError(
                        f"The table of layer {layer} was written for the {name} {getattr(described, name)}, but the "
                        f"model hashes with {getattr(own, name)}; tables and weights are not of one model."
                    )
            self._verify_token_map(layer, described, model.hashing.token_map)

    def _verify_token_map(self, layer: int, described, token_map: torch.Tensor | None) -> None:
        if (described.token_map_sha256 is None) != (token_map is None):
            raise TableFormatError(f"Only one of model and table of layer {layer} compresses token ids.")
        if token_map is None or not bool((token_map >= 0).any()):
            return
        if token_map_digest(token_map[: described.token_map_ids]) != described.token_map_sha256:
            raise TableFormatError(
                f"The table of layer {layer} was written for another token map than the model has; use the tokenizer and "
                "weights that belong to the tables."
            )


def find_tables(name_or_path, residency: str = "auto", **kwargs) -> FoundTables | None:
    """Look a model folder or Hub repository through for tables, and decide where they shall live.

    Args:
        name_or_path: as for `from_pretrained`.
        residency: see [`RESIDENCIES`]; `auto` is resident while that is cheap.
        **kwargs: of `from_pretrained`; those that say where files come from, and `device_map`.

    Returns:
        None if transformers shall load everything by itself.

    Raises:
        ValueError: an unknown residency, or tables that cannot be mapped because there are none.
    """
    if residency not in RESIDENCIES:
        raise ValueError(f"engram_residency is {residency!r}; it must be one of {', '.join(map(repr, RESIDENCIES))}.")
    if name_or_path is None or kwargs.get("gguf_file") or kwargs.get("state_dict") is not None:
        return None
    resolve = _resolver(str(name_or_path), kwargs)
    manifest = resolve(MANIFEST_NAME)
    if manifest is not None:
        tables = read_tables(manifest.parent, resolve=lambda name: resolve(name) or manifest.parent / name)
    else:
        tables = {} if residency == "resident" else _tables_among_weights(resolve, kwargs.get("variant"))
    if not tables:
        if residency in ("mapped", "pinned"):
            raise ValueError(
                f"{name_or_path} has no safetensors file with memory tables, so engram_residency={residency!r} is not "
                "possible; leave it out, or name a folder that was saved by save_pretrained."
            )
        return None
    if residency == "auto":
        residency = choose_residency(sum(table.size for table in tables.values()), *_free_memory(kwargs))
    return None if manifest is None and residency == "resident" else FoundTables(tables, residency)


def _resolver(name: str, kwargs: dict) -> Callable[[str], Path | None]:
    """File name to local path; downloads from the Hub what is not there, None for what does not exist."""
    where = ("cache_dir", "force_download", "proxies", "token", "revision", "subfolder", "local_files_only")
    options = {key: kwargs[key] for key in where if kwargs.get(key) is not None}

    def resolve(file: str) -> Path | None:
        found = cached_file(
            name,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )
        return None if found is None else Path(found)

    return resolve


def _tables_among_weights(resolve: Callable[[str], Path | None], variant: str | None) -> dict[int, StoredTable]:
    """Tables that were saved with all other weights: found by name, and mapped just as well."""
    names = SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
    if variant is not None:
        names = tuple(name.replace(".safetensors", f".{variant}.safetensors") for name in names)
    single = resolve(names[0])
    if single is not None:
        return tables_in_checkpoint([single])
    index = resolve(names[1])
    if index is None:
        return {}
    weight_map = parse_json(index.read_bytes(), str(index)).get("weight_map", {})
    pattern = re.compile(_TABLE_KEYS.format(layer=r"\d+"))
    files = sorted({file for key, file in weight_map.items() if pattern.search(key)})
    paths = [resolve(file) for file in files]
    return tables_in_checkpoint([path for path in paths if path is not None])


def choose_residency(size: int, free_host: int, free_device: int | None) -> str:
    """What `auto` means for tables of `size` bytes.

    Args:
        free_host: bytes of host memory that are free.
        free_device: bytes free on the GPU the model goes to; None if it stays on the CPU.
    """
    free = free_host if free_device is None else free_device
    if size <= _RESIDENT_SHARE * free:
        return "resident"
    choice = "mapped" if free_device is None or size > _PINNED_SHARE * free_host else "pinned"
    logger.warning_once(
        f"Memory tables of {size / 1e9:.1f} GB are {choice}, not parameters: {free / 1e9:.1f} GB are free. They are not "
        "trained; pass engram_residency='resident' to hold them in the module."
    )
    return choice


def _free_memory(kwargs: dict) -> tuple[int, int | None]:
    device_map = kwargs.get("device_map")
    targets = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    on_gpu = any(target is not None and str(target) not in ("cpu", "disk", "meta") for target in targets)
    if on_gpu and torch.cuda.is_available():
        return free_host_memory(), torch.cuda.mem_get_info()[0]
    return free_host_memory(), None


def free_host_memory() -> int:
    """Bytes of memory that this process can still take, a container's limit included."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 34
    try:
        (available,) = re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # another system: what sysconf says
    return max(free, 0)


def save_tables(model, folder: str | os.PathLike) -> None:
    """Bring the tables of an `EngramModel` that are not in its state dict to a folder that it is saved to.

    They have not changed since they were loaded, so their files are linked, or copied inside the kernel. If all tables
    are in the state dict, what an earlier save left in the folder is removed: it would be taken for this model's.

    Raises:
        TableFormatError: a file changed since it was loaded.
        OSError: the folder cannot be written; the message says why.
    """
    folder, entries = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    for index, (layer, memory) in enumerate(model.memories().items()):
        source = memory.table.source
        if source is not None:
            stored = source.stored
            description = describe_table(model.hashing, index, width=stored.width, dtype=stored.dtype)
            entries[layer] = pass_on(stored, source.files, folder, description)
    if entries:
        write_manifest(folder, entries)
    _remove_stale_files(folder, entries)


def _remove_stale_files(folder: Path, entries: dict[int, dict]) -> None:
    current = {location["file"] for entry in entries.values() for location in entry["weight"]}
    current |= {MANIFEST_NAME} if entries else set()
    for path in folder.iterdir():
        if is_table_file(path.name) and path.name not in current:
            path.unlink()


def is_table_file(name: str) -> bool:
    """Whether a file of a model folder is named as `save_tables` names its files."""
    return name == MANIFEST_NAME or re.fullmatch(r"engram-layer-[0-9-]+(-of-\d+)?\.safetensors", name) is not None

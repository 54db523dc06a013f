"""Where the rows of a table live: in the module, in page-locked host memory, or in the file.

A model folder is looked through before the model is built (`find_tables`); the tables that shall not be parameters are
then mounted on its `EngramTable` modules, so that transformers never allocates, initializes, moves or saves them.
"""

import contextlib
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.integrations.accelerate import get_device, get_max_memory
from transformers.utils import CONFIG_NAME, logging

from .file_writer_engram import write_json
from .folder_writer_engram import FolderWriter
from .loading_engram import find_weight_files, find_weights, is_weights_file, resolver
from .row_sources_engram import MappedRows, PinnedRows
from .safetensors_engram import FileFormatError, read_json, read_weight_map
from .table_engram import EngramTable
from .table_files_engram import can_be_linked, pass_on, write_manifest
from .table_format_engram import (
    MANIFEST_NAME,
    TORCH_DTYPES,
    StoredTable,
    TableFormatError,
    describe_table,
    read_tables,
    require_same_hash,
    table_keys,
    tables_in_checkpoint,
)
from .weights_digest_engram import weights_digest

# Below its own loggers, so that the verbosity that is set for transformers holds here, too.
logger = logging.get_logger(f"transformers.{__name__}")

RESIDENCIES = ("auto", "resident", "mapped", "pinned")
# Member of the manifest, beside those of the table format, which readers that do not know it ignore.
WEIGHTS_MEMBER = "weights_sha256"
# What `auto` lets tables take of the memory that is free: beside them the backbone, a cache and other processes live.
_RESIDENT_SHARE, _PINNED_SHARE = 0.25, 0.5
# Values of `device_map` that have transformers make a map of its own.
_MADE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass
class FoundTables:
    """The tables of a model folder, and where they shall live.

    Args:
        tables: by layer.
        residency: `"resident"`, `"mapped"` or `"pinned"`.
        weights: finds the files of the weights that the tables were saved with, if their manifest records a digest.
        weights_digest: that digest; None if there is none.
    """

    tables: dict[int, StoredTable]
    residency: str
    weights: Callable[[], list[Path]] = list
    weights_digest: str | None = None

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
        patterns = {table_keys(model.memories()).pattern}
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
            TableFormatError: they were written for another hash or token map, or saved with other weights, and would be
                read as noise.
        """
        if self.weights_digest is not None:
            self._require_same_weights()
        for index, (layer, memory) in enumerate(model.memories().items()):
            memory.table.unread = None
            described = self.tables[layer].description
            if described is not None:
                require_same_hash(described, model.hashing, index)

    def _require_same_weights(self) -> None:
        files = self.weights()
        if files and weights_digest(files) != self.weights_digest:
            raise TableFormatError(
                f"{files[0]} holds other weights than the tables beside it were saved with: the folder was "
                f"changed in part, by a download or a copy that was cut short, say. Fetch or save the whole model again (if the "
                f"weights were changed on purpose, delete {WEIGHTS_MEMBER!r} from {MANIFEST_NAME})."
            )


def leave_tables_on_disk(model: PreTrainedModel, device_map: dict | None) -> None:
    """Map the tables, out of files of their own, that a device map sends to the disk: that is where they are."""
    modules = dict(model.named_modules())
    tables = {name: one for name, one in modules.items() if isinstance(one, EngramTable) and one.unread is not None}
    # All of them if any: a saved model has the tables of all layers in files of their own, or those of none.
    if any(get_device(device_map, f"{name}.weight") == "disk" for name in tables):
        for table in tables.values():
            table.mount(table.unread)


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
        if residency in ("mapped", "pinned"):
            raise ValueError(
                f"engram_residency={residency!r} reads tables from safetensors files, but the weights come from elsewhere "
                "(a state_dict or a GGUF file); leave it out."
            )
        return None
    resolve = resolver(name_or_path, kwargs)
    # A given config may be that of fewer layers than were saved.
    layers = getattr(kwargs.get("config"), "engram_layer_ids", None)
    manifest, tables, variant = resolve(MANIFEST_NAME), {}, kwargs.get("variant")
    if manifest is not None:
        tables = read_tables(manifest.parent, lambda name: resolve(name) or manifest.parent / name, layers)
    own_files = set(tables)
    if manifest is not None or residency != "resident":
        # They come first, as they do for transformers: an upload leaves behind what an earlier one had in files of its own.
        among_weights = _tables_among_weights(resolve, variant, layers)
        own_files -= set(among_weights)
        tables |= among_weights
    if not tables:
        # Of what is no model at all, transformers speaks.
        if residency in ("mapped", "pinned") and resolve(CONFIG_NAME) is not None:
            raise ValueError(
                f"{name_or_path} has no {MANIFEST_NAME}, and no memory tables among its safetensors weights, so "
                f"engram_residency={residency!r} is not possible; complete it, or name a folder that was saved by save_pretrained."
            )
        return None
    if residency == "auto":
        residency = choose_residency(sum(table.size for table in tables.values()), *_free_memory(kwargs))
    if manifest is None and residency == "resident":
        return None
    digest = _recorded_digests(manifest).get(variant or "") if own_files else None
    return FoundTables(tables, residency, lambda: find_weight_files(resolve, variant), digest)


def _recorded_digests(manifest: Path) -> dict[str, str]:
    """Digests of the weights that tables were saved with, by variant (`""` without one); older manifests have none."""
    digests = read_json(manifest).get(WEIGHTS_MEMBER, {})
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise TableFormatError(f"{manifest} says {WEIGHTS_MEMBER} is {digests!r}, expected digests; fetch it again.")
    return digests


def _tables_among_weights(
    resolve: Callable[[str], Path | None], variant: str | None, layers: Collection[int] | None
) -> dict[int, StoredTable]:
    """Tables that were saved with all other weights: found by name, and mapped just as well."""
    single, index = find_weights(resolve, variant)
    weight_map = {} if index is None else read_weight_map(index)
    files = sorted({file for key, file in weight_map.items() if table_keys(layers).search(key)})
    paths = [single, *map(resolve, files)]
    found = tables_in_checkpoint([path for path in paths if path is not None])
    return {layer: table for layer, table in found.items() if layers is None or layer in layers}


def choose_residency(size: int, free_host: int, free_device: int | None) -> str:
    """What `auto` means for tables of `size` bytes.

    Args:
        free_host: bytes of host memory that are free.
        free_device: bytes free on the GPU the model goes to; None if it stays on the CPU.
    """
    free = free_host if free_device is None else free_device
    if size <= _RESIDENT_SHARE * free:
        logger.info(f"Memory tables of {size / 1e9:.1f} GB are resident: {free / 1e9:.1f} GB are free.")
        return "resident"
    choice = "mapped" if free_device is None or size > _PINNED_SHARE * free_host else "pinned"
    logger.warning_once(
        f"Memory tables of {size / 1e9:.1f} GB are {choice}, not parameters: {free / 1e9:.1f} GB are free. They are not "
        "trained; pass engram_residency='resident' to hold them in the module."
    )
    return choice


def _free_memory(kwargs: dict) -> tuple[int, int | None]:
    """Free bytes of the host, and of the GPUs that a model goes to (None if it goes to none), within `max_memory`."""
    device_map, limits = kwargs.get("device_map"), kwargs.get("max_memory")
    # Only where transformers makes the map it looks at limits, which then name all devices that are used.
    limits = get_max_memory(dict(limits)) if limits and device_map in _MADE_MAPS else None

    def usable(device: int | str, free: int) -> int:
        return free if limits is None else min(free, limits.get(device, 0))

    host = usable("cpu", free_host_memory())
    if not torch.cuda.is_available():
        return host, None
    if device_map is None:
        # What is quantized goes to a GPU unasked.
        device_map = "cuda" if kwargs.get("quantization_config") is not None else torch.get_default_device()
    gpus = gpus_of(device_map, torch.cuda.device_count(), torch.cuda.current_device())
    return host, sum(usable(gpu, torch.cuda.mem_get_info(gpu)[0]) for gpu in gpus) or None


def gpus_of(device_map, count: int, current: int) -> set[int]:
    """The numbers of the GPUs among `count` that a `device_map` of transformers uses."""
    if device_map in _MADE_MAPS:
        return set(range(count))
    targets = device_map.values() if isinstance(device_map, dict) else [device_map]
    names = [f"cuda:{target}" if isinstance(target, int) else str(target) for target in targets]
    devices = [torch.device(name) for name in names if name != "disk"]
    return {current if device.index is None else device.index for device in devices if device.type == "cuda"}


# Of both versions of control groups: the limit, what is used, and the counts that say what of it would be given back.
_GROUP_FILES = [
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
]


def free_host_memory() -> int:
    """Bytes of memory that this process can still take, a container's limit included."""
    free = _memory_of_the_system()
    with contextlib.suppress(OSError, ValueError):  # another system than Linux
        (available,) = re.findall(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(available) * 1024
    for names in _GROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
            limit, used, counts = (Path("/sys/fs/cgroup", name).read_text() for name in names)
            (unused,) = re.findall(r"^(?:total_)?inactive_file (\d+)$", counts, re.MULTILINE)[-1:]
            free = min(free, int(limit) - int(used) + int(unused))
    return max(free, 0)


def _memory_of_the_system() -> int:
    """What `sysconf` says is free; of systems that do not tell that, half of all, or 16 GB if they tell neither."""
    names = getattr(os, "sysconf_names", {})
    for name, share in (("SC_AVPHYS_PAGES", 1), ("SC_PHYS_PAGES", 2)):
        if name in names:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") // share
    return 1 << 34


_BY_REFERENCE = ContextVar("tables are saved by reference", default=False)


@contextlib.contextmanager
def tables_by_reference() -> Iterator[None]:
    """Within it, `save_tables` makes symbolic links where it cannot make hard ones: for a folder that is only uploaded.

    That is a temporary one, perhaps on a file system in memory with no room for tables.
    """
    token = _BY_REFERENCE.set(True)
    try:
        yield
    finally:
        _BY_REFERENCE.reset(token)


def save_tables(model, folder: str | os.PathLike) -> None:
    """Bring the tables of an `EngramModel` that are not in its state dict to a folder that it is saved to.

    They have not changed since they were loaded, so their files are linked, or copied inside the kernel.

    Raises:
        TableFormatError: a file changed since it was loaded.
        OSError: the folder cannot be written; the message says why.
    """
    folder, entries = Path(folder), {}
    for index, (layer, memory) in enumerate(model.memories().items()):
        source = memory.table.source
        if source is not None:
            folder.mkdir(parents=True, exist_ok=True)
            description = describe_table(model.hashing, index, width=source.width, dtype=source.stored.dtype)
            nearest = _nearest(source, folder)
            entries[layer] = pass_on(nearest.stored, nearest.files, folder, description, _BY_REFERENCE.get())
    if entries:
        write_manifest(folder, entries)


def complete_save(model, writer: FolderWriter, variant: str | None = None) -> None:
    """Put a saved `EngramModel` in place, if that has not been done: its weights, and its tables, which know them.

    What an earlier save left there of weights and tables is removed; until then, it may be the only copy of a resident table.

    Args:
        writer: of the folder that holds the tables (see [`save_tables`]) and weights.
        variant: of the weights, as for `save_pretrained`.
    """
    if writer.names is not None:
        return
    manifest, written = writer.path / MANIFEST_NAME, {}
    if manifest.exists():
        written = _stamps_by_name(writer.path)
        files = find_weight_files(lambda name: _existing(writer.path / name), variant)
        digests = _digests_of_other_variants(writer, manifest) | {variant or "": weights_digest(files)}
        write_json(manifest, read_json(manifest) | {WEIGHTS_MEMBER: digests})
    writer.publish(lambda name: is_table_file(name) or is_weights_file(name, variant), last=MANIFEST_NAME)
    # What is only uploaded is gone soon. Another process may have saved to the same folder already.
    if written and not _BY_REFERENCE.get():
        with contextlib.suppress(FileFormatError, OSError):
            for layer, stored in read_tables(writer.target).items():
                stamps = MappedRows(stored).stamps
                if all(written.get(path.name) == stamp for path, stamp in stamps.items()):
                    model.memories()[layer].table.source.saved = stored, stamps


def _stamps_by_name(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells the table files of a folder from all others."""
    stamps = [MappedRows(stored).stamps for stored in read_tables(folder).values()]
    return {path.name: stamp for some in stamps for path, stamp in some.items()}


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _digests_of_other_variants(writer: FolderWriter, manifest: Path) -> dict[str, str]:
    """What the target's manifest records of other variants, if its tables are the very files that are saved now."""
    old = writer.target / MANIFEST_NAME
    files = [path for path in writer.path.iterdir() if is_table_file(path.name) and path != manifest]
    kept = [writer.target / path.name for path in files]
    if not old.exists() or not all(a.exists() and a.samefile(b) for a, b in zip(kept, files, strict=True)):
        return {}
    with contextlib.suppress(FileFormatError):
        return _recorded_digests(old)
    return {}


def _nearest(source: MappedRows, folder: Path) -> MappedRows:
    """A table's own files, or those that the last save made of them if only these can be linked to `folder`."""
    source.require_unchanged()
    if source.saved is not None and not _takes_no_space(source, folder):
        stored, stamps = source.saved
        with contextlib.suppress(TableFormatError):  # that save is gone
            saved = MappedRows(stored)
            if saved.stamps == stamps and _takes_no_space(saved, folder):
                return saved
    return source


def _takes_no_space(source: MappedRows, folder: Path) -> bool:
    if _BY_REFERENCE.get():
        return source.stored.has_own_files
    return can_be_linked(source.stored, source.files, folder)


def is_table_file(name: str) -> bool:
    """Whether a file of a model folder is named as `save_tables` names its files."""
    return name == MANIFEST_NAME or re.fullmatch(r"engram-layer-[0-9-]+(-of-\d+)?\.safetensors", name) is not None

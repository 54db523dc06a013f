"""What `from_pretrained` asks of a checkpoint: where its files come from, and where its tables are to live.

A checkpoint is looked through for tables before the model is built. Tables that are not to be parameters are then mounted on
its `EngramTable` modules, so that transformers never allocates, initializes, moves or saves them.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.utils import CONFIG_NAME, cached_file, logging

from .row_sources_engram import MappedRows, PinnedRows
from .safetensors_engram import (
    EngramError,
    FileFormatError,
    find_weight_files,
    find_weights,
    read_header,
    read_json,
    read_weight_map,
    reading,
)
from .table_engram import EngramTable
from .table_format_engram import (
    KINDS,
    MANIFEST_NAME,
    StoredTable,
    TableFormatError,
    choose_residency,
    free_host_memory,
    read_tables,
    require_fit,
    require_same_hash,
    require_size,
    table_keys,
    tables_in_checkpoint,
)

# The logger is a child of transformers', so that the verbosity that is set for transformers applies here, too.
logger = logging.get_logger(f"transformers.{__name__}")

_IS_HASH = re.compile(r"\bhashing\.(?:token_map|multipliers|primes)$")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# The commit in the path of a file in the Hub's cache, whose layout is documented.
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")
_ORIGIN = ("cache_dir", "force_download", "proxies", "token", "revision", "subfolder", "local_files_only")
RESIDENCIES = ("auto", "resident", "mapped", "pinned")
# Members of the manifest, which other readers of the table format ignore, with digests of the weights by variant, and of
# table files by name: they show whether tables and weights belong together.
WEIGHTS_MEMBER, TABLES_MEMBER = "weights_digest", "tables_sha256"
# Values of `device_map` for which transformers makes a map of its own.
_MADE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Weights up to this size are read whole.
_WHOLE_BYTES = 1 << 20
# A larger tensor gives at most this many pieces of at most this many bytes, and at most 1% of its bytes or two pieces of 64.
_MOST_PIECES, _PIECE_BYTES, _LEAST_BYTES = 8, 512, 64


class Checkpoint:
    """Where `from_pretrained` takes a model's files from: a folder, or one state of a repository of the Hub.

    Tables may take hours to download. If the repository changed meanwhile, the weights would be of another state, and no
    hash could tell; so the revision becomes a commit. The folder or repository of an adapter stands for its base model.

    Args:
        name_or_path: what `from_pretrained` was given.
        kwargs: what else it was given.

    Attributes:
        name_or_path, kwargs: what transformers' `from_pretrained` is to be given.

    Raises:
        OSError: there is no config.json, without which transformers would build a backbone of its default size.
        FileFormatError: an adapter does not name its base model.
    """

    def __init__(self, name_or_path: str | os.PathLike | None, kwargs: dict[str, Any]):
        self.name_or_path, self.kwargs = name_or_path, kwargs
        self._has_files = name_or_path is not None and not kwargs.get("gguf_file")
        if self._has_files:
            self._go_to_base_model()
            self._settle_revision()

    @property
    def folder(self) -> Path | None:
        """Where the files are, if that is a folder of this machine."""
        if not self._has_files or not os.path.isdir(self.name_or_path):
            return None
        return Path(self.name_or_path, self.kwargs.get("subfolder") or "")

    def _go_to_base_model(self) -> None:
        """As transformers' `maybe_load_adapters` does, in the form in which its Auto classes pass an adapter on."""
        name, given = self.name_or_path, dict(self.kwargs.get("adapter_kwargs") or {})
        # The base model gets a commit of its own, which transformers would look for in the adapter's repository too.
        given.setdefault("revision", self.kwargs.get("revision") or "main")
        if importlib.util.find_spec("peft") is None:
            return
        if "_adapter_model_path" in given:  # an Auto class has found it
            self.kwargs = {**self.kwargs, "adapter_kwargs": given}
            return
        config = resolver(name, {**self.kwargs, **given})("adapter_config.json")
        # A complete model may have an adapter in its folder.
        if config is None or os.path.exists(os.path.join(name, CONFIG_NAME)):
            return
        base = read_json(config).get("base_model_name_or_path")
        if not isinstance(base, str):
            raise FileFormatError(
                f"{config} does not name its base_model_name_or_path; load the base model, then the adapter."
            )
        self.name_or_path = base
        self.kwargs = {**self.kwargs, "adapter_kwargs": {**given, "_adapter_model_path": str(name)}}

    def _settle_revision(self) -> None:
        self._resolve = resolver(self.name_or_path, self.kwargs)
        config = self._resolve(CONFIG_NAME)
        self._config = config
        if config is None:
            if self.kwargs.get("config") is None:
                raise OSError(
                    f"{self.name_or_path} has no {CONFIG_NAME}; complete it, or name the folder of a saved model."
                )
        elif not os.path.isdir(self.name_or_path):
            commit = _COMMIT.search(config.as_posix())
            if commit:
                self.kwargs = {**self.kwargs, "revision": commit[1]}
                self._resolve = resolver(self.name_or_path, self.kwargs)

    def find_tables(self, residency: str = "auto") -> "FoundTables | None":
        """Look for tables, and decide where they are to live.

        Args:
            residency: one of [`RESIDENCIES`]; `auto` is resident while that is cheap.

        Returns:
            None if transformers is to load everything by itself.

        Raises:
            ValueError: an unknown residency, or tables that cannot be mapped because there are none.
        """
        if residency not in RESIDENCIES:
            raise EngramError(
                f"engram_residency is {residency!r}; it must be one of {', '.join(map(repr, RESIDENCIES))}."
            )
        needs_files = residency in ("mapped", "pinned")
        if not self._has_files or self.kwargs.get("state_dict") is not None:
            if needs_files:
                raise EngramError(
                    f"engram_residency={residency!r} reads tables from safetensors files, but the weights come from "
                    "elsewhere (a state_dict or a GGUF file); leave it out."
                )
            return None
        tables, manifest, own_files = self._read_tables()
        if not tables:
            # Without config.json, transformers raises its own error.
            if needs_files and self._config is not None:
                raise EngramError(
                    f"{self.name_or_path} has no {MANIFEST_NAME}, and no memory tables among its safetensors weights, so "
                    f"engram_residency={residency!r} is not possible; complete it, or name a folder that was saved by "
                    "save_pretrained."
                )
            return None
        if residency == "auto":
            residency = resolve_auto(sum(table.size for table in tables.values()), *_free_memory(self.kwargs))
        names = {name.rpartition(".")[2] for table in tables.values() for name in table.parts[0].names.values()}
        # Names of tables of this package: transformers loads them as any parameter.
        if manifest is None and residency == "resident" and names <= set(KINDS.values()):
            return None
        variant = self.kwargs.get("variant")
        digest = recorded_digests(manifest, WEIGHTS_MEMBER).get(variant or "") if own_files else None
        samples = recorded_digests(manifest, TABLES_MEMBER) if own_files else {}
        return FoundTables(tables, residency, lambda: find_weight_files(self._resolve, variant), digest, samples)

    def _read_tables(self) -> tuple[dict[int, StoredTable], Path | None, set[int]]:
        """The tables by layer, the manifest if there is one, and the layers that it alone names."""
        # A given config may be that of fewer layers than were saved.
        layers = getattr(self.kwargs.get("config"), "engram_layer_ids", None)
        manifest, tables = self._resolve(MANIFEST_NAME), {}
        if manifest is not None:
            folder = manifest.parent
            tables = read_tables(folder, lambda name: self._resolve(name) or folder / name, layers)
        own_files = set(tables)
        # Tables among the weights take precedence, as in transformers: an upload does not remove table files of an earlier one.
        among_weights = self._tables_among_weights(layers)
        own_files -= set(among_weights)
        tables |= among_weights
        return tables, manifest, own_files

    def _tables_among_weights(self, layers: Collection[int] | None) -> dict[int, StoredTable]:
        """Tables that were saved with all other weights, found by name."""
        single, index = find_weights(self._resolve, self.kwargs.get("variant"))
        weight_map = {} if index is None else read_weight_map(index)
        files = sorted({file for key, file in weight_map.items() if table_keys(layers).search(key)})
        paths = [path for path in (single, *map(self._resolve, files)) if path is not None]
        said = read_json(self._config, constants=True).get("engram_table_dtype") if self._config and paths else None
        found = tables_in_checkpoint(paths, said if isinstance(said, str) else None)
        return {layer: table for layer, table in found.items() if layers is None or layer in layers}


def resolver(name_or_path: str | os.PathLike, kwargs: dict[str, Any]) -> Callable[[str], Path | None]:
    """File name to local path; downloads from the Hub what is not there, None for what does not exist.

    Args:
        kwargs: of `from_pretrained`.
    """
    options = {name: kwargs[name] for name in _ORIGIN if kwargs.get(name) is not None}

    def resolve(file: str) -> Path | None:
        try:
            found = cached_file(str(name_or_path), file, **options)
        except OSError as error:
            if not _means_absent(error) and not _is_known_absent(name_or_path, file, options):
                raise
            found = None
        return None if found is None else Path(found).absolute()  # the process may change its folder later

    return resolve


def _means_absent(error: OSError) -> bool:
    """Whether `cached_file` says that there is no such file, or that there is neither a network nor a cached one.

    A Hub that refuses to answer (busy, or forbidden) says nothing of what is there.
    """
    cause = error.__cause__
    if isinstance(cause, LocalEntryNotFoundError):
        return not isinstance(cause.__cause__, HfHubHTTPError)
    return cause is None and error.errno is None


def _is_known_absent(name_or_path: str | os.PathLike, file: str, options: dict[str, Any]) -> bool:
    """Whether the cache has it that the repository, as it was when last asked, has no such file."""
    where = {name: options[name] for name in ("cache_dir", "revision") if name in options}
    path = os.path.join(options.get("subfolder", ""), file)
    try:
        found = try_to_load_from_cache(str(name_or_path), path, **where)
    except HFValidationError:  # neither a folder nor a Hub id
        return False
    return not (found is None or isinstance(found, str))  # otherwise the Hub was not asked, or the file is there


@dataclass
class FoundTables:
    """The tables of a model folder, and where they shall live.

    Args:
        tables: by layer.
        residency: `"resident"`, `"mapped"` or `"pinned"`.
        weights: finds the files of the weights that the tables were saved with, if their manifest records a digest.
        weights_digest: that digest; None if there is none.
        samples: digest of samples of each table file that the manifest records, by name.
    """

    tables: dict[int, StoredTable]
    residency: str
    weights: Callable[[], list[Path]] = list
    weights_digest: str | None = None
    samples: Mapping[str, str] = field(default_factory=dict)

    def mount(self, model) -> None:
        """Give an `EngramModel` without weights its tables.

        Mapped and pinned tables replace the parameters. Resident ones are noted, to be read where transformers would
        initialize what a checkpoint lacks: the ordinary weights may not include them.

        Raises:
            TableFormatError: a layer has no table, one that does not fit the config, or one of another model.
        """
        for layer, memory in model.memories().items():
            table = memory.table
            stored = require_fit(self.tables, layer, table.num_rows, table.width, table.table_dtype)
            rows = (PinnedRows if self.residency == "pinned" else MappedRows)(stored)
            self._require_same_tables(rows)
            if self.residency == "resident":
                memory.table.unread = rows
            else:
                memory.table.mount(rows)
        # transformers passes these to the model that holds this one.
        patterns = {table_keys(model.memories()).pattern}
        model._keys_to_ignore_on_load_missing = patterns | set(model._keys_to_ignore_on_load_missing or ())
        model._keys_to_ignore_on_load_unexpected = patterns | set(model._keys_to_ignore_on_load_unexpected or ())

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
            raise _changed_in_part(files[0], "other weights than the tables beside it were saved with", WEIGHTS_MEMBER)

    def _require_same_tables(self, rows: MappedRows) -> None:
        for path, digest in rows.digests.items():
            if self.samples.get(path.name, digest.hex()) != digest.hex():
                raise _changed_in_part(path, f"another table than the one {MANIFEST_NAME} is of", TABLES_MEMBER)


def _changed_in_part(path: Path, holds: str, member: str) -> TableFormatError:
    return TableFormatError(
        f"{path} holds {holds}: the folder was changed in part, by a download or a copy that was cut short, say. Fetch or "
        f"save the whole model again (if it was changed on purpose, delete {member!r} from {MANIFEST_NAME})."
    )


def recorded_digests(manifest: Path, member: str) -> dict[str, str]:
    """A member of a manifest: `WEIGHTS_MEMBER` or `TABLES_MEMBER`; empty if it has none."""
    digests = read_json(manifest).get(member, {})
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        raise TableFormatError(f"{manifest} says {member} is {digests!r}, expected digests; fetch it again.")
    return digests


def weights_digest(files: Iterable[str | os.PathLike]) -> str:
    """SHA-256, in hex, over the names, dtypes and shapes of all tensors and pieces of each, however they are sharded.

    Tables are left out. Two models that differ only in bytes between the pieces have one digest.

    Table files are written and copied apart from the other weights. Nothing in either shows that both are of one model,
    so the manifest of the tables records this digest of the weights that were saved with them.

    Args:
        files: the safetensors files of a checkpoint.

    Raises:
        FileFormatError: a file is damaged.
        OSError: a file cannot be read.
    """
    is_table = table_keys().search
    with contextlib.ExitStack() as stack:
        tensors = [
            tensor
            for path in files
            for tensor in _stored_tensors(stack.enter_context(_open(path)))
            if not is_table(tensor[0])
        ]
        is_small = sum(size for *_, size in tensors) <= _WHOLE_BYTES
        digest = hashlib.sha256()
        for name, dtype, shape, file, offset, size in sorted(tensors, key=itemgetter(0)):
            pieces = [(0, size)] if is_small else _pieces(size)
            read = [_read(file, offset + begin, count) for begin, count in pieces]
            digest.update(b"".join([repr((name, dtype, shape)).encode(), *read]))
    return digest.hexdigest()


def _open(path: str | os.PathLike) -> io.FileIO:
    with reading(Path(path)):
        return open(path, "rb", buffering=0)


def _stored_tensors(file: io.FileIO) -> list[tuple[str, str, tuple[int, ...], io.FileIO, int, int]]:
    """Name, dtype, shape, file, offset and bytes of each tensor in a file that safetensors wrote or has loaded.

    What that has checked is not checked again, which would take longer than to read the pieces. [`read_header`] says what
    is wrong with a file that was damaged since.
    """
    size, head = os.fstat(file.fileno()).st_size, 8 + int.from_bytes(file.read(8), "little")
    try:
        entries, tensors = json.loads(_read(file, 8, min(head, size) - 8)), []
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            tensors.append((name, entry["dtype"], tuple(entry["shape"]), file, head + begin, end - begin))
        if head + sum(tensor[-1] for tensor in tensors) == size:
            return tensors
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        pass
    spans = read_header(file.name).tensors.values()
    return [(span.name, span.dtype, span.shape, file, span.offset, span.size) for span in spans]


def _pieces(size: int) -> list[tuple[int, int]]:
    """Offset and bytes of pieces that are spread evenly over `size` bytes, the first and last ones included."""
    count = min(_MOST_PIECES, max(2, size >> 22))
    piece = max(_LEAST_BYTES, min(_PIECE_BYTES, size // (100 * count)))
    if size <= count * piece:
        return [(0, size)]
    return [(index * (size - piece) // (count - 1), piece) for index in range(count)]


def _read(file: io.FileIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    while len(data) < size:
        piece = file.read(size - len(data))
        if not piece:
            raise FileFormatError(
                f"{file.name} became shorter while it was read; restore it, and load the model again."
            )
        data += piece
    return data


def require_memory(model: PreTrainedModel, missing: Collection[str]) -> None:
    """Refuse a checkpoint without all of the memory, which would be random.

    Args:
        model: a model that was just filled from it.
        missing: keys that the checkpoint does not have; those of tables that are read from files of their own may be among
            them.

    Raises:
        ValueError: names one of the others.
    """
    elsewhere = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    memory = sorted(key for key in missing if ".engram." in key or "hashing." in key)
    absent = [key for key in memory if not any(pattern.search(key) for pattern in elsewhere)]
    if absent:
        raise EngramError(
            f"The checkpoint lacks {len(absent)} tensors of the memory, such as {absent[0]}; complete the folder (a shard or "
            f"{MANIFEST_NAME} may be absent), or add memory to a plain backbone with EngramForCausalLM.from_backbone."
        )


def require_sizes(model: PreTrainedModel, files: Sequence[str] | None) -> None:
    """Refuse tables among the weights whose size is not what the config says, before its word takes any memory."""
    tables = {layer: memory.table for layer, memory in model.memory_model.memories().items()}
    tables = {layer: table for layer, table in tables.items() if table.is_resident and table.unread is None}
    keys = table_keys(tables)
    for file in files or () if tables else ():
        for name, span in read_header(file).tensors.items() if str(file).endswith(".safetensors") else ():
            match = keys.search(name)
            if match and match[2] == "weight":
                require_size(int(match[1]), span.shape, tuple(tables[int(match[1])].weight.shape))


def leave_tables_on_disk(model: PreTrainedModel, device_map: dict | None) -> None:
    """Map the tables, out of files of their own, that a device map sends to the disk: that is where they are."""
    modules = dict(model.named_modules())
    tables = {name: one for name, one in modules.items() if isinstance(one, EngramTable) and one.unread is not None}
    # If one table is mapped, all are: a saved model has either all tables in files of their own, or none.
    if any(_device_of(f"{name}.weight", device_map or {}) == "disk" for name in tables):
        for table in tables.values():
            table.mount(table.unread)


def _device_of(name: str, device_map: dict) -> int | str | torch.device | None:
    while name and name not in device_map:  # a map names modules, which include everything in them
        name = name.rpartition(".")[0]
    return device_map.get(name)


def resolve_auto(size: int, free_host: int, free_device: int | None) -> str:
    """[`choose_residency`], with a warning where tables that a user may want to train are no parameters."""
    choice = choose_residency(size, free_host, free_device)
    if choice != "resident":
        logger.warning_once(
            f"Memory tables of {size / 1e9:.1f} GB are {choice}, not parameters: too little memory is free. They are not "
            "trained; pass engram_residency='resident' to hold them in the module."
        )
    return choice


def _free_memory(kwargs: dict) -> tuple[int, int | None]:
    """Free bytes of the host, and of the GPUs that a model goes to (None if it goes to none), within `max_memory`."""
    device_map, limits = kwargs.get("device_map"), kwargs.get("max_memory")
    # transformers considers limits only where it makes the map itself; they then name all devices that are used.
    if limits and device_map in _MADE_MAPS:
        from accelerate.utils import get_max_memory  # transformers needs it for these maps, and for nothing else

        limits = get_max_memory(dict(limits))
    else:
        limits = None

    def usable(device: int | str, free: int) -> int:
        return free if limits is None else min(free, limits.get(device, 0))

    host = usable("cpu", free_host_memory())
    if not torch.cuda.is_available():
        return host, None
    if device_map is None:
        # Quantized models go to a GPU by default.
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


def renamings_of_version(format_version: int) -> list[WeightRenaming]:
    """Renamings from the tensor names of an earlier format to the current ones."""
    # Version 1 kept the backbone in a submodule of that name.
    return [WeightRenaming(r"^model\.backbone\.", "model.")] if format_version == 1 else []


def stored_dtype_of_hash(
    state_dict: Mapping[str, torch.Tensor] | None, files: Sequence[str] | None
) -> torch.dtype | None:
    """The dtype in which a checkpoint has the hash, if a tool has cast it to floating point; else None.

    transformers loads floats into integer buffers without a word.
    """
    for file in files or ():
        for name, span in read_header(file).tensors.items() if str(file).endswith(".safetensors") else ():
            if _IS_HASH.search(name) and span.dtype in _FLOATS:
                return _FLOATS[span.dtype]
    for name, tensor in (state_dict or {}).items():
        if _IS_HASH.search(name) and tensor.is_floating_point():
            return tensor.dtype
    return None

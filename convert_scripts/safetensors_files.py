"""Read checkpoints as untrusted input: the index and the headers of its shards are checked, tensor data is never
loaded.

A checkpoint of several safetensors files has an index, `model.safetensors.index.json`, which names the file of every tensor.

A damaged file is a `FileFormatError`; files that do not fit together are a `ConversionError`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..safetensors_engram import EngramError, FileFormatError, FileHeader, TensorSpan, read_header, read_weight_map

INDEX_NAME = "model.safetensors.index.json"


class ConversionError(EngramError):
    """Input that cannot be converted; the message says in one sentence what is wrong, what was expected, what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of checked shards: every tensor of the index is in exactly the file the index names, and no other
    tensor is.

    Args:
        elsewhere: tensors that the index places in shards that were not read.
    """

    folder: Path
    shards: dict[str, FileHeader]
    tensors: dict[str, TensorSpan]
    elsewhere: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards.values())


def read_shard(path: Path) -> FileHeader:
    """Read and check the header of one safetensors file of torch tensors."""
    return require_torch(read_header(path))


def require_torch(shard: FileHeader) -> FileHeader:
    """Refuse a file that another framework wrote."""
    if shard.metadata and shard.metadata.get("format") != "pt":
        raise FileFormatError(
            f"The metadata of {shard.path} is {shard.metadata}, expected {{'format': 'pt'}}; fetch it again."
        )
    return shard


def read_listed_shard(path: Path) -> FileHeader:
    """Read a shard as `read_shard` does; its folder's index names the file."""
    if not path.is_file():
        raise ConversionError(
            f"{path.parent / INDEX_NAME} names {path.name}, which is not in the folder; fetch the missing file."
        )
    return read_shard(path)


def read_checkpoint(
    folder: Path,
    is_wanted: Callable[[str], bool] = lambda name: True,
    read: Callable[[Path], FileHeader] = read_listed_shard,
) -> Checkpoint:
    """Read the index and headers of a checkpoint, and check that they agree.

    Args:
        is_wanted: returns whether the shard with the tensor of a given name is read.
        read: returns the checked header of a shard.
    """
    weight_map = read_weight_map(folder / INDEX_NAME)
    wanted = sorted({file for name, file in weight_map.items() if is_wanted(name)})
    shards = {file: read(folder / file) for file in wanted}
    tensors = {}
    for file, shard in shards.items():
        for name, span in shard.tensors.items():
            if weight_map.get(name) != file:
                raise ConversionError(_misplaced(name, file, weight_map.get(name), folder))
            tensors[name] = span
    elsewhere = frozenset(name for name, file in weight_map.items() if file not in shards)
    missing = weight_map.keys() - tensors.keys() - elsewhere
    if missing:
        name = min(missing)
        raise ConversionError(
            f"The index of {folder} places {enumerate_names(missing)} in {weight_map[name]} "
            f"and elsewhere, but the file does not hold it; fetch the checkpoint again."
        )
    return Checkpoint(folder, shards, tensors, elsewhere)


def _misplaced(name: str, file: str, expected: str | None, folder: Path) -> str:
    if expected is None:
        return (
            f"{file} holds the tensor {name!r}, which the index of {folder} does not name; fetch the checkpoint again."
        )
    return (
        f"tensor {name!r} is in {file}, the index of {folder} places it in {expected}; a tensor may be in one file only, "
        f"fetch the checkpoint again."
    )


def enumerate_names(names: Iterable[str], most: int = 3) -> str:
    """Return a readable list of the first few of `names`."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(repr(name) for name in ordered[:most]) + more

"""What `save_pretrained` does: all files of a model become part of a folder in one step, and mapped tables are linked or copied.

A save is written into a hidden folder inside its target, which is therefore on the same disk, and then exchanged for what
the target holds. Until the exchange begins, the target is the old model; from then on the new files are whole, and an
exchange that an exception interrupts is completed. Only a process that is killed within it (it takes
milliseconds) leaves a target of two models, which [`require_settled`] refuses.
"""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import Self

from .loading_engram import (
    TABLES_MEMBER,
    WEIGHTS_MEMBER,
    recorded_digests,
    weights_digest,
)
from .row_sources_engram import MappedRows
from .safetensors_engram import (
    EngramError,
    FileFormatError,
    FileWriter,
    alone_in,
    can_link,
    find_weight_files,
    header_bytes,
    is_weights_file,
    json_bytes,
    link_or_copy,
    lock_file,
    read_json,
    write_json,
)
from .table_format_engram import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    METADATA_KEY,
    PAGE,
    ROW_FORMATS,
    StoredTable,
    TableDescription,
    describe_table,
    read_tables,
)

# Hidden folders inside a target: of a save that is being written, and of one that is whole and being put in place.
SAVE_PREFIX, EXCHANGE_PREFIX = ".engram-save-", ".engram-exchange-"
# Their files lie in a folder of the one name, beside a file that is locked while the save goes on.
_FILES, _LOCK = "files", "lock"
# How many seconds loading waits for a save that is put in place.
LOAD_WAITS = 10.0
POLL_SECONDS = 0.01


class FolderWriter:
    """Files that become part of a folder together, or not at all.

    As a context manager: write to `path`, and call `publish` at the end. Others that do so for the same folder are waited
    for while their files are put in place, and what a killed process left there is removed.

    Args:
        target: the folder; made if it is missing.

    Attributes:
        path: the folder to write to.
        names: of the files that were put in place; None before that.

    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, target: str | os.PathLike):
        self.target, self.names = Path(target), None
        name = secrets.token_hex(8)
        self._staged, self._exchanged = self.target / f"{SAVE_PREFIX}{name}", self.target / f"{EXCHANGE_PREFIX}{name}"
        self.path = self._staged / _FILES
        self._is_new = not self.target.exists()
        self._lock: int | None = None

    def __enter__(self) -> Self:
        try:
            self._begin()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _begin(self) -> None:
        self.target.mkdir(parents=True, exist_ok=True)
        with alone_in(self.target):
            _remove_left_saves(self.target)
            self.path.mkdir(parents=True)
            self._lock = os.open(self._staged / _LOCK, os.O_RDWR | os.O_CREAT)
            lock_file(self._lock)

    def publish(self, is_stale: Callable[[str], bool] = lambda name: False, last: str | None = None) -> None:
        """Put all files in place, if that has not been done, and remove what they replace.

        Args:
            is_stale: whether a file of the target that is not among the new ones belongs to what they replace.
            last: name of the file that is put in place after all others.

        Raises:
            OSError: the files cannot be put in place.
        """
        if self.names is not None:
            return
        files = [path.relative_to(self.path) for path in sorted(self.path.rglob("*")) if not path.is_dir()]
        self._files, self._is_stale = sorted(files, key=lambda file: file.as_posix() == last), is_stale
        if os.name == "nt":  # where no folder is renamed that has an open file in it
            self._unlock()
        with alone_in(self.target):
            try:
                self._staged.rename(self._exchanged)
                self._exchange()
            except BaseException:
                self._finish()
                raise

    def _exchange(self) -> None:
        for file in self._files:
            _put_in_place(self._exchanged / _FILES / file, self.target / file)
        names = {file.as_posix() for file in self._files}
        for path in self.target.iterdir():
            if path.name not in names and not path.is_dir() and self._is_stale(path.name):
                path.unlink(missing_ok=True)
        # From here on the target is whole. Earlier exchanges that were killed have been replaced by this one.
        for path in self.target.glob(f"{EXCHANGE_PREFIX}*"):
            done = path.with_name(path.name.replace(EXCHANGE_PREFIX, SAVE_PREFIX))
            path.rename(done)
            shutil.rmtree(done, ignore_errors=True)
        self.names = names

    def _finish(self) -> None:
        """Complete an exchange that has begun."""
        if self.names is None and self._exchanged.exists():
            self._exchange()

    def _end(self) -> None:
        """Leave nothing behind but what was put in place."""
        self._finish()
        if os.name == "nt":
            self._unlock()
        shutil.rmtree(self._staged, ignore_errors=True)
        self._unlock()  # last, so that no other process takes the folder for one that was left
        if self._is_new:
            with contextlib.suppress(OSError):  # it is not empty
                self.target.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_left_saves(target: Path) -> None:
    """Remove the files of saves that were killed; where files cannot be locked, nobody can tell, and they stay."""
    for path in target.glob(f"{SAVE_PREFIX}*"):
        try:
            file = os.open(path / _LOCK, os.O_RDWR)
        except FileNotFoundError:  # killed before or after it had one, since another save that begins is waited for
            shutil.rmtree(path, ignore_errors=True)
            continue
        except OSError:
            continue
        try:
            if lock_file(file):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(file)


def _put_in_place(path: Path, name: Path) -> None:
    """Make the file at `path` the one called `name`; it keeps its own name too, where there are hard links."""
    name.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() and not path.is_symlink():  # moved by the first try of an exchange that is repeated
        return
    if not path.is_symlink() and name.exists() and path.samefile(name):
        return
    link = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        os.link(path, link)
    except OSError:  # none on this file system
        os.replace(path, name)
    else:
        os.replace(link, name)


def require_settled(folder: str | os.PathLike) -> None:
    """Refuse a folder in which the files of two saves may be mixed, since one was killed while it put them in place.

    Args:
        folder: of a model or an adapter; anything else (such as the name of a Hub repository) is let through.

    Raises:
        EngramError: says where the new files are.
    """
    deadline = time.monotonic() + LOAD_WAITS
    while left := sorted(Path(folder).glob(f"{EXCHANGE_PREFIX}*")) if os.path.isdir(folder) else []:
        if time.monotonic() >= deadline:
            raise EngramError(
                f"A save to {folder} was killed while its files were put in place, so that files of two saves may be mixed "
                f"there; what was saved is whole in {left[-1] / _FILES}: load it from there, and save it to {folder} again."
            )
        time.sleep(POLL_SECONDS)


# --- tables ------------------------------------------------------------------------------


def table_file_name(layer: int, part: int = 0, parts: int = 1) -> str:
    """`engram-layer-00001.safetensors`; of several parts, `engram-layer-00001-00000-of-00002.safetensors`."""
    return f"engram-layer-{layer:05d}{f'-{part:05d}-of-{parts:05d}' if parts > 1 else ''}.safetensors"


def is_table_file(name: str) -> bool:
    """Whether a file of a model folder is named as `save_tables` names its files."""
    return name == MANIFEST_NAME or re.fullmatch(r"engram-layer-[0-9-]+(-of-\d+)?\.safetensors", name) is not None


def table_head(d: TableDescription) -> bytes:
    """The header of a table file, padded to a page."""
    count, form = d.rows[1] - d.rows[0], ROW_FORMATS[d.dtype]
    sizes = {"weight": (form.dtype, (count, d.width // form.packed))}
    sizes["scale"] = (d.scale_dtype, (count, form.scales(d.width)))
    tensors = [(name, *sizes.get(kind, ("F32", (1,)))) for kind, name in d.tensors.items()]
    return header_bytes(tensors, {METADATA_KEY: d.to_json()}, PAGE)


def write_manifest(folder: str | os.PathLike, entries: dict[int, dict]) -> None:
    """Write `engram_tables.json`, complete or not at all; write it last.

    Args:
        entries: by layer; see [`manifest_entry`].
    """
    write_json(Path(folder) / MANIFEST_NAME, _manifest(entries))


def _manifest(entries: dict[int, dict]) -> dict:
    return {"format_version": FORMAT_VERSION, "tables": {str(layer): entries[layer] for layer in sorted(entries)}}


def manifest_entry(
    parts: Iterable[tuple[str, tuple[int, int], dict[str, str]]], description: TableDescription | None = None
) -> dict:
    """One layer's entry of a manifest.

    Args:
        parts: file name, `(first, stop)` and tensor names by kind of every part, in row order.
        description: for files that do not describe themselves.
    """
    entry: dict = {}
    for file, rows, names in parts:
        for kind, tensor in names.items():
            entry.setdefault(kind, []).append({"file": file, "tensor": tensor, "rows": list(rows)})
    if description is not None:
        members = asdict(description)
        entry["description"] = {name: members[name] for name in members if name not in ("rows", "tensors")}
    return entry


def pass_on(
    stored: StoredTable,
    files: dict[Path, int],
    folder: Path,
    description: TableDescription,
    symbolic: bool = False,
) -> dict:
    """Make an unchanged table part of `folder`; returns its entry of the manifest.

    Files that hold nothing but this table are linked, or copied whole. Out of files that hold other tensors too, the
    table is copied into files of its own.

    Args:
        files: open file of every path in `stored`.
        description: of the table, for files that are written.
        symbolic: as in [`link_or_copy`].
    """
    names = [table_file_name(stored.layer, index, len(stored.parts)) for index in range(len(stored.parts))]
    sources = [files[part.file.path] for part in stored.parts]
    ranges = [(part.first, part.stop) for part in stored.parts]
    if stored.has_own_files:
        for part, name, source in zip(stored.parts, names, sources, strict=True):
            link_or_copy(source, part.file.path, folder / name, symbolic)
        tensors = [part.names for part in stored.parts]
        self_describing = METADATA_KEY in stored.parts[0].file.metadata
        return manifest_entry(zip(names, ranges, tensors, strict=True), None if self_describing else description)
    for part, name, source in zip(stored.parts, names, sources, strict=True):
        with FileWriter(folder / name, table_head(description.with_rows(part.first, part.stop))) as writer:
            for kind, span in part.spans.items():
                writer.copy(description.tensors[kind], span, source)
    return manifest_entry((name, rows, description.tensors) for name, rows in zip(names, ranges, strict=True))


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

    Args:
        folder: is to be published by [`complete_save`].

    Raises:
        TableFormatError: a file changed since it was loaded.
        OSError: the folder cannot be written; the message says why.
    """
    folder, entries, samples = Path(folder), {}, {}
    for index, (layer, memory) in enumerate(model.memories().items()):
        source = memory.table.source
        if source is not None:
            folder.mkdir(parents=True, exist_ok=True)
            stored = source.stored
            description = describe_table(
                model.hashing, index, width=stored.width, dtype=stored.dtype, kinds=stored.parts[0].spans
            )
            nearest = _nearest(source, folder)
            entries[layer] = pass_on(nearest.stored, nearest.files, folder, description, _BY_REFERENCE.get())
            if nearest.stored.has_own_files:
                parts = zip(entries[layer]["weight"], nearest.stored.parts, strict=True)
                samples |= {entry["file"]: nearest.digests[part.file.path].hex() for entry, part in parts}
    if entries:  # not synced to the disk, as [`complete_save`] writes it again
        (folder / MANIFEST_NAME).write_bytes(json_bytes(_manifest(entries) | {TABLES_MEMBER: samples}))


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
        others = _digests_of_other_variants(writer, manifest)
        written = record_digests(writer.path, variant, others)
    writer.publish(lambda name: is_table_file(name) or is_weights_file(name, variant), last=MANIFEST_NAME)
    if written and not _BY_REFERENCE.get():  # what is only uploaded is gone soon
        for memory in model.memories().values():
            if memory.table.source is not None:
                memory.table.source.saved = writer.target.absolute(), written


def record_digests(folder: Path, variant: str | None = None, others: dict[str, str] | None = None) -> dict[str, str]:
    """Have the manifest of a whole model's folder say which weights and table files belong together.

    Args:
        variant: of the weights.
        others: digests of the weights of other variants.

    Returns:
        The digest of every table file, in hex, by name.
    """
    manifest = folder / MANIFEST_NAME
    content = read_json(manifest)
    files = {part["file"] for entry in content["tables"].values() for part in entry["weight"]}
    if content.get(TABLES_MEMBER, {}).keys() != files:  # those that were linked are known
        content[TABLES_MEMBER] = _samples_by_name(map(MappedRows, read_tables(folder).values()))
    written = {path.name: path for path in folder.iterdir()}
    weights = weights_digest(find_weight_files(written.get, variant))
    write_json(manifest, content | {WEIGHTS_MEMBER: {**(others or {}), variant or "": weights}})
    return content[TABLES_MEMBER]


def _samples_by_name(tables: Iterable[MappedRows]) -> dict[str, str]:
    """What tells the files of tables from all others."""
    return {path.name: digest.hex() for rows in tables for path, digest in rows.digests.items()}


def _digests_of_other_variants(writer: FolderWriter, manifest: Path) -> dict[str, str]:
    """What the target's manifest records of other variants, if its tables are the very files that are saved now."""
    old = writer.target / MANIFEST_NAME
    files = [path for path in writer.path.iterdir() if is_table_file(path.name) and path != manifest]
    kept = [writer.target / path.name for path in files]
    if not old.exists() or not all(a.exists() and a.samefile(b) for a, b in zip(kept, files, strict=True)):
        return {}
    with contextlib.suppress(FileFormatError):
        return recorded_digests(old, WEIGHTS_MEMBER)
    return {}


def _nearest(source: MappedRows, folder: Path) -> MappedRows:
    """A table's own files, or those that the last save made of them if only these can be linked to `folder`."""
    source.require_unchanged()
    if source.saved is not None and not _takes_no_space(source, folder):
        last, written = source.saved
        with contextlib.suppress(FileFormatError, KeyError, OSError):  # that save is gone, or was written over
            saved = MappedRows(read_tables(last)[source.stored.layer])
            if _samples_by_name([saved]).items() <= written.items() and _takes_no_space(saved, folder):
                return saved
    return source


def _takes_no_space(source: MappedRows, folder: Path) -> bool:
    """Whether `pass_on` has nothing to copy."""
    return source.stored.has_own_files and (
        _BY_REFERENCE.get() or all(can_link(file, path, folder) for path, file in source.files.items())
    )

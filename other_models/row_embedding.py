"""An embedding whose rows are outside the module: they are read by ids, from files or host memory.

The model's own embedding class keeps its computation (scales, unpacking). Only its parameters are replaced by
[`RowsById`], which answers lookups and refuses everything else.
"""

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..cache_engram import RuntimeSubclass
from ..prefetch_engram import FetchedRows
from ..row_sources_engram import MappedRows, PinnedRows
from ..safetensors_engram import EngramError
from ..table_format_engram import free_host_memory
from .stored_tables import StoredTensor

# One or two tokens read this many rows; for fewer, sorting and requesting pages take longer than reading.
_FEW = 64


class TableRows(MappedRows):
    """Rows of a table in its files, of which a read accesses few of hundreds of parts.

    Args:
        stored, digests: as for [`~row_sources_engram.MappedRows`].
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._starts = np.array([part.first for part in self.parts])
        self._views = [part.weight.numpy() for part in self.parts]
        self._is_larger_than_memory: bool | None = None

    def request(self, row_ids: np.ndarray) -> None:
        """Request rows as in any mapped table."""
        (size,) = self.row_bytes
        for index, here in self._reached(row_ids):
            part = self.stored.parts[index]
            self._maps[part.file.path].request(part.weight.offset + (row_ids[here] - part.first) * size, size)

    def _reached(self, row_ids: np.ndarray) -> Iterator[tuple[int, slice]]:
        """Return the parts that contain sorted `row_ids`: the index of each, and the selection of its ids."""
        bounds = np.searchsorted(row_ids, [*self._starts, self.num_rows])
        for index in np.flatnonzero(bounds[1:] > bounds[:-1]).tolist():
            yield index, slice(bounds[index], bounds[index + 1])

    def gather(self, row_ids: np.ndarray) -> torch.Tensor:
        """Return the rows of `row_ids` `[n]`, which are sorted if they are many, as bytes `[n, bytes of a row]`."""
        self.require_unchanged()
        rows = torch.empty((len(row_ids), *self.row_bytes), dtype=torch.uint8, device="cpu")
        target = rows.numpy()
        if self._waits_for_disk(len(row_ids)):
            self.request(np.sort(row_ids))  # The disk then reads them together, in the order of the file.
        if len(row_ids) <= _FEW:
            parts = np.searchsorted(self._starts, row_ids, "right") - 1
            for place, (part, row) in enumerate(
                zip(parts.tolist(), (row_ids - self._starts[parts]).tolist(), strict=True)
            ):
                target[place] = self._views[part][row]
            return rows
        for index, here in self._reached(row_ids):
            np.take(self._views[index], row_ids[here] - self._starts[index], 0, target[here], "clip")
        return rows

    def _waits_for_disk(self, count: int) -> bool:
        """Return whether requesting pages beforehand saves time: for many rows, and for few if pages do not stay in
        memory.
        """
        if count <= _FEW and self._is_larger_than_memory is None:
            self._is_larger_than_memory = self.stored.size > free_host_memory()
        return count > _FEW or (count > 1 and bool(self._is_larger_than_memory))


class TableReader:
    """Reads rows of one tensor of a table by their ids.

    Args:
        name: the name of the tensor in the model, for errors.
        stored: the stored tensor.
        source: the rows as bytes.
        casts: dtypes that a stored row is cast to, one after the other, as loading and moving the model would.
    """

    def __init__(self, name: str, stored: StoredTensor, source: MappedRows, casts: tuple[torch.dtype, ...]):
        self.name, self.stored, self.source, self.casts = name, stored, source, casts
        self._ahead: dict[int, FetchedRows] = {}

    def __reduce__(self):
        return type(self), (self.name, self.stored, self.source, self.casts)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of rows after reading."""
        return self.casts[-1] if self.casts else self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        return (self.source.num_rows, *self.stored.row_shape)

    def cast(self, dtype: torch.dtype) -> "TableReader":
        """Return a view of the same rows with one more cast."""
        casts = self.casts if dtype == self.dtype else (*self.casts, dtype)
        return type(self)(self.name, self.stored, self.source, casts)

    def offer(self, rows: FetchedRows) -> None:
        """Offer prefetched rows for the next read of this thread, which uses them if its ids match."""
        self._ahead[threading.get_ident()] = rows

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read rows of integer `ids` of any shape, on their device: `[*ids.shape, ...]`.

        Raises:
            IndexError: there is no such row.
            TableFormatError: a file was changed while the model uses it.
        """
        flat = ids.reshape(-1).long()
        if isinstance(self.source, PinnedRows) and self.source.is_visible_from(flat.device):
            rows, _ = self.source.fetch(flat)
        else:
            rows = self._read_on_host(flat)
        rows = rows.view(self.stored.dtype).view(*ids.shape, *self.stored.row_shape)
        for dtype in self.casts:
            rows = rows.to(dtype)
        return rows

    def _read_on_host(self, ids: torch.Tensor) -> torch.Tensor:
        """Read rows of int64 `ids` `[n]` to their device, as int8 `[n, bytes of a row]`; each is read and moved once."""
        ahead, wanted = self._ahead.pop(threading.get_ident(), None), ids.cpu().numpy()
        if ahead is None and len(wanted) <= _FEW and isinstance(self.source, TableRows):
            self._require_rows(wanted)
            return self.source.gather(wanted).view(torch.int8).to(ids.device)
        unique, places = np.unique(wanted, return_inverse=True)
        self._require_rows(unique)
        if ahead is not None and np.array_equal(ahead.row_ids, unique):
            rows, _ = ahead.fetch(torch.from_numpy(unique))
        elif isinstance(self.source, TableRows):
            rows = self.source.gather(unique).view(torch.int8)
        else:
            rows, _ = self.source.fetch(torch.from_numpy(unique))
        return rows.to(ids.device).index_select(0, torch.from_numpy(places).to(ids.device))

    def _require_rows(self, ids: np.ndarray) -> None:
        if len(ids) and not 0 <= (first := ids.min()) <= (last := ids.max()) < self.source.num_rows:
            raise IndexError(
                f"{self.name} has no row {first if first < 0 else last}, only 0..{self.source.num_rows - 1}; check the token ids."
            )


_ATTRIBUTES = (
    "device dtype grad grad_fn is_cpu is_cuda is_leaf is_meta is_mps is_nested is_quantized is_sparse is_xpu itemsize layout nbytes "
    "ndim requires_grad shape"
)
_METHODS = "__len__ dim element_size is_complex is_contiguous is_floating_point nelement numel size stride"
# These attributes of a table need none of its numbers.
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _ATTRIBUTES.split()),
    *(getattr(torch.Tensor, name) for name in _METHODS.split()),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
_GRADIENTS = {torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__}


class RowsById(torch.Tensor):
    """Replaces a tensor of an embedding: it has its shape and dtype, no memory, and answers lookups by ids.

    Any other operation that needs the numbers (a product with the whole table, a copy, a gradient) is refused.
    """

    reader: TableReader

    @classmethod
    def of(cls, reader: TableReader) -> "RowsById":
        """Return a replacement that reads with `reader`."""
        made = torch.empty(reader.shape, dtype=reader.dtype, device="meta").as_subclass(cls)
        made.reader = reader
        made._is_hf_initialized = True  # There is nothing to initialize.
        return made

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"RowsById({list(self.shape)}, dtype={self.dtype}, {self.reader.source.residency})"

    def __deepcopy__(self, memo: dict) -> "RowsById":
        return type(self).of(self.reader.cast(self.reader.dtype))

    def __reduce_ex__(self, protocol):
        return type(self).of, (self.reader,)

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None) -> Any:
        """Answer queries of the table's attributes, and lookups."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        table, ids = _lookup(func, args, kwargs)
        if table is not None:
            return table.reader.read(ids)
        name = next(value for value in [*args, *kwargs.values()] if isinstance(value, cls)).reader.name
        if func in _GRADIENTS:
            raise _frozen(name)
        raise EngramError(
            f"{name} is read by ids alone, but the model asked for {getattr(func, '__name__', func)!r} of the whole table, which "
            "is not in memory; load it with residency='resident'."
        )


def _frozen(name: str) -> EngramError:
    return EngramError(
        f"{name} is read from its files and has no gradient; load it with residency='resident' to train it."
    )


def _lookup(func: Callable, args: tuple, kwargs: dict) -> tuple[RowsById | None, Any]:
    """Return the table and the ids that a call looks up in it; None for a call that is not a lookup."""
    if func is F.embedding:
        ids, table, *rest = args
        is_plain = not any(rest[1:2]) and kwargs.get("max_norm") is None
    elif func in (torch.Tensor.__getitem__, torch.embedding):
        (table, ids), is_plain = args[:2], True
    elif func in (torch.index_select, torch.Tensor.index_select) and len(args) == 3 and args[1] == 0:
        (table, _, ids), is_plain = args, True
    else:
        return None, None
    is_ids = (
        isinstance(ids, torch.Tensor) and not ids.is_floating_point() and ids.dtype not in (torch.bool, torch.uint8)
    )
    return (table, ids) if is_plain and is_ids and isinstance(table, RowsById) else (None, None)


class EmbeddingOfRows(RuntimeSubclass):
    """A mix-in before the class of an embedding, whose parameters with a row for every id are [`RowsById`]."""

    readers: Mapping[str, TableReader] = MappingProxyType({})

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        return {"__module__": base.__module__, "__name__": f"{base.__name__}OfRows"}

    @torch.compiler.disable
    def forward(self, *args, **kwargs):
        """Run the forward of the embedding itself."""
        return super().forward(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True):
        """Do as in torch; requesting a gradient is refused."""
        if requires_grad:
            raise _frozen(next(iter(self.readers.values())).name)
        return super().requires_grad_(requires_grad)

    def __deepcopy__(self, memo: dict) -> "EmbeddingOfRows":
        # PEFT would train a copy of this module, find no parameter in it, and give no warning.
        if not memo:
            raise _frozen(next(iter(self.readers.values())).name)
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__setstate__(copy.deepcopy(self.__dict__, memo))
        return made

    def _apply(self, fn, recurse=True):
        # The rows stay where they are, but are cast as the parameters would have been.
        for leaf, reader in self.readers.items():
            mount(self, leaf, reader.cast(fn(torch.empty(0, dtype=reader.dtype)).dtype))
        return super()._apply(fn, recurse)


def mount(module: nn.Module, leaf: str, reader: TableReader) -> None:
    """Make an embedding read the rows of one of its parameters with `reader`.

    Args:
        module: an instance of [`EmbeddingOfRows`].
        leaf: the name of the parameter.
    """
    module.readers = {**module.readers, leaf: reader}
    if leaf in dict(module.named_parameters(recurse=False)):
        delattr(module, leaf)
    setattr(module, leaf, RowsById.of(reader))

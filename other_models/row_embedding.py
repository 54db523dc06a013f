"""An embedding whose rows are not in the module: what is read of its table is read by ids, from files or host memory.

The model's own embedding class keeps doing what it does (scales, unpacking). Only its parameters are exchanged for
[`RowsById`], which answers lookups and refuses everything else.
"""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..cache_engram import RuntimeSubclass
from ..prefetch_engram import FetchedRows
from ..row_sources_engram import MappedRows, PinnedRows
from ..safetensors_engram import EngramError
from .stored_tables import StoredTensor


class TableReader:
    """Reads rows of one tensor of a table by their ids.

    Args:
        name: of the tensor in the model, for errors.
        stored: where it lies.
        source: the rows as bytes.
        casts: dtypes that a stored row is cast to, one after the other, as loading and moving the model would.
    """

    def __init__(self, name: str, stored: StoredTensor, source: MappedRows, casts: tuple[torch.dtype, ...]):
        self.name, self.stored, self.source, self.casts = name, stored, source, casts
        self._starts = np.array([part.first for part in source.parts])
        self._ahead: dict[int, FetchedRows] = {}

    def __reduce__(self):
        return type(self), (self.name, self.stored, self.source, self.casts)

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""
        return self.casts[-1] if self.casts else self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return (self.source.num_rows, *self.stored.row_shape)

    def cast(self, dtype: torch.dtype) -> "TableReader":
        """The same rows after one more cast."""
        casts = self.casts if dtype == self.dtype else (*self.casts, dtype)
        return type(self)(self.name, self.stored, self.source, casts)

    def offer(self, rows: FetchedRows) -> None:
        """Rows that are being fetched for the next read of this thread, which takes them if they are the right ones."""
        self._ahead[threading.get_ident()] = rows

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of integer `ids` of any shape, on their device: `[*ids.shape, ...]`.

        Raises:
            IndexError: there is no such row.
            TableFormatError: a file was changed under the model.
        """
        flat = ids.reshape(-1).long()
        if isinstance(self.source, PinnedRows) and self.source.is_visible_from(flat.device):
            rows, _ = self.source.fetch(flat)
        else:
            unique, places = np.unique(flat.cpu().numpy(), return_inverse=True)
            self._require_rows(unique)
            rows = self._read_sorted(unique).to(flat.device)
            rows = rows.index_select(0, torch.from_numpy(places).to(flat.device))
        rows = rows.view(self.stored.dtype).view(*ids.shape, *self.stored.row_shape)
        for dtype in self.casts:
            rows = rows.to(dtype)
        return rows

    def _require_rows(self, ids: np.ndarray) -> None:
        if len(ids) and not 0 <= ids[0] <= ids[-1] < self.source.num_rows:
            wrong = int(ids[0] if ids[0] < 0 else ids[-1])
            raise IndexError(
                f"{self.name} has no row {wrong}, only 0..{self.source.num_rows - 1}; check the token ids."
            )

    def _read_sorted(self, ids: np.ndarray) -> torch.Tensor:
        """Rows of distinct sorted ids, as int8 `[n, bytes of a row]`."""
        ahead = self._ahead.pop(threading.get_ident(), None)
        if ahead is not None and np.array_equal(ahead.row_ids, ids):
            rows, _ = ahead.fetch(torch.from_numpy(ids))
            return rows
        self.source.require_unchanged()
        if len(ids) > 1:
            self.source.request(ids)  # so that the disk reads them all at once, in the order of the file
        rows = torch.empty((len(ids), *self.source.row_bytes), dtype=torch.uint8, device="cpu")
        # A table may have hundreds of parts, of which a token's ids lie in few.
        bounds = np.searchsorted(ids, [*self._starts, self.source.num_rows])
        for index in np.flatnonzero(bounds[1:] > bounds[:-1]):
            here, part = slice(bounds[index], bounds[index + 1]), self.source.parts[index]
            np.take(part.weight.numpy(), ids[here] - part.first, 0, rows.numpy()[here], "clip")
        return rows.view(torch.int8)


_METADATA = {
    getattr(torch.Tensor, name).__get__
    for name in (
        *(
            "shape",
            "dtype",
            "device",
            "ndim",
            "layout",
            "requires_grad",
            "grad",
            "grad_fn",
            "is_leaf",
            "is_meta",
            "is_cpu",
        ),
        *("is_cuda", "is_sparse", "is_quantized", "itemsize", "nbytes", "is_nested", "is_mps", "is_xpu"),
    )
} | {
    *(torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.nelement, torch.Tensor.element_size),
    *(torch.Tensor.stride, torch.Tensor.is_floating_point, torch.Tensor.is_contiguous, torch.Tensor.__len__),
    *(torch.is_floating_point, torch.numel, torch.Tensor.is_complex, torch.is_complex),
}
_GRADIENTS = {torch.Tensor.requires_grad_, torch.Tensor.requires_grad.__set__}


class RowsById(torch.Tensor):
    """Stands in for a tensor of an embedding: has its shape and dtype, no memory, and answers lookups by ids.

    Anything else that would need the numbers (a product with the whole table, a copy, a gradient) is refused.
    """

    reader: TableReader

    @classmethod
    def of(cls, reader: TableReader) -> "RowsById":
        """A stand-in that reads with `reader`."""
        made = torch.empty(reader.shape, dtype=reader.dtype, device="meta").as_subclass(cls)
        made.reader = reader
        made._is_hf_initialized = True  # there is nothing to initialize
        return made

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"RowsById({list(self.shape)}, dtype={self.dtype}, {self.reader.source.residency})"

    def __deepcopy__(self, memo: dict) -> "RowsById":
        return type(self).of(self.reader.cast(self.reader.dtype))

    def __reduce_ex__(self, protocol):
        return type(self).of, (self.reader,)

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None) -> Any:
        """Answers what is known of the table, and lookups."""
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
    """The table and the ids that a call looks up in it; None for a call that is no lookup."""
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
    """Goes in front of the class of an embedding, whose parameters with a row for every id are [`RowsById`]."""

    readers: dict[str, TableReader] = {}

    @classmethod
    def _members(cls, base: type) -> dict[str, Any]:
        return {"__module__": base.__module__, "__name__": f"{base.__name__}OfRows"}

    @torch.compiler.disable
    def forward(self, *args, **kwargs):
        """As the embedding itself."""
        return super().forward(*args, **kwargs)

    def requires_grad_(self, requires_grad: bool = True):
        """As in torch; asking for a gradient is refused."""
        if requires_grad:
            raise _frozen(next(iter(self.readers.values())).name)
        return super().requires_grad_(requires_grad)

    def __deepcopy__(self, memo: dict) -> "EmbeddingOfRows":
        # PEFT copies a module by itself to train the copy, of which it would find no parameter and say nothing.
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
    """Have an embedding read the rows of one of its parameters with `reader`.

    Args:
        module: an instance of [`EmbeddingOfRows`].
        leaf: the name of the parameter.
    """
    module.readers = {**module.readers, leaf: reader}
    if leaf in dict(module.named_parameters(recurse=False)):
        delattr(module, leaf)
    setattr(module, leaf, RowsById.of(reader))

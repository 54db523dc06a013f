"""Trainable differences for chosen rows of a table, and the layer that adds them to the table's rows.

Shape letters: n adapted rows of a table, W channels of a row, T heads a position reads.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from ..safetensors_engram import EngramError

if TYPE_CHECKING:
    from ..table_engram import EngramTable, RowReader


def rows_digest(rows: torch.Tensor) -> str:
    """Return the SHA-256 of row numbers, int64 `[n]`, in hexadecimal."""
    return hashlib.sha256(rows.cpu().numpy().astype("<i8").tobytes()).hexdigest()


class RowDifferences(nn.Module):
    """Trainable differences of some rows of a table; every other row has none.

    Args:
        rows: int64 `[n]`, the adapted rows, strictly ascending; None until a checkpoint gives them.
        count: n.
        num_rows: rows of the table.
        width: W.
        device: device of the parameters.
        digest: the result of [`rows_digest`] for the rows; None if it is not known.

    Attributes:
        rows: buffer, saved with the differences, which mean nothing without their row numbers.
        delta: float32 parameter `[n, W]`, zero at first, so that adding an adapter changes nothing; NaN until a
            checkpoint gives it, so that missing differences are noticed. It is float32 for a table of any dtype, so that
            small updates of a low-precision table are not lost.
    """

    rows: torch.Tensor

    def __init__(
        self,
        rows: torch.Tensor | None,
        count: int,
        num_rows: int,
        width: int,
        device: torch.device | None = None,
        digest: str | None = None,
    ):
        super().__init__()
        self.num_rows, self.digest, self._awaits_checkpoint = num_rows, digest, rows is None
        # No row has this number, so an adapter whose rows were never loaded is refused.
        self.register_buffer("rows", torch.full((count,), -1, device=device) if rows is None else rows.to(device))
        delta = torch.full(
            (count, width), 0.0 if rows is not None else float("nan"), device=device, dtype=torch.float32
        )
        self.delta = nn.Parameter(delta)
        self._checked: torch.Tensor | None = None
        self.is_rounded = False
        self.register_state_dict_post_hook(_shorten)
        self.register_load_state_dict_pre_hook(_lengthen)
        self.register_load_state_dict_post_hook(_check_loaded_rows)

    def require_rows(self) -> None:
        """Refuse row numbers that this table does not have, that are not ascending, or that are not those of the digest;
        and differences that were not loaded.

        Raises:
            ValueError: row numbers or differences are wrong.
        """
        if self._checked is self.rows:  # Moving and loading replace the tensor, or call the hook.
            return
        rows = self.rows
        is_fine = rows.dtype == torch.int64 and bool((rows[1:] > rows[:-1]).all())
        if not is_fine or (rows.numel() and not 0 <= int(rows[0]) <= int(rows[-1]) < self.num_rows):
            raise EngramError(
                f"The row numbers of an adapter are missing or damaged: they must ascend from 0 to at most "
                f"{self.num_rows - 1}; load the adapter again from the folder that save_pretrained wrote."
            )
        if self.digest is not None and rows_digest(rows) != self.digest:
            raise EngramError(
                "The row numbers of an adapter are not those that adapter_config.json was saved with: its files belong to two "
                "adapters, or one is damaged; restore the folder that save_pretrained wrote."
            )
        if self._awaits_checkpoint and (self.delta.is_meta or bool(self.delta.isnan().any())):
            raise EngramError(
                "The differences of an adapter are missing or no numbers; load it again from the folder that save_pretrained "
                "wrote, or train it again."
            )
        self._checked = rows

    def forward(self, row_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the differences `[..., T, W]` of row ids `[..., T]`, and their mask, bool `[..., T, 1]`; where it is
        False, differences have no meaning.
        """
        if not torch.compiler.is_compiling():
            self.require_rows()
        if not self.rows.numel():  # All rows were removed again.
            adapted = torch.zeros_like(row_ids, dtype=torch.bool).unsqueeze(-1)
            return self.delta.new_zeros((*row_ids.shape, self.delta.shape[1])), adapted
        place = torch.searchsorted(self.rows, row_ids.contiguous()).clamp_max(self.rows.numel() - 1)
        adapted = (self.rows[place] == row_ids).unsqueeze(-1)
        return F.embedding(place, self.delta), adapted

    @torch.no_grad()
    def round(self) -> None:
        """Round the differences to bfloat16, the dtype of saving from now on, until they are trained again."""
        self.delta.copy_(self.delta.to(torch.bfloat16))
        self.is_rounded = True

    def keep(self, chosen: torch.Tensor) -> None:
        """Remove all rows where bool `chosen` `[n]` is False."""
        chosen = chosen.to(self.rows.device)
        self.delta = nn.Parameter(self.delta.detach()[chosen], requires_grad=self.delta.requires_grad)
        self.rows = self.rows[chosen]
        self.digest = rows_digest(self.rows)

    def extra_repr(self) -> str:
        """Return numbers of rows and channels, for `print(model)`."""
        return f"{self.delta.shape[0]}, {self.delta.shape[1]}"


def _shorten(adapter: RowDifferences, state: dict[str, torch.Tensor], prefix: str, _metadata: Any) -> None:
    """Save rounded differences in half the bytes, if they still have the values that `round` gave them."""
    delta = state.get(prefix + "delta")
    if adapter.is_rounded and delta is not None and torch.equal(delta.to(torch.bfloat16).to(delta.dtype), delta):
        state[prefix + "delta"] = delta.to(torch.bfloat16)


def _lengthen(adapter: RowDifferences, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Undo `_shorten`: loading may replace the parameter, including its dtype."""
    delta = state.get(prefix + "delta")
    if delta is not None and delta.dtype == torch.bfloat16:
        state[prefix + "delta"] = delta.to(torch.float32)
        adapter.is_rounded = True


def _check_loaded_rows(adapter: RowDifferences, _incompatible_keys: Any) -> None:
    adapter._checked = None
    if not adapter.rows.is_meta:
        adapter.require_rows()


@torch.compiler.disable
def _release_pages(table: "EngramTable") -> None:
    """Release the pages of a mapped table that a step of training read.

    A corpus seldom reads the same rows again soon, and the process would keep a page for each of them in memory.
    """
    if (release := getattr(table.source, "release", None)) is not None:
        release()


def combine(parts: Iterable[tuple[RowDifferences, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows `[n]`, ascending, and the weighted sum of their differences, float32 `[n, W]`."""
    parts = list(parts)
    rows = torch.unique(torch.cat([adapter.rows for adapter, _ in parts]))
    delta = torch.zeros(rows.numel(), parts[0][0].delta.shape[1], device=rows.device)
    for adapter, weight in parts:
        place = torch.searchsorted(rows, adapter.rows)
        delta[place] += weight * adapter.delta.detach().to(delta.dtype)
    return rows, delta


class RowsLayer(nn.Module, BaseTunerLayer):
    """A table with row adapters: the table's rows, plus the differences of every active adapter.

    Rows that no active adapter has are unchanged to the last bit. Prefetched rows of the table are used as
    without adapters. All other attributes are those of the table.

    Args:
        base_layer: the `EngramTable`, of any dtype, resident or not.
        device: the device of the looked-up rows, and so of the adapters: a mapped table itself stays on the host.
    """

    adapter_layer_names = ("engram_rows_adapter",)
    other_param_names = ()

    def __init__(self, base_layer: "EngramTable", device: torch.device):
        super().__init__()
        self.base_layer = base_layer
        self.engram_rows_adapter = nn.ModuleDict()
        self.device = device
        self._disable_adapters = False
        self.merged_adapters = []
        self._before_merges: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def add_adapter(self, name: str, rows: torch.Tensor | None, count: int, digest: str | None = None) -> None:
        """Add differences for `rows` (see [`RowDifferences`]) under the adapter's name."""
        table = self.base_layer
        self.engram_rows_adapter[name] = RowDifferences(rows, count, table.num_rows, table.width, self.device, digest)

    def forward(
        self, row_ids: torch.Tensor, dtype: torch.dtype | None = None, source: "RowReader | None" = None
    ) -> torch.Tensor:
        """Return rows of `row_ids` `[..., T]`, side by side, `[..., T * W]`, as a table does."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        rows = self.base_layer(row_ids, dtype=dtype, source=source)
        names = [] if self.disable_adapters else self._unmerged(self.active_adapters)
        if not names:
            return rows
        difference, adapted = self.engram_rows_adapter[names[0]](row_ids)
        for name in names[1:]:
            more, where = self.engram_rows_adapter[name](row_ids)
            difference = torch.where(adapted, difference, 0) + torch.where(where, more, 0)
            adapted = adapted | where
        if difference.requires_grad and not self.base_layer.is_resident:
            _release_pages(self.base_layer)
        apart = rows.unflatten(-1, (row_ids.shape[-1], -1))
        return torch.where(adapted, (apart + difference).to(rows.dtype), apart).flatten(-2)

    def _unmerged(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.engram_rows_adapter and name not in self.merged_adapters]

    def require_mergeable(self) -> None:
        """Refuse a table to which differences cannot be added exactly.

        Raises:
            ValueError: the table is not resident, or is quantized.
        """
        table = self.base_layer
        if isinstance(getattr(table, "weight", None), DTensor):
            raise EngramError(
                "A table in shards cannot take differences; keep the adapter, or merge it into the model of a folder that "
                "export_model wrote."
            )
        if not table.is_resident:
            raise EngramError(
                "A table in its file or in host memory cannot take differences; keep the adapter, or load the model with "
                "engram_residency='resident' to merge it."
            )
        if table.scale is not None:
            raise EngramError(
                f"Rows of {table.table_dtype} cannot take a difference without being rounded again; keep the "
                "adapter, or merge it into a model whose table is bfloat16 or float32."
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the differences into the table, whose rows then equal those of this layer to the bit.

        Args:
            safe_merge: whether to refuse rows that are not finite.
            adapter_names: None for the active ones.

        Raises:
            ValueError: the table is not resident or is quantized, or the rows are not finite.
        """
        names = self._unmerged(self.active_adapters if adapter_names is None else adapter_names)
        if not names:
            return
        self.require_mergeable()
        parts = [self.engram_rows_adapter[name] for name in names]
        for part in parts:
            part.require_rows()
        rows, delta = combine((part, 1.0) for part in parts)
        weight = self.base_layer.weight.data
        before = weight[rows]
        merged = (before + delta).to(weight.dtype)
        if safe_merge and not bool(merged.isfinite().all()):
            raise EngramError(
                f"The adapters {names} would put rows that are not finite into the table; train them again."
            )
        weight[rows] = merged
        self._before_merges.append((rows, before))
        self.merged_adapters = [*self.merged_adapters, *names]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the rows that the table had before, to the bit."""
        weight = self.base_layer.weight.data
        while self._before_merges:
            rows, before = self._before_merges.pop()
            weight[rows.to(weight.device)] = before.to(weight.device)
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: differences of rows are not a product of two small matrices."""
        return False

    # PEFT would give differences the dtype of the table, which may be float8 or int8.
    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.engram_rows_adapter and not self.engram_rows_adapter[adapter_name].delta.is_meta:
            self.engram_rows_adapter[adapter_name].to(device or self.device)

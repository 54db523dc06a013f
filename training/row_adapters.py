"""Training only the table rows that a corpus reads, at the cost of those rows.

A dense gradient and Adam's two moments are each as large as a table, while a fine-tuning corpus reads a sliver of it.
A row adapter is a trainable difference for chosen rows, on top of a frozen table:

    rows = touched_rows(model, DataLoader(dataset, batch_size=8, collate_fn=collator))
    add_row_adapters(model, rows)
    model = get_peft_model(model, LoraConfig(target_modules=[...], modules_to_save=["row_adapter"]))

Shape letters: R rows of a table, n of them adapted, W channels of a row, T heads a position reads.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from ..safetensors_engram import EngramError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..modeling_engram import EngramModel
    from ..table_engram import EngramTable

NAME = "row_adapter"
_INDEX = f".engram.table.{NAME}.rows"


class RowAdapter(nn.Module):
    """Trainable differences of some rows of a table; every other row has none.

    Args:
        rows: int64 `[n]`, the adapted rows, strictly ascending.
        width: W.
        device, dtype: of `delta`; float32 by default, so that small updates of a low-precision table are not lost.

    Attributes:
        rows: buffer, saved with the weights: a difference means nothing without the row it belongs to.
        delta: parameter `[n, W]`, zero at first, so that adding an adapter changes nothing.
    """

    rows: torch.Tensor

    def __init__(self, rows: torch.Tensor, width: int, device=None, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.register_buffer("rows", rows.to(device))
        self.delta = nn.Parameter(torch.zeros(rows.numel(), width, device=device, dtype=dtype))

    def forward(self, row_ids: torch.Tensor) -> torch.Tensor:
        """Differences `[..., T * W]` for row ids `[..., T]`, zero where a row is not adapted."""
        position = torch.searchsorted(self.rows, row_ids).clamp_max(self.rows.numel() - 1)
        adapted = self.rows[position] == row_ids
        return (F.embedding(position, self.delta) * adapted.unsqueeze(-1)).flatten(-2)

    def extra_repr(self) -> str:
        """Rows and channels, for `print(model)`."""
        return f"{self.delta.shape[0]}, {self.delta.shape[1]}"


def touched_rows(model: nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """Rows that a corpus reads: a pure function of its token ids, so no layer of the backbone runs.

    Args:
        model: an Engram model, plain or wrapped.
        batches: what a `DataLoader` yields: `input_ids` `[B, S]` and, where the model will get them, `attention_mask`,
            `position_ids`, `seq_idx` and `image_mask`. Labels and anything else are ignored.

    Returns:
        By decoder layer, the distinct rows, int64, ascending.
    """
    engram = _engram_model(model)
    device = cast(torch.Tensor, engram.hashing.multipliers).device
    # A byte a row is a small part of the table, and costs a batch no more when many rows have been seen before.
    seen = {layer: torch.zeros(table.num_rows, dtype=torch.bool) for layer, table in _tables(engram).items()}
    for batch in batches:
        mask, positions, images, documents = (
            None if batch.get(name) is None else batch[name].to(device)
            for name in ("attention_mask", "position_ids", "image_mask", "seq_idx")
        )
        memory = engram.prepare_memory(batch["input_ids"].to(device), mask, positions, images, documents)
        valid = memory.row_ids.new_ones((), dtype=torch.bool) if memory.valid is None else memory.valid
        row_ids = memory.row_ids[:, valid.expand(memory.row_ids.shape[1:3])]
        for read, layer_ids in zip(seen.values(), row_ids.cpu(), strict=True):
            read[layer_ids.flatten()] = True
    return {layer: read.nonzero().squeeze(-1) for layer, read in seen.items()}


def saved_rows(folder: str | Path) -> dict[int, torch.Tensor]:
    """Rows, by decoder layer, of the row adapters that PEFT saved in `folder`; to add them before loading it.

        add_row_adapters(model, saved_rows(folder))
        model = PeftModel.from_pretrained(model, folder)

    Raises:
        ValueError: there are none.
    """
    path = Path(folder) / "adapter_model.safetensors"
    rows = {}
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                if key.endswith(_INDEX):
                    rows[int(key.removesuffix(_INDEX).rpartition(".")[2])] = file.get_tensor(key)
    if not rows:
        raise EngramError(
            f"{path} holds no row adapters; name a folder that PeftModel.save_pretrained wrote with "
            f'modules_to_save=["{NAME}"].'
        )
    return rows


def add_row_adapters(model: nn.Module, rows: Mapping[int, torch.Tensor]) -> None:
    """Freeze the tables and give the named layers' tables a [`RowAdapter`]; the model's output stays exactly as it is.

    The adapter is the submodule `row_adapter` of its table, which is what PEFT's `modules_to_save` takes. Adapted
    models are saved through PEFT, or after [`merge_row_adapters`]. Tables may be of any dtype, float8 included.

    Args:
        model: an Engram model.
        rows: by decoder layer, the rows to train, int64 `[n]` (see [`touched_rows`]).

    Raises:
        ValueError: a layer has no memory or an adapter already, or rows are missing, repeated or not in its table.
    """
    engram = _engram_model(model)
    tables = _tables(engram)
    chosen = {layer: _checked_rows(layer, ids, tables) for layer, ids in rows.items()}
    for table in tables.values():
        table.requires_grad_(False)
    for layer, ids in chosen.items():
        table = tables[layer]
        # Where the rows arrive: a mapped table itself stays on the host.
        device = next(engram.memories()[layer].kv_proj.parameters()).device
        table.add_module(NAME, RowAdapter(ids, table.width, device=device))
        hook = table.register_forward_hook(_add_differences, with_kwargs=True)
        table.row_adapter_hook = hook  # type: ignore[assignment]  # torch has modules hold tensors and modules only


def _checked_rows(layer: int, rows: torch.Tensor, tables: Mapping[int, "EngramTable"]) -> torch.Tensor:
    if layer not in tables:
        raise EngramError(f"Layer {layer} has no Engram memory; the layers that have are {sorted(tables)}.")
    if hasattr(tables[layer], NAME):
        raise EngramError(f"The table of layer {layer} has a row adapter already; merge_row_adapters(model) first.")
    distinct, num_rows = torch.unique(rows), tables[layer].num_rows
    if rows.dtype != torch.int64 or rows.dim() != 1 or not 0 < distinct.numel() == rows.numel():
        raise EngramError(
            f"Rows of layer {layer} must be a non-empty int64 vector without repetitions, got "
            f"{rows.dtype} {list(rows.shape)} with {distinct.numel()} distinct rows; take them from touched_rows."
        )
    if distinct[0] < 0 or distinct[-1] >= num_rows:
        raise EngramError(
            f"Rows {int(distinct[0])} to {int(distinct[-1])} were given for layer {layer}, whose table has rows 0 to "
            f"{num_rows - 1}; take them from touched_rows of this very model."
        )
    return distinct


def _add_differences(table: nn.Module, args: tuple, kwargs: dict, rows: torch.Tensor) -> torch.Tensor:
    # Looked up at every call, because PEFT replaces the submodule by its own wrapper. A hook, because it survives
    # what else wraps a table's forward (accelerate's device hooks, FSDP), and leaves its state-dict keys alone.
    differences = getattr(table, NAME)(args[0] if args else kwargs["row_ids"])
    return (rows + differences).to(rows.dtype)


@torch.no_grad()
def merge_row_adapters(model: nn.Module) -> None:
    """Write every adapted row into its table and take the adapters off; float tables become trainable again.

    Output stays what it was, to the bit where the model computes in the table's dtype.

    Raises:
        ValueError: there is no adapter, PEFT still holds one, or a table is quantized or not resident.
    """
    tables = [table for table in _tables(_engram_model(model)).values() if hasattr(table, NAME)]
    if not tables:
        raise EngramError("This model has no row adapters to merge.")
    for table in tables:
        if not isinstance(getattr(table, NAME), RowAdapter):
            raise EngramError("PEFT still wraps the row adapters; call merge_and_unload() and merge what it returns.")
        if not table.is_resident:
            raise EngramError(
                "A table that stays in its file cannot take differences; keep the adapter, or load the model with "
                "engram_residency='resident' to merge it."
            )
        if table.scale is not None:
            raise EngramError(
                f"Rows of a {table.weight.dtype} table cannot take a difference without being rounded again; keep the "
                "adapter, or merge it into a model whose table is bfloat16 or float32."
            )
    for table in tables:
        adapter = getattr(table, NAME)
        merged = table.weight[adapter.rows] + adapter.delta
        table.weight[adapter.rows] = merged.to(table.weight.dtype)
        cast("RemovableHandle", table.row_adapter_hook).remove()
        del table.row_adapter, table.row_adapter_hook
        table.requires_grad_(True)


def _engram_model(model: nn.Module) -> "EngramModel":
    """The `EngramModel` inside of any wrapping, the installed class or one that came as remote code."""
    found = next((module for module in model.modules() if hasattr(type(module), "prepare_memory")), None)
    if found is None:
        raise EngramError(f"{type(model).__name__} has no Engram memory; pass an EngramModel or EngramForCausalLM.")
    return cast("EngramModel", found)


def _tables(engram: "EngramModel") -> dict[int, "EngramTable"]:
    """The table of every layer with memory, in the order of `engram_layer_ids`."""
    return {layer: memory.table for layer, memory in engram.memories().items()}

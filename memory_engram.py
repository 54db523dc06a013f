"""`EngramTable`: the rows of one layer's memory, and how they are fetched.

Shape letters: R rows of the table, W channels of a row, T heads a position reads (all n-gram orders).
"""

import torch
from torch import nn
from torch.nn import functional as F

# Channels that share a scale in a float8 row (DeepSeek-V4.1: `layers.L.engram.embed.scale`).
SCALE_BLOCK = 32


class EngramTable(nn.Module):
    """An embedding table that hash heads read rows from.

    Args:
        num_rows: R, the sum of the layer's primes.
        width: W, `engram_head_dim`.
        table_dtype: None for rows in `dtype`, trainable; `"float8_e4m3fn"` for frozen rows with an E8M0
            (power-of-two) scale per 32 channels.
        device, dtype: of the parameters, as in `torch.nn` modules.

    Parameters:
        weight: `[R, W]`.
        scale: float8_e8m0fnu `[R, W / 32]`, or None.
    """

    def __init__(self, num_rows: int, width: int, table_dtype: str | None = None, device=None, dtype=None):
        super().__init__()
        self.num_rows, self.width = num_rows, width
        quantized = table_dtype is not None
        stored = getattr(torch, table_dtype) if quantized else dtype
        self.weight = nn.Parameter(
            torch.empty((num_rows, width), device=device, dtype=stored), requires_grad=not quantized
        )
        scale = None
        if quantized:
            blocks = (num_rows, width // SCALE_BLOCK)
            scale = nn.Parameter(torch.empty(blocks, device=device, dtype=torch.float8_e8m0fnu), requires_grad=False)
        self.register_parameter("scale", scale)

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` moves dtypes, but a float8 row means nothing without its scale: only devices move.
        if self.scale is None:
            return super()._apply(fn, recurse)
        return super()._apply(lambda tensor: _keep_dtype(tensor, fn(tensor)), recurse)

    def extra_repr(self) -> str:
        """Rows, channels and stored dtype, for `print(model)`."""
        return f"{self.num_rows}, {self.width}, dtype={self.weight.dtype}"

    def forward(self, row_ids: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Rows of `row_ids` `[..., T]`, side by side: `[..., T * W]`.

        Args:
            row_ids: int64, each in `0..R-1`.
            dtype: of the result, for a float8 table; rows of a float table keep theirs.
        """
        if self.scale is None:
            return F.embedding(row_ids, self.weight).flatten(-2)
        return dequantize_rows(_gather(self.weight, row_ids), _gather(self.scale, row_ids), dtype).flatten(-2)


def dequantize_rows(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`value * 2 ** (exponent - 127)`, the scale of a block shared by 32 neighbouring channels.

    Args:
        values: float8_e4m3fn `[..., W]`.
        scale: float8_e8m0fnu `[..., W / 32]`.
        dtype: of the result; float32 if None. The product is exact in float32 before it is rounded to it.
    """
    blocks = values.to(torch.float32).unflatten(-1, (-1, SCALE_BLOCK))
    rows = (blocks * scale.to(torch.float32).unsqueeze(-1)).flatten(-2)
    return rows if dtype is None else rows.to(dtype)


def _gather(table: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
    # Gathered as bytes: not every device indexes float8, and no value is touched.
    return table.view(torch.uint8)[row_ids].view(table.dtype)


def _keep_dtype(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return after if after.dtype == before.dtype else before.to(after.device)

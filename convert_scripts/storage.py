"""Storage of the release's tensors: dtype, and the block of numbers that shares a scale. Planning needs only this, and
no torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """The storage of a matrix: the weight's dtype and, if it is quantized, the block that shares one E8M0 scale.

    Where `is_certain` is false, the release's own header was not read: both BF16 and F32 are accepted.
    """

    dtype: str
    block: tuple[int, int] | None = None
    is_certain: bool = True

    @property
    def is_packed(self) -> bool:
        """Whether a byte holds two E2M1 codes."""
        return self.dtype == "I8"

    def takes(self, dtype: str) -> bool:
        """Return whether a weight may be stored as `dtype`."""
        return dtype == self.dtype or (not self.is_certain and dtype in ("BF16", "F32"))

    def weight_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape in which values of `shape` are stored."""
        return (*shape[:-1], shape[-1] // 2) if self.is_packed else shape

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of values of `shape`."""
        rows, columns = self.block
        return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))


BF16 = Storage("BF16")
F32 = Storage("F32")
LIKELY_BF16 = Storage("BF16", is_certain=False)
LIKELY_F32 = Storage("F32", is_certain=False)
FP8_BLOCKS = Storage("F8_E4M3", (32, 32))
FP8_ROWS = Storage("F8_E4M3", (1, 32))
FP4_ROWS = Storage("I8", (1, 32))

"""The three activation roundings of DeepSeek-V4.1's caches.

The release keeps its window latents in FP8 and its compressed latents and index vectors in FP4, and was trained that
way, so the rounding belongs to the model and not to a storage format: every function returns the rounded *value* in
the input's dtype. The rules are those of the release's quantization kernels. Each rounding passes gradients straight
through.
"""

import torch

FP8_MAX = 448.0  # largest E4M3
FP4_MAX = 6.0  # largest E2M1


def power_of_two_above(x: torch.Tensor) -> torch.Tensor:
    """`2 ** ceil(log2(x))` of positive normal float32, read from the exponent bits so that it is exact."""
    bits = x.view(torch.int32)
    has_mantissa = (bits & 0x7FFFFF) != 0
    return ((bits >> 23) + has_mantissa.to(torch.int32)).bitwise_left_shift(23).view(torch.float32)


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3 value of float32 `x`, saturating at 448; ties to even."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest E2M1 value (0, .5, 1, 1.5, 2, 3, 4, 6) of float32 `x`, saturating at 6; ties to the even code."""
    x = x.clamp(-FP4_MAX, FP4_MAX)
    # Codes are evenly spaced inside each binade, so rounding half to even there picks the even code on a tie.
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return (x / step).round() * step


def _round_groups(x: torch.Tensor, group: int, scale_of, to_format) -> torch.Tensor:
    """Round `x` `[..., channels]` in groups of `group` channels that share the scale `scale_of(largest magnitude)`."""
    with torch.no_grad():
        groups = x.float().unflatten(-1, (-1, group))
        scale = scale_of(groups.abs().amax(-1, keepdim=True))
        rounded = (to_format(groups / scale) * scale).flatten(-2).to(x.dtype)
    # `x - x.detach()` is exactly zero and carries the gradient; `x + (rounded - x)` would lose the last bit.
    return rounded + (x - x.detach()) if x.requires_grad else rounded


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """E4M3 with a power-of-two scale per 32 channels: the window latents. `[..., 32 n]`, any float dtype."""
    return _round_groups(x, 32, lambda a: power_of_two_above(a.clamp(min=1e-4) / FP8_MAX), to_e4m3)


def round_mxfp4(x: torch.Tensor) -> torch.Tensor:
    """E2M1 with a power-of-two scale per 32 channels: index queries and keys. `[..., 32 n]`, any float dtype."""
    return _round_groups(x, 32, lambda a: power_of_two_above(a.clamp(min=FP4_MAX * 2**-126) / FP4_MAX), to_e2m1)


def round_nvfp4(x: torch.Tensor) -> torch.Tensor:
    """E2M1 with an E4M3 scale per 16 channels: the compressed latents. `[..., 16 n]`, any float dtype."""
    return _round_groups(x, 16, lambda a: to_e4m3(a.clamp(min=FP4_MAX * 2**-9) / FP4_MAX), to_e2m1)

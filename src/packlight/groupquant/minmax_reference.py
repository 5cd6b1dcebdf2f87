"""The min-max code in plain PyTorch: minimum and step of a group, and codes between.

Minimum and step are bfloat16 numbers in one int32 word, the minimum in the high half. Arithmetic is
in float32 whatever the dtype of the tensor.

What a pack holds is finite: `limits.py` says in place of what. Differences are taken of halves,
since those of whole numbers may overflow. A negative step says that in place of an infinity there
is a number at which the derivative is the same and the function is not.
"""

import torch
from torch import Tensor

from packlight.elementwise.limits import Limits
from packlight.groupquant.draws import draws, fraction_bits
from packlight.groupquant.grouping import Grouping

# Bits of 2^-126, the least step: its inverse is finite.
TINY = 0x00800000
# The sign of a float32 number.
SIGN = -(2**31)


def _bf16_down(x: Tensor) -> Tensor:
    """float32 `x` rounded down to a bfloat16 number, as int32 bits with a zero low half."""
    bits = x.view(torch.int32)
    return (bits + torch.where(bits < 0, 0xFFFF, 0).int()) & -65536


def _bf16_up(x: Tensor) -> Tensor:
    """float32 `x` >= 0 rounded up to a bfloat16 number, as int32 bits with a zero low half."""
    return (x.view(torch.int32) + 0xFFFF) & -65536


def encode(
    values: Tensor, grouping: Grouping, seed: Tensor | None, within: Limits, greatest: float
) -> tuple[Tensor, Tensor]:
    """Codes of `values` [rows, row_groups, group_size] as uint8, and a word for each group.

    `seed` [1] int64 makes the rounding stochastic; without it the rounding is to nearest. No code
    stands for more than `greatest`.
    """
    lowest, highest, below, above, edge = within
    low, high = torch.aminmax(values, dim=-1) if values.numel() else (values[..., 0],) * 2
    far = low <= -edge, high >= edge
    replaced = (far[0] & (below > lowest)) | (far[1] & (above < highest))
    low = torch.where(far[0], below, low.clamp(lowest, highest))
    high = torch.where(far[1], above, high.clamp(lowest, highest)).maximum(low)
    values = values.clamp(low.unsqueeze(-1), high.unsqueeze(-1)).float()

    top = float(2**grouping.bits - 1)
    low_bits = _bf16_down(low.float().contiguous())
    half_low = low_bits.view(torch.float32) * 0.5
    half_spread = (high.float() * 0.5 - half_low).contiguous()
    finite = half_spread < float("inf")  # false for NaN too
    exact = half_spread * (2 / top)
    step_bits = _bf16_up(exact).clamp(min=TINY)
    step_bits = torch.where(finite, step_bits, 0x7FC00000).int()
    inverse = torch.where(finite, 1.0 / step_bits.view(torch.float32) * 2.0, 0.0)
    codes = (values * 0.5 - half_low.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0)
    codes = codes * inverse.unsqueeze(-1)
    # The sum has `fraction_bits` behind the point, as in `minmax_kernels.py`.
    base = float(1 << (23 - fraction_bits(grouping.bits)))
    dither = 0.5 if seed is None else draws(seed, grouping)
    codes = codes.clamp(max=top) + (base + dither) - base

    # The step that is kept is rounded down where the last code would stand for more than is finite.
    last = step_bits.view(torch.float32) * (top / 2) + half_low
    step_bits = torch.where(last > greatest / 2, exact.view(torch.int32) & -65536, step_bits)
    step_bits = torch.where(replaced, step_bits | SIGN, step_bits)
    return codes.floor().to(torch.uint8), low_bits | ((step_bits >> 16) & 0xFFFF)


def decode(numbers: Tensor, words: Tensor, replaced: bool) -> Tensor:
    """The float32 values of codes [groups, group_size] and words [groups].

    Unless those in place of infinities will do, as they do for derivatives, groups with any come
    back as NaN.
    """
    low = (words & -65536).view(torch.float32).view(-1, 1)
    step = (words << 16).view(torch.float32).view(-1, 1)
    step = step.abs() if replaced else torch.where(step < 0, torch.nan, step)
    # The product of whole ones may overflow.
    values: Tensor = (low * 0.5 + step * 0.5 * numbers.float()) * 2.0
    return values

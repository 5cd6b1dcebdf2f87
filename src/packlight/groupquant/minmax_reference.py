"""The min-max code in plain PyTorch: minimum and step of a group, and codes between.

Minimum and step are bfloat16 numbers in one int32 word, the minimum in the high half. Arithmetic is
in float32 whatever the dtype of the tensor.

With an **offset** u, one number of the group's that is drawn again where the pack is read,

    code = floor((x - m) / s + u),    x~ = m + s (code + 1/2 - u).

For u uniform on [0, 1) the error is uniform on (-s/2, s/2] whatever x is (subtractive dither:
Roberts, 1962; Schuchman, 1964): E[x~] = x, and the variance is s^2 / 12, half of what stochastic
rounding has on average. u has f bits, and so has the quotient; what u stands for is in the middle
of its 2^-f, so that no bias is left but that of rounding the quotient. The errors of a group hang
together by u. A weight gradient sums over tokens, each with groups of its own.

A minimum of 0 is kept exactly, for a ReLU makes it of half its values: code 0 is 0 and nothing
else, and the other codes start at 1, a step of (maximum) / (2^b - 2) apart. A group whose step is
2^118 or more is rounded to nearest, u = 1/2: half a step more might be infinite.

What a pack holds is finite: `limits.py` says in place of what. Differences are taken of halves,
since those of whole numbers may overflow. A negative step says that in place of an infinity there
is a number at which the derivative is the same and the function is not.
"""

import torch
from torch import Tensor

from packlight.elementwise.limits import Limits
from packlight.groupquant.draws import draws, fraction_bits, offsets
from packlight.groupquant.grouping import OFFSET, Grouping

# Bits of 2^-126, the least step: its inverse is finite.
TINY = 0x00800000
# The sign of a float32 number.
SIGN = -(2**31)
# The least step of a group without an offset.
COARSE = 2.0**118


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

    with_offset = grouping.code == OFFSET
    top = float(2**grouping.bits - 1)
    low_bits = _bf16_down(low.float().contiguous())
    half_low = low_bits.view(torch.float32) * 0.5
    half_spread = (high.float() * 0.5 - half_low).contiguous()
    finite = half_spread < float("inf")  # false for NaN too
    from_zero = low_bits.view(torch.float32) == 0
    exact = half_spread * (2 / top)
    if with_offset:
        exact = torch.where(from_zero, half_spread * (2 / (top - 1)), exact)
    step_bits = _bf16_up(exact).clamp(min=TINY)
    step_bits = torch.where(finite, step_bits, 0x7FC00000).int()
    inverse = torch.where(finite, 1.0 / step_bits.view(torch.float32) * 2.0, 0.0)
    codes = (values * 0.5 - half_low.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0)
    codes = codes * inverse.unsqueeze(-1)
    # The sum has `fraction_bits` behind the point, as in `minmax_kernels.py`.
    base = float(1 << (23 - fraction_bits(grouping.bits)))
    codes = codes.clamp(max=top)
    if with_offset:
        assert seed is not None
        u = _offset(seed, step_bits.view(torch.float32), grouping.bits).unsqueeze(-1)
        from_zero = from_zero.unsqueeze(-1)
        codes = codes + (base + u + from_zero) - base
        codes = torch.where(from_zero & (values <= 0), 0.0, codes)
    else:
        codes = codes + (base + (0.5 if seed is None else draws(seed, grouping))) - base

    # The step that is kept is rounded down where the last code would stand for more than is finite.
    last = step_bits.view(torch.float32) * (top / 2) + half_low
    step_bits = torch.where(last > greatest / 2, exact.view(torch.int32) & -65536, step_bits)
    step_bits = torch.where(replaced, step_bits | SIGN, step_bits)
    return codes.floor().to(torch.uint8), low_bits | ((step_bits >> 16) & 0xFFFF)


def _offset(seed: Tensor, step: Tensor, bits: int) -> Tensor:
    """u of each group, in the shape of its step."""
    u = offsets(seed, step.numel(), bits).view_as(step)
    return torch.where(step.abs() < COARSE, u, 0.5)


def line(words: Tensor, bits: int, seed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What codes of groups by offset stand for: halves of code 0's value and of a step, float32.

    The third is what code 0 stands for: of groups from zero 0, but NaN in a group with one. All
    have the shape of the words.
    """
    low = (words & -65536).view(torch.float32)
    step = (words << 16).view(torch.float32).abs()
    half_step = step * 0.5  # the product of whole ones may overflow
    u = _offset(seed, step, bits)
    middle = torch.where(step < COARSE, 0.5 - 2.0 ** -(fraction_bits(bits) + 1), 0.5)
    from_zero = low == 0
    first = low * 0.5 + half_step * (middle - u - from_zero.float())
    nothing = half_step * 0.0
    return first, half_step, torch.where(from_zero, nothing, (first + nothing) * 2.0)


def on_line(numbers: Tensor, first: Tensor, half_step: Tensor, lowest: Tensor) -> Tensor:
    """The float32 values of codes [groups, group_size], of what `line` gives as [groups, 1]."""
    values = (first + half_step * numbers.float()) * 2.0
    return torch.where(numbers == 0, lowest, values)


def decode(
    numbers: Tensor, words: Tensor, bits: int, seed: Tensor | None, replaced: bool
) -> Tensor:
    """The float32 values of codes [groups, group_size] and words [groups], by offset with a seed.

    Unless those in place of infinities will do, as they do for derivatives, groups with any come
    back as NaN.
    """
    words = words.view(-1, 1)
    if seed is None:
        half_low = (words & -65536).view(torch.float32) * 0.5
        half_step = (words << 16).view(torch.float32).abs() * 0.5
        values = (half_low + half_step * numbers.float()) * 2.0
    else:
        values = on_line(numbers, *line(words, bits, seed))
    return values if replaced else torch.where((words & 0x8000) != 0, torch.nan, values)

"""The rotated code in plain PyTorch: a group is turned at random, so that its values are normal.

A group x of G values keeps their mean m, G codes, and a scale k. With d = x - m, signs D drawn for
the group and the Hadamard matrix H,

    y = H D d / |d|,   code = round((2^b - 1) S(y / (2 F) + 1/2)),   k = |d| / <y, l(code)>,
    x~ = m + k D H l(code).

Each of the values y is a sum of G with random signs, so it is nearly normal whatever x is, with
variance 1, since H H = G. `Formula` has S, F and the levels l. They are the least-squares ones of a
normal distribution (Lloyd, Max) but for 2% of the error, which is .135, .0359 and .00970 of the
variance at 2, 3 and 4 bits with this scale. It is that of EDEN (Vargaftik et al., ICML 2022), which
makes <x~ - m, d> = |d|^2: what a pack errs by is across d. A scale that half of the group tells
errs by 1.5% more in all, but along d, and what reads whole groups at once, as attention does, errs
by up to half as much again. So the code is unbiased over rotations that turn d anywhere, and nearly
over these: what is left of a bias is 2% of the squared error at 2 bits and .3% at 4. Mean and scale
are bfloat16 numbers in one int32 word, the mean in the high half.

Without the mean a group far from 0 would spend its codes on that; without signs one whose values
are alike would be turned into few large ones.

x and m are divided by a power of two near the greatest magnitude. d is a bfloat16 number from there
to products on tensor cores, and so are sums of two; what follows, and from the code on, is float16.
A group with a NaN or an infinity has a mean of NaN.

A group has eight parts, one after the other, and a place is one element of each. The codes of a
place are one integer of 8 b bits, the code of part p in bits from b p up. Its `pieces` are the low
16 bits, then the next 16 or 8: a group is the first piece of all places, then the second.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from packlight._checks import without_autocast
from packlight.elementwise.limits import GREATEST, Limits
from packlight.groupquant.draws import signs
from packlight.groupquant.grouping import Grouping
from packlight.groupquant.minmax_reference import SIGN


class Formula(NamedTuple):
    """How y becomes a code, and what a code stands for.

    code = round((2^b - 1) S(u)), u = y / (2 bound) + 1/2 between 0 and 1, and
    level = s (5/2 + s^4), s = step (code - (2^b - 1) / 2). Where smooth, S(u) = u^2 (3 - 2 u);
    otherwise S(u) = u and level = s. `last` is above all levels and bounds what a pack may stand
    for.
    """

    bound: float
    step: float
    last: float
    smooth: bool


_HALF = torch.finfo(torch.float16).max
# Of <y, l(code)>, much less than the least level times |y|, unless values differ by less than
# float16 can tell apart: a millionth of the greatest.
LEAST = 0.0625

LIFT = 2.5
# By bits. Steps are powers of two, so that float16 has s.
FORMULAS = {
    1: Formula(0.5, 1.0, 0.52, False),
    2: Formula(1.5, 1.0, 1.55, False),
    3: Formula(2.6, 1 / 4, 2.71, True),
    4: Formula(3.06, 1 / 8, 3.08, True),
}


def pieces(bits: int) -> tuple[int, ...]:
    """Sizes of the integers that hold the codes of the eight elements of a place."""
    return {1: (8,), 2: (16,), 3: (16, 8), 4: (16, 16)}[bits]


def hadamard(size: int, device: torch.device) -> Tensor:
    """[size, size] of 1 and -1: the parity of the bits that row and column have in common."""
    matrix = torch.ones(1, 1, device=device)
    for _ in range(int(math.log2(size))):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def transform(x: Tensor, rounded: int) -> Tensor:
    """H x of each row of 16-bit `x`, in float32: so many steps of three between its eighths in the
    dtype of `x`.
    """
    size = x.shape[1] // 8
    with without_autocast(x.device.type):
        for step in range(3):
            x = x.float() if step == rounded else x
            low, high = x.view(-1, 4 >> step, 2, size << step).unbind(2)
            x = torch.stack([low + high, low - high], 2)
        return (x.view(-1, size).float() @ hadamard(size, x.device)).view(-1, 8 * size)


def nearest_bfloat16(x: Tensor) -> Tensor:
    """float32 `x`, finite, rounded to a bfloat16 number, as int32 bits with a zero low half."""
    bits = x.contiguous().view(torch.int32)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536


def levels(numbers: Tensor, bits: int) -> Tensor:
    """The level of each code, float16."""
    formula = FORMULAS[bits]
    s: Tensor = ((numbers.float() - (2**bits - 1) / 2) * formula.step).half()
    if not formula.smooth:
        return s
    square = (s * s).float()
    level: Tensor = s * (square * square + LIFT).half()
    return level


def codes(y: Tensor, bits: int) -> Tensor:
    """The code of each float16 number, uint8; of NaN anything."""
    formula, top = FORMULAS[bits], 2**bits - 1
    half = torch.tensor(0.5 / formula.bound).half().float()
    u = (y.float() * half + 0.5).clamp(0.0, 1.0).half()
    if formula.smooth:
        value = (u * u).float() * (3 * top - 2 * top * u.float()).half().float()
    else:
        value = u.float() * top
    found: Tensor = value.nan_to_num(0.0).round().to(torch.uint8)
    return found


def to_bytes(numbers: Tensor, bits: int) -> Tensor:
    """Bytes, flat, of codes [groups, group_size] of uint8: see the top of this file."""
    size = numbers.shape[-1] // 8
    parts = numbers.view(-1, 8, size).int()
    whole = sum((parts[:, p] << (bits * p) for p in range(1, 8)), parts[:, 0])
    found, first = [], 0
    for width in pieces(bits):
        shifts = torch.arange(first, first + width, 8, device=numbers.device)
        found.append(((whole.unsqueeze(-1) >> shifts) & 0xFF).view(-1, size * width // 8))
        first += width
    return torch.cat(found, 1).to(torch.uint8).view(-1)


def from_bytes(bytes_: Tensor, bits: int, group_size: int) -> Tensor:
    """The inverse of `to_bytes`: codes [groups, group_size] of uint8."""
    size = group_size // 8
    left = bytes_.view(-1, size * bits).int()
    whole, first = torch.zeros_like(left[:, :size]), 0
    for width in pieces(bits):
        count = width // 8
        piece, left = left[:, : size * count].view(-1, size, count), left[:, size * count :]
        for byte in range(count):
            whole |= piece[..., byte] << (first + 8 * byte)
        first += width
    shifts = bits * torch.arange(8, device=bytes_.device).view(8, 1)
    numbers: Tensor = ((whole.unsqueeze(1) >> shifts) & (2**bits - 1)).to(torch.uint8)
    return numbers.view(-1, group_size)


def encode(
    values: Tensor, grouping: Grouping, seed: Tensor, within: Limits
) -> tuple[Tensor, Tensor]:
    """Codes of `values` [rows, row_groups, group_size] as uint8, and a word for each group.

    Of a ragged group what follows its last value is left out of the mean, and as the mean.
    """
    bits, size = grouping.bits, grouping.group_size
    lowest, highest, below, above, edge = within
    low, high = torch.aminmax(values, dim=-1) if values.numel() else (values[..., 0],) * 2
    far = low <= -edge, high >= edge
    replaced = (far[0] & (below > lowest)) | (far[1] & (above < highest))
    low = torch.where(far[0], below, low.clamp(lowest, highest))
    high = torch.where(far[1], above, high.clamp(lowest, highest)).maximum(low)
    finite = (high.float() * 0.5 - low.float() * 0.5 < math.inf).view(-1)
    x = values.clamp(low.unsqueeze(-1), high.unsqueeze(-1)).float()

    count = torch.full((grouping.row_groups,), size, device=x.device)
    count[-1:] = grouping.width - (grouping.row_groups - 1) * size
    there = torch.arange(size, device=x.device) < count.view(-1, 1)
    mean = (torch.where(there, x, 0.0) / count.view(-1, 1)).sum(-1)
    mean_bits = nearest_bfloat16(torch.where(mean.isfinite(), mean, 0.0)).view(-1, 1)
    mean = mean_bits.view(torch.float32)
    x = torch.where(there, x, mean.view(*x.shape[:2], 1)).view(-1, size)
    # Divided by a power of two, so that no square overflows or underflows.
    greatest = x.abs().amax(1, keepdim=True) if x.numel() else x[:, :1]
    exponent = (greatest.view(torch.int32) & 0x7F800000).clamp(1 << 23, 253 << 23)
    unit = exponent.view(torch.float32)
    inverse = ((254 << 23) - exponent).view(torch.float32)
    d = torch.where(finite.view(-1, 1), x * inverse - mean * inverse, 0.0)

    squares = (d * d).sum(1, keepdim=True)
    normal = squares.rsqrt().clamp(max=_HALF).half()
    y = transform((signs(seed, len(d), size) * d).bfloat16(), 1).half() * normal
    numbers = codes(y, bits)

    inner = (y * levels(numbers, bits)).float().sum(1, keepdim=True)
    scale = torch.where(inner > LEAST, unit * (squares * normal.float() / inner), 0.0)
    scale = scale.minimum((GREATEST - mean.abs()) / (FORMULAS[bits].last * size))
    scale_bits = (nearest_bfloat16(scale) >> 16) & 0xFFFF
    mean_bits = torch.where(finite.view(-1, 1), mean_bits, 0x7FC00000).int()
    words = (mean_bits | scale_bits).view(-1)
    # The sign of the scale, which is none otherwise.
    return numbers, torch.where(replaced.view(-1), words | (-SIGN >> 16), words).int()


def decode(numbers: Tensor, words: Tensor, bits: int, seed: Tensor, replaced: bool) -> Tensor:
    """The float32 values of codes [groups, group_size] and words [groups].

    Unless those in place of infinities will do, as they do for derivatives, groups with any come
    back as NaN.
    """
    mean = (words & -65536).view(torch.float32).view(-1, 1)
    scale = (words << 16).view(torch.float32).view(-1, 1)
    scale = scale.abs() if replaced else torch.where(scale < 0, torch.nan, scale)
    return mean + scale * (signs(seed, *numbers.shape) * transform(levels(numbers, bits), 3))

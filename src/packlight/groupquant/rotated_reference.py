"""The rotated code in plain PyTorch: a group is turned at random, so that its values are normal.

A group x of G values keeps their mean m, G codes, and a scale k. With d = x - m, signs D drawn for
the group and the Hadamard matrix H,

    y = H D d / |d|,   code = floor(a y (1 - c y^2) + 2^b / 2),   k = |d|^2 / <H D d, l(code)>,
    x~ = m + k D H l(code).

Each of the values y is a sum of G with random signs, so it is nearly normal whatever x is, with
variance 1, since H H = G. The borders of the codes and their levels l = s (1 + e s^4),
s = code - (2^b - 1) / 2, are the least-squares ones of a normal distribution (Lloyd, Max) but for
1%: an error of .119, .0346 and .00957 of the variance at 2, 3 and 4 bits. The scale is that of
EDEN (Vargaftik et al., ICML 2022): it makes <x~ - m, d> = |d|^2, so the code is unbiased over
rotations that turn d anywhere, and nearly over these: what is left of a bias is 2% of the squared
error at 2 bits and .3% at 4. Mean and scale are bfloat16 numbers in one int32 word, the mean in the
high half.

Without the mean a group far from 0 would spend its codes on that; without signs one whose values
are alike would be turned into few large ones.

d is divided by its greatest magnitude. From there to the code, and from the code on, numbers are
float16, in which 16 + code has six more bits. A group with a NaN or an infinity has a mean of NaN.
"""

import math

import torch
from torch import Tensor

from packlight._checks import without_autocast
from packlight.elementwise.limits import GREATEST, Limits
from packlight.groupquant.draws import signs
from packlight.groupquant.grouping import Grouping
from packlight.groupquant.minmax_reference import SIGN

# By bits: a, c, e, the greatest magnitude of y of which the formula is, and one that is above all
# levels, which bounds what a pack may stand for.
FORMULAS = {
    1: (1.0, 0.0, 0.0, 0.96, 0.52),
    2: (1 / 0.97, 0.0, 0.0, 1.92, 1.55),
    3: (2.0, 0.045, 1.4e-3, 2.89, 4.4),
    4: (3.8, 0.04, 1.12e-4, 2.89, 10.5),
}
# Differences are taken of sixteenths: whole ones may overflow, and so may inverses of small ones.
PART = 0.0625
LEAST = 2.0**-120


def hadamard(size: int, device: torch.device) -> Tensor:
    """[size, size] of 1 and -1: the parity of the bits that row and column have in common."""
    matrix = torch.ones(1, 1, device=device)
    for _ in range(int(math.log2(size))):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix


def transform(x: Tensor) -> Tensor:
    """H x of each row of `x`, rounded to float16, in float32: between its eighths in float16."""
    size = x.shape[1] // 8
    x = x.half()
    with without_autocast(x.device.type):
        for step in range(3):
            low, high = x.view(-1, 4 >> step, 2, size << step).unbind(2)
            x = torch.stack([low + high, low - high], 2)
        return (x.view(-1, size).float() @ hadamard(size, x.device)).view(-1, 8 * size)


def nearest_bfloat16(x: Tensor) -> Tensor:
    """float32 `x`, finite, rounded to a bfloat16 number, as int32 bits with a zero low half."""
    bits = x.contiguous().view(torch.int32)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536


def levels(numbers: Tensor, bits: int) -> Tensor:
    """l(code), float16."""
    s = (numbers.float() - (2**bits - 1) / 2).half()
    square = s * s
    level: Tensor = s * (square * square * _half(FORMULAS[bits][2]) + 1)
    return level


def _half(number: float) -> float:
    """A number as float16 has it."""
    return float(torch.tensor(number).half())


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
    d = torch.where(finite.view(-1, 1), x * PART - mean * PART, 0.0)

    greatest = d.abs().amax(1, keepdim=True) if d.numel() else d[:, :1]
    z = torch.where(greatest >= LEAST, d * (1 / greatest), 0.0)
    squares = (z * z).sum(1, keepdim=True)
    turned = transform(signs(seed, len(z), size) * z)
    a, c, _, furthest, last = FORMULAS[bits]
    y = (turned * squares.rsqrt()).nan_to_num(0.0).half()
    t = y.clamp(-furthest, furthest)
    t = t * (1 - _half(c) * (t * t))
    numbers = (t * _half(a) + (16 + 2 ** (bits - 1))).float().floor().to(torch.uint8) - 16

    inner = (y * levels(numbers, bits)).float().sum(1, keepdim=True)
    scale = (greatest * (squares.sqrt() / inner)).nan_to_num(0.0) / PART
    scale = scale.minimum((GREATEST - mean.abs()) / (last * size))
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
    return mean + scale * (signs(seed, *numbers.shape) * transform(levels(numbers, bits)))

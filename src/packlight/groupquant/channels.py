"""Channels by scales of their own, so that one far larger than the others takes nothing from them.

Rows x [..., C] are packed as y = (x - m) 2^-e, with a mean m and an exponent e of each channel, and
come back as x~ = y~ 2^e + m. With r the root mean square of a channel about its mean,

    e = max(0, round(3/4 log2(r / median of r))).

A group's error is the same for all of its y, so that of a channel grows with 2^e. An exponent of
1/2 in place of 3/4 would make the error of all values together least; one of 1 would make that of
each channel the same share of the channel, and the large ones no better than the others. With 3%
of the channels 60 times larger, at 4 bits, 1/2, 3/4 and 1 leave a weight gradient an error of .024,
.031 and .100, and .150, .112 and .096 in the columns of the other channels, as without large ones.

Mean and exponent are of the tensor itself, of some of its rows, and travel with its pack. So there
is no state, and a checkpoint's two passes, a replayed graph and the first step are like any other.
What is sampled decides how near a pack comes, not what it stands for: the code is as unbiased as it
is for y. Readers apply both with the weight and bias that a pack of a norm has.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SAMPLED = 256  # rows
FEWEST_ROWS = 256  # of which mean and scale, 32 bits a channel, are an eighth of a bit an element
POWER = 0.75
_LARGEST = 15.0
_FARTHEST_MEAN = 2.0**100  # what is left of a finite value is finite


def fit(shape: Sequence[int], stride: Sequence[int], group_size: int) -> bool:
    """Whether a tensor of dense strides has rows enough, and each of whole groups."""
    if len(shape) < 2 or shape[-1] == 0 or shape[-1] % group_size:
        return False
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return expected >= FEWEST_ROWS * shape[-1]


def of_channels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """2^e and m of `rows` [n, C], each bfloat16; 1 and 0 of channels that are not finite."""
    some = rows[:: max(1, rows.shape[0] // SAMPLED)].float()
    variance, mean = torch.var_mean(some, 0, correction=0)
    deviation = variance.sqrt()
    exponent = (POWER * torch.log2(deviation / deviation.median())).round()
    exponent = exponent.nan_to_num(0.0, 0.0, 0.0).clamp(0.0, _LARGEST)
    mean = mean.nan_to_num(0.0, 0.0, 0.0).clamp(-_FARTHEST_MEAN, _FARTHEST_MEAN)
    return exponent.exp2().bfloat16(), mean.bfloat16()


def scaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y as rows, and what brings x back: 2^e and m."""
    rows = x.reshape(-1, x.shape[-1])
    scale, mean = of_channels(rows)
    if x.dtype == torch.float16:  # in which a difference may overflow
        rows = rows.float()
    return (rows - mean.to(rows.dtype)) * scale.reciprocal().to(rows.dtype), scale, mean

"""Which channels of a norm's weights let x_hat be had from the output, and which do not.

The output y = gamma x_hat + beta is rounded to u |y|, half a unit of its dtype, so that
x_hat = (y - beta) / gamma has an error of up to

    u |x_hat + beta / gamma|.

A large offset |beta / gamma| drowns x_hat in the rounding of beta; a gamma so small that gamma
x_hat underflows loses it outright. Such channels are ill-posed: a norm keeps x_hat itself for them.

**Offset.** In float32 the limit is 64: gradients then differ from torch's by 4e-6 at most. In 16
bits it is 1/2. There torch's own dgamma has one rounding, that of the result, and ours that of y
besides, larger by sqrt(1 + (beta / gamma)^2): together sqrt(2 + 1/4) = 1.5 times torch's error when
rows are independent, the worst case. The norms of all-MiniLM-L6-v2 have 38 ill-posed channels among
4992 in 16 bits (at most 13 of 384 in one norm), and 2 in float32, whose gamma has vanished.

**Underflow.** y is exact to u |y| down to the smallest normal number, so |gamma| must not be below
that; in float32 and bfloat16 it must not be below 2^-100, since kernels flush subnormal numbers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from packlight import _torch

OFFSET_LIMIT = {
    torch.bfloat16: 0.5,
    torch.float16: 0.5,
    torch.float32: 64.0,
    torch.float64: 64.0,
}
SMALLEST = {
    torch.bfloat16: 2.0**-100,
    torch.float16: 2.0**-14,
    torch.float32: 2.0**-100,
    torch.float64: 2.0**-1000,
}


def ill_posed(
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    offset_limit: float | None = None,
) -> Tensor | None:
    """Which channels must be kept exactly where the output is kept in `dtype`, as a bool tensor.

    None where there is neither weight nor bias, and so nothing to be ill-posed. `offset_limit`
    replaces the limit on |beta / gamma| (see the module's text): a larger one keeps less, with an
    error of x_hat of up to u (|x_hat| + limit).
    """
    if weight is None and bias is None:
        return None
    with torch.no_grad():
        gamma, beta = _sizes(weight, bias)
        limit = OFFSET_LIMIT[dtype] if offset_limit is None else offset_limit
        return (gamma < SMALLEST[dtype]) | (beta > limit * gamma)


def _sizes(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """|gamma| and |beta| in float64, 1 and 0 where there is none."""
    gamma, beta = (None if t is None else t.detach().double().abs() for t in (weight, bias))
    if gamma is None:
        assert beta is not None
        return torch.ones_like(beta), beta
    return gamma, torch.zeros_like(gamma) if beta is None else beta


class Verdict(NamedTuple):
    """What a norm keeps beside its output: x_hat of these channels, or all of its input."""

    channels: Tensor | None  # indices into the flattened weight, None if there are none
    plain: bool  # more than half are ill-posed: torch's own norm, which keeps its input


WELL_POSED = Verdict(None, plain=False)


def verdict_of_weights(
    weight: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    offset_limit: float | None = None,
) -> Verdict:
    """The verdict on the current weights. Reads them on the host, so the device is waited for."""
    bad = ill_posed(weight, bias, dtype, offset_limit)
    if bad is None or bad.is_meta or _torch.is_fake(bad):
        return WELL_POSED
    return verdict_of_channels(bad.flatten().nonzero().flatten(), bad.numel())


def verdict_of_channels(channels: Tensor, width: int) -> Verdict:
    """The verdict when these channels of `width` are to be kept exactly."""
    if channels.numel() == 0:
        return WELL_POSED
    return Verdict(channels, plain=2 * channels.numel() > width)


def worst_error(
    weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype, verdict: Verdict
) -> float:
    """The largest u (1 + |beta / gamma|) over the channels that are not kept exactly."""
    if verdict.plain:
        return 0.0
    rounding = torch.finfo(dtype).eps / 2
    if weight is None and bias is None:
        return rounding
    gamma, beta = (t.flatten() for t in _sizes(weight, bias))
    error = rounding * (1 + beta / gamma)
    error = error.masked_fill(gamma < SMALLEST[dtype], math.inf)
    if verdict.channels is not None:
        error = error.index_fill(0, verdict.channels, rounding)
    return float(error.max())

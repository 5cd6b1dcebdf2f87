"""RReLU: slopes that torch draws, kept as few-bit codes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import (
    autocast,
    check_inplace,
    check_numbers,
    check_tensor,
    needs_gradient,
    refuse_second_derivative,
)
from packlight._overwrite import overwrite
from packlight.fewbit import ops
from packlight.fewbit.codebook import check_bits
from packlight.fewbit.functional import DEFAULT_BITS, leaky_relu
from packlight.packing.layout import compute_dtype, dense_stride, laid_out


class _Drawn(torch.autograd.Function):
    """y with slopes that torch draws; keeps their codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lower: float, upper: float, bits: int) -> Tensor:
        ctx.stride = dense_stride(x)
        y = laid_out(F.rrelu(x, lower, upper, training=True), ctx.stride)
        wide = compute_dtype(x)
        # What tells nothing of its slope, 0 and an infinity, takes the mean of all. Codes of
        # positive inputs, whose slope is 1, are above all others.
        slope = (y.to(wide) / x.to(wide)).nan_to_num_(nan=(lower + upper) / 2)
        slope = torch.where(x <= 0, slope, upper + 1.0)
        parts = 2**bits - 1
        width = (upper - lower) / parts
        borders = [*(lower + i * width for i in range(1, parts)), upper + 0.5]
        ctx.levels = (*(lower + (i + 0.5) * width for i in range(parts)), 1.0)
        ctx.bits = bits
        ctx.save_for_backward(ops.encode(slope, bits, borders, "none", 0.0, 0, ctx.stride))
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative("codes of its slopes")
        (codes,) = ctx.saved_tensors
        dx = ops.decode_backward(grad_output, codes, ctx.bits, ctx.levels, False, ctx.stride)
        return dx, None, None, None


_draw: Callable[..., Tensor] = _torch.applied(_Drawn)


def rrelu(
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
    *,
    bits: int = DEFAULT_BITS,
) -> Tensor:
    """x for x > 0, else a x, with a drawn from U(lower, upper) for each element.

    Keeps `bits` bits an element, where torch keeps the input and the slopes. Slopes are torch's own
    draws, so the output is torch's. The gradient of x is exact for x > 0; elsewhere it is dy times
    the middle of one of 2^bits - 1 equal parts of (lower, upper), the one that a lies in: unbiased
    over the draws, and off by at most (upper - lower) / (2^(bits + 1) - 2) of dy. Without training
    a is the mean, and 1 bit is kept, exactly.
    """
    check_tensor(input, "rrelu")
    check_numbers("rrelu", lower=lower, upper=upper)
    check_bits(bits)
    if not training:
        return leaky_relu(input, (lower + upper) / 2, inplace)
    if not needs_gradient(input):
        return F.rrelu(input, lower, upper, training=True, inplace=inplace)
    if inplace:
        check_inplace(input)
    x = autocast(input, "rrelu", lambda empty: F.rrelu(empty, lower, upper, training=True))
    y = _draw(x, lower, upper, bits)
    return overwrite(input, y) if inplace else y

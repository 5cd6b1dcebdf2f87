"""Batch norm that keeps a fixed-point code of its normalised value.

`batch_norm` has torch.nn.functional's arguments, plus `bits` and `window`. A `relu` that reads its
output keeps nothing of its own, and its gradient is exact; a convolution or a Linear that reads
either rebuilds its input from the same code.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import check_tensor, refuse_second_derivative
from packlight.groupquant.fixed_point import ops
from packlight.groupquant.fixed_point.method import FixedPoint, bin_width
from packlight.groupquant.fixed_point.packs import KEEPS, Rebuild, grade
from packlight.layers import channel_norms
from packlight.pack import Pack
from packlight.packing.layout import in_memory_format

_DEFAULT = FixedPoint()


class _BatchNorm(torch.autograd.Function):
    """y, codes and table; keeps the latter two."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        bits: int,
        width: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, codes, table = ops.batch_norm(
            x, weight, bias, running_mean, running_var, momentum, eps, bits, width
        )
        ctx.mark_non_differentiable(codes, table)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(codes, table)
        ctx.layout = (y.stride(), bits)
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, codes, table

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        dx = dweight = dbias = None
        if grad_output is not None:
            codes, table = ctx.saved_tensors
            dx, dgamma, dbeta = ops.batch_norm_backward(
                grad_output, codes, table, *ctx.layout, False, None
            )
            needs_input, needs_weight, needs_bias, *_ = ctx.needs_input_grad
            if needs_weight:
                dweight = dgamma.to(ctx.weight_dtype)
            if needs_bias:
                dbias = dbeta.to(ctx.bias_dtype)
            if not needs_input:
                dx = None
        return dx, dweight, dbias, *[None] * 6


_apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _torch.applied(_BatchNorm)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    bits: int = _DEFAULT.bits,
    window: float | None = _DEFAULT.window,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) gamma + beta over [N, C, ...], statistics over all but C.

    In training keeps `bits` bits an element and 24 bytes a channel, where torch keeps x. With g the
    gradient of y,

        dgamma = sum(g x~),  dbeta = sum(g),  dx = gamma rstd (g - mean g - x~ mean(g x~)):

    dbeta and the path through the mean exact, the rest biased by the error of x~ (`FixedPoint`).
    Without `training`, where no gradient is asked for, and below 16 values a channel, this is
    torch's function. Of a parameter it is that of `packlight.groupquant`.
    """
    check_tensor(input, "batch_norm")
    if channel_norms.is_of_a_weight(input, running_mean, training):
        return channel_norms.standardised(input, weight, bias, eps)
    width = bin_width(bits, window)
    if not training or not channel_norms.worth_packing(input, weight, bias):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    running = (running_mean, running_var)
    input = in_memory_format(input)
    y, codes, table = _apply(input, weight, bias, *running, momentum, eps, bits, width)
    shape = tuple(y.shape)
    rebuild = Rebuild(shape, y.stride(), bits)
    sharing.note_pack(y, Pack(rebuild, shape, (codes, table), grade(bits)))
    return y

"""A convolution, the batch norm behind it and a ReLU as one function, with a residual sum too.

    y = batch_norm(W * x),   relu(batch_norm(W * x))   or   relu(batch_norm(W * x) + other)

Apart, they are two to four functions, with notes between them that nothing else reads. Here the
forward pass reads and writes y once, and the backward pass takes the mask of the ReLU where it
reads a gradient anyway. What the convolution makes is overwritten by y.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight import _torch
from packlight._checks import refuse_second_derivative, saved_with_weight
from packlight._gradients import recast
from packlight._overwrite import writable
from packlight.groupquant.fixed_point import ops
from packlight.groupquant.fixed_point.packs import KEEPS, Rebuild, grade
from packlight.groupquant.fixed_point.relu import times_mask
from packlight.groupquant.fixed_point.residual import sum_of
from packlight.layers.channel_norms import MIN_VALUES
from packlight.layers.convolution import Geometry, convolution_gradients
from packlight.pack import Pack
from packlight.reading import reader

# Running mean and variance, momentum, eps, bits and width of a bin.
_Norm = tuple[Tensor | None, Tensor | None, float, float, int, float]


class _ConvNorm(torch.autograd.Function):
    """y, codes, table, and with another term the mask of the sum.

    Keeps W, the pack of x, and these but y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        other: Tensor | None,
        geometry: Geometry,
        norm: _Norm,
        relu: bool,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        y = geometry.forward(x, weight, bias)  # autocast casts in here, and keeps no copy
        if y._is_view():  # of one axis, which torch makes of two
            y = writable(y)
        if other is None:
            made = ops.batch_norm_(y, gamma, beta, *norm, relu)
        else:
            made = ops.batch_norm_sum_(y, gamma, beta, *norm, other)
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *made, *tensors)
        ctx.geometry, ctx.rebuild, ctx.shape = geometry, rebuild, x.shape
        ctx.layout, ctx.is_sum = (y.stride(), norm[4]), other is not None
        ctx.relu, ctx.is_relu = relu and other is None, relu or other is not None
        given = (x, weight, bias, gamma, beta, other)
        ctx.dtypes = [None if each is None else each.dtype for each in given]
        return y, *made

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        needs, dtypes = _torch.needed_gradients(ctx), ctx.dtypes
        if grad_output is None:
            return (None,) * len(needs)
        weight, codes, table, *tensors = saved_with_weight(ctx)
        signs = tensors.pop(0) if ctx.is_sum else None
        stride, bits = ctx.layout
        dh, dgamma, dbeta = ops.batch_norm_backward(
            grad_output, codes, table, stride, bits, ctx.relu, signs
        )
        found = convolution_gradients(
            ctx.geometry, dh, ctx.rebuild, tensors, ctx.shape, recast(weight, dh), needs[:3]
        )
        del dh, weight
        dother = None
        if signs is not None and needs[5]:  # last, when what is as large is gone
            dother = times_mask(grad_output, signs, stride)
        rows = zip((*found, dgamma, dbeta, dother), dtypes, needs[:6], strict=True)
        gradients = [
            None if not need else g if g.dtype == dtype else g.to(dtype) for g, dtype, need in rows
        ]
        return *gradients, *[None] * (len(needs) - 6)


_apply: Callable[..., tuple[Tensor, ...]] = _torch.applied(_ConvNorm)


@functools.lru_cache(4096)
def geometry_of(
    shape: torch.Size,
    weight: torch.Size,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Geometry, tuple[int, ...]] | None:
    """That of a convolution of [N, C, ...], and the shape of its output.

    None where the layers are to run one by one: where the input does not fit, which raises, and
    where a batch norm of so few values packs nothing.
    """
    if len(shape) != len(weight) or shape[1] != weight[1] * groups:
        return None
    window = zip(shape[2:], weight[2:], stride, padding, dilation, strict=True)
    sizes = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in window]
    if min(sizes) < 1 or shape[0] * math.prod(sizes) < MIN_VALUES:
        return None
    geometry = Geometry(stride, padding, dilation, False, (0,) * len(stride), groups)
    return geometry, (shape[0], weight[0], *sizes)


def conv_norm(
    x: Tensor,
    kept: Pack,
    convolution: tuple[Tensor, Tensor | None, Geometry],
    affine: tuple[Tensor | None, Tensor | None],
    norm: _Norm,
    relu: bool,
    other: tuple[Tensor, Pack | None] | None,
) -> tuple[Tensor, Pack | None]:
    """y as above, and what is kept of it, which no note says yet.

    `kept` is a pack of x; `other` is the other term of a residual sum and what is kept of it, if
    anything is. In eager mode, in training, with a gradient of the weight; the checks are the
    caller's. Keeps what `fixed_point.batch_norm` keeps, for a sum one bit an element more, and for
    the convolution nothing but the pack of x. Gradients are those of the layers one by one: the
    mask is exact, the rest is as exact as codes and pack.
    """
    rebuild = reader(kept.reading, kept.rebuild)
    term, of_term = (None, None) if other is None else other
    given = (*convolution[:2], *affine, term, convolution[2], norm, relu, rebuild, *kept.tensors)
    y, codes, table, *signs = _apply(x, *given)
    shape, stride, bits = tuple(y.shape), y.stride(), norm[4]
    own = Rebuild(shape, stride, bits, relu and term is None)
    pack = Pack(own, shape, (codes, table), grade(bits))
    if term is None:
        return y, pack
    if term.dtype != y.dtype or term.stride() != stride:  # as in any sum
        of_term = None
    return y, sum_of(pack, of_term, stride, *signs)

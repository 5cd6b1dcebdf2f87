"""Dropout that keeps one bit an element."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight._checks import (
    check_inplace,
    check_numbers,
    check_tensor,
    needs_gradient,
    refuse_second_derivative,
)
from packlight._philox import draw_seed
from packlight.errors import InputError
from packlight.fewbit import ops
from packlight.packing.layout import dense_stride


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float, inplace: bool) -> Tensor:
        ctx.stride = dense_stride(x)
        if inplace:
            y, codes = x, ops.dropout_(x, seed, p, True)
            ctx.mark_dirty(x)
        else:
            y, codes = ops.dropout(x, seed, p, True)
        ctx.save_for_backward(codes)
        ctx.levels = (0.0, 1 / (1 - p))
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative()
        (codes,) = ctx.saved_tensors
        dx = ops.decode_backward(grad_output, codes, 1, ctx.levels, False, ctx.stride)
        return dx, None, None, None


_drop: Callable[..., Tensor] = _Dropout.apply


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zeroes each element with probability p and divides the rest by 1 - p.

    Keeps 1 bit an element, where torch keeps a byte (a scaled copy on the CPU). Exact: the gradient
    has the very mask of the forward, and 1 / (1 - p) in fp32. The mask comes from Philox4x32-10 and
    a seed drawn from the ambient generator of the tensor's device, so `torch.manual_seed` repeats a
    run bit for bit and a checkpoint's recomputation sees the same mask. The stream differs from
    torch's own.

    Raises `InputError` when p is outside 0 to 1.
    """
    check_tensor(input, "dropout")
    check_numbers("dropout", p=p)
    if not 0.0 <= p <= 1.0:
        raise InputError(f"p={p!r} is not a probability from 0 to 1")
    if not training or p in (0.0, 1.0):
        return F.dropout(input, p, training, inplace)  # keeps nothing of the input's size
    seed = draw_seed(input)
    # Without a gradient too: a checkpoint runs its first pass so, and must see the same mask.
    if needs_gradient(input):
        if inplace:
            check_inplace(input)
        return _drop(input, seed, p, inplace)
    if inplace:
        ops.dropout_(input, seed, p, False)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(input)  # as any in-place operation of torch
        return input
    y: Tensor = ops.dropout(input, seed, p, False)[0]
    return y

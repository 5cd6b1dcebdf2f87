"""Largest and smaller of values: who was it is a bit, where torch keeps all values. Exact."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight._checks import is_plain, needs_gradient, refuse_second_derivative
from packlight.layers.arithmetic import followed
from packlight.packing.layout import dense_stride
from packlight.packing.ops import pack_mask, unpack_mask


def _bits(mask: Tensor) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    stride = dense_stride(mask)
    return pack_mask(mask.view(torch.uint8), stride), tuple(mask.shape), stride


class _Extreme(torch.autograd.Function):
    """The largest, or smallest, elements along dimensions; keeps a bit an element of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[..., Tensor], dim: Any) -> Tensor:
        y = function(x, dim, keepdim=True)
        bits, *ctx.layout = _bits(x == y)
        ctx.save_for_backward(bits)
        ctx.dim = dim
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second_derivative("a bit an element")
        mask = unpack_mask(*ctx.saved_tensors, *ctx.layout)
        share = dy / mask.sum(ctx.dim, keepdim=True)  # as torch divides it among equal ones
        return torch.where(mask, share, 0.0), None, None


_extreme: Callable[..., Tensor] = _Extreme.apply


def _along(function: Callable[..., Tensor], x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    if torch.compiler.is_dynamo_compiling() or not needs_gradient(x) or x.dim() == 0:
        return function(x, dim, keepdim)
    dims = (dim,) if isinstance(dim, int) else tuple(dim) or tuple(range(x.dim()))
    y = _extreme(x, function, dims)
    return y if keepdim else y.squeeze(dims)


def amax(input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """`torch.amax`. Keeps a bit an element; exact."""
    return _along(torch.amax, input, dim, keepdim)


def amin(input: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor:
    """`torch.amin`. Keeps a bit an element; exact."""
    return _along(torch.amin, input, dim, keepdim)


class _Larger(torch.autograd.Function):
    """The larger, or smaller, of two; keeps three bits an element."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, smaller: bool) -> Tensor:
        y = torch.minimum(a, b) if smaller else torch.maximum(a, b)
        lost = (a > b, a < b) if smaller else (a < b, a > b)
        kept = [_bits(mask) for mask in (*lost, a == b)]
        ctx.save_for_backward(*(bits for bits, *_ in kept))
        ctx.layouts = [layout for _, *layout in kept]
        ctx.shapes = (a.shape, b.shape)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        refuse_second_derivative("three bits an element")
        lost_a, lost_b, equal = (
            unpack_mask(bits, *layout)
            for bits, layout in zip(ctx.saved_tensors, ctx.layouts, strict=True)
        )
        dy = torch.where(equal, dy / 2, dy)
        da, db = dy.masked_fill(lost_a, 0.0), dy.masked_fill(lost_b, 0.0)
        return da.sum_to_size(ctx.shapes[0]), db.sum_to_size(ctx.shapes[1]), None


_larger: Callable[..., Tensor] = _Larger.apply


def _of_two(function: Callable[..., Tensor], a: Tensor, b: Tensor) -> Tensor:
    packed = (
        not torch.compiler.is_dynamo_compiling()
        and (needs_gradient(a) or needs_gradient(b))
        and a.dtype == b.dtype
        and a.device == b.device
        and is_plain(b)
    )
    if not packed:
        return function(a, b)
    return followed(lambda a, b: _larger(a, b, function is torch.minimum), a, b, again=function)


def maximum(input: Tensor, other: Tensor) -> Tensor:
    """`torch.maximum`. Keeps three bits an element, where torch keeps both tensors; exact."""
    return _of_two(torch.maximum, input, other)


def minimum(input: Tensor, other: Tensor) -> Tensor:
    """`torch.minimum`. Keeps three bits an element, where torch keeps both tensors; exact."""
    return _of_two(torch.minimum, input, other)

"""Power-average pooling that keeps its input once.

Torch composes it of elementwise functions around an average pooling, and keeps the input, its power
and four tensors of the size of the output. All of them are made again here from the input.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import (
    autocasts,
    check_tensor,
    needs_gradient,
    numbers,
    refuse_second_derivative,
)
from packlight.layers.shape_only import Size, avg_pool_gradient

# One axis is the last of two, the other of size 1, as in torch's own average pooling.
_POOLS: dict[int, Callable[..., Tensor]] = {2: F.lp_pool2d, 3: F.lp_pool3d}
_AVERAGES: dict[int, Callable[..., Tensor]] = {2: F.avg_pool2d, 3: F.avg_pool3d}


class _LPPool(torch.autograd.Function):
    """y = (sum of x^p over a window)^(1/p); keeps x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        p: float,
        kernel: tuple[int, ...],
        stride: tuple[int, ...],
        ceil_mode: bool,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = (p, kernel, stride, ceil_mode)
        return _POOLS[len(kernel)](x, p, kernel, stride, ceil_mode)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative("its input, and makes the rest again")
        (x,) = ctx.saved_tensors
        return _gradient(grad_output, x, *ctx.settings), None, None, None, None


def _gradient(
    grad_output: Tensor,
    x: Tensor,
    p: float,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    ceil_mode: bool,
) -> Tensor:
    """The steps of torch's own backward pass, in their order, so that all bits are the same."""
    axes = len(kernel)
    mean = _AVERAGES[axes](x.pow(p), kernel, stride, 0, ceil_mode)
    sign, size = torch.sign(mean), F.relu(torch.abs(mean))
    power = (sign * size).mul(math.prod(kernel))
    d_product = grad_output * (1 / p * power.pow(1 / p - 1)) * math.prod(kernel)
    d_size = (d_product * sign).masked_fill_(size <= 0, 0)
    d_mean = d_size * torch.sgn(mean)
    gradient = avg_pool_gradient(axes)
    d_power = gradient(d_mean, x, kernel, stride, (0,) * axes, ceil_mode, True, None)
    return d_power * (p * x.pow(p - 1))


_apply: Callable[..., Tensor] = _torch.applied(_LPPool)


def _lp_pool(
    axes: int,
    input: Tensor,
    norm_type: Any,
    kernel_size: Size,
    stride: Size | None,
    ceil_mode: bool,
) -> Tensor:
    check_tensor(input, f"lp_pool{axes}d")
    # An exponent that is a tensor may be trained.
    is_power = isinstance(norm_type, (int, float)) and math.isfinite(norm_type)
    if not is_power or not needs_gradient(input) or autocasts(input.device.type):
        plain: Any = getattr(F, f"lp_pool{axes}d")
        y: Tensor = plain(input, norm_type, kernel_size, stride, ceil_mode)
        return y
    kernel = numbers(kernel_size, axes, "kernel_size")
    steps = kernel if stride is None else numbers(stride, axes, "stride")
    if axes > 1:
        return _apply(input, norm_type, kernel, steps, ceil_mode)
    y = _apply(input.unsqueeze(-2), norm_type, (1, *kernel), (1, *steps), ceil_mode)
    return y.squeeze(-2)


def lp_pool1d(
    input: Tensor,
    norm_type: Any,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Power-average pooling over [N, C, L] or [C, L]; see `lp_pool2d`."""
    return _lp_pool(1, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool2d(
    input: Tensor,
    norm_type: Any,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """(sum of x^p over a window)^(1/p) over [N, C, H, W] or [C, H, W], with torch's arguments.

    Keeps the input, of which torch keeps the power besides, and four tensors of the size of the
    output; exact. With an infinite p, and under autocast, it is torch's own.
    """
    return _lp_pool(2, input, norm_type, kernel_size, stride, ceil_mode)


def lp_pool3d(
    input: Tensor,
    norm_type: Any,
    kernel_size: Size,
    stride: Size | None = None,
    ceil_mode: bool = False,
) -> Tensor:
    """Power-average pooling over [N, C, D, H, W] or [C, D, H, W]; see `lp_pool2d`."""
    return _lp_pool(3, input, norm_type, kernel_size, stride, ceil_mode)

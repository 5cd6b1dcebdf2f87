"""The norms' `autograd.Function`s: what is kept, and how the backward pass reads it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight import _torch
from packlight._checks import refuse_second_derivative
from packlight.inverted import norm_ops as ops


class _InvertedRowNorm(torch.autograd.Function):
    """LayerNorm or RMSNorm; keeps its output, or the cast of it where it returns one too."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        channels: Tensor | None,
        normalized_shape: tuple[int, ...],
        eps: float,
        centred: bool,
        dtype: torch.dtype,
        cast: torch.dtype | None,
    ) -> Any:
        y, narrow, rstd, exact = ops.row_norm(
            x, normalized_shape, weight, bias, channels, eps, centred, dtype, cast
        )
        ctx.set_materialize_grads(False)
        ctx.arguments = (normalized_shape, centred, x.dtype)
        kept = y if cast is None else narrow
        ctx.save_for_backward(kept, weight, bias, channels, rstd, _unless(channels is None, exact))
        return y if cast is None else (y, narrow)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_narrow: Tensor | None = None) -> Any:
        refuse_second_derivative("its output")
        dy = _sum(grad_output, grad_narrow)
        if dy is None:
            return (None,) * 9
        kept, weight, bias, channels, rstd, exact = _kept(ctx)
        normalized_shape, centred, dtype = ctx.arguments
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx, dgamma, dbeta = ops.row_norm_backward(
            dy,
            kept,
            normalized_shape,
            weight,
            bias,
            channels,
            rstd,
            exact,
            centred,
            dtype,
            needs_x,
            needs_weight or needs_bias,
        )
        return (
            _unless(not needs_x, dx),
            _unless(not needs_weight, dgamma),
            _unless(not needs_bias, dbeta),
            *[None] * 6,
        )


class _InvertedChannelNorm(torch.autograd.Function):
    """BatchNorm, GroupNorm or InstanceNorm; keeps as `_InvertedRowNorm` does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        channels: Tensor | None,
        kind: str,
        arguments: tuple[Any, ...],
        dtype: torch.dtype,
        cast: torch.dtype | None,
    ) -> Any:
        kept_dtype = cast or dtype
        if kind == "group":
            y, rstd, exact = ops.group_norm(
                x, weight, bias, channels, *arguments, dtype, kept_dtype
            )
        else:
            running_mean, running_var, momentum, eps = arguments
            op = ops.batch_norm if kind == "batch" else ops.instance_norm
            y, rstd, exact = op(
                x,
                weight,
                bias,
                running_mean,
                running_var,
                channels,
                momentum,
                eps,
                dtype,
                kept_dtype,
            )
        ctx.set_materialize_grads(False)
        ctx.input_dtype = x.dtype
        kept = y if cast is None else y.to(cast)
        ctx.save_for_backward(kept, weight, bias, channels, rstd, _unless(channels is None, exact))
        return y if cast is None else (y, kept)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, grad_narrow: Tensor | None = None) -> Any:
        refuse_second_derivative("its output")
        dy = _sum(grad_output, grad_narrow)
        if dy is None:
            return (None,) * 8
        kept, weight, bias, channels, rstd, exact = _kept(ctx)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dx, dgamma, dbeta = ops.channel_norm_backward(
            dy,
            kept,
            weight,
            bias,
            channels,
            rstd,
            exact,
            ctx.input_dtype,
            needs_x,
            needs_weight or needs_bias,
        )
        return (
            _unless(not needs_x, dx),
            _unless(not needs_weight, dgamma),
            _unless(not needs_bias, dbeta),
            *[None] * 5,
        )


# Typed names: torch leaves `apply` without annotations.
norm_rows: Callable[..., Any] = _torch.applied(_InvertedRowNorm)
norm_channels: Callable[..., Any] = _torch.applied(_InvertedChannelNorm)


def _kept(ctx: Any) -> tuple[Any, ...]:
    try:
        tensors: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace operation" in str(error):
            error.add_note(
                "An inverted norm keeps its output. Where the model overwrites that, as with"
                " nn.ReLU(inplace=True) or `+=`, this saves nothing over keeping the input: leave"
                ' such norms out, as in convert(model, {nn.BatchNorm2d: None, "*": Inverted()})'
            )
        raise
    return tensors


def _unless(absent: bool, tensor: Tensor) -> Tensor | None:
    """The tensor, None where its operator left it empty."""
    return None if absent else tensor


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of the gradients of the two outputs, either of which may have none."""
    if a is None or b is None:
        return b if a is None else a
    return a + b

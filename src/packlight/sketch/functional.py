"""Functions that keep a sketch of their input: torch.nn.functional's names and arguments, plus
`rows`, `kind`, `min_rows` and `max_rows` as `Sketch` has them.

The forward is torch's. Kept for the backward pass are the weight and `Sketch.row_count(tokens)`
rows in place of all tokens, in the dtype in which torch computes. Gradients with respect to input
and bias are exact, the weight's is unbiased. Functions that read one tensor (q, k, v) share one
sketch, with the rows and the kind of the first; a pack of another method is not used, since it may
be biased. Where the weight needs no gradient nothing of the input is kept. A second derivative
raises `DoubleBackwardError`.

Where a sketch would be no smaller than the input, torch's own function runs, and a warning says so,
once a process for a shape of the weight.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import (
    autocast_dtype,
    check_tensor,
    is_frozen,
    needs_gradient,
    refuse_second_derivative,
    saved_with_weight,
)
from packlight._gradients import column_sums, recast
from packlight._overwrite import writable
from packlight.errors import InputError
from packlight.packing.layout import compute_dtype
from packlight.sketch.method import Kind, Sketch
from packlight.sketch.sketches import WeightGradient, sketch_input

_DEFAULT = Sketch()
# By the number of axes that follow the features.
_PLAIN: tuple[Callable[..., Tensor], ...] = (F.linear, F.conv1d, F.conv2d)
_NAMES = ("linear", "conv1d", "conv2d")


def _tokens_of(x: Tensor, axes: int) -> Tensor:
    """x as [tokens, features]; a copy where they are not in one piece, as channels first."""
    if axes:
        x = x.flatten(2).transpose(1, 2)
    return x.reshape(-1, x.shape[-1])


class _Layer(torch.autograd.Function):
    """y = x W^T + b at every token; keeps W and the sketch of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axes: int,
        weight_gradient: WeightGradient,
        kept: Tensor,
    ) -> Tensor:
        # Autocast casts in here, and keeps no copy.
        y = writable(_PLAIN[axes](x, weight, bias), of_linear=axes == 0)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, kept)
        ctx.axes, ctx.weight_gradient = axes, weight_gradient
        ctx.x_dtype, ctx.weight_dtype, ctx.shape = x.dtype, weight.dtype, weight.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative("a sketch of its input")
        weight, kept = saved_with_weight(ctx)
        needs_input, needs_weight, needs_bias = _torch.needed_gradients(ctx)[:3]
        dx = dweight = dbias = None
        if needs_input:
            weight = recast(weight, grad_output)
            if ctx.axes:
                dx = _PLAIN[ctx.axes](grad_output, weight.transpose(0, 1))
            else:
                dx = grad_output.matmul(weight)
            dx = dx.to(ctx.x_dtype)
        g = _tokens_of(grad_output, ctx.axes)
        wanted = needs_bias or (needs_weight and ctx.weight_gradient.needs_total)
        total = column_sums(g, compute_dtype(g)) if wanted else None
        if needs_weight:
            dweight = ctx.weight_gradient(g, total, kept)
            dweight = dweight.view(ctx.shape).to(ctx.weight_dtype)
        if needs_bias and total is not None:
            dbias = total.to(ctx.bias_dtype)
        return dx, dweight, dbias, None, None, None


_apply: Callable[..., Tensor] = _torch.applied(_Layer)


def _check(x: Tensor, weight: Tensor, axes: int) -> None:
    name = _NAMES[axes]
    check_tensor(x, name)
    check_tensor(weight, name)
    if weight.dim() != axes + 2:
        raise InputError(
            f"{name} takes a weight of {axes + 2} dimensions, got shape {tuple(weight.shape)}"
        )
    dimensions = (axes + 1, axes + 2) if axes else range(1, x.dim() + 1)
    if x.dim() not in dimensions or x.shape[-axes - 1] != weight.shape[1]:
        where = f"dimension {-axes - 1} of" if axes else "last in"
        raise InputError(
            f"{name}: the input is {tuple(x.shape)}, a weight of shape {tuple(weight.shape)} takes"
            f" {weight.shape[1]} features, {where} the input"
        )
    if x.device != weight.device:
        raise InputError(
            f"{name}: the input is on {x.device}, the weight on {weight.device}; move one of them"
        )


@_torch.one_node
def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, axes: int, method: Sketch) -> Tensor:
    plain = _PLAIN[axes]
    if is_frozen(weight):
        return plain(x, weight, bias)
    if axes and x.dim() == axes + 1:  # no batch dimension
        return _layer(x.unsqueeze(0), weight, bias, axes, method).squeeze(0)
    count = math.prod(x.shape) // weight.shape[1] if weight.shape[1] else 0
    rows = method.row_count(count)
    if rows >= count:
        _say_exact(weight, count, rows)
        return plain(x, weight, bias)
    if not needs_gradient(weight):
        return plain(x, weight, bias)
    dtype = autocast_dtype(x, "linear", lambda empty: F.linear(empty, empty.new_empty(1, 0)))
    tokens = _tokens_of(x, axes)
    # Of the input's own shape where its rows are not in the order of its memory.
    layout = tuple(x.shape) if axes else tuple(tokens.shape)
    sketch = sketch_input(x, tokens, layout, method.kind, rows, dtype)
    return _apply(x, weight, bias, axes, sketch.rebuild, *sketch.tensors)


# Shapes of weights whose layers were said to be exact.
_said: set[tuple[int, ...]] = set()


def _say_exact(weight: Tensor, tokens: int, rows: int) -> None:
    shape = tuple(weight.shape)
    if _torch.is_traced() or not tokens or shape in _said:
        return
    if not needs_gradient(weight):
        return
    _said.add(shape)
    warnings.warn(
        f"a sketch of {rows} rows is no smaller than the {tokens} tokens of this input, so a layer"
        f" with a weight of shape {shape} keeps it exactly; ask for fewer rows, or lower min_rows"
        " (said once for this shape)",
        stacklevel=4,
    )


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: float | int = _DEFAULT.rows,
    kind: Kind = _DEFAULT.kind,
    min_rows: int = _DEFAULT.min_rows,
    max_rows: int | None = _DEFAULT.max_rows,
) -> Tensor:
    """x W^T + b, x [..., in], W [out, in], b [out].

    With p = `Sketch(...).row_count(tokens)`, keeps p of the rows of x, or nothing where a sketch of
    x is kept already, and W itself. Input and bias gradients exact, weight gradient unbiased.
    """
    method = Sketch(rows, kind, min_rows, max_rows)
    _check(input, weight, 0)
    return _layer(input, weight, bias, 0, method)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    rows: float | int = _DEFAULT.rows,
    kind: Kind = _DEFAULT.kind,
    min_rows: int = _DEFAULT.min_rows,
    max_rows: int | None = _DEFAULT.max_rows,
) -> Tensor:
    """torch.nn.functional.conv1d with kernel size 1, over [N, C, L] or [C, L]; see `conv2d`."""
    method = Sketch(rows, kind, min_rows, max_rows)
    return _convolution(input, weight, bias, stride, padding, groups, 1, method)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    rows: float | int = _DEFAULT.rows,
    kind: Kind = _DEFAULT.kind,
    min_rows: int = _DEFAULT.min_rows,
    max_rows: int | None = _DEFAULT.max_rows,
) -> Tensor:
    """torch.nn.functional.conv2d with kernel size 1, over [N, C, H, W] or [C, H, W].

    A linear layer at every position, so positions are what `linear` calls tokens; what is kept and
    what gradients are is as there. Channels-last tensors are sketched as they lie; channels first,
    input and output gradient are copied for it, each for a moment. Raises `InputError` for other
    kernel sizes, strides, paddings and groups.
    """
    method = Sketch(rows, kind, min_rows, max_rows)
    return _convolution(input, weight, bias, stride, padding, groups, 2, method)


def check_pointwise(
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    groups: int,
    name: str,
) -> None:
    """Raises `InputError` unless the convolution is a linear layer at every position."""
    for what, value, wanted in (
        ("kernel_size", kernel, 1),
        ("stride", stride, 1),
        ("padding", 0 if padding in ("same", "valid") else padding, 0),
        ("groups", groups, 1),
    ):
        numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        if any(number != wanted for number in numbers):
            raise InputError(
                f"{name}: {what}={value!r} is not {wanted}; a sketch is of convolutions that are"
                " linear layers at every position, and groupquant has all others"
            )


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    groups: int,
    axes: int,
    method: Sketch,
) -> Tensor:
    check_tensor(weight, _NAMES[axes])
    check_pointwise(tuple(weight.shape[2:]), stride, padding, groups, _NAMES[axes])
    _check(x, weight, axes)
    return _layer(x, weight, bias, axes, method)

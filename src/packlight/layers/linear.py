"""Linear layers that keep a pack of their input, or nothing where something stands for it."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import (
    check_tensor,
    needs_gradient,
    refuse_second_derivative,
    saved_with_weight,
)
from packlight._gradients import column_sums, product, recast
from packlight._overwrite import writable
from packlight.quantiser import KEEPS, Quantiser, pack_input, worth_packing


class _Linear(torch.autograd.Function):
    """y = x W^T + b; keeps W and the pack of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        y = writable(F.linear(x, weight, bias), of_linear=True)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *tensors)
        ctx.rebuild = rebuild
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, *tensors = saved_with_weight(ctx)
        if ctx.needs_input_grad[0]:
            weight = recast(weight, grad_output)
        rows = grad_output.reshape(math.prod(grad_output.shape[:-1]), grad_output.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = rows.mm(weight).view(*grad_output.shape[:-1], -1).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            x = ctx.rebuild(grad_output.dtype, *tensors)
            dweight = product(rows.t(), x.reshape(rows.shape[0], -1), ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(rows.dtype, ctx.bias_dtype)
            dbias = column_sums(rows, wide).to(ctx.bias_dtype)
        return dx, dweight, dbias, None, *[None] * len(tensors)


_apply: Callable[..., Tensor] = _torch.applied(_Linear)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, method: Quantiser
) -> Tensor:
    """x W^T + b, x [..., in], W [out, in], b [out].

    Keeps a pack of x, or nothing where x is packed already, and W itself. Gradients of input and
    bias are exact; that of the weight is of the rebuilt input, unbiased where the method is.
    """
    check_tensor(input, "linear")
    if not (needs_gradient(weight) and worth_packing(input, method)):
        return F.linear(input, weight, bias)
    kept = pack_input(input, method)
    return _apply(input, weight, bias, kept.rebuild, *kept.tensors)

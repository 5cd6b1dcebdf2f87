"""A frozen Linear and its adapter of low rank as one function."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight import _torch
from packlight._checks import refuse_second_derivative, saved_with_weight
from packlight._gradients import as_dtype
from packlight._overwrite import writable
from packlight.low_rank import ops as low_rank
from packlight.quantiser import KEEPS


def matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Lora(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T; keeps W, A, B, x A^T and the pack of x.

    A, B and what is computed with them have a dtype of their own, and y is rounded where PEFT's
    operations round it. x A^T is kept in the dtype of x, but never
    cast to float16. Of a `layer` of 4 bits W is decoded in each pass: the layer itself stands for
    it, and `decoded` gives W in a dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        second: Tensor,
        weight: Any,  # None where a layer of 4 bits stands for it
        bias: Tensor | None,
        layer: nn.Module | None,
        decoded: Callable[[Any, torch.dtype], Tensor],
        scaling: float,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        low = low_rank.narrowed(matrix(x), first.t())
        y = F.linear(x, weight, bias) if layer is None else layer(x)
        rows, rounds = y.view(-1, y.shape[-1]), layer is not None
        low_rank.add_widened_(rows, low, second.t(), scaling, rounds)
        kept_weight = weight if ctx.needs_input_grad[0] else None
        # What float16 holds ends at 65504, and x A^T does not: infinite, it would be dB.
        kept = low if x.dtype == torch.float16 else as_dtype(low, x.dtype)
        ctx.save_for_backward(kept_weight, first, second, kept, *tensors)
        ctx.settings = (layer, decoded, scaling, rebuild)
        return writable(y, of_linear=True)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, first, second, low, *tensors = saved_with_weight(ctx)
        layer, decoded, scaling, rebuild = ctx.settings
        needs = _torch.needed_gradients(ctx)
        needs_input, needs_first, needs_second = needs[:3]
        rows = matrix(grad_output)
        dx = dfirst = dsecond = None
        if needs_second:
            # As the weight lies: fused optimizers read a gradient that lies otherwise wrongly.
            found = low_rank.outer(rows, as_dtype(low, second.dtype)).t()
            dsecond = torch.mul(found, scaling, out=torch.empty_like(second))
        if needs_first or needs_input:
            dlow = low_rank.narrowed(rows, second).mul_(scaling)
        if needs_first:
            dfirst = low_rank.outer(matrix(rebuild(rows.dtype, *tensors)), dlow)
        if needs_input:
            dx = rows.mm(weight if layer is None else decoded(layer, rows.dtype))
            low_rank.add_widened_(dx, dlow, first, 1.0, False)
            dx = dx.view(*grad_output.shape[:-1], -1)
        return dx, dfirst, dsecond, *[None] * (len(needs) - 3)


adapted: Callable[..., Tensor] = _torch.applied(_Lora)

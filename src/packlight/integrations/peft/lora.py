"""LoRA: a frozen layer and its adapter as one function.

PEFT's own code casts the input, runs three layers, scales, adds and casts back: seven operations
and as many nodes of the graph, of which four pass over the whole output in float32. One function
adds the adapter's share to the frozen layer's output in place.

Known is the code of LoRA's `Linear` (`scaled.py`), where one adapter is at work, without dropout,
bias or variant, on a frozen `nn.Linear` and without autocast. Elsewhere PEFT's code runs.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight import _torch
from packlight._checks import (
    autocasts,
    is_taken,
    refuse_second_derivative,
    saved_with_weight,
)
from packlight._gradients import as_dtype
from packlight._overwrite import writable
from packlight.calls import is_bare, uncovered
from packlight.groupquant.modules import Linear
from packlight.integrations.peft.adapters import Adapter, trains
from packlight.quantiser import KEEPS, Quantiser, pack_input, worth_packing
from packlight.reading import reader
from packlight.selectors import kind_of


class _Lora(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T; keeps W, A, B, x A^T and the pack of x.

    A, B and what is computed with them have a dtype of their own. x A^T is kept in the dtype of x.
    The sum is rounded once, to that of x W^T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        second: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: float,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        hidden = F.linear(as_dtype(x, first.dtype), first)
        y = F.linear(x, weight, bias).add_(F.linear(hidden, second), alpha=scaling)
        kept_weight = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(kept_weight, first, second, as_dtype(hidden, x.dtype), *tensors)
        ctx.settings = (scaling, rebuild)
        return writable(y, of_linear=True)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, first, second, hidden, *tensors = saved_with_weight(ctx)
        scaling, rebuild = ctx.settings
        needs_input, needs_first, needs_second = ctx.needs_input_grad[:3]
        rows = grad_output.flatten(0, -2)
        wide = as_dtype(rows, first.dtype)
        dx = dfirst = dsecond = None
        if needs_second:
            hidden = as_dtype(hidden.flatten(0, -2), first.dtype)
            dsecond = wide.t().mm(hidden).mul_(scaling)
        dhidden = wide.mm(second).mul_(scaling)
        if needs_first:
            x = rebuild(first.dtype, *tensors)
            dfirst = dhidden.t().mm(x.reshape(rows.shape[0], -1))
        if needs_input:
            dx = rows.mm(weight).add_(dhidden.mm(first))
            dx = dx.view(*grad_output.shape[:-1], -1)
        return dx, dfirst, dsecond, *[None] * (len(ctx.needs_input_grad) - 3)


_apply: Callable[..., Tensor] = _torch.applied(_Lora)


class LoraLayer(Adapter):
    """f(x) + s B A x; keeps a pack of x, as all adapters of x do together, and A x."""

    method: Quantiser
    base_layer: nn.Module
    active_adapters: list[str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor | None = None
        if not args and not kwargs and not torch.compiler.is_compiling():
            y = uncovered(self._adapted, x)
        if y is None:
            y = super().forward(x, *args, **kwargs)
        return y

    def _adapted(self, x: Tensor) -> Tensor | None:
        """The result by one function; None where PEFT's code is to run."""
        if not trains(self) or not is_taken(x) or autocasts(x.device.type):
            return None
        lora: Any = self
        names = [name for name in self.active_adapters if name in lora.lora_A]
        if len(names) != 1 or names[0] in lora.lora_variant:
            return None
        name, base = names[0], lora.base_layer
        first, second = lora.lora_A[name], lora.lora_B[name]
        packs = isinstance(first, Linear)
        if not packs or type(lora.lora_dropout[name]) is not nn.Identity:
            return None
        for layer in (base, first, second):
            if kind_of(layer) is not nn.Linear or not is_bare(layer):
                return None
        weight, bias, a, b = base.weight, base.bias, first.weight, second.weight
        scaling = lora.scaling[name]
        fits = (
            first.training
            and isinstance(scaling, (int, float))
            and first.bias is second.bias is None
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and a.requires_grad
            and b.requires_grad
            and a.dtype == b.dtype
            and weight.dtype == x.dtype
            and (a.dtype == x.dtype or getattr(self, "cast_input_dtype_enabled", True))
            and x.dim() > 1
            and worth_packing(x, first.method)
        )
        if not fits:
            return None
        kept = pack_input(x, first.method)
        rebuild = reader(kept.reading, kept.rebuild)
        return _apply(x, a, b, weight, bias, scaling, rebuild, *kept.tensors)

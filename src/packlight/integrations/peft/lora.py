"""LoRA: a frozen layer and its adapter as one function.

PEFT's own code casts the input, runs three layers, scales, adds and casts back: seven operations
and as many nodes of the graph, of which four pass over the whole output in float32, beside each
other. In a checkpointed block that is the most that is alive at once. One function adds the
adapter's share to the frozen layer's output in place, by tiles of rows.

Known is the code of LoRA's `Linear` (`scaled.py`) where one adapter is at work, which is no
variant. On a frozen `nn.Linear`, without dropout, bias and autocast, all of it is one function;
around other layers the sum is. Elsewhere PEFT's code runs.
"""

from collections.abc import Callable, Iterator
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

# Of a tile: 64 MiB in float32.
_ELEMENTS = 2**24


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of matrices of as many rows, as views; a tile of the first is `_ELEMENTS`."""
    rows = max(1, _ELEMENTS // max(1, tensors[0].shape[-1]))
    return zip(*(x.split(rows) for x in tensors), strict=True)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


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
        y = F.linear(x, weight, bias)
        for rows, low in _tiles(y.view(-1, y.shape[-1]), _matrix(hidden)):
            rows.add_(F.linear(low, second), alpha=scaling)
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
        rows, hidden = _matrix(grad_output), _matrix(hidden)
        dhidden = rows.new_empty((rows.shape[0], second.shape[1]), dtype=second.dtype)
        dx = dfirst = dsecond = None
        for dy, low, into in _tiles(rows, hidden, dhidden):
            wide = as_dtype(dy, first.dtype)
            torch.mm(wide, second, out=into)
            if needs_second:
                part = wide.t().mm(as_dtype(low, first.dtype))
                dsecond = part if dsecond is None else dsecond.add_(part)
        dhidden.mul_(scaling)
        if dsecond is not None:
            dsecond.mul_(scaling)
        if needs_first:
            x = rebuild(first.dtype, *tensors)
            dfirst = dhidden.t().mm(_matrix(x))
        if needs_input:
            dx = rows.mm(weight)
            for tile, low in _tiles(dx, dhidden):
                tile.add_(low.mm(first))
            dx = dx.view(*grad_output.shape[:-1], -1)
        return dx, dfirst, dsecond, *[None] * (len(ctx.needs_input_grad) - 3)


class _Sum(torch.autograd.Function):
    """y = r + s l in the dtype of r; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, delta: Tensor, scaling: float) -> Tensor:
        ctx.settings = (scaling, delta.dtype)
        y = torch.empty_like(result, memory_format=torch.contiguous_format)
        for into, r, d in _tiles(_matrix(y), _matrix(result), _matrix(delta)):
            into.copy_(r + d * scaling)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        scaling, dtype = ctx.settings
        ddelta = dy.to(dtype) * scaling if ctx.needs_input_grad[1] else None
        return dy, ddelta, None


_apply: Callable[..., Tensor] = _torch.applied(_Lora)
_sum: Callable[..., Tensor] = _torch.applied(_Sum)


class LoraLayer(Adapter):
    """f(x) + s B A x; keeps a pack of x, as all adapters of x do together, and A x."""

    method: Quantiser
    base_layer: nn.Module
    active_adapters: list[str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if kwargs or args else self._only_adapter()
        if name is None or torch.compiler.is_compiling() or not (trains(self) and is_taken(x)):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        y: Tensor | None = uncovered(self._adapted, x, name)
        return self._summed(x, name) if y is None else y

    def _only_adapter(self) -> str | None:
        """The adapter at work, if it is one and no variant."""
        lora: Any = self
        names = [name for name in self.active_adapters if name in lora.lora_A]
        return names[0] if len(names) == 1 and names[0] not in lora.lora_variant else None

    def _summed(self, x: Tensor, name: str) -> Tensor:
        """The results of the layers, added by a function."""
        lora: Any = self
        first, second = lora.lora_A[name], lora.lora_B[name]
        result: Tensor = self.base_layer(x)
        low = first(lora.lora_dropout[name](self._cast_input_dtype(x, first.weight.dtype)))
        y: Tensor = uncovered(_sum, result, second(low), lora.scaling[name])
        return y

    def _adapted(self, x: Tensor, name: str) -> Tensor | None:
        """The result by one function; None where it is more than a frozen Linear and two others."""
        lora: Any = self
        base, first, second = lora.base_layer, lora.lora_A[name], lora.lora_B[name]
        packs = isinstance(first, Linear)
        if autocasts(x.device.type) or not packs:
            return None
        if type(lora.lora_dropout[name]) is not nn.Identity:
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

"""LoRA: a frozen layer and its adapter as one function.

PEFT's own code casts the input, runs three layers, scales, adds and casts back: seven operations
and as many nodes of the graph, of which four pass over the whole output in float32, beside each
other. In a checkpointed block that is the most that is alive at once. One function adds the
adapter's share to the frozen layer's output in place, by tiles of rows.

Known are the codes of LoRA's `Linear` and `Linear4bit` (`scaled.py`) where one adapter is at work,
which is no variant. On a frozen `nn.Linear` or one of 4 bits of bitsandbytes, without dropout, bias
and autocast, all of it is one function; around other layers the sum is. Elsewhere PEFT's code runs.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from packlight import _torch
from packlight._checks import (
    autocasts,
    is_plain,
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


def _add(result: Tensor, delta: Tensor, scaling: float, rounds: bool) -> None:
    """r + s d into r, rounded once to its dtype, or where PEFT's code does so s d before it too."""
    if rounds:
        result.add_(as_dtype(delta * scaling, result.dtype))
    else:
        result.add_(delta, alpha=scaling)


class _Lora(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T; keeps W, A, B, x A^T and the pack of x.

    A, B and what is computed with them have a dtype of their own. x A^T is kept in the dtype of x.
    Of a `layer` of 4 bits W is decoded in each pass: the layer itself stands for it.
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
        scaling: float,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        hidden = F.linear(as_dtype(x, first.dtype), first)
        y = F.linear(x, weight, bias) if layer is None else layer(x)
        for rows, low in _tiles(y.view(-1, y.shape[-1]), _matrix(hidden)):
            _add(rows, F.linear(low, second), scaling, rounds=layer is not None)
        kept_weight = weight if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(kept_weight, first, second, as_dtype(hidden, x.dtype), *tensors)
        ctx.settings = (layer, scaling, rebuild)
        return writable(y, of_linear=True)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, first, second, hidden, *tensors = saved_with_weight(ctx)
        layer, scaling, rebuild = ctx.settings
        needs = _torch.needed_gradients(ctx)
        needs_input, needs_first, needs_second = needs[:3]
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
            dx = rows.mm(weight if layer is None else _decoded(layer, rows.dtype))
            for tile, low in _tiles(dx, dhidden):
                tile.add_(low.mm(first))
            dx = dx.view(*grad_output.shape[:-1], -1)
        return dx, dfirst, dsecond, *[None] * (len(needs) - 3)


class _Sum(torch.autograd.Function):
    """y = r + s l in the dtype of r; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, delta: Tensor, scaling: float, rounds: bool) -> Tensor:
        ctx.settings = (scaling, delta.dtype)
        y = torch.empty_like(result, memory_format=torch.contiguous_format)
        for into, r, d in _tiles(_matrix(y), _matrix(result), _matrix(delta)):
            into.copy_(r + (as_dtype(d * scaling, r.dtype) if rounds else d * scaling))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        scaling, dtype = ctx.settings
        ddelta = dy.to(dtype) * scaling if ctx.needs_input_grad[1] else None
        return dy, ddelta, None, None


def _has_four_bits(layer: nn.Module) -> bool:
    """Whether it is the Linear of 4 bits of bitsandbytes, whose module such a layer has loaded."""
    bnb = sys.modules.get("bitsandbytes")
    return bnb is not None and kind_of(layer) is bnb.nn.Linear4bit


def _decoded(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    weight: Tensor = dequantize_module_weight(layer)
    return as_dtype(weight, dtype)


_apply: Callable[..., Tensor] = _torch.applied(_Lora)
_sum: Callable[..., Tensor] = _torch.applied(_Sum)


class LoraLayer(Adapter):
    """f(x) + s B A x; keeps a pack of x, as all adapters of x do together, and A x."""

    method: Quantiser
    base_layer: nn.Module
    active_adapters: list[str]
    rounds = (
        False  # what an adapter adds is rounded to the dtype of the layer's result, and then added
    )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if kwargs or args else self._only_adapter()
        if self.rounds and autocasts(x.device.type):
            name = None  # PEFT's code rounds nothing then
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
        y: Tensor = uncovered(_sum, result, second(low), lora.scaling[name], self.rounds)
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
        for layer in (first, second):
            if kind_of(layer) is not nn.Linear or not is_bare(layer):
                return None
        known = self.rounds if _has_four_bits(base) else kind_of(base) is nn.Linear
        if not (known and is_bare(base)):
            return None
        weight, bias, a, b = base.weight, base.bias, first.weight, second.weight
        scaling = lora.scaling[name]
        if self.rounds:
            whole = x.numel() > x.shape[-1]  # of one row bitsandbytes has another kernel
        else:
            whole = is_plain(weight) and weight.dtype == x.dtype
        fits = (
            first.training
            and isinstance(scaling, (int, float))
            and first.bias is second.bias is None
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and a.requires_grad
            and b.requires_grad
            and a.dtype == b.dtype
            and whole
            and (a.dtype == x.dtype or getattr(self, "cast_input_dtype_enabled", True))
            and x.dim() > 1
            and worth_packing(x, first.method)
        )
        if not fits:
            return None
        kept = pack_input(x, first.method)
        rebuild = reader(kept.reading, kept.rebuild)
        layers = (None, None, base) if self.rounds else (weight, bias, None)
        return _apply(x, a, b, *layers, scaling, rebuild, *kept.tensors)

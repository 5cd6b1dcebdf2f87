"""LoRA: a frozen layer and its adapter as one function.

PEFT's own code casts the input, runs three layers, scales, adds and casts back: seven operations
and as many nodes of the graph, of which four pass over the whole output in float32, beside each
other. In a checkpointed block that is the most that is alive at once. One function adds the
adapter's share to the frozen layer's output in place, by operators of low rank.

Known are the codes of LoRA's `Linear` and `Linear4bit` (`scaled.py`) where one adapter is at work,
which is no variant. On a frozen `nn.Linear` or one of 4 bits of bitsandbytes, without dropout, bias
and autocast, all of it is one function; around other layers the sum is. Elsewhere PEFT's code runs.
"""

import sys
from collections.abc import Callable
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
from packlight.low_rank import ops as low_rank
from packlight.quantiser import KEEPS, Quantiser, pack_input, worth_packing
from packlight.reading import reader
from packlight.selectors import kind_of

_ROWS = 1024  # of a tile


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Lora(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T; keeps W, A, B, x A^T and the pack of x.

    A, B and what is computed with them have a dtype of their own, and y is rounded where PEFT's
    operations round it. x A^T is kept in the dtype of x, but never
    cast to float16. Of a `layer` of 4 bits W is decoded in each pass: the layer itself stands for
    it.
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
        low = low_rank.narrowed(_matrix(x), first.t())
        y = F.linear(x, weight, bias) if layer is None else layer(x)
        rows, rounds = y.view(-1, y.shape[-1]), layer is not None
        low_rank.add_widened_(rows, low, second.t(), scaling, rounds)
        kept_weight = weight if ctx.needs_input_grad[0] else None
        # What float16 holds ends at 65504, and x A^T does not: infinite, it would be dB.
        kept = low if x.dtype == torch.float16 else as_dtype(low, x.dtype)
        ctx.save_for_backward(kept_weight, first, second, kept, *tensors)
        ctx.settings = (layer, scaling, rebuild)
        return writable(y, of_linear=True)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, first, second, low, *tensors = saved_with_weight(ctx)
        layer, scaling, rebuild = ctx.settings
        needs = _torch.needed_gradients(ctx)
        needs_input, needs_first, needs_second = needs[:3]
        rows = _matrix(grad_output)
        dx = dfirst = dsecond = None
        if needs_second:
            # As the weight lies: fused optimizers read a gradient that lies otherwise wrongly.
            found = low_rank.outer(rows, as_dtype(low, second.dtype)).t()
            dsecond = torch.mul(found, scaling, out=torch.empty_like(second))
        if needs_first or needs_input:
            dlow = low_rank.narrowed(rows, second).mul_(scaling)
        if needs_first:
            dfirst = low_rank.outer(_matrix(rebuild(rows.dtype, *tensors)), dlow)
        if needs_input:
            dx = rows.mm(weight if layer is None else _decoded(layer, rows.dtype))
            low_rank.add_widened_(dx, dlow, first, 1.0, False)
            dx = dx.view(*grad_output.shape[:-1], -1)
        return dx, dfirst, dsecond, *[None] * (len(needs) - 3)


class _Sum(torch.autograd.Function):
    """y = r + s l in the dtype of r; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, delta: Tensor, scaling: float, rounds: bool) -> Tensor:
        ctx.settings = (scaling, delta.dtype)
        y = torch.empty_like(result, memory_format=torch.contiguous_format)
        parts = (tile.split(_ROWS) for tile in (_matrix(y), _matrix(result), _matrix(delta)))
        for into, r, d in zip(*parts, strict=True):
            into.copy_(r + (as_dtype(d * scaling, r.dtype) if rounds else d * scaling))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        scaling, dtype = ctx.settings
        ddelta = dy.to(dtype) * scaling if ctx.needs_input_grad[1] else None
        return dy, ddelta, None, None


def _decodes(kind: type[nn.Module], rounds: bool) -> bool:
    """Whether layers of this kind have 4 bits: those of bitsandbytes, and where a step is foretold
    those that stand for them, in PEFT's ordinary layer. Either has loaded its module.
    """
    module, name = _FOUR_BITS[rounds]
    found = sys.modules.get(module)
    return found is not None and kind is getattr(found, name)


_FOUR_BITS = {
    True: ("bitsandbytes.nn", "Linear4bit"),
    False: ("packlight.planner.adapted", "FourBits"),
}


def _decoded(layer: Any, dtype: torch.dtype) -> Tensor:
    is_imagined = _decodes(kind_of(layer), rounds=False)
    weight: Tensor = layer.dequantized() if is_imagined else dequantize_module_weight(layer)
    return as_dtype(weight, dtype)


_apply: Callable[..., Tensor] = _torch.applied(_Lora)
_sum: Callable[..., Tensor] = _torch.applied(_Sum)


class LoraLayer(Adapter):
    """f(x) + s B A x; keeps a pack of x, as all adapters of x do together, and A x."""

    method: Quantiser
    base_layer: nn.Module
    active_adapters: list[str]
    lora_variant: dict[str, Any]
    scaling: dict[str, Any]
    rounds = (
        False  # what an adapter adds is rounded to the dtype of the layer's result, and then added
    )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name, y = None, None
        if not (args or kwargs or torch.compiler.is_compiling()):
            name, y = uncovered(self._at_once, x)
        if name is None:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        return self._summed(x, name) if y is None else y

    def _at_once(self, x: Tensor) -> tuple[str | None, Tensor | None]:
        """The adapter that is ours to add, or None, and the result, or None for not yet."""
        name = self._only_adapter()
        if name is None or not (trains(self) and is_taken(x)):
            return None, None
        if self.rounds and autocasts(x.device.type):  # PEFT's code rounds nothing then
            return None, None
        return name, self._adapted(x, name)

    def _only_adapter(self) -> str | None:
        """The adapter at work, if it is one and no variant."""
        known = self._modules["lora_A"]._modules  # type: ignore[union-attr]
        names = [name for name in self.active_adapters if name in known]
        return names[0] if len(names) == 1 and names[0] not in self.lora_variant else None

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
        # From dictionaries: modules as attributes are slow to read, and a step reads thousands.
        own: Any = self._modules
        base, parts = own["base_layer"], ("lora_A", "lora_B", "lora_dropout")
        first, second, dropout = (own[part]._modules[name] for part in parts)
        packs = isinstance(first, Linear)
        if autocasts(x.device.type) or not packs or type(dropout) is not nn.Identity:
            return None
        kind = kind_of(base)
        decodes = _decodes(kind, self.rounds)
        known = decodes or (kind is nn.Linear and not self.rounds)
        if not known or not kind_of(first) is kind_of(second) is nn.Linear:
            return None
        if not is_bare(base, first, second, dropout):
            return None
        weight, bias, a, b = base.weight, base.bias, first.weight, second.weight
        scaling = self.scaling[name]
        if decodes:
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
        layers = (None, None, base) if decodes else (weight, bias, None)
        return _apply(x, a, b, *layers, scaling, rebuild, *kept.tensors)

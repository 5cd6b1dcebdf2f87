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
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from packlight import _torch
from packlight._checks import (
    autocasts,
    is_plain,
    is_taken,
)
from packlight._gradients import as_dtype
from packlight.calls import is_bare, uncovered
from packlight.groupquant.modules import Linear
from packlight.integrations.peft.adapters import Adapter, trains
from packlight.low_rank.functional import adapted, matrix
from packlight.quantiser import Quantiser, pack_input, worth_packing
from packlight.reading import reader
from packlight.selectors import kind_of

_ROWS = 1024  # of a tile


class _Sum(torch.autograd.Function):
    """y = r + s l in the dtype of r; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, delta: Tensor, scaling: float, rounds: bool) -> Tensor:
        ctx.settings = (scaling, delta.dtype)
        y = torch.empty_like(result, memory_format=torch.contiguous_format)
        parts = (tile.split(_ROWS) for tile in (matrix(y), matrix(result), matrix(delta)))
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
    return (
        layer.dequantized(dtype)
        if is_imagined
        else as_dtype(dequantize_module_weight(layer), dtype)
    )


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
        return adapted(x, a, b, *layers, _decoded, scaling, rebuild, *kept.tensors)

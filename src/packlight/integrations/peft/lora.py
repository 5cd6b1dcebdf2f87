"""LoRA: what its layer adds to the result of the layer that it adapts.

PEFT casts the input to float32 and holds it, multiplies by B and by the scaling, adds, and casts
back: four tensors in float32 of the width of the layer, beside each other. In a checkpointed block
that is the most that is alive at once. Here the cast goes when A has read it, and the sum is
computed by tiles of rows; the numbers are the same.

Known is the code of LoRA's `Linear` (`scaled.py`) with one adapter at work, which is no variant.
"""

from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch
from packlight._checks import is_taken
from packlight.calls import uncovered
from packlight.integrations.peft.adapters import Adapter, trains

# Of a tile: 64 MiB in float32.
_ELEMENTS = 2**24


class _Sum(torch.autograd.Function):
    """y = r + s l in the dtype of r; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, delta: Tensor, scaling: float) -> Tensor:
        ctx.settings = (scaling, delta.dtype)
        y = torch.empty_like(result, memory_format=torch.contiguous_format)
        width = result.shape[-1]
        rows = max(1, _ELEMENTS // max(1, width))
        parts = (x.reshape(-1, width).split(rows) for x in (y, result, delta))
        for into, r, d in zip(*parts, strict=True):
            into.copy_(r + d * scaling)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        scaling, dtype = ctx.settings
        ddelta = dy.to(dtype) * scaling if ctx.needs_input_grad[1] else None
        return dy, ddelta, None


_sum: Any = _torch.applied(_Sum)


class LoraLayer(Adapter):
    """f(x) + s B A x."""

    base_layer: nn.Module
    active_adapters: list[str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if kwargs or args else self._only_adapter()
        if name is None or torch.compiler.is_compiling() or not (trains(self) and is_taken(x)):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        lora: Any = self
        first, second = lora.lora_A[name], lora.lora_B[name]
        result: Tensor = self.base_layer(x)
        low = first(lora.lora_dropout[name](self._cast_input_dtype(x, first.weight.dtype)))
        delta: Tensor = second(low)
        y: Tensor = uncovered(_sum, result, delta, lora.scaling[name])
        return y

    def _only_adapter(self) -> str | None:
        """The adapter at work, if it is one and no variant."""
        lora: Any = self
        names = [name for name in self.active_adapters if name in lora.lora_A]
        return names[0] if len(names) == 1 and names[0] not in lora.lora_variant else None

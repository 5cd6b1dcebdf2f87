"""AdaLoRA: LoRA whose matrices are parameters and no layers, with a trained rank behind them.

Plain autograd keeps the input in float32, r numbers a token, and the whole result for the gradient
of the rank. Here a pack of the input is kept, one for all that read it, and a pack of the r
numbers, which give the rank's gradient as well.

Known is the code of `SVDLinear`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight._checks import is_taken, needs_gradient, refuse_second_derivative
from packlight._gradients import product
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations.peft.adapters import Adapter, knows, trains
from packlight.layers.linear import linear
from packlight.quantiser import KEEPS, Quantiser, pack_input, worth_packing

# --- The code that is known, as PEFT has it. Never run: `is_copy` compares with it.


def _svd(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    if self.disable_adapters:
        if self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
    elif self.merged:
        result = self.base_layer(x, *args, **kwargs)
    else:
        result = self.base_layer(x, *args, **kwargs)
        for active_adapter in self.active_adapters:
            if active_adapter not in self.lora_A.keys():  # noqa: SIM118  as it is there
                continue
            lora_A = self.lora_A[active_adapter]
            lora_B = self.lora_B[active_adapter]
            lora_E = self.lora_E[active_adapter]
            dropout = self.lora_dropout[active_adapter]
            scaling = self.scaling[active_adapter]
            ranknum = self.ranknum[active_adapter] + 1e-5

            x = self._cast_input_dtype(x, lora_A.dtype)
            result += (dropout(x) @ (lora_A * lora_E).T @ lora_B.T) * scaling / ranknum

    return result


# --- The layer.


class _Ranked(torch.autograd.Function):
    """y = h B^T s / k for the rank k; keeps B, k and the pack of h, r numbers a token."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        rank: Tensor,
        scaling: float,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, rank, *tensors)
        ctx.settings = (scaling, rebuild, h.dtype)
        return F.linear(h, weight) * scaling / rank

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, rank, *tensors = ctx.saved_tensors
        scaling, rebuild, dtype = ctx.settings
        dy = grad_output * (scaling / rank)
        dh = dy.matmul(weight.to(dy.dtype))
        dweight = drank = None
        h = rebuild(dy.dtype, *tensors)
        if ctx.needs_input_grad[1]:
            rows = dy.reshape(-1, dy.shape[-1])
            dweight = product(rows.t(), h.reshape(rows.shape[0], -1), weight.dtype)
        if ctx.needs_input_grad[2]:
            drank = -((dh * h).sum() / rank).to(rank.dtype)
        return dh.to(dtype), dweight, drank, None, None, *[None] * len(tensors)


_ranked: Callable[..., Tensor] = _Ranked.apply


class AdaLoraLayer(Adapter):
    """y + (x (A E)^T B^T) s / k; keeps a pack of x, and of x (A E)^T."""

    method: Quantiser
    base_layer: nn.Module
    active_adapters: list[str]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (trains(self) and is_taken(x)):
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        lora: Any = self
        result: Tensor = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name not in lora.lora_A:
                continue
            rank = lora.ranknum[name] + 1e-5
            x = self._cast_input_dtype(x, lora.lora_A[name].dtype)
            first = lora.lora_A[name] * lora.lora_E[name]
            h = linear(lora.lora_dropout[name](x), first, method=self.method)
            result += self._second(h, lora.lora_B[name], lora.scaling[name], rank)
        return result

    def _second(self, h: Tensor, weight: Tensor, scaling: float, rank: Tensor) -> Tensor:
        if rank.numel() != 1 or not (needs_gradient(h) and worth_packing(h, self.method)):
            return h @ weight.T * scaling / rank
        kept = pack_input(h, self.method)
        return _ranked(h, weight, rank, scaling, kept.rebuild, *kept.tensors)


# --- The rule.


@knows
@once_a_class
def _form(kind: type[nn.Module]) -> type[nn.Module] | None:
    return AdaLoraLayer if is_copy(vars(kind).get("forward"), _svd) else None

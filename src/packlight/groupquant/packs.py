"""What packs stand for that kernels read on their way."""

import dataclasses
import math

import torch
from torch import Tensor

from packlight.groupquant import ops
from packlight.groupquant.method import GroupQuant
from packlight.layers.activations import Applied, GatedProduct


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class AppliedCodes(Applied):
    """f(x~), by one kernel."""

    method: GroupQuant

    def __call__(self, dtype: torch.dtype, *kept: Tensor) -> Tensor:
        layout = (self.shape, self.stride, math.prod(self.shape))
        groups = (self.method.bits, self.method.group_size)
        function = (self.name, self.parameters)
        y: Tensor = ops.dequantize(*kept, *layout, *groups, dtype, *function, None, None)
        return y


@dataclasses.dataclass  # not frozen, as above
class GatedCodes(GatedProduct):
    """f(gate~) up~, by one kernel."""

    method: GroupQuant

    def __call__(self, dtype: torch.dtype, *kept: Tensor) -> Tensor:
        groups = (self.method.bits, self.method.group_size)
        y: Tensor = ops.gated_product(*kept, self.name, self.shape, self.stride, *groups, dtype)
        return y

    def factor_gradients(self, dy: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        layout = (self.stride, self.method.bits, self.method.group_size)
        df, dup = ops.gated_backward(dy, *kept, self.name, *layout, False)
        return df, dup


@dataclasses.dataclass  # not frozen, as above
class ScaledRows:
    """x~ weight + bias of rows that start groups of their own, by one kernel."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    width: int
    bits: int
    group_size: int

    def __call__(
        self,
        dtype: torch.dtype,
        codes: Tensor,
        scales: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        layout = (self.shape, self.stride, self.width, self.bits, self.group_size)
        y: Tensor = ops.dequantize(codes, scales, *layout, dtype, "", (), weight, bias)
        return y

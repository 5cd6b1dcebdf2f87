"""What packs stand for that kernels read on their way."""

import dataclasses
import math

import torch
from torch import Tensor

from packlight.groupquant import ops
from packlight.groupquant.grouping import Groups
from packlight.groupquant.method import GroupQuant
from packlight.layers.activations import Applied, GatedProduct


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class AppliedCodes(Applied):
    """f(x~), by one kernel."""

    method: GroupQuant

    def __call__(self, dtype: torch.dtype, *kept: Tensor) -> Tensor:
        layout = (self.shape, self.stride, math.prod(self.shape))
        given = (self.method.groups, dtype, self.name, self.parameters, None, None)
        y: Tensor = ops.dequantize(*kept, *layout, *given)
        return y


@dataclasses.dataclass  # not frozen, as above
class GatedCodes(GatedProduct):
    """f(gate~) up~, by one kernel."""

    method: GroupQuant

    def __call__(self, dtype: torch.dtype, *kept: Tensor) -> Tensor:
        layout = (self.shape, self.stride, self.method.groups)
        y: Tensor = ops.gated_product(*kept, self.name, *layout, dtype)
        return y

    def factor_gradients(self, dy: Tensor, *kept: Tensor) -> tuple[Tensor, Tensor]:
        layout = (self.stride, self.method.groups)
        df, dup = ops.gated_backward(dy, *kept, self.name, *layout, False)
        return df, dup


@dataclasses.dataclass  # not frozen, as above
class ScaledRows:
    """x~ weight + bias of rows that start groups of their own, by one kernel."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    width: int
    groups: Groups

    def __call__(
        self,
        dtype: torch.dtype,
        codes: Tensor,
        scales: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        layout = (self.shape, self.stride, self.width, self.groups)
        y: Tensor = ops.dequantize(codes, scales, *layout, dtype, "", (), weight, bias)
        return y

"""Layers that torch.nn lacks, in plain PyTorch: what their twins run in `eval()`."""

import torch.nn.functional as F
from torch import Tensor, nn

from packlight.elementwise.functions import quick_gelu, relu_squared


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x)."""

    def forward(self, input: Tensor) -> Tensor:
        return quick_gelu(input)


class ReLUSquared(nn.Module):
    """max(x, 0)^2."""

    def forward(self, input: Tensor) -> Tensor:
        return relu_squared(input)


class SwiGLU(nn.Module):
    """silu(gate) up."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class GEGLU(nn.Module):
    """gelu(gate) up, with either form of GELU."""

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate=self.approximate) * up


class ReGLU(nn.Module):
    """relu(gate) up."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.relu(gate) * up

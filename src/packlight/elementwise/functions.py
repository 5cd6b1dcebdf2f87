"""Activations that torch.nn.functional has no function of one tensor for."""

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the GELU approximation of Hendrycks and Gimpel that CLIP uses."""
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2, from Primer (So et al., 2021)."""
    return F.relu(x).square()

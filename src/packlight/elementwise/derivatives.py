"""Activations that a pack of their input can serve, and their derivatives, as torch has them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.fewbit.activations import CONTINUOUS

_aten = torch.ops.aten
_SELU = (1.6732632423543772, 1.0507009873554805)


def _quick_gelu(dy: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return dy * (s + x * (1.702 * s * (1 - s)))  # 1.702 x may overflow, which times 0 is NaN


def _softplus(dy: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    dx: Tensor = _aten.softplus_backward(dy, x, beta, threshold)
    return dx


# y = FUNCTIONS[name](x, *parameters)
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: row.function for name, row in CONTINUOUS.items()},
    "relu": F.relu,
}

# dx = BACKWARD[name](dy, x, *parameters), names and parameters as in fewbit/activations.py.
BACKWARD: dict[str, Callable[..., Tensor]] = {
    "celu": lambda dy, x, alpha: _aten.elu_backward(dy, alpha, 1.0, 1.0 / alpha, False, x),
    "elu": lambda dy, x, alpha: _aten.elu_backward(dy, alpha, 1.0, 1.0, False, x),
    "gelu": lambda dy, x: _aten.gelu_backward(dy, x),
    "gelu_tanh": lambda dy, x: _aten.gelu_backward(dy, x, approximate="tanh"),
    "hardswish": lambda dy, x: _aten.hardswish_backward(dy, x),
    "logsigmoid": lambda dy, x: dy * torch.sigmoid(-x),
    "mish": lambda dy, x: _aten.mish_backward(dy, x),
    "quick_gelu": _quick_gelu,
    "relu": lambda dy, x: _aten.threshold_backward(dy, x, 0.0),
    "relu_squared": lambda dy, x: dy * 2 * torch.relu(x),
    "selu": lambda dy, x: _aten.elu_backward(dy, *_SELU, 1.0, False, x),
    "sigmoid": lambda dy, x: _aten.sigmoid_backward(dy, torch.sigmoid(x)),
    "silu": lambda dy, x: _aten.silu_backward(dy, x),
    "softplus": _softplus,
    "softsign": lambda dy, x: dy / (1 + x.abs()).square(),
    "tanh": lambda dy, x: _aten.tanh_backward(dy, torch.tanh(x)),
    "tanhshrink": lambda dy, x: dy * torch.tanh(x).square(),
}

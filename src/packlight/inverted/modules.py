"""Inverted layers under torch.nn's own names: each is its torch class, keeping its output.

Constructor, attributes, `state_dict` and printing are torch.nn's. In `eval()` the plain torch
operation runs, twice differentiable. What is kept, and how exact the gradient is, stands with each
function in `functional.py`.
"""

from torch import Tensor, nn

from packlight.inverted import functional as inverted
from packlight.layers import plain
from packlight.layers.twin import Twin

# --- Functions with one minimum.


class GELU(Twin, nn.GELU):
    """`torch.nn.GELU`; keeps the output and 1 bit an element, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.gelu(input, self.approximate)


class Hardswish(Twin, nn.Hardswish):
    """`torch.nn.Hardswish`; keeps the output and 1 bit an element, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.hardswish(input, self.inplace)


class Mish(Twin, nn.Mish):
    """`torch.nn.Mish`; keeps the output and 1 bit an element, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.mish(input, self.inplace)


class QuickGELU(Twin, plain.QuickGELU):
    """x sigmoid(1.702 x), which torch.nn lacks; keeps the output and 1 bit an element."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.quick_gelu(input)


class SiLU(Twin, nn.SiLU):
    """`torch.nn.SiLU`; keeps the output and 1 bit an element, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.silu(input, self.inplace)


# --- Monotone functions.


class CELU(Twin, nn.CELU):
    """`torch.nn.CELU`; keeps the output alone, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.celu(input, self.alpha, self.inplace)


class ELU(Twin, nn.ELU):
    """`torch.nn.ELU`; keeps the output alone, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.elu(input, self.alpha, self.inplace)


class Hardsigmoid(Twin, nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid`; keeps the output alone, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.hardsigmoid(input, self.inplace)


class Hardtanh(Twin, nn.Hardtanh):
    """`torch.nn.Hardtanh`; keeps the output alone, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(Twin, nn.LeakyReLU):
    """`torch.nn.LeakyReLU`; keeps the output alone, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.leaky_relu(input, self.negative_slope, self.inplace)


class LogSigmoid(Twin, nn.LogSigmoid):
    """`torch.nn.LogSigmoid`; keeps the output alone, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.logsigmoid(input)


class ReLU(Twin, nn.ReLU):
    """`torch.nn.ReLU`; torch's own, which keeps the output alone, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.relu(input, self.inplace)


class ReLU6(Twin, nn.ReLU6):
    """`torch.nn.ReLU6`; keeps the output alone, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.relu6(input, self.inplace)


class SELU(Twin, nn.SELU):
    """`torch.nn.SELU`; keeps the output alone, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.selu(input, self.inplace)


class Sigmoid(Twin, nn.Sigmoid):
    """`torch.nn.Sigmoid`; torch's own, which keeps the output alone."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.sigmoid(input)


class Softplus(Twin, nn.Softplus):
    """`torch.nn.Softplus`; keeps the output alone, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.softplus(input, self.beta, self.threshold)


class Softsign(Twin, nn.Softsign):
    """`torch.nn.Softsign`; keeps the output alone, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.softsign(input)


class Tanh(Twin, nn.Tanh):
    """`torch.nn.Tanh`; torch's own, which keeps the output alone."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.tanh(input)


class Tanhshrink(Twin, nn.Tanhshrink):
    """`torch.nn.Tanhshrink`; keeps the output alone, exact to rounding."""

    def training_forward(self, input: Tensor) -> Tensor:
        return inverted.tanhshrink(input)

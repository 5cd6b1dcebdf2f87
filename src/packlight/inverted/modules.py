"""Inverted layers under torch.nn's own names: each is its torch class, keeping its output.

Constructor, attributes, `state_dict` and printing are torch.nn's. In `eval()` the plain torch
operation runs, twice differentiable. What is kept, and how exact the gradient is, stands with each
function in `functional.py`.
"""

from torch import Tensor, nn

from packlight.elementwise.functions import quick_gelu
from packlight.inverted import functional as inverted

# --- Functions with one minimum.


class GELU(nn.GELU):
    """`torch.nn.GELU`; keeps the output and 1 bit an element, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.gelu(input, self.approximate)


class Hardswish(nn.Hardswish):
    """`torch.nn.Hardswish`; keeps the output and 1 bit an element, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.hardswish(input, self.inplace)


class Mish(nn.Mish):
    """`torch.nn.Mish`; keeps the output and 1 bit an element, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.mish(input, self.inplace)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), which torch.nn lacks; keeps the output and 1 bit an element."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return quick_gelu(input)
        return inverted.quick_gelu(input)


class SiLU(nn.SiLU):
    """`torch.nn.SiLU`; keeps the output and 1 bit an element, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.silu(input, self.inplace)


# --- Monotone functions.


class CELU(nn.CELU):
    """`torch.nn.CELU`; keeps the output alone, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.celu(input, self.alpha, self.inplace)


class ELU(nn.ELU):
    """`torch.nn.ELU`; keeps the output alone, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.elu(input, self.alpha, self.inplace)


class Hardsigmoid(nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid`; keeps the output alone, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.hardsigmoid(input, self.inplace)


class Hardtanh(nn.Hardtanh):
    """`torch.nn.Hardtanh`; keeps the output alone, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """`torch.nn.LeakyReLU`; keeps the output alone, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.leaky_relu(input, self.negative_slope, self.inplace)


class LogSigmoid(nn.LogSigmoid):
    """`torch.nn.LogSigmoid`; keeps the output alone, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.logsigmoid(input)


class ReLU(nn.ReLU):
    """`torch.nn.ReLU`; torch's own, which keeps the output alone, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.relu(input, self.inplace)


class ReLU6(nn.ReLU6):
    """`torch.nn.ReLU6`; keeps the output alone, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.relu6(input, self.inplace)


class SELU(nn.SELU):
    """`torch.nn.SELU`; keeps the output alone, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.selu(input, self.inplace)


class Sigmoid(nn.Sigmoid):
    """`torch.nn.Sigmoid`; torch's own, which keeps the output alone."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.sigmoid(input)


class Softplus(nn.Softplus):
    """`torch.nn.Softplus`; keeps the output alone, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.softplus(input, self.beta, self.threshold)


class Softsign(nn.Softsign):
    """`torch.nn.Softsign`; keeps the output alone, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.softsign(input)


class Tanh(nn.Tanh):
    """`torch.nn.Tanh`; torch's own, which keeps the output alone."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.tanh(input)


class Tanhshrink(nn.Tanhshrink):
    """`torch.nn.Tanhshrink`; keeps the output alone, exact to rounding."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return inverted.tanhshrink(input)

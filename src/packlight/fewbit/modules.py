"""Few-bit layers under torch.nn's own names: each is its torch class, keeping codes in training.

Constructor, attributes, `state_dict` and printing are torch.nn's; `bits` or `codebook` come after
them. In `eval()` the plain torch operation runs, exact and twice differentiable. What is kept, and
how exact the gradient is, stands with each function in `functional.py`.
"""

from typing import Any

from torch import Tensor, nn

from packlight.elementwise.functions import quick_gelu, relu_squared
from packlight.fewbit import functional as few_bit
from packlight.fewbit.codebook import Codebook, check_codebook
from packlight.fewbit.dropout import dropout
from packlight.fewbit.functional import DEFAULT_BITS
from packlight.fewbit.method import check_bits
from packlight.fewbit.pooling import max_pool1d, max_pool2d, max_pool3d


class _Coded(nn.Module):
    """What layers with a codebook share: `bits`, and a `codebook` that overrides it."""

    bits: int
    codebook: Codebook | None

    def _set_coding(self, bits: int, codebook: Codebook | None) -> None:
        self.bits = check_bits(bits) if codebook is None else check_codebook(codebook).bits
        self.codebook = codebook

    def extra_repr(self) -> str:
        own = f"bits={self.bits}" + ("" if self.codebook is None else ", codebook=custom")
        inherited = super().extra_repr()
        return f"{inherited}, {own}" if inherited else own


# --- Continuous activations.


class CELU(_Coded, nn.CELU):
    """`torch.nn.CELU`; keeps `bits` bits an element, biased."""

    def __init__(
        self,
        alpha: float = 1.0,
        inplace: bool = False,
        *,
        bits: int = DEFAULT_BITS,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(alpha, inplace)
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.celu(input, self.alpha, self.inplace, bits=self.bits, codebook=self.codebook)


class ELU(_Coded, nn.ELU):
    """`torch.nn.ELU`; keeps `bits` bits an element, biased."""

    def __init__(
        self,
        alpha: float = 1.0,
        inplace: bool = False,
        *,
        bits: int = DEFAULT_BITS,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(alpha, inplace)
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.elu(input, self.alpha, self.inplace, bits=self.bits, codebook=self.codebook)


class GELU(_Coded, nn.GELU):
    """`torch.nn.GELU`; keeps `bits` bits an element, biased."""

    def __init__(
        self,
        approximate: str = "none",
        *,
        bits: int = DEFAULT_BITS,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(approximate)
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.gelu(input, self.approximate, bits=self.bits, codebook=self.codebook)


class Hardswish(_Coded, nn.Hardswish):
    """`torch.nn.Hardswish`; keeps `bits` bits an element, biased."""

    def __init__(
        self,
        inplace: bool = False,
        *,
        bits: int = DEFAULT_BITS,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(inplace)
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.hardswish(input, self.inplace, bits=self.bits, codebook=self.codebook)


class LogSigmoid(_Coded, nn.LogSigmoid):
    """`torch.nn.LogSigmoid`; keeps `bits` bits an element, biased."""

    def __init__(self, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None) -> None:
        super().__init__()
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.logsigmoid(input, bits=self.bits, codebook=self.codebook)


class Mish(_Coded, nn.Mish):
    """`torch.nn.Mish`; keeps `bits` bits an element, biased."""

    def __init__(
        self,
        inplace: bool = False,
        *,
        bits: int = DEFAULT_BITS,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(inplace)
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.mish(input, self.inplace, bits=self.bits, codebook=self.codebook)


class QuickGELU(_Coded):
    """x sigmoid(1.702 x), which torch.nn lacks; keeps `bits` bits an element, biased."""

    def __init__(self, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None) -> None:
        super().__init__()
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return quick_gelu(input)
        return few_bit.quick_gelu(input, bits=self.bits, codebook=self.codebook)


class ReLUSquared(_Coded):
    """max(x, 0)^2, which torch.nn lacks; keeps `bits` bits an element, biased."""

    def __init__(self, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None) -> None:
        super().__init__()
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return relu_squared(input)
        return few_bit.relu_squared(input, bits=self.bits, codebook=self.codebook)


class SELU(_Coded, nn.SELU):
    """`torch.nn.SELU`; keeps `bits` bits an element, biased."""

    def __init__(
        self,
        inplace: bool = False,
        *,
        bits: int = DEFAULT_BITS,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(inplace)
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.selu(input, self.inplace, bits=self.bits, codebook=self.codebook)


class Sigmoid(_Coded, nn.Sigmoid):
    """`torch.nn.Sigmoid`; keeps `bits` bits an element, biased."""

    def __init__(self, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None) -> None:
        super().__init__()
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.sigmoid(input, bits=self.bits, codebook=self.codebook)


class SiLU(_Coded, nn.SiLU):
    """`torch.nn.SiLU`; keeps `bits` bits an element, biased."""

    def __init__(
        self,
        inplace: bool = False,
        *,
        bits: int = DEFAULT_BITS,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(inplace)
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.silu(input, self.inplace, bits=self.bits, codebook=self.codebook)


class Softplus(_Coded, nn.Softplus):
    """`torch.nn.Softplus`; keeps `bits` bits an element, biased."""

    def __init__(
        self,
        beta: float = 1.0,
        threshold: float = 20.0,
        *,
        bits: int = DEFAULT_BITS,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(beta, threshold)
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.softplus(
            input, self.beta, self.threshold, bits=self.bits, codebook=self.codebook
        )


class Softsign(_Coded, nn.Softsign):
    """`torch.nn.Softsign`; keeps `bits` bits an element, biased."""

    def __init__(self, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None) -> None:
        super().__init__()
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.softsign(input, bits=self.bits, codebook=self.codebook)


class Tanh(_Coded, nn.Tanh):
    """`torch.nn.Tanh`; keeps `bits` bits an element, biased."""

    def __init__(self, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None) -> None:
        super().__init__()
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.tanh(input, bits=self.bits, codebook=self.codebook)


class Tanhshrink(_Coded, nn.Tanhshrink):
    """`torch.nn.Tanhshrink`; keeps `bits` bits an element, biased."""

    def __init__(self, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None) -> None:
        super().__init__()
        self._set_coding(bits, codebook)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.tanhshrink(input, bits=self.bits, codebook=self.codebook)


# --- Exact activations. Constructors are torch's.


class Hardshrink(nn.Hardshrink):
    """`torch.nn.Hardshrink`; keeps 1 bit an element, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.hardshrink(input, self.lambd)


class Hardsigmoid(nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid`; keeps 1 bit an element, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.hardsigmoid(input, self.inplace)


class Hardtanh(nn.Hardtanh):
    """`torch.nn.Hardtanh`; keeps 1 bit an element, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """`torch.nn.LeakyReLU`; keeps 1 bit an element, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.leaky_relu(input, self.negative_slope, self.inplace)


class ReLU(nn.ReLU):
    """`torch.nn.ReLU`; keeps 1 bit an element, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.relu(input, self.inplace)


class ReLU6(nn.ReLU6):
    """`torch.nn.ReLU6`; keeps 1 bit an element, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.relu6(input, self.inplace)


class Softshrink(nn.Softshrink):
    """`torch.nn.Softshrink`; keeps 1 bit an element, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.softshrink(input, self.lambd)


class Threshold(nn.Threshold):
    """`torch.nn.Threshold`; keeps 1 bit an element, exact."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return few_bit.threshold(input, self.threshold, self.value, self.inplace)


# --- Dropout and pooling. Constructors are torch's.


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`; keeps 1 bit an element, exact."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)


class MaxPool1d(nn.MaxPool1d):
    """`torch.nn.MaxPool1d`; keeps ceil(log2(window)) bits an output element, exact."""

    def forward(self, input: Tensor) -> Any:
        if not self.training:
            return super().forward(input)
        return max_pool1d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool2d(nn.MaxPool2d):
    """`torch.nn.MaxPool2d`; keeps ceil(log2(window)) bits an output element, exact."""

    def forward(self, input: Tensor) -> Any:
        if not self.training:
            return super().forward(input)
        return max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class MaxPool3d(nn.MaxPool3d):
    """`torch.nn.MaxPool3d`; keeps ceil(log2(window)) bits an output element, exact."""

    def forward(self, input: Tensor) -> Any:
        if not self.training:
            return super().forward(input)
        return max_pool3d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )

"""Few-bit layers under torch.nn's own names: each is its torch class, keeping codes in training.

Constructor, attributes, `state_dict` and printing are torch.nn's; `bits` or `codebook` come after
them. In `eval()` the plain torch operation runs, exact and twice differentiable. What is kept, and
how exact the gradient is, stands with each function in `functional.py`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from packlight.errors import InputError
from packlight.fewbit import functional as few_bit
from packlight.fewbit.codebook import Codebook, Weight, Weighted, check_bits
from packlight.fewbit.dropout import dropout
from packlight.fewbit.functional import DEFAULT_BITS
from packlight.fewbit.method import FewBit
from packlight.fewbit.pooling import max_pool1d, max_pool2d, max_pool3d
from packlight.fewbit.slopes import rrelu
from packlight.layers import plain
from packlight.layers.twin import Twin


class Coded(Twin):
    """What layers with a codebook share: the arguments of `FewBit`."""

    bits: int
    codebook: Codebook | Weighted | None

    def __init__(
        self,
        *args: Any,
        bits: int = DEFAULT_BITS,
        weight: Weight | None = None,
        codebook: Codebook | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        vars(self).update(FewBit(bits, weight, codebook).options)

    @property
    def options(self) -> dict[str, Any]:
        return {"bits": self.bits, "codebook": self.codebook}

    def _shown(self) -> dict[str, Any]:
        kind = "weighted" if isinstance(self.codebook, Weighted) else "custom"
        return {"bits": self.bits} | ({} if self.codebook is None else {"codebook": kind})


# --- Continuous activations.


class CELU(Coded, nn.CELU):
    """`torch.nn.CELU`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.celu(input, self.alpha, self.inplace, **self.options)


class ELU(Coded, nn.ELU):
    """`torch.nn.ELU`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.elu(input, self.alpha, self.inplace, **self.options)


class GELU(Coded, nn.GELU):
    """`torch.nn.GELU`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.gelu(input, self.approximate, **self.options)


class Hardswish(Coded, nn.Hardswish):
    """`torch.nn.Hardswish`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.hardswish(input, self.inplace, **self.options)


class LogSigmoid(Coded, nn.LogSigmoid):
    """`torch.nn.LogSigmoid`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.logsigmoid(input, **self.options)


class Mish(Coded, nn.Mish):
    """`torch.nn.Mish`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.mish(input, self.inplace, **self.options)


class QuickGELU(Coded, plain.QuickGELU):
    """x sigmoid(1.702 x), which torch.nn lacks; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.quick_gelu(input, **self.options)


class ReLUSquared(Coded, plain.ReLUSquared):
    """max(x, 0)^2, which torch.nn lacks; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.relu_squared(input, **self.options)


class SELU(Coded, nn.SELU):
    """`torch.nn.SELU`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.selu(input, self.inplace, **self.options)


class Sigmoid(Coded, nn.Sigmoid):
    """`torch.nn.Sigmoid`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.sigmoid(input, **self.options)


class SiLU(Coded, nn.SiLU):
    """`torch.nn.SiLU`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.silu(input, self.inplace, **self.options)


class Softplus(Coded, nn.Softplus):
    """`torch.nn.Softplus`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.softplus(input, self.beta, self.threshold, **self.options)


class Softsign(Coded, nn.Softsign):
    """`torch.nn.Softsign`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.softsign(input, **self.options)


class Tanh(Coded, nn.Tanh):
    """`torch.nn.Tanh`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.tanh(input, **self.options)


class Tanhshrink(Coded, nn.Tanhshrink):
    """`torch.nn.Tanhshrink`; keeps `bits` bits an element, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.tanhshrink(input, **self.options)


# --- Exact activations. Constructors are torch's.


class Exact(Twin):
    """What exact layers share: they keep what the exact gradient takes, so they take no bits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "bits" in kwargs:  # as fewbit's layers have it
            raise InputError(
                f"{type(self).__name__} keeps the exact gradient whatever the bits, mostly in 1 bit"
                f" an element: leave out bits={kwargs['bits']!r}"
            )
        super().__init__(*args, **kwargs)


class Hardshrink(Exact, nn.Hardshrink):
    """`torch.nn.Hardshrink`; keeps 1 bit an element, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.hardshrink(input, self.lambd)


class Hardsigmoid(Exact, nn.Hardsigmoid):
    """`torch.nn.Hardsigmoid`; keeps 1 bit an element, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.hardsigmoid(input, self.inplace)


class Hardtanh(Exact, nn.Hardtanh):
    """`torch.nn.Hardtanh`; keeps 1 bit an element, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(Exact, nn.LeakyReLU):
    """`torch.nn.LeakyReLU`; keeps 1 bit an element, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.leaky_relu(input, self.negative_slope, self.inplace)


class ReLU(Exact, nn.ReLU):
    """`torch.nn.ReLU`; keeps 1 bit an element, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.relu(input, self.inplace)


class ReLU6(Exact, nn.ReLU6):
    """`torch.nn.ReLU6`; keeps 1 bit an element, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.relu6(input, self.inplace)


class Softshrink(Exact, nn.Softshrink):
    """`torch.nn.Softshrink`; keeps 1 bit an element, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.softshrink(input, self.lambd)


class Threshold(Exact, nn.Threshold):
    """`torch.nn.Threshold`; keeps 1 bit an element, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return few_bit.threshold(input, self.threshold, self.value, self.inplace)


# --- Drawn slopes.


class CodedSlopes(Twin):
    """What layers share that keep codes of slopes: `bits`."""

    bits: int

    def __init__(self, *args: Any, bits: int = DEFAULT_BITS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bits = check_bits(bits)

    @property
    def options(self) -> dict[str, Any]:
        return {"bits": self.bits}


class RReLU(CodedSlopes, nn.RReLU):
    """`torch.nn.RReLU`; keeps `bits` bits an element, unbiased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return rrelu(input, self.lower, self.upper, True, self.inplace, **self.options)


# --- Dropout and pooling. Constructors are torch's.


class Dropout(Exact, nn.Dropout):
    """`torch.nn.Dropout`; keeps 1 bit an element, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, True, self.inplace)


class _MaxPool(Exact, nn.modules.pooling._MaxPoolNd):
    """What the poolings share."""

    def _pool(self, function: Callable[..., Any], input: Tensor) -> Any:
        window = (self.kernel_size, self.stride, self.padding, self.dilation)
        return function(input, *window, self.ceil_mode, self.return_indices)


class MaxPool1d(_MaxPool, nn.MaxPool1d):
    """`torch.nn.MaxPool1d`; keeps ceil(log2(window)) bits an output element, exact."""

    def training_forward(self, input: Tensor) -> Any:
        return self._pool(max_pool1d, input)


class MaxPool2d(_MaxPool, nn.MaxPool2d):
    """`torch.nn.MaxPool2d`; keeps ceil(log2(window)) bits an output element, exact."""

    def training_forward(self, input: Tensor) -> Any:
        return self._pool(max_pool2d, input)


class MaxPool3d(_MaxPool, nn.MaxPool3d):
    """`torch.nn.MaxPool3d`; keeps ceil(log2(window)) bits an output element, exact."""

    def training_forward(self, input: Tensor) -> Any:
        return self._pool(max_pool3d, input)

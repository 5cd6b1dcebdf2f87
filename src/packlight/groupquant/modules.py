"""Layers under torch.nn's own names that keep group-quantised tensors in training.

Constructor, attributes, `state_dict` and printing are torch.nn's; `bits`, `group_size` and
`rounding` come after them, as `GroupQuant` has them. In `eval()` the plain torch operation runs,
exact and twice differentiable. What is kept, and how exact the gradient is, stands with each
function in `functional.py`. `inplace=True` overwrites the input, as torch's does,
and saves nothing by it: the output is made first.
"""

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Size, Tensor, nn

from packlight import sharing
from packlight._checks import check_inplace
from packlight._overwrite import overwrite
from packlight._seeds import start_rounding
from packlight.elementwise.functions import quick_gelu, relu_squared
from packlight.groupquant.grouping import Rounding
from packlight.groupquant.method import GroupQuant
from packlight.layers import functional, norms
from packlight.layers.linear import linear
from packlight.quantiser import Quantiser

_DEFAULT = GroupQuant()


class _Quantised(nn.Module):
    """What these layers share: the method by which they keep."""

    method: Quantiser

    def _keep(self, bits: int, group_size: int, rounding: Rounding) -> None:
        self.method = GroupQuant(bits, group_size, rounding)
        start_rounding()

    def extra_repr(self) -> str:
        own = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(self.method).items())
        inherited = super().extra_repr()
        return f"{inherited}, {own}" if inherited else own


def in_place(inplace: bool, input: Tensor, output: Tensor) -> Tensor:
    """The output, in the place of the input where that is asked for."""
    if not inplace:
        return output
    check_inplace(input)
    pack = sharing.pack_of(output)
    written = overwrite(input, output)
    if pack is not None:
        sharing.note_pack(written, pack)
    return written


class Linear(_Quantised, nn.Linear):
    """`torch.nn.Linear`; keeps a pack of its input, or shares one."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return linear(input, self.weight, self.bias, method=self.method)


class LayerNorm(_Quantised, nn.LayerNorm):
    """`torch.nn.LayerNorm`; keeps a pack of the normalised value."""

    def __init__(
        self,
        normalized_shape: int | list[int] | Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return norms.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, method=self.method
        )


class RMSNorm(_Quantised, nn.RMSNorm):
    """`torch.nn.RMSNorm`; keeps a pack of the normalised value."""

    def __init__(
        self,
        normalized_shape: int | list[int] | Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._keep(bits, group_size, rounding)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return norms.rms_norm(x, self.normalized_shape, self.weight, self.eps, method=self.method)


class CELU(_Quantised, nn.CELU):
    """`torch.nn.CELU`; keeps a pack of its input, biased."""

    def __init__(
        self,
        alpha: float = 1.0,
        inplace: bool = False,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(alpha, inplace)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return in_place(self.inplace, input, functional.celu(input, self.alpha, method=self.method))


class ELU(_Quantised, nn.ELU):
    """`torch.nn.ELU`; keeps a pack of its input, biased."""

    def __init__(
        self,
        alpha: float = 1.0,
        inplace: bool = False,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(alpha, inplace)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return in_place(self.inplace, input, functional.elu(input, self.alpha, method=self.method))


class GELU(_Quantised, nn.GELU):
    """`torch.nn.GELU`; keeps a pack of its input, biased."""

    def __init__(
        self,
        approximate: str = "none",
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(approximate)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return functional.gelu(input, self.approximate, method=self.method)


class Hardswish(_Quantised, nn.Hardswish):
    """`torch.nn.Hardswish`; keeps a pack of its input, biased."""

    def __init__(
        self,
        inplace: bool = False,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(inplace)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return in_place(self.inplace, input, functional.hardswish(input, method=self.method))


class LogSigmoid(_Quantised, nn.LogSigmoid):
    """`torch.nn.LogSigmoid`; keeps a pack of its input, biased."""

    def __init__(
        self,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return functional.logsigmoid(input, method=self.method)


class Mish(_Quantised, nn.Mish):
    """`torch.nn.Mish`; keeps a pack of its input, biased."""

    def __init__(
        self,
        inplace: bool = False,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(inplace)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return in_place(self.inplace, input, functional.mish(input, method=self.method))


class QuickGELU(_Quantised):
    """`quick_gelu` as a layer; keeps a pack of its input, biased."""

    def __init__(
        self,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return quick_gelu(input)
        return functional.quick_gelu(input, method=self.method)


class ReLUSquared(_Quantised):
    """`relu_squared` as a layer; keeps a pack of its input, biased."""

    def __init__(
        self,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return relu_squared(input)
        return functional.relu_squared(input, method=self.method)


class SELU(_Quantised, nn.SELU):
    """`torch.nn.SELU`; keeps a pack of its input, biased."""

    def __init__(
        self,
        inplace: bool = False,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(inplace)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return in_place(self.inplace, input, functional.selu(input, method=self.method))


class Sigmoid(_Quantised, nn.Sigmoid):
    """`torch.nn.Sigmoid`; keeps a pack of its input, biased."""

    def __init__(
        self,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return functional.sigmoid(input, method=self.method)


class SiLU(_Quantised, nn.SiLU):
    """`torch.nn.SiLU`; keeps a pack of its input, biased."""

    def __init__(
        self,
        inplace: bool = False,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(inplace)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return in_place(self.inplace, input, functional.silu(input, method=self.method))


class Softplus(_Quantised, nn.Softplus):
    """`torch.nn.Softplus`; keeps a pack of its input, biased."""

    def __init__(
        self,
        beta: float = 1.0,
        threshold: float = 20.0,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(beta, threshold)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return functional.softplus(input, self.beta, self.threshold, method=self.method)


class Softsign(_Quantised, nn.Softsign):
    """`torch.nn.Softsign`; keeps a pack of its input, biased."""

    def __init__(
        self,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return functional.softsign(input, method=self.method)


class Tanh(_Quantised, nn.Tanh):
    """`torch.nn.Tanh`; keeps a pack of its input, biased."""

    def __init__(
        self,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return functional.tanh(input, method=self.method)


class Tanhshrink(_Quantised, nn.Tanhshrink):
    """`torch.nn.Tanhshrink`; keeps a pack of its input, biased."""

    def __init__(
        self,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return functional.tanhshrink(input, method=self.method)


class SwiGLU(_Quantised):
    """silu(gate) up; keeps packs of both, biased."""

    def __init__(
        self,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self._keep(bits, group_size, rounding)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if not self.training:
            return F.silu(gate) * up
        return functional.swiglu(gate, up, method=self.method)


class GEGLU(_Quantised):
    """gelu(gate) up; keeps packs of both, biased."""

    def __init__(
        self,
        approximate: str = "none",
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self.approximate = approximate
        self._keep(bits, group_size, rounding)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if not self.training:
            return F.gelu(gate, approximate=self.approximate) * up
        return functional.geglu(gate, up, self.approximate, method=self.method)


class ReGLU(_Quantised):
    """relu(gate) up; keeps packs of both, biased."""

    def __init__(
        self,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__()
        self._keep(bits, group_size, rounding)

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        if not self.training:
            return F.relu(gate) * up
        return functional.reglu(gate, up, method=self.method)


class GLU(_Quantised, nn.GLU):
    """`torch.nn.GLU`; keeps packs of both halves, biased."""

    def __init__(
        self,
        dim: int = -1,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(dim)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return functional.glu(input, self.dim, method=self.method)

"""Layers under torch.nn's own names that keep group-quantised tensors in training.

Constructor, attributes, `state_dict` and printing are torch.nn's; `bits`, `group_size`, `rounding`
and `code` come after them, as `GroupQuant` has them. In `eval()` the plain torch operation runs,
exact and twice differentiable. What is kept, and how exact the gradient is, stands with each
function in `functional.py`. `inplace=True` overwrites the input, as torch's does,
and saves nothing by it: the output is made first.
"""

import dataclasses
from typing import Any

from torch import Tensor, nn

from packlight import sharing
from packlight._checks import check_inplace
from packlight._overwrite import overwrite
from packlight._seeds import start_rounding
from packlight.groupquant.grouping import Code, Rounding
from packlight.groupquant.method import GroupQuant
from packlight.layers import functional, norms, plain
from packlight.layers.activations import activation, gated, gelu_name
from packlight.layers.linear import linear
from packlight.layers.prelu import prelu
from packlight.layers.twin import Twin
from packlight.method import the_one
from packlight.quantiser import Quantiser

_DEFAULT = GroupQuant()


class Quantised(Twin):
    """What these layers share: the method by which they keep."""

    method: Quantiser

    def __init__(
        self,
        *args: Any,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
        code: Code = _DEFAULT.code,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method = the_one(self.suited(GroupQuant(bits, group_size, rounding, code)))
        start_rounding()

    @staticmethod
    def suited(method: GroupQuant) -> GroupQuant:
        """The method as this layer takes it."""
        return method.for_functions()

    def _shown(self) -> dict[str, Any]:
        return dataclasses.asdict(self.method)


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


class Linear(Quantised, nn.Linear):
    """`torch.nn.Linear`; keeps a pack of its input, or shares one."""

    @staticmethod
    def suited(method: GroupQuant) -> GroupQuant:
        return method

    # A module around it may compute its result beforehand, with others of the same input: the
    # input, its version and the result, which is read once.
    ready: "tuple[Tensor, int, Tensor] | None" = None

    def training_forward(self, input: Tensor) -> Tensor:
        if self.ready is not None:
            x, version, y = self.ready
            self.__dict__.pop("ready", None)
            if x is input and version == input._version:
                return y
        return linear(input, self.weight, self.bias, method=self.method)


class LayerNorm(Quantised, nn.LayerNorm):
    """`torch.nn.LayerNorm`; keeps a pack of the normalised value."""

    @staticmethod
    def suited(method: GroupQuant) -> GroupQuant:
        return method.for_norms()

    def training_forward(self, input: Tensor) -> Tensor:
        given = (self.normalized_shape, self.weight, self.bias, self.eps)
        return norms.layer_norm(input, *given, method=self.method)


class RMSNorm(Quantised, nn.RMSNorm):
    """`torch.nn.RMSNorm`; keeps a pack of the normalised value."""

    @staticmethod
    def suited(method: GroupQuant) -> GroupQuant:
        return method.for_norms()

    def training_forward(self, x: Tensor) -> Tensor:
        given = (self.normalized_shape, self.weight, self.eps)
        return norms.rms_norm(x, *given, method=self.method)


class CELU(Quantised, nn.CELU):
    """`torch.nn.CELU`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        y = activation(input, "celu", self.method, (self.alpha,))
        return in_place(self.inplace, input, y)


class ELU(Quantised, nn.ELU):
    """`torch.nn.ELU`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        y = activation(input, "elu", self.method, (self.alpha,))
        return in_place(self.inplace, input, y)


class GELU(Quantised, nn.GELU):
    """`torch.nn.GELU`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        name = gelu_name(self.approximate)
        return activation(input, name, self.method)


class Hardswish(Quantised, nn.Hardswish):
    """`torch.nn.Hardswish`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        y = activation(input, "hardswish", self.method)
        return in_place(self.inplace, input, y)


class LogSigmoid(Quantised, nn.LogSigmoid):
    """`torch.nn.LogSigmoid`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return activation(input, "logsigmoid", self.method)


class Mish(Quantised, nn.Mish):
    """`torch.nn.Mish`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        y = activation(input, "mish", self.method)
        return in_place(self.inplace, input, y)


class QuickGELU(Quantised, plain.QuickGELU):
    """`quick_gelu` as a layer; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return activation(input, "quick_gelu", self.method)


class ReLUSquared(Quantised, plain.ReLUSquared):
    """`relu_squared` as a layer; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return activation(input, "relu_squared", self.method)


class SELU(Quantised, nn.SELU):
    """`torch.nn.SELU`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        y = activation(input, "selu", self.method)
        return in_place(self.inplace, input, y)


class Sigmoid(Quantised, nn.Sigmoid):
    """`torch.nn.Sigmoid`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return activation(input, "sigmoid", self.method)


class SiLU(Quantised, nn.SiLU):
    """`torch.nn.SiLU`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        y = activation(input, "silu", self.method)
        return in_place(self.inplace, input, y)


class Softplus(Quantised, nn.Softplus):
    """`torch.nn.Softplus`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        parameters = (self.beta, self.threshold)
        return activation(input, "softplus", self.method, parameters)


class Softsign(Quantised, nn.Softsign):
    """`torch.nn.Softsign`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return activation(input, "softsign", self.method)


class Tanh(Quantised, nn.Tanh):
    """`torch.nn.Tanh`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return activation(input, "tanh", self.method)


class Tanhshrink(Quantised, nn.Tanhshrink):
    """`torch.nn.Tanhshrink`; keeps a pack of its input, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return activation(input, "tanhshrink", self.method)


class PReLU(Quantised, nn.PReLU):
    """`torch.nn.PReLU`; keeps 1 bit and, where its slopes train, a pack of its input."""

    def training_forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight, method=self.method)


class SwiGLU(Quantised, plain.SwiGLU):
    """silu(gate) up; keeps packs of both, biased."""

    def training_forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated(gate, up, "silu", self.method, super().forward)


class GEGLU(Quantised, plain.GEGLU):
    """gelu(gate) up; keeps packs of both, biased."""

    def training_forward(self, gate: Tensor, up: Tensor) -> Tensor:
        name = gelu_name(self.approximate)
        return gated(gate, up, name, self.method, super().forward)


class ReGLU(Quantised, plain.ReGLU):
    """relu(gate) up; keeps packs of both, biased."""

    def training_forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return gated(gate, up, "relu", self.method, super().forward)


class GLU(Quantised, nn.GLU):
    """`torch.nn.GLU`; keeps packs of both halves, biased."""

    def training_forward(self, input: Tensor) -> Tensor:
        return functional.glu(input, self.dim, method=self.method)

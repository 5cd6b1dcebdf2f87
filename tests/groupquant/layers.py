"""The table of group-quantised activations."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight.groupquant as group_quant
import tests.layers
from packlight.elementwise.functions import quick_gelu, relu_squared
from tests.helpers import pack_bytes

BITS, GROUP_SIZE = 8, 32


@dataclasses.dataclass(frozen=True)
class Layer(tests.layers.Layer):
    """To nearest, so that two calls agree, and with small groups for the small samples of tests."""

    bits: int = BITS

    method = "groupquant"
    operators = ("activation", "activation_backward")
    keeps_output = False

    @property
    def tolerance(self) -> float:
        """Another memory order makes other groups, each with another rounding.

        Samples go to +-30, and lie at -3 and 0, where derivatives of two jump by 1/2 and 0.7.
        """
        if self.bits < BITS:  # a step of 9 from -30 to 30
            return 1.3
        return 0.8 if self.name in ("hardswish", "selu") else 0.3

    def __str__(self) -> str:
        return self.name if self.bits == BITS else f"{self.name} {self.bits} bits"

    def apply(self, x: Tensor, **options: object) -> Tensor:
        return super().apply(x, **self._options() | options)

    def make(self, **options: object) -> nn.Module:
        return super().make(**self._options() | options)

    def _options(self) -> dict[str, object]:
        return {"bits": self.bits, "group_size": GROUP_SIZE, "rounding": "nearest"}

    def packed_bytes(self, count: int) -> int:
        return pack_bytes(count, self.bits, GROUP_SIZE)


def _layer(name, module, function, plain, *arguments, parameters=None, bits=BITS):
    values = arguments if parameters is None else parameters
    ours, theirs = getattr(group_quant, module), getattr(nn, module, None)
    return Layer(name, ours, theirs, function, plain, arguments, values, bits=bits)


def _gelu(x, approximate):
    return F.gelu(x, approximate=approximate)


LAYERS = [
    _layer("celu", "CELU", group_quant.celu, F.celu, 0.7),
    _layer("elu", "ELU", group_quant.elu, F.elu, 1.0),
    _layer("gelu", "GELU", group_quant.gelu, _gelu, "none", parameters=()),
    _layer("gelu", "GELU", group_quant.gelu, _gelu, "none", parameters=(), bits=3),
    _layer("gelu_tanh", "GELU", group_quant.gelu, _gelu, "tanh", parameters=()),
    _layer("hardswish", "Hardswish", group_quant.hardswish, F.hardswish),
    _layer("logsigmoid", "LogSigmoid", group_quant.logsigmoid, F.logsigmoid),
    _layer("mish", "Mish", group_quant.mish, F.mish),
    _layer("quick_gelu", "QuickGELU", group_quant.quick_gelu, quick_gelu),
    _layer("relu_squared", "ReLUSquared", group_quant.relu_squared, relu_squared),
    _layer("selu", "SELU", group_quant.selu, F.selu),
    _layer("sigmoid", "Sigmoid", group_quant.sigmoid, torch.sigmoid),
    _layer("silu", "SiLU", group_quant.silu, F.silu),
    _layer("softplus", "Softplus", group_quant.softplus, F.softplus, 1.5, 10.0),
    _layer("softsign", "Softsign", group_quant.softsign, F.softsign),
    _layer("tanh", "Tanh", group_quant.tanh, torch.tanh),
    _layer("tanhshrink", "Tanhshrink", group_quant.tanhshrink, F.tanhshrink),
]

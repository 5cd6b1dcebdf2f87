"""The table of inverted activations."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

import packlight.inverted as inverted
import tests.layers
from packlight.elementwise.functions import quick_gelu
from packlight.inverted.inverses import INVERSES
from packlight.packing import layout


@dataclasses.dataclass(frozen=True)
class Layer(tests.layers.Layer):
    """`branch`: a bit an element says which side of the minimum. `native`: torch's own function."""

    branch: bool = False
    native: bool = False

    method = "inverted"
    operators = ("activation", "activation_", "backward")
    keeps_output = True
    # Next to a minimum a last digit of the output is worth this much of the derivative.
    tolerance = 3e-4

    def __str__(self) -> str:
        return self.name

    def packed_bytes(self, count: int) -> int:
        return layout.packed_bytes(count, 1) if self.branch else 0

    @property
    def path(self) -> tuple[object, ...]:
        if self.native:
            return (self.method, "torch's own")
        return (self.method, self.branch, INVERSES[self.name].select)

    @property
    def step(self) -> bool:
        """Whether the derivative is a step function."""
        return self.name in ("hardsigmoid", "hardtanh", "leaky_relu", "relu", "relu6")

    @property
    def derivable_twice(self) -> bool:
        return self.native


def _layer(name, module, function, plain, *arguments, parameters=None, **flags):
    ours, theirs = getattr(inverted, module), getattr(nn, module, None)
    values = arguments if parameters is None else parameters
    return Layer(name, ours, theirs, function, plain, arguments, values, **flags)


def _gelu(x, approximate):
    return F.gelu(x, approximate=approximate)


BOTH = {"branch": True, "inplace": True}
LAYERS = [
    _layer("gelu", "GELU", inverted.gelu, _gelu, "none", parameters=(), branch=True),
    _layer("gelu_tanh", "GELU", inverted.gelu, _gelu, "tanh", parameters=(), branch=True),
    _layer("hardswish", "Hardswish", inverted.hardswish, F.hardswish, **BOTH),
    _layer("mish", "Mish", inverted.mish, F.mish, **BOTH),
    _layer("quick_gelu", "QuickGELU", inverted.quick_gelu, quick_gelu, branch=True),
    _layer("silu", "SiLU", inverted.silu, F.silu, **BOTH),
    _layer("celu", "CELU", inverted.celu, F.celu, 0.7, inplace=True),
    _layer("elu", "ELU", inverted.elu, F.elu, 1.0, inplace=True),
    _layer("hardsigmoid", "Hardsigmoid", inverted.hardsigmoid, F.hardsigmoid, inplace=True),
    _layer("hardtanh", "Hardtanh", inverted.hardtanh, F.hardtanh, -0.5, 1.25, inplace=True),
    _layer("leaky_relu", "LeakyReLU", inverted.leaky_relu, F.leaky_relu, 0.2, inplace=True),
    _layer("logsigmoid", "LogSigmoid", inverted.logsigmoid, F.logsigmoid),
    _layer("relu", "ReLU", inverted.relu, F.relu, inplace=True, native=True),
    _layer("relu6", "ReLU6", inverted.relu6, F.relu6, inplace=True),
    _layer("selu", "SELU", inverted.selu, F.selu, inplace=True),
    _layer("sigmoid", "Sigmoid", inverted.sigmoid, torch.sigmoid, native=True),
    _layer("softplus", "Softplus", inverted.softplus, F.softplus, 1.5, 10.0),
    _layer("softsign", "Softsign", inverted.softsign, F.softsign),
    _layer("tanh", "Tanh", inverted.tanh, torch.tanh, native=True),
    _layer("tanhshrink", "Tanhshrink", inverted.tanhshrink, F.tanhshrink),
]
OURS = [layer for layer in LAYERS if not layer.native]
BRANCH = [layer for layer in LAYERS if layer.branch]

"""The table of few-bit layers: every test of the contract runs over these rows."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight.fewbit as few_bit
from packlight.elementwise.functions import quick_gelu, relu_squared


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, its function, and torch's own.

    `bits` is what an exact layer keeps an element, None where the codebook decides.
    """

    name: str  # in the tables of activations.py
    module: Callable[..., nn.Module] | None
    plain_module: Callable[..., nn.Module] | None
    function: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    arguments: tuple[float | str, ...] = ()
    parameters: tuple[float, ...] = ()  # the arguments, as the tables take them
    bits: int | None = None
    inplace: bool = False

    def __str__(self) -> str:
        return self.name

    def apply(self, x: Tensor, bits: int = 3, **options: object) -> Tensor:
        if self.bits is None:
            options["bits"] = bits
        return self.function(x, *self.arguments, **options)

    def torch(self, x: Tensor, **options: object) -> Tensor:
        return self.plain(x, *self.arguments, **options)

    def make(self, bits: int = 3, **options: object) -> nn.Module:
        assert self.module is not None
        if self.bits is None:
            options["bits"] = bits
        return self.module(*self.arguments, **options)

    def code_bits(self, bits: int = 3) -> int:
        return self.bits or bits


def _continuous(name, module, function, plain, *arguments, inplace=False, parameters=None):
    ours = getattr(few_bit, module)
    theirs = getattr(nn, module, None)
    values = arguments if parameters is None else parameters
    return Layer(name, ours, theirs, function, plain, arguments, values, None, inplace)


def _exact(name, module, function, plain, *arguments, inplace=False, bits=1):
    ours = getattr(few_bit, module) if module else None
    theirs = getattr(nn, module) if module else None
    return Layer(name, ours, theirs, function, plain, arguments, arguments, bits, inplace)


LAYERS = [
    _continuous("celu", "CELU", few_bit.celu, F.celu, 0.7, inplace=True),
    _continuous("elu", "ELU", few_bit.elu, F.elu, 1.0, inplace=True),
    _continuous(
        "gelu", "GELU", few_bit.gelu, lambda x, a: F.gelu(x, approximate=a), "none", parameters=()
    ),
    _continuous(
        "gelu_tanh",
        "GELU",
        few_bit.gelu,
        lambda x, a: F.gelu(x, approximate=a),
        "tanh",
        parameters=(),
    ),
    _continuous("hardswish", "Hardswish", few_bit.hardswish, F.hardswish, inplace=True),
    _continuous("logsigmoid", "LogSigmoid", few_bit.logsigmoid, F.logsigmoid),
    _continuous("mish", "Mish", few_bit.mish, F.mish, inplace=True),
    _continuous("quick_gelu", "QuickGELU", few_bit.quick_gelu, quick_gelu),
    _continuous("relu_squared", "ReLUSquared", few_bit.relu_squared, relu_squared),
    _continuous("selu", "SELU", few_bit.selu, F.selu, inplace=True),
    _continuous("sigmoid", "Sigmoid", few_bit.sigmoid, torch.sigmoid),
    _continuous("silu", "SiLU", few_bit.silu, F.silu, inplace=True),
    _continuous("softplus", "Softplus", few_bit.softplus, F.softplus, 1.5, 10.0),
    _continuous("softsign", "Softsign", few_bit.softsign, F.softsign),
    _continuous("tanh", "Tanh", few_bit.tanh, torch.tanh),
    _continuous("tanhshrink", "Tanhshrink", few_bit.tanhshrink, F.tanhshrink),
    _exact("abs", None, few_bit.abs, torch.abs, bits=2),
    _exact("hardshrink", "Hardshrink", few_bit.hardshrink, F.hardshrink, 0.375),
    _exact("hardsigmoid", "Hardsigmoid", few_bit.hardsigmoid, F.hardsigmoid, inplace=True),
    _exact("hardtanh", "Hardtanh", few_bit.hardtanh, F.hardtanh, -0.5, 1.25, inplace=True),
    _exact("leaky_relu", "LeakyReLU", few_bit.leaky_relu, F.leaky_relu, 0.2, inplace=True),
    _exact("relu", "ReLU", few_bit.relu, F.relu, inplace=True),
    _exact("relu6", "ReLU6", few_bit.relu6, F.relu6, inplace=True),
    _exact("softshrink", "Softshrink", few_bit.softshrink, F.softshrink, 0.375),
    _exact("threshold", "Threshold", few_bit.threshold, F.threshold, 0.25, 3.0, inplace=True),
]
CONTINUOUS = [layer for layer in LAYERS if layer.bits is None]
EXACT = [layer for layer in LAYERS if layer.bits is not None]
INPLACE = [layer for layer in LAYERS if layer.inplace]
MODULES = [layer for layer in LAYERS if layer.module is not None]


def kept_bytes(function: Callable[[], object]) -> int:
    """Bytes of the unique storages that autograd keeps while `function` runs."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())

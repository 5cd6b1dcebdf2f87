"""The table of few-bit layers."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight.fewbit as few_bit
import tests.layers
from packlight.elementwise.functions import quick_gelu, relu_squared
from packlight.fewbit.activations import CONTINUOUS as CONTINUOUS_CODES
from packlight.fewbit.activations import EXACT as EXACT_CODES
from packlight.fewbit.codebook import default_codebook
from packlight.packing import layout


@dataclasses.dataclass(frozen=True)
class Layer(tests.layers.Layer):
    """`bits` is what an exact layer keeps an element, None where the codebook decides."""

    bits: int | None = None

    method = "fewbit"
    operators = ("activation", "activation_", "encode", "decode_backward")
    keeps_output = False

    def __str__(self) -> str:
        return self.name

    def apply(self, x: Tensor, bits: int = 3, **options: object) -> Tensor:
        if self.bits is None:
            options["bits"] = bits
        return super().apply(x, **options)

    def make(self, bits: int = 3, **options: object) -> nn.Module:
        if self.bits is None:
            options["bits"] = bits
        return super().make(**options)

    def code_bits(self, bits: int = 3) -> int:
        return self.bits or bits

    @property
    def path(self) -> tuple[object, ...]:
        if self.bits is not None:
            return (self.method, self.bits, EXACT_CODES[self.name].mask)
        book = default_codebook(self.name, 3, self.parameters)
        return (self.method, book.parity, CONTINUOUS_CODES[self.name].poison)

    def packed_bytes(self, count: int, bits: int = 3) -> int:
        flag = self.bits is None
        return layout.packed_bytes(count, self.code_bits(bits)) + flag


def _continuous(name, module, function, plain, *arguments, inplace=False, parameters=None):
    ours = getattr(few_bit, module)
    theirs = getattr(nn, module, None)
    values = arguments if parameters is None else parameters
    return Layer(name, ours, theirs, function, plain, arguments, values, inplace)


def _exact(name, module, function, plain, *arguments, inplace=False, bits=1):
    ours = getattr(few_bit, module) if module else None
    theirs = getattr(nn, module) if module else None
    return Layer(name, ours, theirs, function, plain, arguments, arguments, inplace, bits)


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
    _exact("clamp", None, few_bit.clamp, torch.clamp, -0.5, 1.25),
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

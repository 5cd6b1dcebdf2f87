"""`Conv1D` of GPT-2 and its like: a linear layer that holds its weight transposed."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from packlight._checks import is_frozen
from packlight._classes import joined
from packlight.groupquant.modules import Quantised
from packlight.inverted.linear import _cast_if_noted
from packlight.inverted.method import Inverted
from packlight.layers.linear import linear
from packlight.layers.twin import Twin
from packlight.method import Swap, rule
from packlight.quantiser import Quantiser
from packlight.sketch import functional as sketched
from packlight.sketch.method import Sketch
from packlight.sketch.modules import Sketched


class GroupQuantConv1D(Quantised):
    """x W + b; keeps a pack of x, or shares one, as `packlight.groupquant.Linear` does."""

    is_transposed_linear = True  # to functions of several layers
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or is_frozen(self.weight):
            plain: Tensor = super().forward(x)
            return plain
        return linear(x, self.weight.t(), self.bias, method=self.method)


class SketchConv1D(Sketched):
    """x W + b; keeps a sketch of x, or shares one, as `packlight.sketch.Linear` does."""

    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or is_frozen(self.weight):
            plain: Tensor = super().forward(x)
            return plain
        return sketched.linear(x, self.weight.t(), self.bias, **self.options)


class InvertedConv1D(Twin):
    """x W + b; keeps the cast of x that an inverted norm keeps, as `packlight.inverted.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(_cast_if_noted(x))
        return y


@rule(Quantiser, Conv1D)
def _quantised_conv1d(method: Quantiser, module: Conv1D) -> Swap:
    return Swap(joined(GroupQuantConv1D, Conv1D), {"method": method})


@rule(Sketch, Conv1D)
def _sketched_conv1d(method: Sketch, module: Conv1D) -> Swap:
    return Swap(joined(SketchConv1D, Conv1D), {"method": method})


@rule(Inverted, Conv1D)
def _inverted_conv1d(method: Inverted, module: Conv1D) -> Swap:
    return Swap(joined(InvertedConv1D, Conv1D))

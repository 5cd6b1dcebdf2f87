"""Residual blocks of transformers' ResNet: each convolution with its batch norm, one function."""

from typing import Any

from torch import Tensor, nn
from transformers.models.resnet import modeling_resnet as modeling

from packlight._classes import joined, origin
from packlight.calls import is_bare
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._residual import Block, Known, conv_norm_act, end, known, passes
from packlight.method import Method, Rule, Swap, rule_finder


def _block(self: Any, hidden_state: Any) -> Any:
    """As transformers has it. Never run: `is_copy` compares with it."""
    residual = hidden_state
    hidden_state = self.layer(hidden_state)
    residual = self.shortcut(residual)
    hidden_state += residual
    hidden_state = self.activation(hidden_state)
    return hidden_state  # noqa: RET504  as it is there


class FixedPointResidualLayer(Block):
    """activation(layer(x) + shortcut(x)), where `layer` is several convolutions with norms."""

    def run(self: Any, x: Tensor, covered: bool) -> Tensor:
        *layers, last = self.layer
        first = at = known(x)
        for each in layers:
            at = conv_norm_act(at, each.convolution, each.normalization, each.activation)
        term = self.shortcut
        if _is(term, modeling.ResNetShortCut):
            added = conv_norm_act(first, term.convolution, term.normalization)
        else:
            added = first if passes(term) else Known(term(first.noted()))
        parts = (last.convolution, last.normalization, self.activation)
        return end(at, *parts, added, None, covered)

    def fits(self: Any) -> bool:
        layer = self.layer
        if not _is(layer, nn.Sequential) or not len(layer):
            return False
        if not all(_is(each, modeling.ResNetConvLayer) for each in layer):
            return False
        return passes(layer[-1].activation)


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module runs the code of the class, with its calls covered or not."""
    derived = origin(type(module))
    own = type(module) if derived is None else derived[1][0]
    return own is kind and is_bare(module)


@once_a_class
def _is_block(kind: type[nn.Module]) -> bool:
    return is_copy(vars(kind).get("forward"), _block)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _swap if issubclass(method, FixedPoint) and _is_block(kind) else None


def _swap(method: FixedPoint, module: nn.Module) -> Swap:
    return Swap(joined(FixedPointResidualLayer, type(module)), parts=("layer.0.normalization",))

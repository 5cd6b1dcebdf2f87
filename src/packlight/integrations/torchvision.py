"""Blocks of torchvision; `packlight.convert` imports this where the program has imported it.

| class | becomes, under `FixedPoint` |
| --- | --- |
| BasicBlock, Bottleneck | convolution, batch norm and ReLU as one function, with the sum |

So does a class of someone else's with their code. All other layers of torchvision are torch's, with
torch's rules.
"""

from typing import Any

from torch import Tensor, nn

from packlight._classes import joined
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._residual import Block, conv_norm_act, end, known
from packlight.method import Method, Rule, Swap, rule_finder


def _basic(self: Any, x: Any) -> Any:
    """As torchvision has it. Never run: `is_copy` compares with it."""
    identity = x

    out = self.conv1(x)
    out = self.bn1(out)
    out = self.relu(out)

    out = self.conv2(out)
    out = self.bn2(out)

    if self.downsample is not None:
        identity = self.downsample(x)

    out += identity
    out = self.relu(out)

    return out  # noqa: RET504  as it is there


def _bottleneck(self: Any, x: Any) -> Any:
    """As torchvision has it. Never run: `is_copy` compares with it."""
    identity = x

    out = self.conv1(x)
    out = self.bn1(out)
    out = self.relu(out)

    out = self.conv2(out)
    out = self.bn2(out)
    out = self.relu(out)

    out = self.conv3(out)
    out = self.bn3(out)

    if self.downsample is not None:
        identity = self.downsample(x)

    out += identity
    out = self.relu(out)

    return out  # noqa: RET504  as it is there


class FixedPointBasicBlock(Block):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + downsample(x))."""

    def run(self: Any, x: Tensor, covered: bool) -> Tensor:
        first = known(x)
        at = conv_norm_act(first, self.conv1, self.bn1, self.relu)
        return end(at, self.conv2, self.bn2, self.relu, first, self.downsample, covered)


class FixedPointBottleneck(Block):
    """The same with three convolutions."""

    def run(self: Any, x: Tensor, covered: bool) -> Tensor:
        first = known(x)
        at = conv_norm_act(first, self.conv1, self.bn1, self.relu)
        at = conv_norm_act(at, self.conv2, self.bn2, self.relu)
        return end(at, self.conv3, self.bn3, self.relu, first, self.downsample, covered)


_KNOWN = {_basic: FixedPointBasicBlock, _bottleneck: FixedPointBottleneck}


@once_a_class
def _mixin(kind: type[nn.Module]) -> type[nn.Module] | None:
    forward = vars(kind).get("forward")
    return next((ours for known, ours in _KNOWN.items() if is_copy(forward, known)), None)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _block if issubclass(method, FixedPoint) and _mixin(kind) is not None else None


def _block(method: FixedPoint, module: nn.Module) -> Swap:
    mixin = _mixin(type(module))
    assert mixin is not None
    return Swap(joined(mixin, type(module)), parts=("bn1",))

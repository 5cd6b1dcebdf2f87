"""Residual blocks of timm, each convolution of which runs with its batch norm as one function."""

from typing import Any

from torch import Tensor, nn

from packlight._classes import joined
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._residual import Block, Known, conv_norm_act, end, known, passes
from packlight.method import Method, Rule, Swap, rule_finder


def _basic(self: Any, x: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    shortcut = x

    x = self.conv1(x)
    x = self.bn1(x)
    x = self.drop_block(x)
    x = self.act1(x)
    x = self.aa(x)

    x = self.conv2(x)
    x = self.bn2(x)

    if self.se is not None:
        x = self.se(x)

    if self.drop_path is not None:
        x = self.drop_path(x)

    if self.downsample is not None:
        shortcut = self.downsample(shortcut)
    x += shortcut
    x = self.act2(x)

    return x  # noqa: RET504  as it is there


def _bottleneck(self: Any, x: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    shortcut = x

    x = self.conv1(x)
    x = self.bn1(x)
    x = self.act1(x)

    x = self.conv2(x)
    x = self.bn2(x)
    x = self.drop_block(x)
    x = self.act2(x)
    x = self.aa(x)

    x = self.conv3(x)
    x = self.bn3(x)

    if self.se is not None:
        x = self.se(x)

    if self.drop_path is not None:
        x = self.drop_path(x)

    if self.downsample is not None:
        shortcut = self.downsample(shortcut)
    x += shortcut
    x = self.act3(x)

    return x  # noqa: RET504  as it is there


class FixedPointBasicBlock(Block):
    """act2(drop_path(se(bn2(conv2(...)))) + downsample(x))."""

    def run(self: Any, x: Tensor, covered: bool) -> Tensor:
        first, parts = known(x), self._modules
        at = self._middle(first, parts["conv1"], parts["bn1"], parts["act1"])
        last, between = (parts["conv2"], parts["bn2"], parts["act2"]), (self.se, self.drop_path)
        return end(at, *last, first, self.downsample, covered, between)

    def _middle(self: Any, at: Known, conv: Any, norm: Any, act: Any) -> Known:
        """aa(act(drop_block(norm(conv(x)))))."""
        drop, aa = self.drop_block, self.aa
        if passes(drop, aa):
            return conv_norm_act(at, conv, norm, act)
        return Known(aa(act(drop(conv_norm_act(at, conv, norm).noted()))))


class FixedPointBottleneck(FixedPointBasicBlock):
    """The same with three convolutions."""

    def run(self: Any, x: Tensor, covered: bool) -> Tensor:
        first, parts = known(x), self._modules
        at = conv_norm_act(first, parts["conv1"], parts["bn1"], parts["act1"])
        at = self._middle(at, parts["conv2"], parts["bn2"], parts["act2"])
        last, between = (parts["conv3"], parts["bn3"], parts["act3"]), (self.se, self.drop_path)
        return end(at, *last, first, self.downsample, covered, between)


_RESIDUAL = {_basic: FixedPointBasicBlock, _bottleneck: FixedPointBottleneck}


@once_a_class
def _residual_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    forward = vars(kind).get("forward")
    return next((ours for known, ours in _RESIDUAL.items() if is_copy(forward, known)), None)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    return _blocks if issubclass(method, FixedPoint) and _residual_of(kind) is not None else None


def _blocks(method: FixedPoint, module: nn.Module) -> Swap:
    mixin = _residual_of(type(module))
    assert mixin is not None
    return Swap(joined(mixin, type(module)), parts=("bn1",))

"""Layers of timm; `packlight.convert` imports this where the program has imported timm.

| class | becomes, under |
| --- | --- |
| GELU, GELUTanh, QuickGELU | the activation: `FewBit`, `GroupQuant`, `Inverted` |
| BatchNormAct2d | the batch norm, before its dropout and activation: `FixedPoint`, `GroupQuant` |
| LayerNorm | the layer norm: `GroupQuant`, `Inverted` |
| LayerNorm2d | the layer norm over channels: `GroupQuant` |
| RmsNorm | the RMS norm: `GroupQuant`, `Inverted` |
| Mlp | W_2 f(W_1 x) as one function, where its parts are `GroupQuant`'s and no dropout is on |

The dropout and the activation of BatchNormAct2d are modules of their own and converted as such.
What timm builds of torch.nn has torch's rules; its attention calls
`F.scaled_dot_product_attention`, which `convert(..., functional=True)` covers. All other classes of
its own are left alone.
"""

from typing import Any

import torch
from timm import layers
from torch import Tensor, nn

from packlight._classes import joined
from packlight.calls import is_bare, uncovered
from packlight.groupquant.fixed_point import functional as fixed_point
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.modules import Quantised
from packlight.integrations._activations import register
from packlight.integrations._copies import is_copy, once_a_class
from packlight.integrations._parts import function_of_part, parameters_of, takes
from packlight.integrations._residual import Block, Known, conv_norm_act, end, passes
from packlight.inverted import norms as inverted
from packlight.inverted.method import Inverted
from packlight.inverted.norm_modules import InvertedNorm
from packlight.layers import channel_norms, norms
from packlight.layers.mlp import mlp
from packlight.layers.twin import Twin, start_batch
from packlight.method import Method, NotConverted, Rule, Swap, rule, rule_finder
from packlight.quantiser import Quantiser

register({layers.GELU: "gelu", layers.GELUTanh: "gelu_tanh", layers.QuickGELU: "quick_gelu"})


# --- Batch norm with an activation.


class FixedPointBatchNormAct2d(Twin):
    """act(drop(batch_norm(x))); keeps the codes of `packlight.groupquant.fixed_point`."""

    bits: int
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        y = fixed_point.batch_norm(x, **start_batch(self), bits=self.bits)
        activated: Tensor = self.act(self.drop(y))
        return activated


class GroupQuantBatchNormAct2d(Quantised):
    """act(drop(batch_norm(x))); keeps a pack of the normalised value."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        y = channel_norms.batch_norm(x, **start_batch(self), method=self.method)
        activated: Tensor = self.act(self.drop(y))
        return activated


# --- Feed-forward layers.


def _mlp(self: Any, x: Any) -> Any:
    """As timm has it. Never run: `is_copy` compares with it."""
    x = self.fc1(x)
    x = self.act(x)
    x = self.drop1(x)
    x = self.norm(x)
    x = self.fc2(x)
    x = self.drop2(x)
    return x  # noqa: RET504  as it is there


class GroupQuantMlp(nn.Module):
    """fc2(act(fc1(x))); keeps packs of x and of what fc1 gives, as its parts do one by one."""

    method: Quantiser
    fc1: nn.Module
    act: nn.Module
    drop1: nn.Module
    norm: nn.Module
    fc2: nn.Module
    drop2: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor | None = None
        if self.training and not torch.compiler.is_compiling():
            y = uncovered(self._at_once, x)
        if y is None:
            y = super().forward(x)
        return y

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The result by one function; None where the parts are to run one by one."""
        first, act, last = self.fc1, self.act, self.fc2
        for dropout in (self.drop1, self.drop2):
            if not isinstance(dropout, nn.Dropout) or dropout.p or not is_bare(dropout):
                return None
        if type(self.norm) is not nn.Identity or not is_bare(self.norm):
            return None
        parameters = parameters_of((first, last), self.method)
        function = function_of_part(act, self.method)
        if parameters is None or function is None or not takes(x, self.method):
            return None
        return mlp(x, parameters, function, self.method)


# --- Residual blocks.


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
        first = Known(x)
        at = self._middle(first, self.conv1, self.bn1, self.act1)
        between = (self.se, self.drop_path)
        return end(at, self.conv2, self.bn2, self.act2, first, self.downsample, covered, between)

    def _middle(self: Any, at: Known, conv: Any, norm: Any, act: Any) -> Known:
        """aa(act(drop_block(norm(conv(x)))))."""
        drop, aa = self.drop_block, self.aa
        if passes(drop, aa):
            return conv_norm_act(at, conv, norm, act)
        return Known(aa(act(drop(conv_norm_act(at, conv, norm).noted()))))


class FixedPointBottleneck(FixedPointBasicBlock):
    """The same with three convolutions."""

    def run(self: Any, x: Tensor, covered: bool) -> Tensor:
        first = Known(x)
        at = conv_norm_act(first, self.conv1, self.bn1, self.act1)
        at = self._middle(at, self.conv2, self.bn2, self.act2)
        between = (self.se, self.drop_path)
        return end(at, self.conv3, self.bn3, self.act3, first, self.downsample, covered, between)


# --- Norms of rows.


class GroupQuantLayerNorm(Quantised):
    """`F.layer_norm` over the last dimension; keeps a pack of the normalised value."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        return norms.layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, method=self.method
        )


class GroupQuantLayerNorm2d(Quantised):
    """`F.layer_norm` over the channels of [N, C, H, W]; keeps a pack of the normalised value."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        y = norms.layer_norm(
            x.permute(0, 2, 3, 1),
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            method=self.method,
        )
        return y.permute(0, 3, 1, 2)


class GroupQuantRmsNorm(Quantised):
    """`F.rms_norm` over the last dimension; keeps a pack of the normalised value."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        return norms.rms_norm(x, self.normalized_shape, self.weight, self.eps, method=self.method)


class InvertedLayerNorm(InvertedNorm):
    """`F.layer_norm` over the last dimension; keeps its output and 32 bits a row."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        shape = tuple(self.normalized_shape)
        return inverted.row_norm(x, shape, self.weight, self.bias, self.eps, True, self._verdict)


class InvertedRmsNorm(InvertedNorm):
    """`F.rms_norm` over the last dimension; keeps its output and 32 bits a row."""

    normalized_shape: tuple[int, ...]
    weight: Tensor | None
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            plain: Tensor = super().forward(x)
            return plain
        shape = tuple(self.normalized_shape)
        return inverted.row_norm(x, shape, self.weight, None, self.eps, False, self._verdict)


# --- The rules.

_GROUP_QUANT: dict[type[nn.Module], type[nn.Module]] = {
    layers.BatchNormAct2d: GroupQuantBatchNormAct2d,
    layers.LayerNorm: GroupQuantLayerNorm,
    layers.LayerNorm2d: GroupQuantLayerNorm2d,
    layers.RmsNorm: GroupQuantRmsNorm,
}
_INVERTED: dict[type[nn.Module], type[nn.Module]] = {
    layers.LayerNorm: InvertedLayerNorm,
    layers.RmsNorm: InvertedRmsNorm,
}


def _check(module: Any) -> None:
    if getattr(module, "_fast_norm", False):
        raise NotConverted("timm's fast norm is on, which computes in another dtype")


@rule(Quantiser, *_GROUP_QUANT)
def _quantised(method: Quantiser, module: Any) -> Swap:
    _check(module)
    kind = type(module)
    return Swap(joined(_GROUP_QUANT[kind], kind), {"method": method})


@rule(Inverted, *_INVERTED)
def _inverted(method: Inverted, module: Any) -> Swap:
    _check(module)
    kind = type(module)
    return Swap(joined(_INVERTED[kind], kind), {"offset_limit": None, "_seen": None})


@once_a_class
def _is_mlp(kind: type[nn.Module]) -> bool:
    return is_copy(vars(kind).get("forward"), _mlp)


_BLOCKS = {_basic: FixedPointBasicBlock, _bottleneck: FixedPointBottleneck}


@once_a_class
def _block_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    forward = vars(kind).get("forward")
    return next((ours for known, ours in _BLOCKS.items() if is_copy(forward, known)), None)


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    if issubclass(method, Quantiser) and _is_mlp(kind):
        return _parts
    return _block if issubclass(method, FixedPoint) and _block_of(kind) is not None else None


def _block(method: FixedPoint, module: nn.Module) -> Swap:
    mixin = _block_of(type(module))
    assert mixin is not None
    return Swap(joined(mixin, type(module)))


def _parts(method: Quantiser, module: nn.Module) -> Swap:
    return Swap(joined(GroupQuantMlp, type(module)), {"method": method})


@rule(FixedPoint, layers.BatchNormAct2d)
def _fixed_point(method: FixedPoint, module: Any) -> Swap:
    kind = type(module)
    return Swap(joined(FixedPointBatchNormAct2d, kind), {"bits": method.bits})

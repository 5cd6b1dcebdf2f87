"""Norms of timm: a batch norm with an activation behind it, and norms of rows."""

from typing import Any

from timm import layers
from torch import Tensor, nn

from packlight._classes import joined
from packlight.groupquant.fixed_point import functional as fixed_point
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.modules import Quantised
from packlight.inverted import norms as inverted
from packlight.inverted.method import Inverted
from packlight.inverted.norm_modules import InvertedNorm
from packlight.layers import channel_norms, norms
from packlight.layers.twin import Twin, start_batch
from packlight.method import NotConverted, Swap, rule
from packlight.quantiser import Quantiser

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


@rule(FixedPoint, layers.BatchNormAct2d)
def _fixed_point(method: FixedPoint, module: Any) -> Swap:
    kind = type(module)
    return Swap(joined(FixedPointBatchNormAct2d, kind), {"bits": method.bits})

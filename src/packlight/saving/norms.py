"""Inputs of torch's norms, which are packed normalised.

The backward pass of a norm computes (x~ - mean) rstd. Where x hardly varies, rstd is 1 / sqrt(eps):
it turns an error of x~, which is in units of the range of a group, into hundreds in place of a
value near 0. So the pack is of (x - mean) / unit, where unit is the deviation of x, and its error
is that of normalised values. Mean and rstd are the node's own, which the node saves anyway.

Such a pack is as fine as its norm needs, and serves no other reader.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node

from packlight._torch import graph
from packlight.groupquant.reference import saturated
from packlight.layers.channel_norms import LEAST, along_channels, along_groups
from packlight.saving.kept import Exact, Holder, Kept


def _along_rows(values: Tensor, x: Tensor) -> Tensor:
    return values


# Operations, and how the statistics that they save multiply their input.
NORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **dict.fromkeys(
        [
            *("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"),
            *("NativeBatchNormLegitNoTraining", "BatchNormWithUpdate", "BatchNormNoUpdate"),
        ],
        along_channels,
    ),
    "NativeGroupNorm": along_groups,
    "NativeLayerNorm": _along_rows,
    "FusedRmsNorm": _along_rows,
}

# A deviation below this many roundings of rstd counts as none. A deviation below this many
# roundings of the mean is so small that the error of a pack is less than the rounding of x, where
# both are of 16 bits.
_OF_RSTD, _OF_MEAN = 2.0, 0.25

# Values of a channel below which a batch norm's input stays exact.
_FEWEST = 16

# The greatest unit. The square of a smaller float32 number overflows already, and rstd is 0 then.
_GREATEST = 2.0**100


@dataclasses.dataclass(slots=True, eq=False)
class Statistics:
    """The mean, if any, and 1 / sqrt(variance + eps) of the input of a norm."""

    along: Callable[[Tensor, Tensor], Tensor]
    mean: Tensor | None
    rstd: Tensor
    eps: float

    def unit(self) -> Tensor:
        """The deviation, and no less than the least deviation that counts."""
        rstd = self.rstd.float()
        least = max(LEAST, _OF_RSTD * torch.finfo(self.rstd.dtype).eps)
        unit = (1 - self.eps * rstd.square()).clamp(min=least).sqrt() / rstd
        if self.mean is not None:
            rounding = _OF_MEAN * torch.finfo(self.mean.dtype).eps
            unit = unit.maximum(self.mean.abs().float() * rounding)
        return unit.clamp(max=_GREATEST)


@dataclasses.dataclass(slots=True, eq=False)
class Normalised:
    """A pack of normalised values."""

    values: Kept
    statistics: Statistics
    dtype: torch.dtype

    @classmethod
    def of(
        cls, x: Tensor, statistics: Statistics, pack: Callable[[Tensor], Kept | None]
    ) -> "Normalised | None":
        """The pack of x, normalised; None if `pack` returns None."""
        along, mean = statistics.along, statistics.mean
        values = x.float() if mean is None else x - along(mean, x).float()
        kept = pack(values * along(1 / statistics.unit(), x))
        return None if kept is None else cls(kept, statistics, x.dtype)

    def unpack(self) -> Tensor:
        along, mean = self.statistics.along, self.statistics.mean
        x = self.values.unpack()
        x = x.mul_(along(self.statistics.unit(), x))
        if mean is not None:
            x = x.add_(along(mean, x))
        return saturated(x, self.dtype).to(self.dtype)


def normalises(operation: str, slot: str) -> bool:
    """Whether an operation is a norm that saves its input under this name."""
    return operation in NORMS and slot == "input"


def has_few_values(operation: str, x: Tensor) -> bool:
    """Whether a batch norm reads so few values a channel that its gradient is nearly all lost.

    Of two values the normalised ones are 1 and -1 whatever they were, and the gradient is 0: what a
    backward pass computes is what rounding leaves of sums that cancel.
    """
    return NORMS.get(operation) is along_channels and x.numel() < _FEWEST * x.shape[1]


def mixes_rows(function: str, operation: str, x: Tensor, node: Node | None, size: int) -> bool:
    """Whether an RMS norm of elementary operations reads x, and a group spans several rows.

    Such a norm multiplies a row near 0 by 1 / sqrt(eps), and none of its nodes saves all that a
    normalised pack needs.
    """
    if function != "rms_norm" or node is None or x.shape[-1] % size == 0:
        return False
    read = [one.name() for one, _ in node.next_functions if one is not None]
    return operation == "Pow" or (operation == "Mul" and "RsqrtBackward0" in read)


def eps_of_call(function: str, arguments: Iterable[object]) -> float:
    """The eps among the arguments of a norm whose node does not save it; 0 if there is none."""
    if function not in ("layer_norm", "native_layer_norm", "rms_norm"):
        return 0.0
    return next((value for value in arguments if isinstance(value, float)), 0.0)


def statistics(
    operation: str, x: Tensor, node: Node | None, slots: Mapping[str, list[Holder]], eps: float
) -> Statistics | None:
    """The statistics by which a norm's node normalises its input; None if the node saves none.

    `eps` is for nodes that do not save it.
    """
    along = NORMS[operation]
    saved = [graph.saved_number(node, name) for name in ("eps", "epsilon")]
    eps = next((number for number in saved if number is not None), eps)
    mean, rstd = _exact(slots, "result1"), _exact(slots, "result2")
    if operation == "FusedRmsNorm":
        mean, rstd = None, mean
    if rstd is None:  # running statistics: they may be written to, so they are copied
        mean, variance = _exact(slots, "running_mean"), _exact(slots, "running_var")
        if mean is None or variance is None:
            return None
        mean, rstd = mean.clone(), (variance.float() + eps).rsqrt()
    elif mean is None or operation != "NativeGroupNorm" or x.device.type != "cpu":
        return Statistics(along, mean, rstd, eps)
    # Here torch computes the variance of channels-last groups as a difference of squares.
    squares = (x - along(mean, x).float()).square()
    if operation == "NativeGroupNorm":
        variance = squares.reshape(*rstd.shape, -1).mean(-1)
    else:
        variance = squares.mean([0, *range(2, x.dim())])
    least = LEAST / rstd.float().square()
    return Statistics(along, mean, variance.maximum(least).rsqrt(), 0.0)


def _exact(slots: Mapping[str, list[Holder]], slot: str) -> Tensor | None:
    """A tensor that a node saves exactly; None if there is none or it is empty."""
    for holder in slots.get(slot, ()):
        if isinstance(holder.kept, Exact) and holder.kept.tensor.numel():
            return holder.kept.tensor
    return None

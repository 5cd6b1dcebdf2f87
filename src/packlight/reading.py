"""A packed tensor is rebuilt once for layers that read it one after the other, as q, k and v do.

Their backward passes follow each other too. The first to run rebuilds the tensor and leaves it for
the next, and the last takes it along: what is alive at a time is what would be alive otherwise.
Layers that another layer stands between, as at the two ends of a residual block, rebuild it each
for itself, since the tensor would be in memory for all that lies between them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from packlight import _torch


class Reading:
    """How many layers in a row are to rebuild a packed tensor yet, and the tensor between them."""

    __slots__ = ("left", "rebuild", "rebuilt", "stream")

    def __init__(self, rebuild: Callable[..., Tensor]) -> None:
        self.rebuild = rebuild
        self.left = 0
        self.rebuilt: Tensor | None = None
        self.stream: int | None = None  # on which it was rebuilt: another does not wait for it

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        x, self.rebuilt = self.rebuilt, None
        self.left -= 1
        if (x is None and self.left <= 0) or _torch.is_traced():
            return self.rebuild(dtype, *tensors)
        first = tensors[0]
        assert first is not None
        stream = _torch.current_stream(first)
        if x is None or x.dtype != dtype or stream != self.stream:
            x = self.rebuild(dtype, *tensors)
        if self.left > 0 and stream is not None and _torch.at_end_of_backward(self.let_go):
            self.rebuilt, self.stream = x, stream
        return x

    def let_go(self) -> None:
        """Ends a backward pass that did not run through all of the layers."""
        self.rebuilt = None


def reading_of(rebuild: Callable[..., Tensor]) -> Reading | None:
    """That of a new pack; None where a compiler sees what is computed twice."""
    return None if _torch.is_traced() else Reading(rebuild)


_last: Reading | None = None


def reader(reading: Reading | None, rebuild: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What a layer rebuilds its input with, called once for each layer, in the forward pass."""
    global _last
    if _torch.is_traced():
        return rebuild
    follows, _last = _last is reading, reading
    if reading is None or (reading.left and not follows):
        return rebuild
    reading.left += 1
    return reading

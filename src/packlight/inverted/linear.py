"""Linear and convolutions that read the cast which an inverted norm made of its output.

Under 16-bit autocast torch may return a norm's output in float32; each Linear behind it then casts
it and keeps its own cast. An inverted norm makes the cast once and keeps it. These layers read that
cast, so that it is kept once for the norm and for all of them. Results are torch's, bit for bit.
Without autocast, and for an input without such a cast (any other producer, a tensor modified since,
a tensor with hooks, which would miss the gradient), they are torch's layers.
"""

import torch
from torch import Tensor, nn

from packlight import _torch, sharing


@_torch.one_node
def _cast_if_noted(input: Tensor) -> Tensor:
    """The cast that the input's producer made of it, where autocast would make the same."""
    kind = input.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or not torch.is_grad_enabled():
        return input
    if not _torch.is_traced() and input.retains_grad:
        return input
    cast = sharing.cast_of(input, torch.get_autocast_dtype(kind))
    return input if cast is None else cast


class Linear(nn.Linear):
    """`torch.nn.Linear`; keeps the cast of its input that an inverted norm keeps, and no other."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_cast_if_noted(input))


class Conv1d(nn.Conv1d):
    """`torch.nn.Conv1d`; keeps the cast of its input that an inverted norm keeps, and no other."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_cast_if_noted(input))


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d`; keeps the cast of its input that an inverted norm keeps, and no other."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_cast_if_noted(input))


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d`; keeps the cast of its input that an inverted norm keeps, and no other."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_cast_if_noted(input))

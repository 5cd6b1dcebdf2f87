"""What a pack of fixed-point codes stands for."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from packlight.groupquant.fixed_point import ops
from packlight.groupquant.fixed_point.residual_ops import residual
from packlight.pack import Grade

_GRADES = {bits: Grade(bits, 1, unbiased=True) for bits in range(1, 9)}


def grade(bits: int) -> Grade:
    """What a code offers its readers: its error is its method's own, and no reader's choice."""
    return _GRADES[bits]  # a cache of functools is nothing that torch.compile follows


# What the error of a second derivative says is kept.
KEEPS = "fixed-point codes"


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class Rebuild:
    """The output of a batch norm from its codes and table, or that of the ReLU behind it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bits: int
    relu: bool = False

    def __call__(self, dtype: torch.dtype, codes: Tensor, table: Tensor) -> Tensor:
        y: Tensor = ops.rebuild(codes, table, self.shape, self.stride, self.bits, dtype, self.relu)
        return y


@dataclasses.dataclass  # not frozen, as above
class ResidualRebuild:
    """A sum of batch norms and of what it starts with, from what is kept of each.

    The links are added one after the other; those that `masked` names have the mask of a ReLU, that
    of the sum up to there. The running sum is in float32, rounded to `dtype` every few links, which
    is little beside the error of codes. The tensors are those of the start, then codes, table and
    mask of each link.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bits: int
    masked: tuple[bool, ...]
    start: Callable[..., Tensor] | None = None
    first: int = 0  # how many tensors belong to the start

    def __call__(self, dtype: torch.dtype, *tensors: Tensor) -> Tensor:
        start = None
        if self.start is not None:
            start = self.start(dtype, *tensors[: self.first]).reshape(self.shape)
        codes, table, *kept = tensors[self.first :]
        layout = (self.shape, self.stride, self.bits, dtype)
        y: Tensor = residual(start, codes, table, kept, self.masked, *layout)
        return y

    def with_link(self) -> "ResidualRebuild":
        """One more batch norm added."""
        return self._masked(*self.masked, False)

    def with_mask(self) -> "ResidualRebuild":
        """The ReLU behind it."""
        return self._masked(*self.masked[:-1], True)

    def _masked(self, *masked: bool) -> "ResidualRebuild":
        layout = (self.shape, self.stride, self.bits)
        return ResidualRebuild(*layout, masked, self.start, self.first)

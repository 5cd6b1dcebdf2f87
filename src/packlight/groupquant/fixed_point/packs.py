"""What a pack of fixed-point codes stands for."""

import dataclasses

import torch
from torch import Tensor

from packlight.groupquant.fixed_point import ops

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

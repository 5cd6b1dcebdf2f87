"""A pack: saved tensors that stand for another, and how near they are to it."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from packlight import _torch
from packlight.reading import Reading


class Grade(NamedTuple):
    """How near a pack is to its tensor: what a reader asks for, and what a pack offers."""

    bits: int
    group_size: int
    unbiased: bool

    def serves(self, asked: "Grade") -> bool:
        """Whether a pack of this grade is what a reader asks for, or better."""
        finer = self.bits > asked.bits
        fine = finer or (self.bits == asked.bits and self.group_size <= asked.group_size)
        return fine and (self.unbiased or not asked.unbiased)

    def and_of(self, other: "Grade") -> "Grade":
        """The grade of a result that is computed from two packs."""
        return Grade(
            min(self.bits, other.bits),
            max(self.group_size, other.group_size),
            self.unbiased and other.unbiased,
        )


# The tensor itself up to rounding, or with an error for which its method is chosen.
EXACT = Grade(64, 1, True)


class Pack(NamedTuple):
    """Saved tensors, and how to rebuild the tensor of this shape that they stand for.

    `rebuild(dtype, *tensors)` returns that tensor, in its memory order.
    """

    rebuild: Callable[..., Tensor]
    shape: tuple[int, ...]
    tensors: tuple[Tensor | None, ...]
    grade: Grade = EXACT
    reading: Reading | None = None  # of layers that read the tensor one after the other


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class View:
    """Rebuilds a view of a packed tensor: all its elements, in the order of their memory."""

    rebuild: Callable[..., Tensor]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        return self.rebuild(dtype, *tensors).as_strided(self.shape, self.stride)


class WeakPack(NamedTuple):
    """A `Pack` that does not keep its tensors alive."""

    rebuild: Callable[..., Tensor]
    shape: tuple[int, ...]
    references: tuple["weakref.ref[Tensor] | None", ...]
    grade: Grade
    reading: Reading | None

    @staticmethod
    def of(pack: Pack) -> "WeakPack":
        rebuild, shape, tensors, grade, reading = pack
        references = [None if kept is None else weakref.ref(kept) for kept in tensors]
        return WeakPack(rebuild, shape, tuple(references), grade, reading)

    def pack(self) -> Pack | None:
        tensors: list[Tensor | None] = []
        for reference in self.references:  # no generator: this runs at every reader
            tensor = None if reference is None else reference()
            if tensor is not None:
                _torch.revive(tensor)
            elif reference is not None:
                return None
            tensors += (tensor,)
        return Pack(self.rebuild, self.shape, tuple(tensors), self.grade, self.reading)

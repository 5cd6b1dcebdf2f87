"""What is kept in place of a saved tensor, and how the backward pass gets the tensor back."""

import dataclasses
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from packlight.errors import DoubleBackwardError
from packlight.pack import Pack
from packlight.packing.layout import dense_stride, laid_out, memory_order
from packlight.packing.ops import pack_mask, unpack_mask


class Kept(Protocol):
    """Stands for a saved tensor."""

    def unpack(self) -> Tensor:
        """The tensor for the backward pass: a new one, or the one that was saved."""


class Waiting(NamedTuple):
    """What is known about a saved tensor before the operation that saved it is found."""

    owner: TensorWeakRef  # weak: an operation's output would hold the node that holds it
    is_cast: bool  # the owner is of another dtype
    has_history: bool
    function: str  # the torch function that runs; empty if none does
    start: int  # the operation's node has this number or a later one
    hook: object  # the pack hook that was active


@dataclasses.dataclass(slots=True, weakref_slot=True, eq=False)
class Holder:
    """What autograd holds in place of a saved tensor."""

    kept: Kept
    waiting: Waiting | None = None


def unpack(holder: Holder) -> Tensor:
    """The unpack hook."""
    return holder.kept.unpack()


@dataclasses.dataclass(slots=True, weakref_slot=True, eq=False)
class Exact:
    """The tensor itself, detached, and its version when it was saved."""

    tensor: Tensor
    version: int

    def is_unchanged(self) -> bool:
        """Whether the tensor is still as the operation saved it."""
        return self.tensor._version == self.version

    def unpack(self) -> Tensor:
        _check_version(self.tensor, self.version)
        return self.tensor


def _check_version(tensor: Tensor, version: int) -> None:
    """Torch's check, in torch's words: torch makes none where there are hooks."""
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace"
            f" operation: [{tensor.type()} {list(tensor.shape)}] is at version {tensor._version};"
            f" expected version {version} instead"
        )


@dataclasses.dataclass(slots=True, eq=False)
class Packed:
    """A pack, which may be shared, and the layout of the tensor that it stands for here.

    The versions are those of the pack's tensors: the pack of a layer may hold a weight.
    """

    pack: Pack
    versions: tuple[int, ...]
    shape: tuple[int, ...]
    narrow: tuple[int, ...]  # the shape without repetition of elements
    stride: tuple[int, ...]  # dense, of that shape
    spread: tuple[int, ...] | None  # strides with gaps, if the tensor must have them again
    dtype: torch.dtype

    def unpack(self) -> Tensor:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "packlight.saving packed a tensor that this second derivative needs; run this"
                " forward pass outside of it, or drop create_graph=True"
            )
        for tensor, version in zip(self.pack.tensors, self.versions, strict=True):
            if tensor is not None:
                _check_version(tensor, version)
        x = self.pack.rebuild(self.dtype, *self.pack.tensors)
        x = memory_order(x, dense_stride(x)).as_strided(self.narrow, self.stride)
        if self.spread is not None:
            x = laid_out(x, self.spread)
        return x.expand(self.shape)


# ---- without loss --------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True, eq=False)
class Mask:
    """A mask of bool, or of bytes that are 0 or 1, at one bit an element."""

    bits: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, mask: Tensor) -> "Mask":
        """Packs a mask."""
        stride = dense_stride(mask)
        bits = pack_mask(mask.view(torch.uint8), stride)
        return cls(bits, tuple(mask.shape), stride, mask.dtype)

    def unpack(self) -> Tensor:
        mask: Tensor = unpack_mask(self.bits, self.shape, self.stride)
        return mask if self.dtype == torch.bool else mask.view(self.dtype)


@dataclasses.dataclass(slots=True, eq=False)
class Side:
    """One number where a mask is set, another number elsewhere."""

    mask: Mask
    where: float
    elsewhere: float
    dtype: torch.dtype

    def unpack(self) -> Tensor:
        mask = self.mask.unpack()
        x = torch.empty_like(mask, dtype=self.dtype).fill_(self.elsewhere)
        return x.masked_fill_(mask, self.where)


@dataclasses.dataclass(slots=True, eq=False)
class Sign:
    """1, -1 or 0."""

    positive: Mask
    negative: Mask
    dtype: torch.dtype

    def unpack(self) -> Tensor:
        return self.positive.unpack().to(self.dtype) - self.negative.unpack().to(self.dtype)


@dataclasses.dataclass(slots=True, eq=False)
class Zeros:
    """Zeros, for a tensor of which only the shape is needed."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, tensor: Tensor) -> "Zeros":
        """Zeros of the shape of a tensor."""
        return cls(tuple(tensor.shape), dense_stride(tensor), tensor.dtype, tensor.device)

    def unpack(self) -> Tensor:
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.zero_()


@dataclasses.dataclass(slots=True, eq=False)
class OneSided:
    """A pack of the values where a mask is set, and one number elsewhere."""

    values: Kept
    mask: Mask
    most: float  # no value where the mask is set is larger
    elsewhere: float

    def unpack(self) -> Tensor:
        values = self.values.unpack().clamp(max=self.most)
        return values.masked_fill_(~self.mask.unpack(), self.elsewhere)

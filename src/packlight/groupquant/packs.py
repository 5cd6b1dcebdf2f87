"""Packs of tensors: making one, finding one that is there, and what a pack stands for."""

import dataclasses

import torch
from torch import Tensor

from packlight import sharing
from packlight._seeds import Seed, operands, rounding_seed, rounding_seeds
from packlight.groupquant import ops
from packlight.groupquant.method import GroupQuant
from packlight.packing.layout import dense_stride
from packlight.sharing import Pack

# What the error of a second derivative says is kept.
KEEPS = "a group-quantised tensor"


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class Rebuild:
    """What a pack of codes and scales stands for: f(v), or v weight + bias, in a memory order."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    width: int
    bits: int
    group_size: int
    name: str = ""
    parameters: tuple[float, ...] = ()

    def __call__(
        self,
        dtype: torch.dtype,
        codes: Tensor,
        scales: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        layout = (self.shape, self.stride, self.width, self.bits, self.group_size)
        f = (self.name, self.parameters)
        x: Tensor = ops.dequantize(codes, scales, *layout, dtype, *f, weight, bias)
        return x


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class GatedProduct:
    """What the packs of gate and up stand for: f(gate) up, in a memory order."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bits: int
    group_size: int

    def __call__(self, dtype: torch.dtype, *packs: Tensor | None) -> Tensor:
        layout = (self.shape, self.stride, self.bits, self.group_size)
        y: Tensor = ops.gated_product(*packs, self.name, *layout, dtype)
        return y

    def factor_gradients(self, dy: Tensor, *packs: Tensor) -> tuple[Tensor, Tensor]:
        """With respect to f(gate) and to up."""
        layout = (self.stride, self.bits, self.group_size)
        df, dup = ops.gated_backward(dy, *packs, self.name, *layout, False)
        return df, dup


def draw(x: Tensor, method: GroupQuant) -> Seed:
    """A seed for the rounding of `x`; None where it rounds to nearest."""
    return None if method.rounding == "nearest" else rounding_seed(x)


def draw_many(x: Tensor, count: int, method: GroupQuant) -> tuple[Seed, ...]:
    """As many seeds as `draw` gives one."""
    return (None,) * count if method.rounding == "nearest" else rounding_seeds(x, count)


def pack_input(x: Tensor, method: GroupQuant) -> Pack:
    """The pack of `x`: one as good that is kept of it already, else a new one, which is noted."""
    kept = sharing.pack_of(x, method.grade)
    if kept is not None:
        return kept
    rebuild, tensors = new_pack(x.detach(), method, draw(x, method))
    kept = Pack(rebuild, tuple(x.shape), tensors, method.grade)
    sharing.note_pack(x, kept)
    return kept


def new_pack(x: Tensor, method: GroupQuant, seed: Seed) -> tuple[Rebuild, tuple[Tensor, Tensor]]:
    """Codes and scales of all values of `x`, and how `x` comes back from them."""
    stride = dense_stride(x)
    tensors = ops.quantize(x, stride, method.bits, method.group_size, *operands(seed))
    rebuild = Rebuild(tuple(x.shape), stride, x.numel(), method.bits, method.group_size)
    return rebuild, tensors


def worth_packing(x: Tensor, method: GroupQuant) -> bool:
    """Whether a pack is smaller than the tensor: below a group it may not be."""
    return x.numel() >= method.group_size

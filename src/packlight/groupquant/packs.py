"""Packs of tensors: making one, finding one that is there, and what a pack stands for."""

import dataclasses

import torch
from torch import Tensor

from packlight import sharing
from packlight._philox import pass_seed, pass_seeds
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


def draw(x: Tensor, method: GroupQuant) -> Tensor | None:
    """A seed for the rounding of `x`; None where it rounds to nearest.

    A function draws whether or not it will pack anything: without gradients, and where a pack is
    shared. Else the two passes of a checkpoint would draw differently, and a dropout behind would
    see another mask in the second.
    """
    if method.rounding == "nearest":
        return None
    return pass_seed(x)


def draw_many(x: Tensor, count: int, method: GroupQuant) -> tuple[Tensor | None, ...]:
    """What as many calls of `draw` would give, in one draw."""
    if method.rounding == "nearest":
        return (None,) * count
    seeds: tuple[Tensor, ...] = pass_seeds(x, count).split(1)
    return seeds


def pack_input(x: Tensor, method: GroupQuant, seed: Tensor | None) -> Pack:
    """The pack of `x`: the one that is kept of it already, else a new one, noted for the next."""
    kept = sharing.pack_of(x)
    if kept is not None:
        return kept
    rebuild, tensors = new_pack(x.detach(), method, seed)
    kept = Pack(rebuild, tuple(x.shape), tensors)
    sharing.note_input(x, kept)
    return kept


def new_pack(
    x: Tensor, method: GroupQuant, seed: Tensor | None
) -> tuple[Rebuild, tuple[Tensor, Tensor]]:
    """Codes and scales of all values of `x`, and how `x` comes back from them."""
    stride = dense_stride(x)
    tensors = ops.quantize(x, stride, method.bits, method.group_size, seed)
    rebuild = Rebuild(tuple(x.shape), stride, x.numel(), method.bits, method.group_size)
    return rebuild, tensors


def worth_packing(x: Tensor, method: GroupQuant) -> bool:
    """Whether a pack is smaller than the tensor: below a group it may not be."""
    return x.numel() >= method.group_size

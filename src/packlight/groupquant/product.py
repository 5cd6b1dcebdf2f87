"""The product of two tensors of which one is packed already, as of an activation and a gate."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight import sharing
from packlight._checks import needs_gradient, refuse_second_derivative
from packlight.groupquant import ops
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.packs import KEEPS, Rebuild, draw, pack_input, worth_packing
from packlight.sharing import Pack


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class _Product:
    """What the packs of two factors of this shape stand for: their product."""

    rebuilds: tuple[Callable[..., Tensor], Callable[..., Tensor]]
    shape: tuple[int, ...]
    first: int  # how many tensors belong to the first

    def __call__(self, dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        gate = self._gate(tensors)
        if gate is not None:
            layout = (gate.f.shape, gate.f.stride, gate.f.bits, gate.f.group_size)
            y: Tensor = ops.gated_product(*gate.packs, gate.f.name, *layout, dtype)
            return y
        one, other = self._factors(dtype, *tensors)
        return one * other

    def gradients(self, dy: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Of the factors."""
        gate = self._gate(tensors)
        if gate is not None:
            layout = (gate.f.stride, gate.f.bits, gate.f.group_size)
            df, dup = ops.gated_backward(dy, *gate.packs, gate.f.name, *layout, False)
            return (dup, df) if gate.is_second else (df, dup)
        one, other = self._factors(dy.dtype, *tensors)
        return dy * other, dy * one

    def _factors(self, dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        one = self.rebuilds[0](dtype, *tensors[: self.first]).reshape(self.shape)
        other = self.rebuilds[1](dtype, *tensors[self.first :]).reshape(self.shape)
        return one, other

    def _gate(self, tensors: tuple[Tensor | None, ...]) -> "_Gate | None":
        """The factors as f(gate) and up, where the kernels of gated units can read their packs."""
        if self.first != 2 or len(tensors) != 4:  # more than codes and scales
            return None
        for second, (f, up) in enumerate((self.rebuilds, self.rebuilds[::-1])):
            if not (isinstance(f, Rebuild) and isinstance(up, Rebuild)):
                return None
            alike = _layout(f) == _layout(up) and f.name and not (up.name or f.parameters)
            if alike and f.shape == self.shape and f.width == math.prod(self.shape):
                packs = (*tensors[2:], *tensors[:2]) if second else tensors
                return _Gate(f, packs, bool(second))
        return None


def _layout(pack: Rebuild) -> tuple[Any, ...]:
    return pack.shape, pack.stride, pack.width, pack.bits, pack.group_size


@dataclasses.dataclass
class _Gate:
    f: Rebuild
    packs: tuple[Tensor | None, ...]  # of gate and up
    is_second: bool  # of the factors


class _Multiplication(torch.autograd.Function):
    """y = a b; keeps the packs of both."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, product: _Product, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.product = product
        return a * b

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        tensors = ctx.saved_tensors
        return *ctx.product.gradients(grad_output, *tensors), None, *[None] * len(tensors)


_multiply: Callable[..., Tensor] = _Multiplication.apply


def mul(input: Tensor, other: Any, *, bits: int, group_size: int, rounding: Any) -> Tensor:
    """a b, biased: da = dy b~, db = dy a~.

    Keeps the pack of each factor: the one that is kept of it already, as for the output of an
    activation, else a new one. Where neither is packed, and where shapes or dtypes differ or a
    factor needs no gradient, this is torch's product, which keeps both factors.
    """
    method = GroupQuant(bits, group_size, rounding)
    if not _may_be_gate(input, other, method):
        return torch.mul(input, other)
    seeds = draw(input, method), draw(other, method)
    if not _is_gate(input, other):
        return torch.mul(input, other)
    one, two = pack_input(input, method, seeds[0]), pack_input(other, method, seeds[1])
    rebuilds = (one.rebuild, two.rebuild)
    product = _Product(rebuilds, tuple(input.shape), len(one.tensors))
    tensors = (*one.tensors, *two.tensors)
    y = _multiply(input, other, product, *tensors)
    # Weakly: a factor's packs may be those of layers before, of a whole stage for a residual sum.
    sharing.note_input(y, Pack(product, tuple(y.shape), tensors))
    return y


def _may_be_gate(a: Tensor, b: object, method: GroupQuant) -> bool:
    alike = isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
    return alike and worth_packing(a, method)


def _is_gate(a: Tensor, b: Tensor) -> bool:
    if not (needs_gradient(a) and needs_gradient(b)):
        return False
    return sharing.pack_of(a) is not None or sharing.pack_of(b) is not None

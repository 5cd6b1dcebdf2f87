"""ReLU that takes its gradient from what is kept of its input already."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, fewbit, sharing
from packlight._checks import check_inplace, check_tensor, needs_gradient, refuse_second_derivative
from packlight._overwrite import overwrite
from packlight.fewbit import ops as few_bit
from packlight.groupquant.fixed_point import ops
from packlight.groupquant.fixed_point.packs import KEEPS, Rebuild, ResidualRebuild
from packlight.pack import Pack
from packlight.packing.layout import dense_stride


class _CodedReLU(torch.autograd.Function):
    """y = max(x, 0) behind a batch norm; keeps the codes of the latter."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Tensor,
        table: Tensor,
        stride: tuple[int, ...],
        bits: int,
        inplace: bool,
    ) -> Tensor:
        ctx.save_for_backward(codes, table)
        ctx.layout = (stride, bits)
        ctx.is_relu = True
        if inplace:
            ctx.mark_dirty(x)
            return torch.relu_(x)
        return torch.relu(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        return ops.relu_backward(grad_output, *ctx.saved_tensors, *ctx.layout), *[None] * 5


_apply_coded: Callable[..., Tensor] = _torch.applied(_CodedReLU)


class _MaskedReLU(torch.autograd.Function):
    """y = max(x, 0) and its mask, one bit an element; keeps the latter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
        relu = ("relu", (), 1, (), "none", 0.0, 0)
        if inplace:
            y, mask = x, few_bit.activation_(x, *relu)
            ctx.mark_dirty(x)
        else:
            y, mask = few_bit.activation(x, *relu)
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mask)
        ctx.stride = dense_stride(x)
        ctx.is_relu = True
        return y, mask

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> Any:
        refuse_second_derivative("a mask")
        dx = None
        if grad_output is not None:
            (mask,) = ctx.saved_tensors
            dx = times_mask(grad_output, mask, ctx.stride)
        return dx, None


_apply_masked: Callable[..., tuple[Tensor, Tensor]] = _torch.applied(_MaskedReLU)


def times_mask(x: Tensor, mask: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`x` where the mask is set, else 0, in the memory order of `stride`."""
    y: Tensor = few_bit.decode_backward(x, mask, 1, (0.0, 1.0), True, stride)
    return y


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class MaskedRebuild:
    """max(x, 0) from its mask and what is kept of x: mask x~, unbiased where x~ is."""

    input: Callable[..., Tensor]
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __call__(self, dtype: torch.dtype, mask: Tensor, *tensors: Tensor) -> Tensor:
        x = self.input(dtype, *tensors).reshape(self.shape)
        return times_mask(x, mask, self.stride)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0), gradient exact.

    Keeps nothing where `fixed_point.batch_norm` made x, whose code holds the mask; else 1 bit an
    element. Where something is kept of x already, the output is rebuilt from it for its readers.
    `inplace` overwrites x, which no layer of packlight keeps.
    """
    check_tensor(input, "relu")
    if not needs_gradient(input):
        return F.relu(input, inplace)
    kept = sharing.pack_of(input)
    if kept is None:
        return fewbit.relu(input, inplace)
    if inplace:
        check_inplace(input)
    # No Function with two outputs may write to a view; a tracer does not say what is one.
    copied = inplace and (_torch.is_traced() or input._is_view())
    written = inplace and not copied
    shape = tuple(input.shape)
    if isinstance(kept.rebuild, Rebuild) and kept.rebuild.shape == shape:
        codes, table = kept.tensors
        stride, bits = kept.rebuild.stride, kept.rebuild.bits
        y = _apply_coded(input, codes, table, stride, bits, written)
        pack = Pack(Rebuild(shape, stride, bits, relu=True), shape, kept.tensors, kept.grade)
    else:
        stride = dense_stride(input)
        y, mask = _apply_masked(input, written)
        pack = _masked(kept, shape, stride, mask)
    if copied:
        y = overwrite(input, y)
    sharing.note_pack(y, pack)
    return y


def _masked(kept: Pack, shape: tuple[int, ...], stride: tuple[int, ...], mask: Tensor) -> Pack:
    """What is kept of the ReLU of a tensor that this is kept of."""
    rebuild = kept.rebuild
    if (
        isinstance(rebuild, ResidualRebuild)
        and (rebuild.shape, rebuild.stride) == (shape, stride)
        and not rebuild.masked[-1]
    ):
        return Pack(rebuild.with_mask(), shape, (*kept.tensors, mask), kept.grade)
    masked = MaskedRebuild(rebuild, shape, stride)
    return Pack(masked, shape, (mask, *kept.tensors), kept.grade)

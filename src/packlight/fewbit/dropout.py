"""Dropout that keeps one bit an element.

The layer draws a seed, of which Philox makes the mask. A call of `F.dropout` in a model's own code
draws the very mask of torch's own function: such a call may run with the calls covered in one pass
and without in the other, as within a checkpoint of a function, and both must see one mask.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import (
    check_inplace,
    check_numbers,
    check_tensor,
    needs_gradient,
    refuse_second_derivative,
)
from packlight._seeds import Seed, mask_seed, operands
from packlight.errors import InputError
from packlight.fewbit import ops
from packlight.pack import Pack
from packlight.packing.layout import compute_dtype, dense_stride
from packlight.packing.ops import pack_mask


class _Dropout(torch.autograd.Function):
    """y and its mask, which it keeps; y alone in place of x, which may be a view.

    The mask is that of the seed, or without one that of torch's own dropout.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Seed, p: float, inplace: bool) -> Any:
        ctx.stride = dense_stride(x)
        if seed is None:
            y, mask = _torch_dropout(x, p, inplace)
            codes = pack_mask(mask.view(torch.uint8), ctx.stride)
        elif inplace:
            y, codes = x, ops.dropout_(x, *operands(seed), p, True)
        else:
            y, codes = ops.dropout(x, *operands(seed), p, True)
        if inplace:
            ctx.mark_dirty(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(codes)
        ctx.p = p
        if inplace:
            return y
        ctx.mark_non_differentiable(codes)
        return y, codes

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative()
        dx = None
        if grad_output is not None:
            (codes,) = ctx.saved_tensors
            dx = masked(grad_output, codes, ctx.p, ctx.stride)
        return dx, None, None, None


def _torch_dropout(x: Tensor, p: float, inplace: bool) -> tuple[Tensor, Tensor]:
    """What `F.dropout` gives, bit for bit and of the same draws, and which elements it keeps."""
    if x.is_cuda and not inplace:
        return torch.native_dropout(x, p, True)
    noise = F.dropout(torch.ones_like(x), p, True, inplace)
    return x.mul_(noise) if inplace else x * noise, noise != 0


def masked(x: Tensor, codes: Tensor, p: float, stride: tuple[int, ...]) -> Tensor:
    """`x` by a packed mask and 1 / (1 - p)."""
    y: Tensor = ops.decode_backward(x, codes, 1, (0.0, 1 / (1 - p)), False, stride)
    return y


_drop: Callable[..., Any] = _torch.applied(_Dropout)


class _TracedDropout(torch.autograd.Function):
    """`_Dropout` as operations that a compiler fuses with what is around them: a residual sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.p = p
        return _traced_dropped(x, codes, p)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (codes,) = ctx.saved_tensors
        # Integers of another width than the forward pass has: a compiler would take equal ones for
        # one computation, and may then keep its result, a factor an element, in place of the codes.
        return _traced_dropped(grad_output, codes, ctx.p, torch.int16), None, None


def _traced_dropped(
    x: Tensor, codes: Tensor, p: float, integer: torch.dtype = torch.int32
) -> Tensor:
    """`x` by its mask and 1 / (1 - p), for codes of elements in the order of a contiguous tensor.

    Element j L + g is bit j of byte g, see `packing/layout.py`.
    """
    bit = torch.arange(8, dtype=integer, device=x.device)
    kept = (codes.to(integer) >> bit.unsqueeze(1)) & 1
    factor = kept.view(-1)[: x.numel()].view(x.shape) * (1 / (1 - p))
    y = x.to(compute_dtype(x)) * factor
    # No cast to the dtype it has: torch 2.11 loses the gradient of a traced Function that ends so.
    return y if y.dtype == x.dtype else y.to(x.dtype)


_drop_traced: Callable[..., Tensor] = _torch.applied(_TracedDropout)


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class _DroppedRebuild:
    """The output from its mask and what is kept of the input."""

    input: Callable[..., Tensor]
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    p: float

    def __call__(self, dtype: torch.dtype, codes: Tensor, *tensors: Tensor | None) -> Tensor:
        x = self.input(dtype, *tensors).reshape(self.shape)
        return masked(x, codes, self.p, self.stride)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zeroes each element with probability p and divides the rest by 1 - p.

    Keeps 1 bit an element, where torch keeps a byte (a scaled copy on the CPU). Where something is
    kept of the input already, a layer that reads the output rebuilds it from that, unless it is
    overwritten. Exact: the gradient has the very mask of the forward, and 1 / (1 - p) in fp32. The
    mask comes from Philox4x32-10 and a seed drawn from the ambient generator of the tensor's
    device, so `torch.manual_seed` repeats a run bit for bit and a checkpoint's recomputation sees
    the same mask. The stream differs from torch's own.

    Raises `InputError` when p is outside 0 to 1.
    """
    if _is_trivial(input, p, training):
        return _trivially(input, p, training, inplace)
    seed = mask_seed(input)
    if needs_gradient(input) and inplace:
        check_inplace(input)
        overwritten: Tensor = _drop(input, seed, p, True)
        return overwritten
    if _torch.is_traced() and not inplace and input.is_contiguous():
        codes = ops.dropout_mask(seed, input.numel(), p)
        if not needs_gradient(input):
            return _traced_dropped(input, codes, p)
        kept = sharing.pack_of(input)
        return _noted(_drop_traced(input, codes, p), codes, p, kept)
    if needs_gradient(input):
        kept = sharing.pack_of(input)
        y, codes = _drop(input, seed, p, False)
        return _noted(y, codes, p, kept)
    # Without a gradient too: a checkpoint runs its first pass so, and must see the same mask.
    if inplace:
        ops.dropout_(input, *operands(seed), p, False)
        if not _torch.is_traced():
            torch.autograd.graph.increment_version(input)  # as any in-place operation of torch
        return input
    dropped: Tensor = ops.dropout(input, *operands(seed), p, False)[0]
    return dropped


def dropout_as_torch(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """`dropout` with the output of `F.dropout`, bit for bit, and its draws; compiled as `dropout`.

    So it is where no gradient is asked for, too, and where this call is not covered.
    """
    if _torch.is_traced():
        return dropout(input, p, training, inplace)
    if _is_trivial(input, p, training):
        return _trivially(input, p, training, inplace)
    if not needs_gradient(input) or not input.numel():
        return F.dropout(input, p, training, inplace)
    if inplace:
        check_inplace(input)
        overwritten: Tensor = _drop(input, None, p, True)
        return overwritten
    kept = sharing.pack_of(input)
    y, codes = _drop(input, None, p, False)
    return _noted(y, codes, p, kept)


def _is_trivial(input: Tensor, p: float, training: bool) -> bool:
    """Whether torch's own function keeps nothing of the input's size."""
    check_tensor(input, "dropout")
    check_numbers("dropout", p=p)
    if not 0.0 <= p <= 1.0:
        raise InputError(f"p={p!r} is not a probability from 0 to 1")
    return not training or p in (0.0, 1.0)


def _trivially(input: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    # torch gives its very input where nothing is dropped; traced, a tensor that has no notes.
    return F.dropout(input, p, training, inplace) if training and p == 1.0 else input


def _noted(y: Tensor, codes: Tensor, p: float, kept: Pack | None) -> Tensor:
    """The output, with a note of how it comes back from what is kept of the input already."""
    if kept is not None:
        shape = tuple(y.shape)
        rebuild = _DroppedRebuild(kept.rebuild, shape, dense_stride(y), p)
        pack = Pack(rebuild, shape, (codes, *kept.tensors), kept.grade)
        sharing.note_pack(y, pack)
    return y

"""PReLU: one exact bit says which slope an element has; a pack of the input serves the slopes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import (
    autocast,
    check_tensor,
    needs_gradient,
    refuse_second_derivative,
)
from packlight.errors import InputError
from packlight.pack import Pack
from packlight.packing.layout import compute_dtype, dense_stride, laid_out
from packlight.packing.ops import pack_mask, unpack_mask
from packlight.quantiser import KEEPS, Quantiser, worth_packing


def _slopes(weight: Tensor, dimensions: int) -> Tensor:
    """The slopes [1] or [channels], to be multiplied by a tensor [batch, channels, ...]."""
    return weight.view(-1, *[1] * (dimensions - 2)) if weight.numel() > 1 else weight


class _PReLU(torch.autograd.Function):
    """y, and what is kept: which elements are above 0, and a pack of x where the slopes train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, method: Quantiser, seed: Any) -> Any:
        stride = dense_stride(x)
        y = laid_out(F.prelu(x, weight), stride)
        above = pack_mask((x > 0).view(torch.uint8), stride)
        # The parameter may change, or be freed, before a reader of the output needs it.
        slopes = weight.clone()
        kept = (slopes, above, *(method.pack(x, seed) if ctx.needs_input_grad[1] else ()))
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept)
        ctx.method, ctx.stride = method, stride
        return y, *kept

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        dx = dweight = None
        if grad_output is not None:
            weight, above, *kept = ctx.saved_tensors
            shape = tuple(grad_output.shape)
            is_above = unpack_mask(above, shape, ctx.stride)
            if ctx.needs_input_grad[0]:
                slopes = _slopes(weight.to(grad_output.dtype), len(shape))
                dx = torch.where(is_above, grad_output, slopes * grad_output)
            if ctx.needs_input_grad[1]:
                dtype = compute_dtype(grad_output)
                x = ctx.method.unpack(dtype, shape, ctx.stride, *kept)
                terms = torch.where(is_above, 0.0, x * grad_output.to(dtype))
                if weight.numel() > 1:
                    dweight = terms.sum([d for d in range(len(shape)) if d != 1])
                else:
                    dweight = terms.sum().view(weight.shape)
                dweight = dweight.to(weight.dtype)
        return dx, dweight, None, None


_apply: Callable[..., tuple[Tensor, ...]] = _torch.applied(_PReLU)


@dataclasses.dataclass  # not frozen: torch.compile of torch 2.11 cannot follow that one
class Sloped:
    """What the pack of the input of a PReLU stands for, to a reader of the output."""

    method: Quantiser
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __call__(self, dtype: torch.dtype, weight: Tensor, above: Tensor, *kept: Tensor) -> Tensor:
        x = self.method.unpack(dtype, self.shape, self.stride, *kept)
        is_above = unpack_mask(above, self.shape, self.stride)
        return torch.where(is_above, x, _slopes(weight.to(dtype), len(self.shape)) * x)


def prelu(input: Tensor, weight: Tensor, *, method: Quantiser) -> Tensor:
    """x for x > 0, else a x; x [batch, channels, ...], slopes a [1] or [channels].

    Keeps 1 bit an element, for an exact gradient of x, and where the slopes train a pack of x: the
    gradient of a is the sum of dy x over x <= 0, and unbiased where the method is. Readers of the
    output rebuild it from the pack. Where the slopes do not train it keeps the bit alone.
    """
    check_tensor(input, "prelu")
    if not isinstance(weight, Tensor):
        raise InputError(f"prelu takes a tensor of slopes, got {type(weight).__name__}")
    trains = needs_gradient(weight)
    if not (trains or needs_gradient(input)) or not worth_packing(input, method):
        return F.prelu(input, weight)
    x = autocast(input, "prelu", lambda empty: F.prelu(empty.view(0, 1), weight.view(-1)[:1]))
    y, *kept = _apply(x, weight, method, method.seed(x) if trains else None)
    if trains:
        rebuild = Sloped(method, tuple(x.shape), dense_stride(x))
        sharing.note_pack(y, Pack(rebuild, tuple(y.shape), tuple(kept), method.grade))
    return y

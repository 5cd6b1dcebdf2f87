"""Writing in place: a result over what it was made from, and what a caller does to a result."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight import _torch


class _Overwrite(torch.autograd.Function):
    """`input`, which is `output`; what was in `input` gets no gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, output: Tensor) -> Tensor:
        ctx.mark_dirty(input)
        return input.copy_(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[None, Tensor]:
        return None, grad_output


_overwrite: Callable[[Tensor, Tensor], Tensor] = _torch.applied(_Overwrite)


def overwrite(input: Tensor, output: Tensor) -> Tensor:
    """`input`, which is `output` from here on."""
    if _torch.is_traced() and torch.is_grad_enabled():
        # torch's copy gives zeros for a gradient to what is overwritten. A compiler adds them, and
        # they are not channels-last, nor is a sum that starts with them: two copies a layer.
        return _overwrite(input, output)
    return input.copy_(output)


def writable(output: Tensor, of_linear: bool = False) -> Tensor:
    """A result of torch, within the forward pass of a Function, as what may be modified in place.

    Torch makes some as views of others (of a Linear in more than two dimensions), and autograd
    lets nobody write to a view that a Function made.
    """
    alone: Tensor = output
    if not _torch.is_traced():
        if output._is_view():
            (alone,) = torch.unsafe_chunk(output, 1)  # a third of the time of `_unsafe_view`
    elif (
        of_linear
        and output.dim() > 2
        and (
            # A tensor that the tracer follows does not say whether it is a view.
            torch.compiler.is_dynamo_compiling() or output._is_view()
        )
    ):
        alone = torch.ops.aten._unsafe_view(output, output.shape)
    return alone

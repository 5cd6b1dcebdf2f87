"""Writing in place: a result over what it was made from, and what a caller does to a result."""

import torch
from torch import Tensor

from packlight import _tracer


def overwrite(input: Tensor, output: Tensor) -> Tensor:
    """`input`, which is `output` from here on."""
    if torch.compiler.is_dynamo_compiling() and _tracer.may_be_detached(input):
        # What is overwritten would get zeros for its gradient. Those of autograd are not
        # channels-last, nor is a sum that starts with them: two copies a layer.
        input.detach_()
    return input.copy_(output)


def writable(output: Tensor, of_linear: bool = False) -> Tensor:
    """A result of torch, within the forward pass of a Function, as what may be modified in place.

    Torch makes some as views of others (of a Linear in more than two dimensions), and autograd
    lets nobody write to a view that a Function made.
    """
    # A traced tensor does not say whether it is a view.
    traced = torch.compiler.is_dynamo_compiling()
    if not (of_linear and output.dim() > 2 if traced else output._is_view()):
        return output
    alone: Tensor = torch.ops.aten._unsafe_view(output, output.shape)
    return alone

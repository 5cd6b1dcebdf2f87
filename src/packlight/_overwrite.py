"""Writing in place: a result over what it was made from, and what a caller does to a result."""

import torch
from torch import Tensor

from packlight import _torch, _tracer


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
    alone: Tensor = output
    if not _torch.is_traced():
        if output._is_view():
            (alone,) = torch.unsafe_chunk(output, 1)  # a third of the time of `_unsafe_view`
    elif of_linear and output.dim() > 2:  # a traced tensor does not say whether it is a view
        alone = torch.ops.aten._unsafe_view(output, output.shape)
    return alone

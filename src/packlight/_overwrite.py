"""Writing a result into the place of what it was made from."""

import torch
from torch import Tensor

from packlight import _tracer


def overwrite(input: Tensor, output: Tensor) -> Tensor:
    """`input`, which is `output` from here on."""
    if torch.compiler.is_compiling() and _tracer.may_be_detached(input):
        # What is overwritten would get zeros for its gradient. Those of autograd are not
        # channels-last, nor is a sum that starts with them: two copies a layer.
        input.detach_()
    return input.copy_(output)

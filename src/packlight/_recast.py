"""Parameters in the dtype of a gradient, cast anew in the backward pass."""

import torch
from torch import Tensor

from packlight._library import define_op

_recast = define_op(
    "recast(Tensor x, Tensor like) -> Tensor",
    reference=lambda x, like: x.to(like.dtype),
    fake=lambda x, like: torch.empty_like(x, dtype=like.dtype),
)


def recast(x: Tensor, like: Tensor) -> Tensor:
    """`x` in the dtype of `like`, a gradient.

    Under autocast the forward pass has cast the parameter already. A compiler would take that cast
    for this one and keep it from pass to pass, 16 bits a parameter; the operator, which depends on
    the gradient, it cannot make before the backward pass.
    """
    if x.dtype == like.dtype:
        return x
    return _recast(x, like) if torch.compiler.is_compiling() else x.to(like.dtype)

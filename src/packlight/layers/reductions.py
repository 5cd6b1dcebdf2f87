"""Norms of vectors and other functions of one tensor, which run once more on a pack of it.

Each has the arguments and results of torch's function. The gradient is that at the packed tensor:
biased, as none of them is linear.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import needs_gradient
from packlight.layers.computed import is_of_parameters
from packlight.layers.replayed import replayed
from packlight.quantiser import Quantiser, worth_packing


def _once_more(
    function: Callable[..., Tensor], x: Tensor, method: Quantiser, *args: Any, **kwargs: Any
) -> Tensor:
    if (
        _torch.is_traced()
        or not needs_gradient(x)
        or is_of_parameters(x)
        or not worth_packing(x, method)
    ):
        return function(x, *args, **kwargs)
    y: Tensor = replayed(lambda x: function(x, *args, **kwargs), (x,), method)
    return y


def vector_norm(
    input: Tensor,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    method: Quantiser,
) -> Tensor:
    """`torch.linalg.vector_norm`, whose first argument has another name."""
    settings = {"dim": dim, "keepdim": keepdim, "dtype": dtype}
    return _once_more(torch.linalg.vector_norm, input, method, ord, **settings)


def norm(
    input: Tensor,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    *,
    method: Quantiser,
) -> Tensor:
    """`torch.norm`."""
    return _once_more(torch.norm, input, method, p, dim, keepdim, dtype=dtype)


def normalize(
    input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, *, method: Quantiser
) -> Tensor:
    """`torch.nn.functional.normalize`."""
    return _once_more(F.normalize, input, method, p, dim, eps)


def erf(input: Tensor, *, method: Quantiser) -> Tensor:
    """`torch.erf`, of which some models write their GELU."""
    return _once_more(torch.erf, input, method)


# By what they become in a model's own code.
REDUCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.linalg.vector_norm: vector_norm,
    torch.norm: norm,
    Tensor.norm: norm,
    F.normalize: normalize,
    torch.erf: erf,
    Tensor.erf: erf,
}

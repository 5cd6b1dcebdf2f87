"""What the operators are, in plain PyTorch: by tiles of rows, so that casts of x are short."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from packlight._gradients import as_dtype

# Of a tile of the wide tensor: 64 MiB in float32.
_ELEMENTS = 2**24


def _tiles(wide: Tensor, narrow: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same rows of both, as views."""
    rows = max(1, _ELEMENTS // max(1, wide.shape[1]))
    return zip(wide.split(rows), narrow.split(rows), strict=True)


def narrowed(x: Tensor, factor: Tensor) -> Tensor:
    """x factor, [rows, rank], in the dtype of the factor [width, rank]."""
    low = factor.new_empty(x.shape[0], factor.shape[1])
    for tile, into in _tiles(x, low):
        torch.mm(as_dtype(tile, factor.dtype), factor, out=into)
    return low


def add_widened_(y: Tensor, low: Tensor, factor: Tensor, scaling: float, rounds: bool) -> None:
    """y + s (low factor) into y, factor [rank, width].

    The product and s times it are rounded to the dtype of the factor, with `rounds` then to that of
    y, and the sum to that of y.
    """
    alpha = 1.0
    if not rounds and math.frexp(scaling)[0] == 0.5 and factor.dtype != torch.float16:
        alpha, scaling = scaling, 1.0  # a power of two rounds nothing
    for tile, part in _tiles(y, low):
        delta = part.mm(factor)
        if scaling != 1.0:
            delta.mul_(scaling)
        tile.add_(as_dtype(delta, tile.dtype) if rounds else delta, alpha=alpha)


def outer(x: Tensor, low: Tensor) -> Tensor:
    """low^T x, [rank, width], in the dtype of `low`."""
    found: Tensor | None = None
    for tile, part in _tiles(x, low):
        product = part.t().mm(as_dtype(tile, low.dtype))
        found = product if found is None else found.add_(product)
    if found is None:
        return low.new_zeros(low.shape[1], x.shape[1])
    return found

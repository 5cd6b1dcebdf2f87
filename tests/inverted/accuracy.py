"""How well f' can be known from the output, and how well it is."""

import math

import torch
from torch import Tensor

from packlight.inverted.inverses import INVERSES


def branch(layer, x: Tensor) -> Tensor | None:
    """Which x lie left of the minimum; None for monotone functions."""
    minimum = INVERSES[layer.name].minimum
    return None if minimum is None else x.double() < minimum


def true_slope(layer, x: Tensor) -> Tensor:
    """f'(x) by torch in float64."""
    x = x.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(layer.torch(x).sum(), x)
    return slope


def information_limit(y: Tensor, left: Tensor | None, slope: Tensor) -> float:
    """The least largest error of f' that anyone can have who knows y and the branch alone.

    All x with the same y and branch form a group; the best answer for a group is the middle of its
    range of f', and its error half of the range.
    """
    key = (y.float() + 0.0).view(torch.int32).long() * 2  # + 0.0: -0 and 0 are one value
    if left is not None:
        key += left
    _, group = torch.unique(key, return_inverse=True)
    empty = torch.full((int(group.max()) + 1,), math.inf, dtype=torch.float64, device=y.device)
    low = empty.scatter_reduce(0, group, slope, "amin")
    high = (-empty).scatter_reduce(0, group, slope, "amax")
    return ((high - low) / 2).max().item()


def floats_near(x: float, distance: float) -> Tensor:
    """Every float32 within `distance` of x."""
    ends = torch.tensor([x - distance, x + distance]).view(torch.int32).tolist()
    return torch.arange(min(ends), max(ends) + 1, dtype=torch.int32).view(torch.float32)

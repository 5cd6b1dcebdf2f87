"""Whether a codebook can be of a function: a wrong one gives wrong gradients without a sign."""

import itertools
from collections.abc import Callable

import numpy as np
import torch

from packlight.fewbit.codebook.curves import by_autograd
from packlight.fewbit.codebook.table import Codebook

# Of the range of f' by which a level may lie outside of f' on its interval. A level that minimises
# E is a mean of f', so it lies inside; one that matches the primitive may lie a little outside.
SLACK = 0.02


def why_of_another(book: Codebook, f: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Why the codebook is not one of f, whatever its weight; None if it can be."""
    low, high = book.domain
    ends = np.array([low, *book.borders, high])
    inner = np.concatenate((ends, (ends[1:] + ends[:-1]) / 2))
    if book.parity != "none":
        inner = np.concatenate((inner, -inner))
    far = (high - low) * np.geomspace(1.0, 100.0, 9)
    inside = np.linspace(low, high, 2049)
    x = np.concatenate((inside, book.center + inner, low - far, high + far))
    slope = by_autograd(f)(x)
    slack = SLACK * max(float(np.ptp(slope[: len(inside)])), 1e-12)
    x, slope = (values[np.isfinite(slope)] for values in (x, slope))
    code, left = book.encode(x), x < book.center
    sides = (left, ~left) if book.parity == "even" else (np.ones_like(left),)
    for side, (number, level) in itertools.product(sides, enumerate(book.levels)):
        own = slope[side & (code == number)]
        if len(own) and not own.min() - slack <= level <= own.max() + slack:
            where = x[side & (code == number)]
            return (
                f"it has {level:g} for inputs between {where.min():g} and {where.max():g}, where "
                f"the derivative lies between {own.min():g} and {own.max():g}"
            )
    return None

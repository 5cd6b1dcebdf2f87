"""How Triton kernels take the seed of an operator."""

import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import SeedArgument
from packlight._seeds import NEAREST


def seed_kind(seed: Tensor | None, number: int) -> int:
    """0 to round to nearest, 1 for a seed that is a number, 2 for one in memory."""
    return 2 if seed is not None else int(number != NEAREST)


def seed_argument(seed: Tensor | None, number: int) -> SeedArgument:
    """What a launch is given for a kernel, which must not be specialised for it."""
    if seed is None:
        return number
    return (seed, number) if number else seed  # one of several


@triton.jit
def seed_value(seed, SEED: tl.constexpr):
    """The seed that a kernel is given, by `seed_kind` as a number or a pointer."""
    if SEED == 2:
        return tl.load(seed)
    else:
        return seed

"""The method object of few-bit layers."""

import dataclasses

from packlight.errors import InputError
from packlight.method import Method


def check_bits(bits: object) -> int:
    """`bits` if it is a whole number from 1 to 8, else an `InputError`."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
        raise InputError(f"bits={bits!r} is not a whole number from 1 to 8; 3 is a good start")
    return bits


@dataclasses.dataclass(frozen=True)
class FewBit(Method):
    """Keep k-bit codes of an activation's derivative in place of its input.

    Keeps `bits` bits an element (1 or 2 for the activations whose derivative is a step function,
    whatever `bits` says: those are exact). The gradient is dy * level[code]: biased, its error
    bounded by the distance of f' to its nearest level. Source: Novikov et al., ICML 2023,
    arXiv 2202.00441.

    Args:
        bits: code length, 1 to 8.
    """

    bits: int = 3

    def __post_init__(self) -> None:
        check_bits(self.bits)

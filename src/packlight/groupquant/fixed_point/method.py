"""The method object of fixed-point codes, and the numbers of their window."""

import dataclasses

from packlight.errors import InputError
from packlight.method import Method

BITS = (4, 8)
# The window is 6 standard deviations wide.
WIDTH = 6.0
# Puts the normalised value 0 into the bin left of it, as the source does.
EDGE = 1e-6


@dataclasses.dataclass(frozen=True)
class FixedPoint(Method):
    """Keep a b-bit code of what a batch norm makes of each value, in a window of +-3 sigma.

    With K = 2^b, x_hat the normalised value, s the sign of gamma, and a = s x_hat + beta / |gamma|,
    so that y = |gamma| a, a channel has

        shift = K/2 - floor(beta / |gamma| K/6), held within 1 ... K - 1
        code  = floor((a - 1e-6) K/6) + K/2 - floor(beta / |gamma| K/6), held within 0 ... K - 1
        a~    = (code - K/2 + floor(beta / |gamma| K/6) + 1/2) 6/K,
        x~    = s (a~ - beta / |gamma|),     y~ = |gamma| a~.

    The window follows the bias, and no pass looks for minimum and maximum. `[code >= shift]` is
    the mask of a ReLU behind the batch norm, exactly: the code of an element whose y is positive
    is raised to `shift`, and any other lowered below it, so that not even the rounding of y makes
    a difference. So one code serves BatchNorm, ReLU and the convolutions behind them. Keeps `bits`
    bits an element and 24 bytes a channel. |x~ - x_hat| <= 3/K within the window; nearest value,
    so biased. Source: Chakrabarti and Moseley, NeurIPS 2019, arXiv 1901.07988, whose gamma is
    positive. What differs here:

    - gamma < 0: the sign flips the axis of x_hat, as above; the rest is the same.
    - |beta / gamma| > 3, where no bin, or all of them, would lie left of 0: the source holds the
      window at 0, so that all values fall in its last bin. Here it goes on following the bias; one
      code is set aside for the side of 0 that is rare.
    - gamma = 0, or so small that beta / gamma has no fraction of a bin: the window is that of
      x_hat, `shift` 1 if beta > 0 and K - 1 if not. dgamma is as good there as elsewhere.

    The end of a residual block, y = relu(batch_norm(h) + x), keeps the code and one bit, the mask
    of the ReLU: 5 bits an element at `bits=4`. With `convert(..., functional=True)`, which sees the
    addition, that is all: where something is kept of x already, as of the end of another block, the
    convolutions and Linears that read y keep nothing of their own. Their weight gradients are then
    those of y~ = [y > 0] (y~_norm + x~), where each term brings the error of its own code, so that
    the error does not grow beside y: nearest value, so biased. Gradients with respect to y, their
    biases and both terms of the sum are exact. After 8 batch norms in a row a pack is made of y,
    since rebuilding takes longer the longer the chain is.

    Args:
        bits: code length: 4 or 8.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_bits(self.bits)


def check_bits(bits: int) -> int:
    """`bits`, or `InputError` unless it is 4 or 8."""
    if bits not in BITS or isinstance(bits, bool):
        raise InputError(f"bits={bits!r} is neither 4 nor 8; 4 trains like exact in most nets")
    return bits

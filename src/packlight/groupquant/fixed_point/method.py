"""The method object of fixed-point codes, and the numbers of their window."""

import dataclasses
import math

from packlight.errors import InputError
from packlight.method import Method

BITS = (4, 8)
# How far the window reaches on either side, in standard deviations, where none is given.
WINDOW = {4: 4.0, 8: 8.0}
# Puts the normalised value 0 into the bin left of it, as the source does.
EDGE = 1e-6


@dataclasses.dataclass(frozen=True)
class FixedPoint(Method):
    """Keep a b-bit code of what a batch norm makes of each value, in a window of +-w deviations.

    With K = 2^b codes for bins of h = 2 w / K, x_hat the normalised value, s the sign of gamma, and
    a = s x_hat + beta / |gamma|, so that y = |gamma| a, a channel has

        shift = K/2 - floor(beta / (|gamma| h)), held within 1 ... K - 1
        code  = floor((a - 1e-6) / h) + K/2 - floor(beta / (|gamma| h)), held within 0 ... K - 1
        a~    = (code - K/2 + floor(beta / (|gamma| h)) + 1/2) h,
        x~    = s (a~ - beta / |gamma|),     y~ = |gamma| a~.

    The window follows the bias, and no pass looks for minimum and maximum. `[code >= shift]` is
    the mask of a ReLU behind the batch norm, exactly: the code of an element whose y is positive
    is raised to `shift`, and any other lowered below it, so that not even the rounding of y makes
    a difference. So one code serves BatchNorm, ReLU and the convolutions behind them. Keeps `bits`
    bits an element and 24 bytes a channel. |x~ - x_hat| <= h / 2 within the window; nearest value,
    so biased. Source: Chakrabarti and Moseley, NeurIPS 2019, arXiv 1901.07988, whose gamma is
    positive and whose w is 3: `FixedPoint(bits, window=3)` gives the source's codes, masks and
    values wherever gamma > 0, |beta| < (3 - h) gamma and eps is nothing beside the variance. What
    differs here:

    - gamma < 0: the sign flips the axis of x_hat, as above; the rest is the same.
    - w is 4 at 4 bits and 8 at 8, unless `window` says otherwise. The normalised values of a
      network that learns have heavy tails (a kurtosis of 4 to 60, where a normal distribution has
      3), and what is cut off shrinks gradients. In a small ResNet-18 on CIFAR-10 those of
      convolutions are off by 0.116 at 4 bits and 0.049 at 8 with +-3, by 0.112 with +-4 and by
      0.011 with +-8, and come out 1.8% and 0.9% too short with +-3, 0.8% and 0.02% with these
      (`tools/fixed_point_window.py`).
    - |beta / gamma| beyond the window, where no bin, or all of them, would lie left of 0: the
      source holds the window at 0, so that all values fall in its last bin, or loses the mask.
      Here it goes on following the bias; one code is set aside for the side of 0 that is rare.
    - h is in units of the deviation of x_hat, sqrt(var / (var + eps)). That is 1 but for channels
      of little variance, as most are at the start of a network whose weights are small; there the
      backward pass multiplies the error of x~ by up to 1 / sqrt(eps) = 316.
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
        window: w, how many standard deviations of x_hat the codes reach on either side. None for
            4 at 4 bits and 8 at 8; 3 for the source's.
    """

    bits: int = 4
    window: float | None = None

    def __post_init__(self) -> None:
        bin_width(self.bits, self.window)


def bin_width(bits: int, window: float | None) -> float:
    """h in standard deviations. Raises `InputError` for what `FixedPoint` does not take."""
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"bits={bits!r} is neither 4 nor 8; 4 trains like exact in most nets")
    if window is None:
        return 2 * WINDOW[bits] / (1 << bits)
    if isinstance(window, bool) or not isinstance(window, (int, float)):
        raise InputError(f"window={window!r} is no number of standard deviations, such as 3")
    if not 0 < window < math.inf:
        raise InputError(f"window={window!r} holds nothing; 3 standard deviations are the source's")
    return 2 * window / (1 << bits)

"""The symmetry of f', which halves the search, and its limits, which pin the tails."""

from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from packlight.errors import InputError
from packlight.fewbit.codebook.curves import Array, Curve
from packlight.fewbit.codebook.table import Parity

PinTails: TypeAlias = bool | Literal["where_bounded"]

# Cells in which f' is scanned for jumps and for how fast it changes.
SCAN = 2048


class Symmetry(NamedTuple):
    """f' mirrored at `center`: itself where even, 2 `middle` - f' where odd."""

    parity: Parity
    center: float = 0.0
    middle: float = 0.0


def symmetry_of(
    parity: Parity | Literal["auto"], slope: Curve, density: Curve, domain: tuple[float, float]
) -> Symmetry:
    """The symmetry to use, about the middle of the domain.

    Raises `InputError` where f' lacks the one asked for.
    """
    none = Symmetry("none")
    if parity == "none":
        return none
    low, high = domain
    center = rounded((low + high) / 2)
    ends = np.linspace(0, (high - low) / 2, SCAN)
    t = (ends[1:] + ends[:-1]) / 2  # Between round numbers, at which f' may jump.
    left, right = slope(center - t), slope(center + t)
    middle = rounded(float((left + right).mean()) / 2)
    even = Symmetry("even", center)
    odd = Symmetry("odd", center, middle)
    has = {
        "even": _vanishes(right - left, right),
        "odd": _vanishes(right + left - 2 * middle, np.append(right - middle, middle)),
    }
    if parity == "auto":
        if has["even"]:
            return even
        symmetric = _vanishes(density(center + t) - density(center - t), density(center + t))
        return odd if has["odd"] and symmetric else none
    if not has[parity]:
        identity = {"even": "f'(c - t) = f'(c + t)", "odd": "f'(c - t) + f'(c + t) = 2 f'(c)"}
        raise InputError(
            f"parity={parity!r}: {identity[parity]} does not hold for all of {domain}, whose "
            f"middle is c = {center:g}; choose a domain around the point of symmetry, or 'auto'"
        )
    return even if parity == "even" else odd


def _vanishes(difference: Array, scale: Array) -> bool:
    return bool(abs(difference).max() <= 1e-7 * abs(scale).max())


def rounded(value: float) -> float:
    """Without the noise of the last digits; + 0.0 drops a sign of 0."""
    return float(f"{value:.12g}") + 0.0


def tail_levels(curve: Curve, pin_tails: PinTails) -> tuple[float | None, float | None]:
    """The limits of f' at -infinity and infinity, None for a side that is to stay free."""
    if not pin_tails:
        return None, None
    limits = _limit(curve, -1), _limit(curve, 1)
    if pin_tails is True and None in limits:
        raise InputError(
            "pin_tails=True, but f' has no finite limit at "
            f"{'-infinity' if limits[0] is None else 'infinity'}: use pin_tails='where_bounded', "
            "which leaves that tail free"
        )
    return limits


def _limit(curve: Curve, sign: int) -> float | None:
    with np.errstate(all="ignore"):
        near, far = curve(sign * np.array([1e12, 1e15])).tolist()
    if not abs(near - far) <= 1e-9 * max(1, abs(far)):
        return None
    return float(round(far, 12))  # Softsign's 1e-30 is its 0.

"""The symmetry of f', which halves the search, and its limits, which pin the tails."""

from typing import Literal, TypeAlias

import numpy as np

from packlight.errors import InputError
from packlight.fewbit.codebook.curves import Array, Curve
from packlight.fewbit.codebook.table import Parity

PinTails: TypeAlias = bool | Literal["where_bounded"]

# Cells in which f' is scanned for jumps and for how fast it changes.
SCAN = 2048


def parity_of(
    parity: Parity | Literal["auto"], slope: Curve, density: Curve, domain: tuple[float, float]
) -> Parity:
    """The parity to use; raises `InputError` where f' lacks the one asked for."""
    if parity == "none":
        return "none"
    if domain[0] != -domain[1]:
        if parity == "auto":
            return "none"
        raise InputError(
            f"domain={domain} with parity {parity!r}, which needs (-m, m): "
            "choose such a domain, or parity 'none'"
        )
    ends = np.linspace(0, domain[1], SCAN)
    x = (ends[1:] + ends[:-1]) / 2  # Between round numbers, at which f' may jump.
    left, right = slope(-x), slope(x)
    has = {
        "even": _vanishes(right - left, right),
        "complement": _vanishes(right + left - 1, np.ones(1)),
    }
    if parity == "auto":
        if has["even"]:
            return "even"
        symmetric = _vanishes(density(x) - density(-x), density(x))
        return "complement" if has["complement"] and symmetric else "none"
    if not has[parity]:
        identity = {"even": "f'(-x) = f'(x)", "complement": "f'(x) + f'(-x) = 1"}[parity]
        raise InputError(f"parity={parity!r}: {identity} does not hold on {domain}; use 'auto'")
    return parity


def _vanishes(difference: Array, scale: Array) -> bool:
    return bool(abs(difference).max() <= 1e-7 * abs(scale).max())


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

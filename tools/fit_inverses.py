"""Fits f'(f^-1(y)) of the inverted activations, and writes the constants into inverses.py.

    python tools/fit_inverses.py          prints degrees and errors
    python tools/fit_inverses.py --write  also rewrites src/packlight/inverted/fits.json

What is fitted, in which variable and why, stands in src/packlight/inverted/inverses.py. All fits
are minimax and come from a linear programme: minimise e with |P(v) - target| <= e at many points.

In 16 bits the points are the values that y can take: all x that give the same y and branch form a
group, and the best that anyone can answer for the group is the middle of its range of f'. So the
target is that middle, and half the range is what no method can avoid.
"""

import argparse
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq, linprog
from scipy.special import expit, log_ndtr

Array = np.ndarray
PATH = Path(__file__).parents[1] / "src" / "packlight" / "inverted" / "fits.json"
DIGITS = {"bf16": 8, "fp16": 11, "fp32": 24}
# The smallest degrees are taken with which the error of a fit stays below this.
TOLERANCE = {8: 2e-3, 11: 1e-3, 24: 3e-5}
# Middles next to the minimum are no smooth function of y; this part of half the range is free.
SLACK = 0.25
# At 24 digits the left polynomial ends at this y, beyond which f' / y stays where it is.
SMALLEST = -1e-12
LOG_OFFSETS = {"gelu": 1, "gelu_tanh": 1, "mish": 2, "quick_gelu": 2, "silu": 2}


# --- The functions and their derivatives, accurate far left of 0 too.


def _gelu(x: Array) -> tuple[Array, Array]:
    phi, density = np.exp(log_ndtr(x)), np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return x * phi, phi + x * density


def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    scale = math.sqrt(8 / math.pi)
    s = expit(scale * (x + 0.044715 * x**3))
    return x * s, s + x * s * (1 - s) * scale * (1 + 3 * 0.044715 * x * x)


def _silu(x: Array) -> tuple[Array, Array]:
    s = expit(x)
    return x * s, s + x * s * (1 - s)


def _quick_gelu(x: Array) -> tuple[Array, Array]:
    y, slope = _silu(1.702 * x)
    return y / 1.702, slope


def _mish(x: Array) -> tuple[Array, Array]:
    t = np.tanh(np.logaddexp(0, x))
    return x * t, t + x * (1 - t * t) * expit(x)


FUNCTIONS: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "mish": _mish,
    "quick_gelu": _quick_gelu,
    "silu": _silu,
}
# Where the right branch ends: past it f' counts as 1, from which it differs by less than the fits.
ENDS = {
    "gelu": {8: 3.8, 11: 4.2, 24: 5.0},
    "gelu_tanh": {8: 3.8, 11: 4.2, 24: 4.8},
    "mish": {8: 5.2, 11: 6.0, 24: 7.0},
    "quick_gelu": {8: 5.6, 11: 6.2, 24: 8.0},
    "silu": {8: 9.6, 11: 10.6, 24: 13.5},
}


@functools.cache
def minimum(name: str) -> tuple[float, float, float]:
    """x*, y* and the slope of f' in u = sqrt(y - y*) there, sqrt(2 f''(x*))."""
    function = FUNCTIONS[name]
    x = brentq(lambda v: float(function(np.array(v))[1]), -3.0, -0.3, xtol=1e-16)
    h = 1e-5
    curvature = float(function(np.array(x + h))[1] - function(np.array(x - h))[1]) / (2 * h)
    return x, float(function(np.array(x))[0]), math.sqrt(2 * curvature)


# --- Rounding, groups and the linear programme.


def rounded(x: Array, digits: int) -> Array:
    """`x` to so many significand bits; the exponent's limits play no part in a fit."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(np.ldexp(mantissa, digits)), exponent - digits)


def all_values(digits: int) -> Array:
    """Every value of a 16-bit format within +-64, but for those too small to matter."""
    exponents = range(-14, 6)
    positive = np.concatenate(
        [np.ldexp(np.arange(2 ** (digits - 1), 2**digits), e - digits + 1) for e in exponents]
    )
    return np.concatenate([-positive, [0.0], positive])


def group(y: Array, slope: Array) -> tuple[Array, Array, Array]:
    """Distinct y, and the middle and half the range of f' over the x that give it."""
    order = np.argsort(y, kind="stable")
    y, slope = y[order], slope[order]
    start = np.flatnonzero(np.r_[True, np.diff(y) != 0])
    low, high = np.minimum.reduceat(slope, start), np.maximum.reduceat(slope, start)
    return y[start], (low + high) / 2, (high - low) / 2


def minimax(
    v: Array, target: Array, degree: int, slack: Array, exact: Array, weight: Array
) -> tuple[Array, float]:
    """Power coefficients of P on [v.min(), v.max()] and e: |P - target| <= e weight + slack.

    Where `exact`, P equals the target.
    """
    low, high = v.min(), v.max()
    chebyshev = np.polynomial.chebyshev.chebvander((2 * v - low - high) / (high - low), degree)
    free = ~exact
    wide = np.c_[chebyshev[free], -weight[free]]
    mirrored = np.c_[-chebyshev[free], -weight[free]]
    result = linprog(
        np.r_[np.zeros(degree + 1), 1],
        A_ub=np.r_[wide, mirrored],
        b_ub=np.r_[target[free] + slack[free], slack[free] - target[free]],
        A_eq=np.c_[chebyshev[exact], np.zeros(exact.sum())] if exact.any() else None,
        b_eq=target[exact] if exact.any() else None,
        bounds=[(None, None)] * (degree + 1) + [(0, None)],
        method="highs",
    )
    series = np.polynomial.Chebyshev(result.x[:-1], domain=[low, high])
    return series.convert(kind=np.polynomial.Polynomial).coef, float(result.x[-1])


def shortest(
    v: Array, target: Array, half: Array, exact: Array, weight: Array, tolerance: float
) -> tuple[list[float], float]:
    """The coefficients of lowest degree with an error below the tolerance, and the error."""
    for degree in range(3, 20):
        coefficients, error = minimax(v, target, degree, SLACK * half, exact, weight)
        if error < tolerance:
            return coefficients.tolist(), error
    raise ValueError("no polynomial of degree below 20 will do")


def thinned(v: Array, keep: Array, count: int = 500) -> Array:
    """Indices of the points in `keep`, and of `count` others spread evenly over v and its ends."""
    order = np.argsort(v)
    grid = (v[order[0]] + v[order[-1]]) / 2 - (v[order[-1]] - v[order[0]]) / 2 * np.cos(
        np.linspace(0, math.pi, count)
    )
    near = order[np.clip(np.searchsorted(v[order], grid), 0, len(v) - 1)]
    return np.union1d(np.flatnonzero(keep), near)


def spread(start: float, end: float) -> Array:
    """Points from `start` to `end`, denser at both."""
    return start + (end - start) * (1 - np.cos(np.linspace(0, math.pi, 900))) / 2


# --- Functions with one minimum.


def floor(name: str, digits: int) -> float:
    """The y0 that answers best next to the minimum.

    There f' = a sqrt(y - y*), and y is known to half a unit: minimise the largest distance of
    a sqrt(max(y - y0, 0)) to the far end of the range over the first few values of y.
    """
    _, bottom, slope = minimum(name)
    unit = 2.0 ** (math.frexp(bottom)[1] - digits)
    y = np.rint(bottom / unit) * unit + unit * np.arange(8)
    low = slope * np.sqrt(np.maximum(y - unit / 2 - bottom, 0))
    high = slope * np.sqrt(y + unit / 2 - bottom)
    candidates = bottom + unit * np.linspace(-1.5, 1.5, 3001)
    answer = slope * np.sqrt(np.maximum(y - candidates[:, None], 0))
    worst = np.maximum(answer - low, high - answer).max(axis=1)
    return float(candidates[worst.argmin()])


def fit_short(name: str, digits: int) -> dict[str, Any]:
    """A polynomial in v for each branch; exactly 0 where y = 0 on the left, and 1 at v = 1."""
    x_min, _, _ = minimum(name)
    function, y0, end = FUNCTIONS[name], floor(name, digits), ENDS[name][digits]
    x = all_values(digits)
    x = x[x <= end]
    y, slope = function(x)
    y = rounded(y, digits)
    span = float(y[-1]) - y0
    result: dict[str, Any] = {"error": 0.0, "floor": y0, "span": span, "center": 0.0}
    for branch, inside in (("right", x >= x_min), ("left", x < x_min)):
        values, middle, half = group(y[inside], slope[inside])
        v = np.sqrt(np.maximum(values - y0, 0) / span)
        chosen = thinned(v, half > half.max() / 4)
        v, middle, half = v[chosen], middle[chosen], half[chosen]
        last = v.argmax()
        middle[last] = 1.0 if branch == "right" else 0.0
        exact = np.arange(len(v)) == last
        result[branch], error = shortest(v, middle, half, exact, np.ones_like(v), TOLERANCE[digits])
        result["error"] = max(result["error"], error)
    return result


def fit_long(name: str) -> dict[str, Any]:
    """f' on the right and f' / y on the left, in v - 1 / 2."""
    x_min, bottom, _ = minimum(name)
    function = FUNCTIONS[name]
    y, slope = function(spread(x_min, ENDS[name][24]))
    span = float(y[-1]) - bottom
    v = np.sqrt(np.maximum(y - bottom, 0) / span)
    slope[-1] = 1.0
    exact = np.zeros(len(v), dtype=bool)
    exact[[0, -1]] = True
    none, one = np.zeros_like(v), np.ones_like(v)
    right, error_right = shortest(v - 0.5, slope, none, exact, one, TOLERANCE[24])

    # v^2 = kappa (y - y*) (c - log(y / y*)), with kappa such that v = 1 where y = SMALLEST.
    c = LOG_OFFSETS[name]
    kappa = 1 / ((SMALLEST - bottom) * (c - math.log(SMALLEST / bottom)))
    lowest = brentq(lambda x: float(function(np.array(x))[0]) - SMALLEST, -60.0, x_min)
    y, slope = function(spread(x_min, lowest))
    v = np.sqrt(np.maximum(kappa * (y - bottom) * (c - np.log(y / bottom)), 0))
    exact = np.zeros(len(v), dtype=bool)
    exact[0] = True
    # An error of the quotient counts times |y|, but in the tail relative to f'.
    weight = 1 / np.maximum(-y, 1e-3)
    left, error_left = shortest(v - 0.5, slope / y, none, exact, weight, TOLERANCE[24])
    return {
        "error": max(error_right, error_left),
        "floor": floor(name, 24),
        "span": span,
        "center": 0.5,
        "log": [-kappa * math.log(2), kappa * (c + math.log(-bottom))],
        "right": right,
        "left": left,
    }


# --- tanhshrink, whose inverse has a cube root at 0.


def fit_tanhshrink(digits: int) -> dict[str, Any]:
    """f' / v in v = (|y| / span)^(2/3), in which f' is smooth at 0, up to v = 1."""
    if digits == 24:
        x = 6.0 * (1 - np.cos(np.linspace(0, math.pi / 2, 1500)))
        y, middle = x - np.tanh(x), np.tanh(x) ** 2
        y = np.where(x < 0.02, x**3 * (1 / 3 - x**2 * (2 / 15 - 17 / 315 * x**2)), y)
        half = np.zeros_like(x)
    else:
        # torch rounds tanh to the dtype, and then the difference.
        x = all_values(digits)
        x = x[(x >= 0) & (x <= 5.0)]
        y, middle, half = group(rounded(x - rounded(np.tanh(x), digits), digits), np.tanh(x) ** 2)
    span = float(y.max())
    v = np.cbrt(y / span) ** 2
    chosen = thinned(v, half > half.max() / 4)
    chosen = chosen[v[chosen] > 0]  # at 0 the answer is 0
    v, middle, half = v[chosen], middle[chosen], half[chosen]
    last = v.argmax()
    middle[last] = 1.0
    center = 0.5 if digits == 24 else 0.0
    # An error of the quotient counts times v.
    right, error = shortest(
        v - center, middle / v, half / v, np.arange(len(v)) == last, 1 / v, TOLERANCE[digits]
    )
    shape = {"floor": 0.0, "span": span, "center": center}
    return {"error": error, **shape, "right": right, "left": []}


def fit(name: str, digits: int) -> dict[str, Any]:
    if name == "tanhshrink":
        return fit_tanhshrink(digits)
    return fit_long(name) if digits == 24 else fit_short(name, digits)


def fit_all() -> dict[str, dict[str, Any]]:
    """Constants of every function, by name and digits."""
    return {
        name: {str(digits): fit(name, digits) for digits in DIGITS.values()}
        for name in (*FUNCTIONS, "tanhshrink")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"rewrite {PATH.name}")
    options = parser.parse_args()
    fits = fit_all()
    for name, by_digits in fits.items():
        for digits, constants in by_digits.items():
            degrees = [len(constants[branch]) - 1 for branch in ("right", "left")]
            print(f"{name:11s} {digits:>2s} digits: {constants['error']:.1e}, degrees {degrees}")
    if options.write:
        PATH.write_text(json.dumps(fits, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""`fit_codebook`: from a function to its codebook."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch

from packlight.fewbit.codebook.curves import (
    Array,
    Curve,
    by_autograd,
    checked_slope,
    on_arrays,
    shifted,
    values_of,
)
from packlight.fewbit.codebook.polish import polish
from packlight.fewbit.codebook.primitive import match_primitive
from packlight.fewbit.codebook.problem import Problem, best_levels, error_of, make_problem, samples
from packlight.fewbit.codebook.search import optimal_intervals
from packlight.fewbit.codebook.symmetry import PinTails, rounded, symmetry_of, tail_levels
from packlight.fewbit.codebook.table import (
    DEFAULT_DOMAIN,
    Codebook,
    Parity,
    check_bits,
    check_choice,
    checked_domain,
    count_pieces,
)
from packlight.fewbit.codebook.weights import Weight, fold, weight_of

Objective = Literal["derivative", "primitive"]

# Borders and levels are rounded to about what float32, in which kernels hold them, can tell apart;
# errors to fewer, so that the last digit never depends on the machine's libm.
DIGITS = 7
ERROR_DIGITS = 6


def fit_codebook(
    f: Callable[[torch.Tensor], torch.Tensor],
    bits: int,
    *,
    domain: tuple[float, float] | None = None,
    weight: Weight = "uniform",
    objective: Objective = "derivative",
    parity: Parity | Literal["auto"] = "auto",
    pin_tails: PinTails = False,
    derivative: Callable[[Any], Any] | None = None,
) -> Codebook:
    """The codebook of 2^bits levels that minimises E = integral of w (f' - q)^2 over the domain.

    f: any callable that takes a float64 tensor of one dimension and gives one of that shape,
        elementwise: a function, a layer. f' comes from autograd, or from `derivative`, a function
        of a NumPy array or of a tensor, and is finite on the domain. A kink of f' is integrated
        best at 0; jumps of f' are found wherever they are. `fewbit.activation(f, codebook)` then
        computes f and keeps codes.
    domain: by default (-10, 10); with a histogram or samples the least (-m, m) that holds them.
    weight: w(x) as
        - "uniform", w = 1;
        - ("normal", sigma), the density of N(0, sigma^2);
        - a function of a NumPy array, of any scale;
        - (counts, edges) as `numpy.histogram` returns, made a density;
        - a 1-D array or tensor of samples, say of measured pre-activations, made a histogram whose
          bins hold equally many.
    objective: "derivative" minimises E. "primitive" minimises the integral of w (f - h)^2, where h
        is continuous, has slopes q, and ends in the limits of f' where these are finite: the idea
        of ReGELU2 and ReSiLU2 (Yang et al., ICML 2024, arXiv 2406.16282). Its minimum is local, the
        one next to the "derivative" book, and its E is larger.
    parity: see `Codebook`; f' is examined about the middle of the domain, so domain=(c - m, c + m)
        for a function that is symmetric about c. "auto" takes "even" if f' is so, which never costs
        and mostly saves error under any weight: all levels are on one side; "odd" if f' is so, the
        weight is symmetric, and E is the same, for the smaller table; else "none".
    pin_tails: True fixes the outermost levels at the limits of f' (0 and 1 for GELU), so that
        saturated units get exact gradients; "where_bounded" leaves a side without a limit free.

    Borders and levels are rounded to 7 significant digits; `error` is E after that.

    Raises `InputError` for `bits` outside 1-8; a domain that is empty, inverted or not finite; a
    weight that is negative, not finite or zero everywhere; f' not finite on the domain; a parity or
    a limit that f' lacks; an unknown name.
    """
    if parity == "auto":
        book = _fit(f, bits, domain, weight, objective, parity, pin_tails, derivative)
        if book.parity != "odd":
            return book
        # Where f' goes up and down, the best intervals need not mirror each other.
        free = _fit(f, bits, domain, weight, objective, "none", pin_tails, derivative)
        return book if book.error <= free.error * ODD_MAY_COST else free
    return _fit(f, bits, domain, weight, objective, parity, pin_tails, derivative)


# By what factor E of mirrored intervals may be larger: as much as a neighbouring optimum of 8 bits.
ODD_MAY_COST = 1.003


def _fit(
    f: Callable[[torch.Tensor], torch.Tensor],
    bits: int,
    domain: tuple[float, float] | None,
    weight: Weight,
    objective: Objective,
    parity: Parity | Literal["auto"],
    pin_tails: PinTails,
    derivative: Callable[[Any], Any] | None,
) -> Codebook:
    check_bits(bits)
    check_choice("objective", objective, get_args(Objective))
    check_choice("parity", parity, ("auto", *get_args(Parity)))
    check_choice("pin_tails", pin_tails, (False, True, "where_bounded"))
    domain = None if domain is None else checked_domain(domain)
    density, edges = weight_of(weight, domain)
    if domain is None:
        domain = (-abs(edges).max(), abs(edges).max()) if len(edges) else DEFAULT_DOMAIN
    low, high = domain = checked_domain(domain)
    curve = by_autograd(f) if derivative is None else on_arrays(derivative)
    slope = checked_slope(curve)
    parity, center, middle = symmetry_of(parity, slope, density, domain)
    values: Curve = functools.partial(values_of, f)
    tails = "where_bounded" if objective == "primitive" and not pin_tails else pin_tails
    first, last = tail_levels(curve, tails)

    if parity != "none":
        # q and f' share their symmetry, so E is an integral over |x - c|, with the weights of both
        # sides.
        low, high, first, edges = 0.0, high - center, None, abs(edges - center)
        slope, values = shifted(slope, center), shifted(values, center)
        density = fold(shifted(density, center))
    problem = make_problem(
        slope, density, low, high, edges, count_pieces(bits, parity), first, last
    )
    borders, levels = _solve(problem)
    if objective == "primitive":
        start = float(values(np.zeros(1))[0]) if parity == "even" else None
        borders, levels = match_primitive(problem, values, borders, start)

    kept_borders, kept_levels = _round_distinct(borders), _round(levels)
    error = error_of(problem, np.asarray(kept_borders), np.asarray(kept_levels))
    if parity == "odd":
        kept_levels += tuple(rounded(2 * middle - level) for level in kept_levels)
    (error,) = _round([error], ERROR_DIGITS)
    return Codebook(bits, kept_borders, kept_levels, error, parity, domain, center)


def _solve(problem: Problem) -> tuple[Array, Array]:
    """The borders and levels that minimise E."""
    _, mass, slope = samples(problem, np.empty(0))
    weight, first, second = (
        np.concatenate(([0.0], np.cumsum((mass * slope**power).sum(axis=1)))) for power in range(3)
    )
    cuts, _ = optimal_intervals(weight, first, second, problem.pieces, problem.first, problem.last)
    borders = polish(problem, problem.grid[cuts])
    return borders, best_levels(problem, borders)[0]


def _round(values: Sequence[float] | Array, digits: int = DIGITS) -> tuple[float, ...]:
    return tuple(float(f"{value:.{digits}g}") + 0.0 for value in values)  # + 0.0 drops a sign of 0.


def _round_distinct(borders: Array) -> tuple[float, ...]:
    """Rounded borders; as they are where the domain is so short that rounding would merge some."""
    rounded = _round(borders)
    return rounded if len(set(rounded)) == len(rounded) else tuple(borders.tolist())

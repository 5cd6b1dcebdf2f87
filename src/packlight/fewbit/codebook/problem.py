"""The problem that is solved: E on an interval, as sums over the cells of a grid."""

import dataclasses

import numpy as np
import numpy.typing as npt

from packlight.errors import InputError
from packlight.fewbit.codebook.curves import Array, Curve
from packlight.fewbit.codebook.symmetry import SCAN

# Gauss-Legendre rule of a cell: exact to the last digits, as cells are short and f' smooth inside.
_POINTS, _POINT_WEIGHTS = np.polynomial.legendre.leggauss(8)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Minimise E on (low, high) with a number of intervals; the outermost levels may be given.

    `grid` are the nodes of the cells of integration, which the dynamic programme takes as candidate
    borders. `jumps` are nodes at which f' jumps; `low` and `high` are among the nodes.
    """

    slope: Curve
    density: Curve
    grid: Array
    jumps: Array
    pieces: int
    first: float | None
    last: float | None

    @property
    def low(self) -> float:
        return float(self.grid[0])

    @property
    def high(self) -> float:
        return float(self.grid[-1])

    def bounds(self, borders: Array) -> Array:
        return np.concatenate(([self.low], borders, [self.high]))


def make_problem(
    slope: Curve,
    density: Curve,
    low: float,
    high: float,
    edges: Array,
    pieces: int,
    first: float | None,
    last: float | None,
) -> Problem:
    # Zero, for that is where the derivatives of activations have their kinks.
    knots = np.unique(np.clip([low, 0.0, high, *edges], low, high))
    scan = np.union1d(np.linspace(low, high, SCAN + 1), knots)
    jumps = _jumps(slope, scan)
    knots = np.union1d(knots, jumps)
    # Up to 6 bits no finer grid leads to a lower E. Of functions that rise and fall (GELU, Mish) 7
    # and 8 bits may end in a neighbouring optimum, up to 0.2% above the best that 12 cells find.
    nodes = _adaptive_nodes(slope, density, scan, cells=max(512, 6 * pieces))
    # A node next to a knot would only make a cell too short to matter.
    distance = abs(nodes[:, None] - knots[None, :]).min(axis=1)
    grid = np.union1d(nodes[distance > 1e-9 * (high - low)], knots)
    problem = Problem(slope, density, grid, jumps, pieces, first, last)
    if not quadrature(problem, grid)[1].sum() > 0:
        raise InputError("weight: zero on the whole domain; widen the domain or change the weight")
    return problem


def _jumps(slope: Curve, nodes: Array) -> Array:
    """Where f' jumps: every cell is halved, toward the half in which f' changes more, until floats
    end; what has not flattened by then is a jump. One at a node is given as that node."""
    left, right = nodes[:-1], nodes[1:]
    at_left, at_right = slope(left), slope(right)
    tolerance = 1e-9 * max(1e-3, float(np.ptp(at_left)))
    for _ in range(48):
        steep = abs(at_right - at_left) > tolerance
        left, right, at_left, at_right = (part[steep] for part in (left, right, at_left, at_right))
        if not len(left):
            break
        middle = (left + right) / 2
        at_middle = slope(middle)
        later = abs(at_right - at_middle) > abs(at_middle - at_left)
        left, at_left = np.where(later, (middle, at_middle), (left, at_left))
        right, at_right = np.where(later, (right, at_right), (middle, at_middle))
    return np.unique(np.where(np.isin(right, nodes), right, left))


def _adaptive_nodes(slope: Curve, density: Curve, scan: Array, cells: int) -> Array:
    """Nodes for a tenth spread evenly, for a tenth like w, and for the rest as the borders of many
    levels are: like (w f''^2)^(1/3)."""
    width = np.diff(scan)
    mass = density((scan[1:] + scan[:-1]) / 2) * width
    change = np.cbrt(mass * np.diff(slope(scan)) ** 2)
    share = sum(
        part * (portion / part.sum())
        for part, portion in ((width, 0.1), (mass, 0.1), (change, 0.8))
        if part.sum() > 0
    )
    reached = np.concatenate(([0.0], np.cumsum(share)))
    return np.interp(np.linspace(0, reached[-1], cells + 1), reached, scan)


def quadrature(problem: Problem, edges: Array) -> tuple[Array, Array]:
    """Points x and their shares of the integral of w; one row per cell between edges."""
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1 + _POINTS)
    return x, problem.density(x) * half * _POINT_WEIGHTS


def samples(problem: Problem, borders: Array) -> tuple[npt.NDArray[np.intp], Array, Array]:
    """For cells that no border cuts: the interval each lies in, shares of the integral of w, f'."""
    edges = np.union1d(problem.grid, borders)
    x, mass = quadrature(problem, edges)
    return np.searchsorted(borders, x[:, 0]), mass, problem.slope(x)


def best_levels(problem: Problem, borders: Array) -> tuple[Array, Array, float]:
    """The levels that minimise E for these borders, the weight of each interval, and E."""
    piece, mass, slope = samples(problem, borders)
    count = len(borders) + 1
    weight = np.bincount(piece, mass.sum(axis=1), count).astype(np.float64)
    total = np.bincount(piece, (mass * slope).sum(axis=1), count).astype(np.float64)
    # Where w is zero E leaves the level open: f' in the middle is never far wrong.
    bounds = problem.bounds(borders)
    levels = problem.slope((bounds[1:] + bounds[:-1]) / 2)
    np.divide(total, weight, out=levels, where=weight > 0)
    if problem.first is not None:
        levels[0] = problem.first
    if problem.last is not None:
        levels[-1] = problem.last
    return levels, weight, float((mass * (slope - levels[piece][:, None]) ** 2).sum())


def error_of(problem: Problem, borders: Array, levels: Array) -> float:
    piece, mass, slope = samples(problem, borders)
    return float((mass * (slope - levels[piece][:, None]) ** 2).sum())

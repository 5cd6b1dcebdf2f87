"""The other objective: slopes of the continuous function nearest to f."""

import numpy as np

from packlight.fewbit.codebook.curves import Array, Curve
from packlight.fewbit.codebook.problem import Problem, quadrature


def match_primitive(
    problem: Problem, values: Curve, borders: Array, start: float | None
) -> tuple[Array, Array]:
    """Borders and slopes of the continuous, piecewise linear h nearest to f: least integral of
    w (f - h)^2.

    h(x) = c + sum over i of l_i b_i(x), b_i(x) the length of (low, x) within interval i. For given
    borders c (unless given as `start`) and the free slopes are a linear least-squares problem
    (variable projection), and dh/ds_i = l_i - l_{i+1} for x > s_i gives the gradient in borders.
    """
    # Costs a tenth of importing torch, for an objective that most programs never ask for.
    from scipy.optimize import minimize

    width = problem.high - problem.low

    def place(z: Array) -> Array:
        """Any z to borders in order: the gaps are width * softmax(z)."""
        gaps = np.exp(z - z.max())
        return problem.low + width * np.cumsum(gaps / gaps.sum())[:-1]

    def objective(z: Array) -> tuple[float, Array]:
        _, error, by_border = _primitive_slopes(problem, values, place(z), start)
        gaps = np.exp(z - z.max())
        gaps /= gaps.sum()
        by_gap = width * np.append(np.cumsum(by_border[::-1])[::-1], 0.0)
        # Scaled, since the optimiser's tolerances are for functions of order 1.
        return error / scale, gaps * (by_gap - gaps @ by_gap) / scale

    scale = max(_primitive_slopes(problem, values, borders, start)[1], 1e-300)
    z = np.log(np.diff(problem.bounds(borders)))
    found = minimize(
        objective, z, jac=True, method="L-BFGS-B", options={"ftol": 1e-12, "maxiter": 100}
    )
    borders = place(found.x)
    return borders, _primitive_slopes(problem, values, borders, start)[0]


def _primitive_slopes(
    problem: Problem, values: Curve, borders: Array, start: float | None
) -> tuple[Array, float, Array]:
    """The best slopes for these borders, the integral of w (f - h)^2, and its gradient in them."""
    bounds = problem.bounds(borders)
    x, mass = (part.reshape(-1) for part in quadrature(problem, np.union1d(problem.grid, borders)))
    piece = np.searchsorted(borders, x)
    offset = x - bounds[piece]
    target = values(x)

    # h is at_left @ unknowns + l_i offset on interval i, for the unknowns c, l_0, l_1, ...
    count = len(bounds) - 1
    at_left = np.column_stack((np.ones(count), np.tri(count, k=-1) * np.diff(bounds)))
    slopes = np.eye(count, count + 1, 1)
    chords = np.diff(values(bounds)) / np.diff(bounds)
    unknowns = np.append(values(bounds[:1]), chords)
    free = np.ones(count + 1, dtype=bool)
    for place, given in ((0, start), (1, problem.first), (-1, problem.last)):
        if given is not None:
            unknowns[place], free[place] = given, False

    def moment(of: Array) -> Array:
        return np.bincount(piece, mass * of, count).astype(np.float64)

    def misfit() -> Array:
        return (at_left @ unknowns)[piece] + unknowns[1:][piece] * offset - target

    cross = at_left.T @ (moment(offset)[:, None] * slopes)
    normal = at_left.T @ (moment(np.ones_like(x))[:, None] * at_left) + cross + cross.T
    normal += slopes.T @ (moment(offset**2)[:, None] * slopes)
    # Where w is zero slopes are open; the ridge keeps them at the chords of f.
    normal += np.diag(np.full(len(normal), 1e-14 * normal.max()))
    error = misfit()
    downhill = at_left.T @ moment(error) + slopes.T @ moment(error * offset)
    unknowns[free] -= np.linalg.solve(normal[np.ix_(free, free)], downhill[free])

    error = misfit()
    right_of = np.cumsum(moment(2 * error)[::-1])[::-1][1:]
    return unknowns[1:], float(mass @ error**2), -np.diff(unknowns[1:]) * right_of

"""From the best borders of a grid to the optimum of the continuous problem, by Newton's method."""

import numpy as np

from packlight.fewbit.codebook.curves import Array
from packlight.fewbit.codebook.problem import Problem, best_levels


def polish(problem: Problem, borders: Array) -> Array:
    """Moves borders from the grid to the optimum nearby.

    With r_i = f'(s_i) - (l_i + l_{i+1}) / 2 and each level at its best,

        dE/ds_i = 2 w(s_i) (l_{i+1} - l_i) r_i,
        dl_i/ds_i = w(s_i) (f'(s_i) - l_i) / W_i,
        dl_{i+1}/ds_i = -w(s_i) (f'(s_i) - l_{i+1}) / W_{i+1},

    W_i the weight of interval i: r = 0 is solved by Newton's method, with a tridiagonal Jacobian. A
    step that would raise E is damped toward Lloyd's method, which holds the levels fixed. Borders
    do not pass a jump of f', and stay on one from which E ascends on both sides.
    """
    if not len(borders):
        return borders
    levels, weight, error = best_levels(problem, borders)
    damping = 0.0
    for _ in range(100):
        step = _newton_step(problem, borders, levels, weight, damping)
        trial = _bounded(problem, borders, borders + step)
        trial_levels, trial_weight, trial_error = best_levels(problem, trial)
        # The tolerance is the noise of E; without it the last steps would look like ascents.
        if (np.diff(problem.bounds(trial)) > 0).all() and trial_error <= error * (1 + 1e-11):
            settled = abs(trial - borders).max() <= 1e-10 * (problem.high - problem.low)
            borders, levels, weight, error = trial, trial_levels, trial_weight, trial_error
            damping = damping / 8 if damping > 1e-2 else 0.0
            if settled:
                break
        else:
            damping = max(4 * damping, 1e-2)
            if damping > 1e9:
                break
    return borders


def _newton_step(
    problem: Problem, borders: Array, levels: Array, weight: Array, damping: float
) -> Array:
    width, spread = problem.high - problem.low, np.ptp(levels)
    change = np.diff(levels)
    middle = (levels[1:] + levels[:-1]) / 2

    near = 1e-7 * width
    sides = problem.slope(borders[:, None] + np.array([-near, near]))
    at_jump = np.isin(borders, problem.jumps)
    ascends = change[:, None] * (sides - middle[:, None]) * [-1, 1] > 0
    # A border that leaves a jump sees f' on the side it goes to.
    side = np.where(ascends[:, 0], sides[:, 1], sides[:, 0])
    slope = np.where(at_jump, side, problem.slope(borders))
    curvature = np.where(at_jump, 0.0, (sides[:, 1] - sides[:, 0]) / (2 * near))
    density = problem.density(borders)

    # The others have no say in E, or nowhere better to go.
    free = (density > 0) & (abs(change) > 1e-12 * spread) & ~(at_jump & ascends.all(axis=1))
    if not free.any():
        return np.zeros_like(borders)

    with np.errstate(divide="ignore", invalid="ignore"):
        from_left = density * (slope - levels[:-1]) / weight[:-1]  # dl_i / ds_i
        from_right = -density * (slope - levels[1:]) / weight[1:]  # dl_{i+1} / ds_i
    if problem.first is not None:
        from_left[0] = 0.0
    if problem.last is not None:
        from_right[-1] = 0.0
    lloyd = np.sign(change) * np.maximum(abs(curvature), 1e-6 * spread / width)
    jacobian = np.diag(curvature + damping * lloyd - (from_left + from_right) / 2)
    jacobian -= np.diag(from_right[:-1] / 2, -1) + np.diag(from_left[1:] / 2, 1)

    jacobian, residual = jacobian[np.ix_(free, free)], (slope - middle)[free]
    step = np.zeros_like(borders)
    try:
        step[free] = -np.linalg.solve(jacobian, residual)
    except np.linalg.LinAlgError:
        # Where f' is linear E can be level in some direction: take the shortest of the steps.
        step[free] = -np.linalg.lstsq(jacobian, residual)[0]
    return step


def _bounded(problem: Problem, borders: Array, trial: Array) -> Array:
    stops = np.unique(np.concatenate(([problem.low, problem.high], problem.jumps)))
    below = stops[np.maximum(np.searchsorted(stops, borders, "left") - 1, 0)]
    above = stops[np.minimum(np.searchsorted(stops, borders, "right"), len(stops) - 1)]
    return np.clip(trial, below, above)

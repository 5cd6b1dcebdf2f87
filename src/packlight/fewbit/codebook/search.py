"""The borders on a grid that minimise E, by dynamic programming."""

import numpy as np
import numpy.typing as npt

from packlight.fewbit.codebook.curves import Array


def optimal_intervals(
    weight_prefix: Array,
    first_prefix: Array,
    second_prefix: Array,
    pieces: int,
    first: float | None = None,
    last: float | None = None,
) -> tuple[npt.NDArray[np.intp], float]:
    """The cuts of n cells into intervals of least total cost, and that cost.

    With prefix integrals W of w, A of w f' and Q of w f'^2 at the n + 1 nodes, the nodes i < j
    bound an interval that costs

        c(i, j) = (Q_j - Q_i) - (A_j - A_i)^2 / (W_j - W_i)            under its best level,
        c(i, j) = (Q_j - Q_i) - 2 l (A_j - A_i) + l^2 (W_j - W_i)      under a given level l,

    `first` and `last` being the given levels of the outermost intervals, if any. The least cost of
    cutting the cells before node j into k intervals is

        D_1(j) = c(0, j),    D_k(j) = min over i < j of D_{k-1}(i) + c(i, j),

    and the minimising i, followed back from j = n, are the cuts: O(pieces n^2) time, O(n^2) memory.
    Intervals are not empty, so pieces beyond n are left out.
    """
    cells = len(weight_prefix) - 1
    pieces = min(pieces, cells)

    def given(level: float, i: slice, j: slice) -> Array:
        weight, mean, square = (
            prefix[j] - prefix[i] for prefix in (weight_prefix, first_prefix, second_prefix)
        )
        return square - 2 * level * mean + level**2 * weight

    # Row j, column i, so that the minimum runs along memory.
    weight, mean, square = (
        prefix[:, None] - prefix[None, :] for prefix in (weight_prefix, first_prefix, second_prefix)
    )
    explained = np.divide(mean**2, weight, out=np.zeros_like(weight), where=weight > 0)
    cost = np.where(np.tri(cells + 1, k=-1, dtype=bool), square - explained, np.inf)

    everything = slice(None)
    to_end = cost[-1] if last is None else given(last, everything, slice(-1, None))
    from_start = cost[:, 0] if first is None else given(first, slice(0, 1), everything)
    to_end[-1] = from_start[0] = np.inf
    if pieces == 1:
        only = from_start[-1] if last is None else to_end[0]
        return np.empty(0, dtype=np.intp), float(only)

    best = from_start
    chosen = []
    for _ in range(pieces - 2):
        total = best + cost
        chosen.append(total.argmin(axis=1))
        best = total.min(axis=1)
    total = best + to_end
    cuts = [int(total.argmin())]
    for choice in reversed(chosen):
        cuts.append(int(choice[cuts[-1]]))
    return np.array(cuts[::-1]), float(total.min())

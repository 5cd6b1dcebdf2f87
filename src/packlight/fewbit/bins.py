"""Equal bins in which a kernel finds the code of a value: one load and one compare."""

import numpy as np


def bins_of(borders: np.ndarray, folded: bool) -> tuple[np.ndarray, float, float, float] | None:
    """Equal bins over the borders with at most one border in each; None if 2^12 do not suffice.

    The kernel finds t's bin as round(t scale + offset): monotone in t, so borders in lower bins lie
    below t and those in higher bins above, and only the border in t's own bin is compared.
    """
    low, high = 0.0 if folded else float(borders[0]), float(borders[-1])
    if not 0 < high - low < np.finfo(np.float32).max:
        return None
    if (borders.view(np.int32) & 255).any():  # which is where an entry counts the borders below
        return None
    for count in (int(2 ** (k / 4)) for k in range(20, 49)):
        scale = np.float32((count - 4) / (high - low))
        first = 0 if folded else round(low * float(scale)) - 2
        position = borders.astype(np.float64) * float(scale) - first
        index = np.rint(position).astype(int)
        # Where rounding of t scale could go either way, another count is taken.
        clear = np.abs(position - np.floor(position) - 0.5) > 1e-3
        if clear.all() and len(set(index)) == len(borders) and index[-1] < count - 1:
            break
    else:
        return None
    below = np.searchsorted(index, np.arange(count))
    entries = np.full(count, np.inf, dtype=np.float32).view(np.int32) & -256
    entries[index] = borders.view(np.int32)
    width = 1 / float(scale)
    offset = float(2**23 - first)
    return (entries | below).astype(np.int32), float(scale), offset, low - width

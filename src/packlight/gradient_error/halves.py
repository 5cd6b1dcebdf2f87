"""The noise of a batch, from the gradients of its halves."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from packlight.errors import InputError
from packlight.gradient_error.passes import Key, Run, Sample
from packlight.gradient_error.sums import square
from packlight.profile.tensors import tensors_in


def noise_of(
    run: Run, plain: nn.Module, value: float
) -> tuple[int | None, dict[Key, float] | None]:
    """The rows of the batch, and for each parameter the square of the noise of its gradient.

    None where the batch cannot be cut. `value` is the loss of the whole batch.
    """
    count = None if run.loss is None and callable(run.batch) else _length(run.batch)
    if count is None or count < 2:
        return None, None
    sizes = (count // 2, count - count // 2)
    halves = [_cut(run.batch, count, rows) for rows in (slice(sizes[0]), slice(sizes[0], None))]
    kept: dict[Key, Tensor] = {}
    squares: dict[Key, Tensor] = {}

    def keep(key: Key, gradient: Sample) -> None:
        kept[key] = gradient.values

    def compare(key: Key, gradient: Sample) -> None:
        squares[key] = square(gradient.values, kept.pop(key, None))

    losses = run.gradients(plain, [], keep, halves[0]), run.gradients(plain, [], compare, halves[1])
    mean, total = sum(map(math.prod, zip(losses, sizes, strict=True))) / count, sum(losses)
    if abs(value - total) <= _ROUNDING * abs(total) < abs(mean - total):
        raise InputError(
            "the loss of the batch is the sum of those of its halves, so it is a sum over rows; the"
            " noise is that of a mean: divide the loss by the number of rows"
        )
    squares |= {key: square(first, None) for key, first in kept.items()}
    scale = sizes[0] * sizes[1] / count**2
    return count, {key: scale * float(square) for key, square in squares.items()}


_ROUNDING = 1e-4  # of a loss


def _length(batch: Any) -> int | None:
    """The first dimension of the first tensor that has one."""
    tensors = (value for value in tensors_in(batch) if value.dim() > 0)
    return next((value.shape[0] for value in tensors), None)


def _cut(batch: Any, count: int, rows: slice) -> Any:
    """The same with these rows of each tensor that has so many."""
    if isinstance(batch, Tensor):
        return batch[rows] if batch.dim() > 0 and batch.shape[0] == count else batch
    if isinstance(batch, Mapping):
        return {key: _cut(value, count, rows) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_cut(value, count, rows) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch

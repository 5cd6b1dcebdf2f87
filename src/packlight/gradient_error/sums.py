"""What is added up over draws of the gradients under a conversion."""

import torch
from torch import Tensor, nn

from packlight.gradient_error.passes import Key, Run, Sample
from packlight.report.gradients import Deviation
from packlight.selectors import Layer


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def square(x: Tensor, other: Tensor | None) -> Tensor:
    """|x - other|^2."""
    difference = _wide(x) if other is None else _wide(x) - _wide(other)
    return difference.square().sum()


class _Sums:
    """What is added up over draws of one gradient."""

    def __init__(self, exact: Sample) -> None:
        self.exact = exact
        self.draws = 0
        self.errors = _wide(torch.zeros_like(exact.values))
        self.numbers = self.errors.new_zeros(3)  # squares of errors, products, squares

    def add(self, gradient: Tensor) -> None:
        exact, found = _wide(self.exact.values), _wide(gradient)
        error = found - exact
        squares = error.square().sum(), (found * exact).sum(), found.square().sum()
        self.numbers += torch.stack(squares)
        self.errors += error
        self.draws += 1

    def deviation(self) -> Deviation:
        factor, draws = self.exact.factor, self.draws
        errors, products, squares = (factor * number for number in self.numbers.tolist())
        bias = None
        if draws > 1:
            together = factor * float(self.errors.square().sum())
            bias = (together - errors) / (draws * (draws - 1))
        exact = factor * float(square(self.exact.values, None))
        return Deviation(exact, errors / draws, bias, products / draws, squares / draws)


def deviations_of(
    run: Run,
    model: nn.Module,
    layers: list[Layer],
    exact: dict[Key, Sample],
    draws: int,
) -> dict[Key, Deviation]:
    """Of each exact gradient; of inputs, where the converted model calls the layer as often."""
    sums = {key: _Sums(gradient) for key, gradient in exact.items()}

    def add(key: Key, gradient: Sample) -> None:
        if key in sums:
            sums[key].add(gradient.values)

    for draw in range(1, draws + 1):
        run.gradients(model, layers, add)
        for key, found in sums.items():
            if key.of == "weight" and found.draws < draw:  # no gradient is one of zeros
                found.add(torch.zeros_like(found.exact.values))
    missed = {key.layer for key, found in sums.items() if found.draws < draws}
    return {
        key: found.deviation()
        for key, found in sums.items()
        if key.of == "weight" or key.layer not in missed
    }

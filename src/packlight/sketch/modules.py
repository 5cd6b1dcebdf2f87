"""Layers under torch.nn's own names that keep a sketch of their input in training.

Constructor, attributes, `state_dict` and printing are torch.nn's; `rows`, `kind`, `min_rows` and
`max_rows` come after them, as `Sketch` has them. In `eval()` the plain torch operation runs, exact
and twice differentiable. What is kept, and how exact the gradient is, stands in `functional.py`.
"""

from typing import Any

from torch import Tensor, nn

from packlight._seeds import start_rounding
from packlight.layers.twin import Twin
from packlight.method import the_one
from packlight.sketch import functional as sketched
from packlight.sketch.method import Kind, Sketch

_DEFAULT = Sketch()


class Sketched(Twin):
    """What these layers share: the method by which they keep."""

    method: Sketch

    def __init__(
        self,
        *args: Any,
        rows: float | int = _DEFAULT.rows,
        kind: Kind = _DEFAULT.kind,
        min_rows: int = _DEFAULT.min_rows,
        max_rows: int | None = _DEFAULT.max_rows,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.method = the_one(Sketch(rows, kind, min_rows, max_rows))
        start_rounding()

    @property
    def options(self) -> dict[str, Any]:
        method = self.method
        return {
            "rows": method.rows,
            "kind": method.kind,
            "min_rows": method.min_rows,
            "max_rows": method.max_rows,
        }


class Linear(Sketched, nn.Linear):
    """`torch.nn.Linear`; keeps a sketch of its input, or shares one."""

    def training_forward(self, input: Tensor) -> Tensor:
        sketched._check(input, self.weight, 0)
        return sketched._layer(input, self.weight, self.bias, 0, self.method)


class _Conv(Sketched, nn.modules.conv._ConvNd):
    """What the convolutions share: kernels of size 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any = 1, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, *args, **kwargs)
        given = (self.kernel_size, self.stride, self.padding, self.groups, type(self).__name__)
        sketched.check_pointwise(*given)

    def training_forward(self, input: Tensor) -> Tensor:
        axes = len(self.kernel_size)
        return sketched._convolution(
            input, self.weight, self.bias, self.stride, self.padding, self.groups, axes, self.method
        )


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d` with kernel size 1; keeps a sketch of its input, or shares one."""


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d` with kernel size 1; keeps a sketch of its input, or shares one."""

"""Layers under torch.nn's own names that keep a sketch of their input in training.

Constructor, attributes, `state_dict` and printing are torch.nn's; `rows`, `kind`, `min_rows` and
`max_rows` come after them, as `Sketch` has them. In `eval()` the plain torch operation runs, exact
and twice differentiable. What is kept, and how exact the gradient is, stands in `functional.py`.
"""

from typing import Any, Literal

from torch import Tensor, nn

from packlight._seeds import start_rounding
from packlight.sketch import functional as sketched
from packlight.sketch.method import Kind, Sketch

_DEFAULT = Sketch()
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class _Sketched(nn.Module):
    """What these layers share: the method by which they keep."""

    method: Sketch

    @property
    def options(self) -> dict[str, Any]:
        """The method as keyword arguments of a function."""
        method = self.method
        return {
            "rows": method.rows,
            "kind": method.kind,
            "min_rows": method.min_rows,
            "max_rows": method.max_rows,
        }

    def extra_repr(self) -> str:
        own = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{super().extra_repr()}, {own}"


class Linear(_Sketched, nn.Linear):
    """`torch.nn.Linear`; keeps a sketch of its input, or shares one."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        rows: float | int = _DEFAULT.rows,
        kind: Kind = _DEFAULT.kind,
        min_rows: int = _DEFAULT.min_rows,
        max_rows: int | None = _DEFAULT.max_rows,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.method = Sketch(rows, kind, min_rows, max_rows)
        start_rounding()

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return sketched.linear(input, self.weight, self.bias, **self.options)


class Conv1d(_Sketched, nn.Conv1d):
    """`torch.nn.Conv1d` with kernel size 1; keeps a sketch of its input, or shares one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 1,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        rows: float | int = _DEFAULT.rows,
        kind: Kind = _DEFAULT.kind,
        min_rows: int = _DEFAULT.min_rows,
        max_rows: int | None = _DEFAULT.max_rows,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        sketched.check_pointwise(self.kernel_size, self.stride, self.padding, groups, "Conv1d")
        self.method = Sketch(rows, kind, min_rows, max_rows)
        start_rounding()

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return sketched.conv1d(input, self.weight, self.bias, **self.options)


class Conv2d(_Sketched, nn.Conv2d):
    """`torch.nn.Conv2d` with kernel size 1; keeps a sketch of its input, or shares one."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 1,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        rows: float | int = _DEFAULT.rows,
        kind: Kind = _DEFAULT.kind,
        min_rows: int = _DEFAULT.min_rows,
        max_rows: int | None = _DEFAULT.max_rows,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        sketched.check_pointwise(self.kernel_size, self.stride, self.padding, groups, "Conv2d")
        self.method = Sketch(rows, kind, min_rows, max_rows)
        start_rounding()

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return sketched.conv2d(input, self.weight, self.bias, **self.options)

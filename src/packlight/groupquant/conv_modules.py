"""Layers of conv nets under torch.nn's own names that keep group-quantised tensors in training.

Constructor, attributes, `state_dict` and printing are torch.nn's; `bits`, `group_size` and
`rounding` come after them, as `GroupQuant` has them. In `eval()` the plain torch operation runs.
What is kept, and how exact the gradient is, stands with each function in
`conv_functional.py`.
"""

from typing import Any

from torch import Tensor, nn

from packlight.groupquant.fixed_point.modules import start_batch
from packlight.groupquant.grouping import Rounding
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.modules import _Quantised
from packlight.layers.channel_norms import batch_norm, group_norm
from packlight.layers.convolution import convolve, pad

_DEFAULT = GroupQuant()


class _Conv(_Quantised, nn.modules.conv._ConvNd):
    """What the convolutions share: the constructor of `torch.nn.Conv2d`, and the forward."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        sizes = (kernel_size, stride, padding, dilation, groups, bias, padding_mode)
        construct: Any = super().__init__
        construct(in_channels, out_channels, *sizes, device, dtype)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            y: Tensor = super().forward(input)
            return y
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            widths = self._reversed_padding_repeated_twice
            input = pad(input, self.weight, widths, self.padding_mode, self.method)
            padding = 0
        # Not by way of `conv2d`, which would make the method anew and check it.
        sizes = (self.stride, padding, self.dilation, self.groups, len(self.kernel_size))
        return convolve(input, self.weight, self.bias, *sizes, self.method)


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d`; keeps a pack of its input, or shares one."""


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d`; keeps a pack of its input, or shares one."""


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d`; keeps a pack of its input, or shares one."""


class _ConvTranspose(_Quantised, nn.modules.conv._ConvTransposeNd):
    """What the transposed convolutions share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        sizes = (kernel_size, stride, padding, output_padding, groups, bias, dilation)
        construct: Any = super().__init__
        construct(in_channels, out_channels, *sizes, padding_mode, device, dtype)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not self.training:
            y: Tensor = super().forward(input, output_size)
            return y
        axes = len(self.kernel_size)
        given: Any = (self.stride, self.padding, self.kernel_size, axes, self.dilation)
        output_padding = self._output_padding(input, output_size, *given)
        padding: Any = self.padding
        sizes = (self.stride, padding, self.dilation, self.groups, axes)
        return convolve(input, self.weight, self.bias, *sizes, self.method, output_padding)


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d`; keeps a pack of its input, or shares one."""


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d`; keeps a pack of its input, or shares one."""


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d`; keeps a pack of its input, or shares one."""


class _BatchNorm(_Quantised, nn.modules.batchnorm._BatchNorm):
    """What the batch norms share."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return batch_norm(input, **start_batch(self), method=self.method)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`; keeps a pack of the normalised value."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`; keeps a pack of the normalised value."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`; keeps a pack of the normalised value."""


class GroupNorm(_Quantised, nn.GroupNorm):
    """`torch.nn.GroupNorm`; keeps a pack of the normalised value."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = _DEFAULT.bits,
        group_size: int = _DEFAULT.group_size,
        rounding: Rounding = _DEFAULT.rounding,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self._keep(bits, group_size, rounding)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps, method=self.method
        )

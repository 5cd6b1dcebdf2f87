"""Layers of conv nets under torch.nn's own names that keep group-quantised tensors in training.

Constructor, attributes, `state_dict` and printing are torch.nn's; `bits`, `group_size`, `rounding`
and `code` come after them, as `GroupQuant` has them. In `eval()` the plain torch operation runs.
What is kept, and how exact the gradient is, stands with each function in `conv_functional.py`.
"""

from typing import Any

from torch import Tensor, nn

from packlight.groupquant.method import GroupQuant
from packlight.groupquant.modules import Quantised
from packlight.layers.channel_norms import batch_norm, group_norm
from packlight.layers.convolution import convolve, pad
from packlight.layers.twin import start_batch


class _OfPixels(Quantised):
    """What layers share whose gradients sum over pixels."""

    @staticmethod
    def suited(method: GroupQuant) -> GroupQuant:
        return method.for_pixels()


class _Conv(_OfPixels, nn.modules.conv._ConvNd):
    """What the convolutions share."""

    def training_forward(self, input: Tensor) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            widths = self._reversed_padding_repeated_twice
            input = pad(input, self.weight, widths, self.padding_mode, self.method)
            padding = 0
        sizes = (self.stride, padding, self.dilation, self.groups, len(self.kernel_size))
        return convolve(input, self.weight, self.bias, *sizes, self.method)


class Conv1d(_Conv, nn.Conv1d):
    """`torch.nn.Conv1d`; keeps a pack of its input, or shares one."""


class Conv2d(_Conv, nn.Conv2d):
    """`torch.nn.Conv2d`; keeps a pack of its input, or shares one."""


class Conv3d(_Conv, nn.Conv3d):
    """`torch.nn.Conv3d`; keeps a pack of its input, or shares one."""


class _ConvTranspose(_OfPixels, nn.modules.conv._ConvTransposeNd):
    """What the transposed convolutions share."""

    def training_forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
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


class _BatchNorm(_OfPixels, nn.modules.batchnorm._NormBase):
    """What the batch norms share."""

    def training_forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return batch_norm(input, **start_batch(self), method=self.method)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`; keeps a pack of the normalised value."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`; keeps a pack of the normalised value."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`; keeps a pack of the normalised value."""


class GroupNorm(_OfPixels, nn.GroupNorm):
    """`torch.nn.GroupNorm`; keeps a pack of the normalised value."""

    def training_forward(self, input: Tensor) -> Tensor:
        given = (self.num_groups, self.weight, self.bias, self.eps)
        return group_norm(input, *given, method=self.method)

"""The layers of torch.nn whose gradient needs the shape of the input; see `shape_only.py`.

Constructors are torch's.
"""

from typing import Any

from torch import Tensor, nn

from packlight.layers import lp_pooling, shape_only
from packlight.layers.twin import Twin

# ---- average pooling -----------------------------------------------------------------------------


class AvgPool1d(Twin, nn.AvgPool1d):
    """`torch.nn.AvgPool1d`; keeps nothing, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.padding)
        return shape_only.avg_pool1d(input, *window, self.ceil_mode, self.count_include_pad)


class AvgPool2d(Twin, nn.AvgPool2d):
    """`torch.nn.AvgPool2d`; keeps nothing, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.padding)
        how = (self.ceil_mode, self.count_include_pad, self.divisor_override)
        return shape_only.avg_pool2d(input, *window, *how)


class AvgPool3d(Twin, nn.AvgPool3d):
    """`torch.nn.AvgPool3d`; keeps nothing, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.padding)
        how = (self.ceil_mode, self.count_include_pad, self.divisor_override)
        return shape_only.avg_pool3d(input, *window, *how)


class AdaptiveAvgPool1d(Twin, nn.AdaptiveAvgPool1d):
    """`torch.nn.AdaptiveAvgPool1d`; keeps nothing, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return shape_only.adaptive_avg_pool1d(input, self.output_size)


class AdaptiveAvgPool2d(Twin, nn.AdaptiveAvgPool2d):
    """`torch.nn.AdaptiveAvgPool2d`; keeps nothing, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return shape_only.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveAvgPool3d(Twin, nn.AdaptiveAvgPool3d):
    """`torch.nn.AdaptiveAvgPool3d`; keeps nothing, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return shape_only.adaptive_avg_pool3d(input, self.output_size)


class LPPool1d(Twin, nn.LPPool1d):
    """`torch.nn.LPPool1d`; keeps its input once, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.ceil_mode)
        return lp_pooling.lp_pool1d(input, float(self.norm_type), *window)


class LPPool2d(Twin, nn.LPPool2d):
    """`torch.nn.LPPool2d`; keeps its input once, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.ceil_mode)
        return lp_pooling.lp_pool2d(input, float(self.norm_type), *window)


class LPPool3d(Twin, nn.LPPool3d):
    """`torch.nn.LPPool3d`; keeps its input once, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        window = (self.kernel_size, self.stride, self.ceil_mode)
        return lp_pooling.lp_pool3d(input, float(self.norm_type), *window)


# ---- max pooling, of which indices are kept ------------------------------------------------------


class AdaptiveMaxPool1d(Twin, nn.AdaptiveMaxPool1d):
    """`torch.nn.AdaptiveMaxPool1d`; keeps an int64 index an output element, exact."""

    def training_forward(self, input: Tensor) -> Any:
        return shape_only.adaptive_max_pool1d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool2d(Twin, nn.AdaptiveMaxPool2d):
    """`torch.nn.AdaptiveMaxPool2d`; keeps an int64 index an output element, exact."""

    def training_forward(self, input: Tensor) -> Any:
        return shape_only.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class AdaptiveMaxPool3d(Twin, nn.AdaptiveMaxPool3d):
    """`torch.nn.AdaptiveMaxPool3d`; keeps an int64 index an output element, exact."""

    def training_forward(self, input: Tensor) -> Any:
        return shape_only.adaptive_max_pool3d(input, self.output_size, self.return_indices)


class FractionalMaxPool2d(Twin, nn.FractionalMaxPool2d):
    """`torch.nn.FractionalMaxPool2d`; keeps an int64 index an output element, exact."""

    def training_forward(self, input: Tensor) -> Any:
        sizes = (self.kernel_size, self.output_size, self.output_ratio)
        samples: Any = self._random_samples
        return shape_only.fractional_max_pool2d(input, *sizes, self.return_indices, samples)


class FractionalMaxPool3d(Twin, nn.FractionalMaxPool3d):
    """`torch.nn.FractionalMaxPool3d`; keeps an int64 index an output element, exact."""

    def training_forward(self, input: Tensor) -> Any:
        sizes = (self.kernel_size, self.output_size, self.output_ratio)
        samples: Any = self._random_samples
        return shape_only.fractional_max_pool3d(input, *sizes, self.return_indices, samples)


# ---- padding -------------------------------------------------------------------------------------


class _Reflects(Twin):
    """What the paddings by reflection share."""

    padding: Any

    def training_forward(self, input: Tensor) -> Tensor:
        return shape_only.pad(input, self.padding, "reflect")


class ReflectionPad1d(_Reflects, nn.ReflectionPad1d):
    """`torch.nn.ReflectionPad1d`; keeps nothing, exact."""


class ReflectionPad2d(_Reflects, nn.ReflectionPad2d):
    """`torch.nn.ReflectionPad2d`; keeps nothing, exact."""


class ReflectionPad3d(_Reflects, nn.ReflectionPad3d):
    """`torch.nn.ReflectionPad3d`; keeps nothing, exact."""


class _Replicates(Twin):
    """What the paddings by the outermost values share."""

    padding: Any

    def training_forward(self, input: Tensor) -> Tensor:
        return shape_only.pad(input, self.padding, "replicate")


class ReplicationPad1d(_Replicates, nn.ReplicationPad1d):
    """`torch.nn.ReplicationPad1d`; keeps nothing, exact."""


class ReplicationPad2d(_Replicates, nn.ReplicationPad2d):
    """`torch.nn.ReplicationPad2d`; keeps nothing, exact."""


class ReplicationPad3d(_Replicates, nn.ReplicationPad3d):
    """`torch.nn.ReplicationPad3d`; keeps nothing, exact."""


# ---- others --------------------------------------------------------------------------------------


class RReLU(Twin, nn.RReLU):
    """`torch.nn.RReLU`; keeps its random slopes, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        return shape_only.rrelu(input, self.lower, self.upper, True, self.inplace)


class Upsample(Twin, nn.Upsample):
    """`torch.nn.Upsample`; keeps nothing, exact."""

    def training_forward(self, input: Tensor) -> Tensor:
        sizes = (self.size, self.scale_factor, self.mode, self.align_corners)
        return shape_only.interpolate(input, *sizes, self.recompute_scale_factor)

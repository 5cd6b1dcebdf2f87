"""What every method makes of layers and functions whose gradient needs less than torch keeps."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.layers import extremes, lp_pooling, shape_only
from packlight.layers import shape_only_modules as modules
from packlight.method import Method, NotConverted, Swap, rows, rule

rows(
    Method,
    {
        (nn.AvgPool1d, F.avg_pool1d): (modules.AvgPool1d, shape_only.avg_pool1d),
        (nn.AvgPool2d, F.avg_pool2d): (modules.AvgPool2d, shape_only.avg_pool2d),
        (nn.AvgPool3d, F.avg_pool3d): (modules.AvgPool3d, shape_only.avg_pool3d),
        (F.adaptive_avg_pool1d,): (shape_only.adaptive_avg_pool1d,),
        (F.adaptive_avg_pool2d,): (shape_only.adaptive_avg_pool2d,),
        (F.adaptive_avg_pool3d,): (shape_only.adaptive_avg_pool3d,),
        (nn.AdaptiveMaxPool1d, F.adaptive_max_pool1d): (
            modules.AdaptiveMaxPool1d,
            shape_only.adaptive_max_pool1d,
        ),
        (nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d): (
            modules.AdaptiveMaxPool2d,
            shape_only.adaptive_max_pool2d,
        ),
        (nn.AdaptiveMaxPool3d, F.adaptive_max_pool3d): (
            modules.AdaptiveMaxPool3d,
            shape_only.adaptive_max_pool3d,
        ),
        (nn.FractionalMaxPool2d, F.fractional_max_pool2d): (
            modules.FractionalMaxPool2d,
            shape_only.fractional_max_pool2d,
        ),
        (nn.FractionalMaxPool3d, F.fractional_max_pool3d): (
            modules.FractionalMaxPool3d,
            shape_only.fractional_max_pool3d,
        ),
        (nn.LPPool1d, F.lp_pool1d): (modules.LPPool1d, lp_pooling.lp_pool1d),
        (nn.LPPool2d, F.lp_pool2d): (modules.LPPool2d, lp_pooling.lp_pool2d),
        (nn.LPPool3d, F.lp_pool3d): (modules.LPPool3d, lp_pooling.lp_pool3d),
        (nn.RReLU, F.rrelu): (modules.RReLU, shape_only.rrelu),
        (nn.ReflectionPad1d,): (modules.ReflectionPad1d,),
        (nn.ReflectionPad2d,): (modules.ReflectionPad2d,),
        (nn.ReflectionPad3d,): (modules.ReflectionPad3d,),
        (nn.ReplicationPad1d,): (modules.ReplicationPad1d,),
        (nn.ReplicationPad2d,): (modules.ReplicationPad2d,),
        (nn.ReplicationPad3d,): (modules.ReplicationPad3d,),
        (F.pad,): (shape_only.pad,),
        (F.interpolate,): (shape_only.interpolate,),
        (torch.gather, Tensor.gather): (shape_only.gather,),
        (torch.amax, Tensor.amax): (extremes.amax,),
        (torch.amin, Tensor.amin): (extremes.amin,),
        (torch.maximum, Tensor.maximum): (extremes.maximum,),
        (torch.minimum, Tensor.minimum): (extremes.minimum,),
        (torch.masked_select, Tensor.masked_select): (shape_only.masked_select,),
    },
)


@rule(Method, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
def _adaptive_avg_pool(method: Method, module: Any) -> Swap:
    if module.output_size in (1, (1, 1), (1, 1, 1)):
        raise NotConverted("it is a mean, of which torch keeps nothing")
    kind: type[nn.Module] = getattr(modules, type(module).__name__)
    return Swap(kind)


@rule(Method, nn.Upsample)
def _upsample(method: Method, module: nn.Upsample) -> Swap:
    if module.mode != "area":
        raise NotConverted(f"torch keeps nothing in mode {module.mode!r}")
    return Swap(modules.Upsample)

"""A layer and an input for every type of torch.nn that a method has a rule for."""

from collections.abc import Callable

import torch
from torch import nn

import packlight
from packlight import FewBit, FixedPoint, GroupQuant, Inverted
from packlight.method import Method, _rules
from packlight.quantiser import Quantiser
from packlight.sketch import Sketch

Sample = tuple[Callable[[], nn.Module], tuple[int, ...]]

ROWS, IMAGES = (32, 64), (4, 16, 8, 8)
VOLUMES, SIGNALS = (2, 16, 4, 4, 4), (4, 16, 32)

_SAMPLES: dict[type[nn.Module], Sample] = {
    nn.AdaptiveAvgPool1d: (lambda: nn.AdaptiveAvgPool1d(5), SIGNALS),
    nn.AdaptiveAvgPool2d: (lambda: nn.AdaptiveAvgPool2d((3, None)), IMAGES),
    nn.AdaptiveAvgPool3d: (lambda: nn.AdaptiveAvgPool3d(3), VOLUMES),
    nn.AdaptiveMaxPool1d: (lambda: nn.AdaptiveMaxPool1d(5), SIGNALS),
    nn.AdaptiveMaxPool2d: (lambda: nn.AdaptiveMaxPool2d((3, None)), IMAGES),
    nn.AdaptiveMaxPool3d: (lambda: nn.AdaptiveMaxPool3d(3), VOLUMES),
    nn.AvgPool1d: (lambda: nn.AvgPool1d(3, 2, ceil_mode=True), SIGNALS),
    nn.AvgPool2d: (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGES),
    nn.AvgPool3d: (lambda: nn.AvgPool3d(2, divisor_override=3), VOLUMES),
    nn.BatchNorm1d: (lambda: nn.BatchNorm1d(16), SIGNALS),
    nn.BatchNorm2d: (lambda: nn.BatchNorm2d(16, momentum=None), IMAGES),
    nn.BatchNorm3d: (lambda: nn.BatchNorm3d(16, eps=1e-3), VOLUMES),
    nn.CELU: (lambda: nn.CELU(0.7), ROWS),
    nn.Conv1d: (lambda: nn.Conv1d(16, 8, 3, padding=1, padding_mode="reflect"), SIGNALS),
    nn.Conv2d: (lambda: nn.Conv2d(16, 8, 3, stride=2, groups=2), IMAGES),
    nn.Conv3d: (lambda: nn.Conv3d(16, 8, 2, bias=False), VOLUMES),
    nn.ConvTranspose1d: (lambda: nn.ConvTranspose1d(16, 8, 3), SIGNALS),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(16, 8, 2, stride=2), IMAGES),
    nn.ConvTranspose3d: (lambda: nn.ConvTranspose3d(16, 8, 2), VOLUMES),
    nn.Dropout: (lambda: nn.Dropout(0.3), ROWS),
    nn.ELU: (lambda: nn.ELU(), ROWS),
    nn.FractionalMaxPool2d: (lambda: nn.FractionalMaxPool2d(2, 3), IMAGES),
    nn.FractionalMaxPool3d: (lambda: nn.FractionalMaxPool3d(2, output_ratio=0.5), VOLUMES),
    nn.GELU: (lambda: nn.GELU("tanh"), ROWS),
    nn.GLU: (lambda: nn.GLU(-1), ROWS),
    nn.GroupNorm: (lambda: nn.GroupNorm(4, 16, eps=1e-3), IMAGES),
    nn.Hardshrink: (lambda: nn.Hardshrink(0.4), ROWS),
    nn.Hardsigmoid: (lambda: nn.Hardsigmoid(), ROWS),
    nn.Hardswish: (lambda: nn.Hardswish(), ROWS),
    nn.Hardtanh: (lambda: nn.Hardtanh(-0.5, 0.75), ROWS),
    nn.InstanceNorm1d: (lambda: nn.InstanceNorm1d(16, affine=True), SIGNALS),
    nn.InstanceNorm2d: (lambda: nn.InstanceNorm2d(16, affine=True), IMAGES),
    nn.InstanceNorm3d: (lambda: nn.InstanceNorm3d(16, affine=True), VOLUMES),
    nn.LPPool1d: (lambda: nn.LPPool1d(2, 3, 2), SIGNALS),
    nn.LPPool2d: (lambda: nn.LPPool2d(2, (2, 3), ceil_mode=True), IMAGES),
    nn.LPPool3d: (lambda: nn.LPPool3d(4, 2), VOLUMES),
    nn.LayerNorm: (lambda: nn.LayerNorm(64, eps=1e-4), ROWS),
    nn.LeakyReLU: (lambda: nn.LeakyReLU(0.2), ROWS),
    nn.Linear: (lambda: nn.Linear(64, 48), ROWS),
    nn.LogSigmoid: (lambda: nn.LogSigmoid(), ROWS),
    nn.MaxPool1d: (lambda: nn.MaxPool1d(2), SIGNALS),
    nn.MaxPool2d: (lambda: nn.MaxPool2d(3, stride=2, padding=1), IMAGES),
    nn.MaxPool3d: (lambda: nn.MaxPool3d(2), VOLUMES),
    nn.Mish: (lambda: nn.Mish(), ROWS),
    nn.PReLU: (lambda: nn.PReLU(16, 0.2), IMAGES),
    nn.RMSNorm: (lambda: nn.RMSNorm(64), ROWS),
    nn.ReflectionPad1d: (lambda: nn.ReflectionPad1d(2), SIGNALS),
    nn.ReflectionPad2d: (lambda: nn.ReflectionPad2d((1, 2, 0, 1)), IMAGES),
    nn.ReflectionPad3d: (lambda: nn.ReflectionPad3d(1), VOLUMES),
    nn.ReplicationPad1d: (lambda: nn.ReplicationPad1d(2), SIGNALS),
    nn.ReplicationPad2d: (lambda: nn.ReplicationPad2d((1, 2, 0, 1)), IMAGES),
    nn.ReplicationPad3d: (lambda: nn.ReplicationPad3d(1), VOLUMES),
    nn.RReLU: (lambda: nn.RReLU(0.1, 0.6), ROWS),
    nn.ReLU: (lambda: nn.ReLU(), ROWS),
    nn.ReLU6: (lambda: nn.ReLU6(), ROWS),
    nn.SELU: (lambda: nn.SELU(), ROWS),
    nn.SiLU: (lambda: nn.SiLU(), ROWS),
    nn.Sigmoid: (lambda: nn.Sigmoid(), ROWS),
    nn.Softplus: (lambda: nn.Softplus(1.5, 10.0), ROWS),
    nn.Softshrink: (lambda: nn.Softshrink(0.4), ROWS),
    nn.Softsign: (lambda: nn.Softsign(), ROWS),
    nn.Tanh: (lambda: nn.Tanh(), ROWS),
    nn.Tanhshrink: (lambda: nn.Tanhshrink(), ROWS),
    nn.Threshold: (lambda: nn.Threshold(0.1, -1.0), ROWS),
    nn.Upsample: (lambda: nn.Upsample(scale_factor=0.6, mode="area"), IMAGES),
}

# Where a method takes only some layers of a type.
_SPECIAL: dict[tuple[type[Method], type[nn.Module]], Sample] = {
    (Sketch, nn.Conv1d): (lambda: nn.Conv1d(16, 8, 1), SIGNALS),
    (Sketch, nn.Conv2d): (lambda: nn.Conv2d(16, 8, 1), IMAGES),
}

# To nearest and with groups of their own, so that two passes agree whatever the seed.
METHODS: dict[type[Method], Method] = {
    FewBit: FewBit(bits=8),
    FixedPoint: FixedPoint(bits=8),
    Quantiser: GroupQuant(bits=8, group_size=32, rounding="nearest"),
    Inverted: Inverted(),
    Sketch: Sketch(rows=8, min_rows=1),
    Method: Sketch(rows=8, min_rows=1),  # what any method makes of a layer
}

# Every rule for a layer of torch.nn; those of other packages are tested with them.
RULES = [key for key in _rules if key[1].__module__.startswith("torch.nn")]


def sample(method: type[Method], kind: type[nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    """A layer in training and an input of it. Weights of norms are near 1, as when they train."""
    make, shape = _SPECIAL.get((method, kind)) or _SAMPLES[kind]
    packlight.manual_seed(0)
    layer = make()
    if "Norm" in kind.__name__:
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.rand_like(parameter) * 0.2)
    return layer, torch.randn(shape)

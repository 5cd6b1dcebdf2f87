"""ResNets for small images and for large ones, of torch's layers or of packlight's."""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from packlight import groupquant
from packlight.groupquant import fixed_point


class Kit(NamedTuple):
    """What a network is built of."""

    conv: Callable[..., nn.Module]
    norm: Callable[[int], nn.Module]
    relu: Callable[..., nn.Module]


def _fixed(bits: int) -> Kit:
    return Kit(
        lambda *args, **options: groupquant.Conv2d(*args, **options, bits=bits),
        lambda channels: fixed_point.BatchNorm2d(channels, bits=bits),
        groupquant.ReLU,
    )


def _group(bits: int) -> Kit:
    return Kit(
        lambda *args, **options: groupquant.Conv2d(*args, **options, bits=bits),
        lambda channels: groupquant.BatchNorm2d(channels, bits=bits),
        groupquant.ReLU,
    )


KITS = {
    "exact": Kit(nn.Conv2d, nn.BatchNorm2d, nn.ReLU),
    "fixed8": _fixed(8),
    "fixed4": _fixed(4),
    "group8": _group(8),
    "group4": _group(4),
    "group2": _group(2),
}


class Block(nn.Module):
    """A basic residual block: two 3x3 convolutions."""

    expansion = 1

    def __init__(self, kit: Kit, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = kit.conv(channels, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = kit.norm(width)
        self.conv2 = kit.conv(width, width, 3, padding=1, bias=False)
        self.norm2 = kit.norm(width)
        self.relu = kit.relu(inplace=True)
        self.shortcut = _shortcut(kit, channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """The block of ResNet-50: 1x1, 3x3 and 1x1, the last four times as wide."""

    expansion = 4

    def __init__(self, kit: Kit, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = kit.conv(channels, width, 1, bias=False), kit.norm(width)
        self.conv2 = kit.conv(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = kit.norm(width)
        self.conv3, self.norm3 = kit.conv(width, 4 * width, 1, bias=False), kit.norm(4 * width)
        self.relu = kit.relu(inplace=True)
        self.shortcut = _shortcut(kit, channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        y += self.shortcut(x)
        return self.relu(y)


def _shortcut(kit: Kit, channels: int, width: int, stride: int) -> nn.Module:
    if stride == 1 and channels == width:
        return nn.Identity()
    return nn.Sequential(kit.conv(channels, width, 1, stride=stride, bias=False), kit.norm(width))


def _resnet(
    kit: Kit,
    block: type[Block] | type[Bottleneck],
    depths: list[int],
    width: int,
    stem: list[nn.Module],
) -> nn.Sequential:
    layers, channels = stem, width
    for stage, depth in enumerate(depths):
        for i in range(depth):
            stride = 2 if stage and i == 0 else 1
            layers.append(block(kit, channels, width << stage, stride))
            channels = (width << stage) * block.expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def resnet18(kit: Kit, width: int = 64) -> nn.Sequential:
    """ResNet-18 with the stem for 32x32 images."""
    stem = [kit.conv(3, width, 3, padding=1, bias=False), kit.norm(width), kit.relu(inplace=True)]
    return _resnet(kit, Block, [2, 2, 2, 2], width, stem)


def resnet50(kit: Kit, pool: nn.Module, width: int = 64) -> nn.Sequential:
    """ResNet-50 with the stem for large images; `pool` is its max pooling, 3x3 with stride 2."""
    stem = [
        kit.conv(3, width, 7, stride=2, padding=3, bias=False),
        kit.norm(width),
        kit.relu(inplace=True),
        pool,
    ]
    return _resnet(kit, Bottleneck, [3, 4, 6, 3], width, stem)


class PreActivation(nn.Module):
    """A pre-activation block whose shortcut is a pooled input, with zeros for further channels."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.relu = nn.ReLU()
        self.pool = nn.Identity() if stride == 1 else nn.AvgPool2d(stride)
        self.more = width - channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.relu(self.norm1(x)))
        y = self.conv2(self.relu(self.norm2(y)))
        return y + F.pad(self.pool(x), (0, 0, 0, 0, 0, self.more))


def preactivation_resnet(depth: int, width: int = 32) -> nn.Sequential:
    """The residual network of approximate activations for 32x32 images: three stages.

    `width` 32 is twice that of the smallest. Source: Chakrabarti and Moseley, NeurIPS 2019.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    channels = width
    for stage in range(3):
        for i in range(depth):
            layers.append(PreActivation(channels, width << stage, 2 if stage and i == 0 else 1))
            channels = width << stage
    layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, 10))

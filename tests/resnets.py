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


# --- With activations before convolutions, as in the paper on approximate activations.


class PreActivation(nn.Sequential):
    """A batch norm, its ReLU and the convolution that reads it."""

    def __init__(self, channels: int, width: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.BatchNorm2d(channels, eps=1e-3),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False),
        )


class PreActivationBottleneck(nn.Module):
    """1x1, 3x3 and 1x1; what passes by is average-pooled and has channels of zeros added.

    In the first block of a network the batch norm and its ReLU stand before both ways.
    """

    def __init__(self, channels: int, width: int, stride: int, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.reduce = PreActivation(channels, width, 1, stride)
        self.conv = PreActivation(width, width, 3)
        self.expand = PreActivation(width, 4 * width, 1)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.added = (4 * width - channels) // 2  # on either side

    def forward(self, x: Tensor) -> Tensor:
        norm, relu, conv = self.reduce
        read = relu(norm(x))
        y = self.expand(self.conv(conv(read)))
        x = self.pool(read if self.is_first else x)
        if self.added:
            x = F.pad(x, (0, 0, 0, 0, self.added, self.added))
        return y + x


def preactivation_resnet(blocks: int, width: int = 1) -> nn.Sequential:
    """The CIFAR network of Chakrabarti and Moseley: 9 blocks + 2 layers, 164 of them with 18 blocks
    in each of three stages of 16, 32 and 64 times `width` channels.
    """
    channels = 16 * width
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for stage in range(3):
        for i in range(blocks):
            stride = 2 if stage and i == 0 else 1
            is_first = stage == i == 0
            layers.append(PreActivationBottleneck(channels, 16 * width << stage, stride, is_first))
            channels = 4 * 16 * width << stage
    layers += [nn.BatchNorm2d(channels, eps=1e-3), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))

"""Codes as bytes, by planes, in plain PyTorch: `Grouping` says where they lie."""

import torch
from torch import Tensor

from packlight.groupquant.grouping import PLANES


def to_bytes(numbers: Tensor, bits: int) -> Tensor:
    """Bytes, flat, of codes [..., group_size] of uint8: those of a group follow each other."""
    planes, first = [], 0
    for width in PLANES[bits]:
        plane = (numbers >> first) & (2**width - 1)
        plane = plane.reshape(-1, 8 // width, numbers.shape[-1] * width // 8)
        byte = plane[:, 0].clone()
        for part in range(1, 8 // width):
            byte |= plane[:, part] << (part * width)
        planes.append(byte)
        first += width
    packed: Tensor = planes[0] if len(planes) == 1 else torch.cat(planes, 1)
    return packed.view(-1)


def from_bytes(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """The inverse of `to_bytes`: codes [groups, group_size] of uint8."""
    bytes_ = codes.view(-1, group_size * bits // 8)
    numbers: Tensor | None = None
    first = start = 0
    for width in PLANES[bits]:
        length = group_size * width // 8
        byte = bytes_[:, None, start : start + length]
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).view(-1, 1)
        plane = ((byte >> shifts) & (2**width - 1)).reshape(-1, group_size)
        # A compiler has each operation to trace, so none is without effect.
        numbers = plane if numbers is None else numbers | (plane << first)
        first, start = first + width, start + length
    assert numbers is not None
    return numbers

"""Codes whose values lie on the same side of 0 as what they stand for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.groupquant.planes import from_bytes, to_bytes


def with_sides(codes: Tensor, scales: Tensor, flat: Tensor, bits: int, group_size: int) -> Tensor:
    """The codes, with those of positive values above 0 and those of others not.

    Only codes next to 0 change, by less than a step. In a group whose least value is 0 zeros come
    back as that.
    """
    last = 2**bits - 1
    low = (scales & -65536).view(torch.float32)
    step = (scales << 16).view(torch.float32)
    # Both have 8 significant bits, so that no rounding takes their ratio to a whole number.
    at_zero = (low / -step).floor().nan_to_num(0.0).view(-1, 1)
    highest = at_zero.clamp(0, last).to(torch.uint8)
    least = (at_zero + 1).clamp(0, last).to(torch.uint8)
    positive, padding = flat > 0, scales.numel() * group_size - flat.numel()
    positive = (F.pad(positive, (0, padding)) if padding else positive).view(-1, group_size)
    numbers = from_bytes(codes, bits, group_size)
    numbers = torch.where(positive, numbers.maximum(least), numbers.minimum(highest))
    return to_bytes(numbers, bits)

"""The operators that pack masks to one bit an element and back, losslessly.

A mask is one byte an element, 0 or 1. Its elements lie in the memory order of dense strides
`stride`, packed as `layout.py` says.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.packing import reference
from packlight.packing.layout import from_memory_order, memory_order, packed_bytes

_KERNELS = "packlight.packing.kernels"


def _pack_mask(mask: Tensor, stride: Sequence[int]) -> Tensor:
    return reference.pack(memory_order(mask, stride), 1)


def _unpack_mask(packed: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    codes = reference.unpack(packed, 1, math.prod(shape))
    return from_memory_order(codes, shape, stride, torch.bool)


pack_mask = define_op(
    "pack_mask(Tensor mask, SymInt[] stride) -> Tensor",
    reference=_pack_mask,
    fake=lambda mask, stride: mask.new_empty(packed_bytes(mask.numel(), 1)),
    kernel=f"{_KERNELS}:pack_mask",
)

unpack_mask = define_op(
    "unpack_mask(Tensor packed, SymInt[] shape, SymInt[] stride) -> Tensor",
    reference=_unpack_mask,
    fake=lambda packed, shape, stride: packed.new_empty_strided(shape, stride, dtype=torch.bool),
    kernel=f"{_KERNELS}:unpack_mask",
)

"""Packing in plain PyTorch; the layout is described in `layout.py`."""

import torch
from torch import Tensor

from packlight.packing.layout import GROUP, lanes, packed_bytes


def _word_dtype(bits: int) -> torch.dtype:
    return torch.int32 if GROUP * bits <= 32 else torch.int64


def pack(codes: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Packs a flat uint8 tensor of codes below 2^bits into `packed_bytes(n, bits)` bytes."""
    count, groups = codes.numel(), lanes(codes.numel())
    if out is None:
        out = codes.new_empty(packed_bytes(count, bits))
    rows = codes.new_zeros(GROUP * groups)
    rows[:count] = codes
    rows = rows.view(GROUP, groups)
    if bits == 8:
        return out.copy_(rows.view(-1))
    word = torch.zeros(groups, dtype=_word_dtype(bits), device=codes.device)
    for j in range(GROUP):
        word |= rows[j].to(word.dtype) << (j * bits)
    planes = out.view(bits, groups)
    for p in range(bits):
        planes[p] = (word >> (8 * p)) & 0xFF
    return out


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: a flat uint8 tensor of `count` codes."""
    groups = lanes(count)
    if bits == 8:
        return packed[:count]
    planes = packed.view(bits, groups).to(_word_dtype(bits))
    word = torch.zeros_like(planes[0])
    for p in range(bits):
        word |= planes[p] << (8 * p)
    rows = packed.new_empty(GROUP, groups)
    for j in range(GROUP):
        rows[j] = (word >> (j * bits)) & ((1 << bits) - 1)
    return rows.view(-1)[:count]

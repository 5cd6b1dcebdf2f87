"""Dropout with a packed mask in plain PyTorch."""

import torch
from torch import Tensor

from packlight._philox import philox
from packlight._seeds import as_tensor
from packlight.packing import reference as packing
from packlight.packing.layout import dense_stride, lanes, memory_order


def drop_below(p: float) -> int:
    """An element is dropped when its 32-bit draw is below this."""
    return min(round(p * 2**32), 2**32 - 1)


def _kept(seed: Tensor, count: int, p: float) -> Tensor:
    """Which of `count` elements are kept.

    Rows 0 to 3 of group g of the packed layout take the four numbers of counter (g, 0), rows 4 to 7
    those of counter (g, 1): a thread of the kernel makes two draws for its eight elements.
    """
    group = torch.arange(lanes(count), device=seed.device)
    draws = torch.stack([*philox(seed, group, 0), *philox(seed, group, 1)])
    return (draws >= drop_below(p)).view(-1)[:count]


def dropout_mask(seed: Tensor, count: int, p: float) -> Tensor:
    """The packed mask of `dropout` for `count` elements."""
    return packing.pack(_kept(seed, count, p).to(torch.uint8), 1)


def dropout(
    x: Tensor, seed: Tensor | None, number: int, p: float, keep_codes: bool
) -> tuple[Tensor, Tensor]:
    """x / (1 - p) where a draw keeps it, else 0; and the packed mask, empty if not asked for."""
    stride = dense_stride(x)
    flat = memory_order(x, stride)
    key = as_tensor(seed, number, x.device)
    assert key is not None
    kept = _kept(key, flat.numel(), p)
    y = x.new_empty_strided(x.shape, stride)
    # As torch on the CPU: the factor is rounded to the tensor's dtype, then multiplied.
    torch.mul(flat, kept.to(x.dtype).div_(1 - p), out=y.as_strided((flat.numel(),), (1,)))
    if not keep_codes:
        return y, x.new_empty(0, dtype=torch.uint8)
    return y, packing.pack(kept.to(torch.uint8), 1)


def dropout_(x: Tensor, seed: Tensor | None, number: int, p: float, keep_codes: bool) -> Tensor:
    """As `dropout`, with the output written over `x`."""
    y, codes = dropout(x, seed, number, p, keep_codes)
    x.copy_(y)
    return codes

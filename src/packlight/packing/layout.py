"""Where the k-bit code of element i lies.

n codes fall into groups of 8, and a group of k-bit codes is one word of k bytes. With

    L = lanes(n) = ceil(n / 64) * 8

word g holds the codes of elements g, L + g, 2 L + g, ..., 7 L + g in that order from the lowest
bit up, and byte p of every word is stored in plane p, at byte p L + g. So a thread that handles
word g shifts by constants only, neighbours in a warp read and write neighbouring elements of eight
streams, and only the rounding of L to 8 is wasted: k n / 8 bytes plus at most 63 when k <= 8.

Elements are numbered in memory order, whatever the strides: a channels-last tensor stays
channels-last and is never copied.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from packlight import _torch

GROUP = 8


def lanes(count: int) -> int:
    """Number of 8-element groups, rounded up to a multiple of 8 so that planes stay aligned."""
    return (count + 63) // 64 * 8


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return bits * lanes(count)


def dense_stride(x: Tensor) -> tuple[int, ...]:
    """The strides of an elementwise result of `x`: its own if it is dense, else the nearest."""
    if x.is_contiguous():
        return x.stride()
    # A compiler's symbols are not asked.
    if not _torch.is_traced() and _is_permuted(x.shape, stride := x.stride()):
        return stride  # without making a tensor
    return torch.empty_like(x, device="meta").stride()


@functools.lru_cache(4096)
def _is_permuted(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether a tensor is a contiguous one with its dimensions in another order.

    Not where a dimension of one element may have any stride.
    """
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if stride != expected or size < 2:
            return False
        expected *= size
    return True


def in_memory_format(x: Tensor) -> Tensor:
    """`x` contiguous or channels-last, as torch's norms of channels and poolings give results.

    A model may rely on that: `view` of the result of such a layer, say.
    """
    return x if x.is_contiguous() else x.contiguous(memory_format=_torch.memory_format(x))


def is_dense(x: Tensor) -> bool:
    """Whether the elements of `x` lie side by side, each once, in whatever order."""
    return x.stride() == dense_stride(x)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Where torch computes with `x`: in float32 for 16-bit tensors."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def write_back(x: Tensor, dense: Tensor) -> None:
    """Puts `dense`, which `laid_out` made of `x` and which was overwritten since, into `x`."""
    if dense is not x:
        x.copy_(dense)


def laid_out(x: Tensor, stride: Sequence[int]) -> Tensor:
    """`x` with strides `stride`: itself when it has these strides, a copy otherwise."""
    stride = tuple(stride)
    if x.stride() == stride:
        return x
    return x.new_empty_strided(x.shape, stride).copy_(x)


def memory_order(x: Tensor, stride: Sequence[int]) -> Tensor:
    """The elements of `x` as a flat tensor, in the memory order of dense strides `stride`.

    A view when `x` has these strides, a copy otherwise. A kernel is given `laid_out` itself.
    """
    return laid_out(x, stride).as_strided((x.numel(),), (1,))


def from_memory_order(
    flat: Tensor, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """A tensor whose `memory_order` is `flat`, which is converted to `dtype`."""
    x = flat.new_empty_strided(tuple(shape), tuple(stride), dtype=dtype)
    x.as_strided((flat.numel(),), (1,)).copy_(flat)
    return x

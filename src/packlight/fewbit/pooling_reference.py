"""Max pooling that keeps the maximum's offset in its window, in plain PyTorch.

An offset numbers the window's positions in row-major order and takes b = ceil(log2(window size))
bits. Offsets of more than 8 bits (windows over 256 elements) are packed 8 bits at a time.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight.packing import reference as packing
from packlight.packing.layout import compute_dtype, laid_out, memory_order, packed_bytes

_POOL: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


def offset_bits(kernel: Sequence[int]) -> int:
    """Bits of an offset in a window of this size; a window of one element takes one too."""
    return max(1, (math.prod(kernel) - 1).bit_length())


def digits(bits: int) -> list[int]:
    """How `bits` bits are cut into codes of at most 8."""
    return [min(8, bits - done) for done in range(0, bits, 8)]


def codes_bytes(count: int, kernel: Sequence[int]) -> int:
    """Bytes that `count` packed offsets take."""
    return sum(packed_bytes(count, part) for part in digits(offset_bits(kernel)))


def memory_format(x: Tensor, axes: int) -> torch.memory_format:
    """The layout of the output: channels-last for a channels-last input, else contiguous."""
    return _torch.memory_format(x) if x.dim() == axes + 2 else torch.contiguous_format


def _with_layout(y: Tensor, layout: torch.memory_format) -> Tensor:
    """`y` with exactly the strides of `layout`; `contiguous` leaves those of axes of size 1."""
    stride = torch.empty(y.shape, device="meta", memory_format=layout).stride()
    return laid_out(y, stride)


def output_format(size: Sequence[int], stride: Sequence[int], axes: int) -> torch.memory_format:
    """The layout that `memory_format` gave an output of this size and these strides."""
    return memory_format(torch.empty_strided(tuple(size), tuple(stride), device="meta"), axes)


def output_shape(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, ...]:
    """The shape torch gives, asked of torch."""
    shape = torch.empty_like(x, device="meta")
    return tuple(_POOL[len(kernel)](shape, kernel, stride, padding, dilation, ceil_mode).shape)


def _starts(size: int, axis: int, axes: int, stride: int, padding: int, like: Tensor) -> Tensor:
    """First input position of every window along one axis, shaped to broadcast over `axes` axes."""
    start = torch.arange(size, device=like.device) * stride - padding
    return start.view([-1 if i == axis else 1 for i in range(axes)])


def _offsets(
    index: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """Window offsets [..., *out] of torch's flat indices into the spatial plane `size`.

    torch's own indices leave the window where all of it is -inf or padding (in some layouts): there
    the window's first position inside the plane stands in.
    """
    axes = len(kernel)
    offset, first = torch.zeros_like(index), torch.zeros_like(index)
    inside = torch.ones_like(index, dtype=torch.bool)
    for d in range(axes):
        position = index // math.prod(size[d + 1 :]) % size[d]
        start = _starts(index.shape[d - axes], d, axes, stride[d], padding[d], index)
        within = torch.div(position - start, dilation[d], rounding_mode="floor")
        inside &= (within >= 0) & (within < kernel[d])
        offset = offset * kernel[d] + within
        skipped = ((-start).clamp(min=0) + dilation[d] - 1) // dilation[d]
        first = first * kernel[d] + skipped.clamp(max=kernel[d] - 1)
    return torch.where(inside, offset, first)


def _indices(
    offset: Tensor,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The inverse of `_offsets`; -1 where the position lies in the padding."""
    axes = len(kernel)
    index = torch.zeros_like(offset)
    inside = torch.ones_like(offset, dtype=torch.bool)
    for d in range(axes):
        within = offset // math.prod(kernel[d + 1 :]) % kernel[d]
        start = _starts(offset.shape[d - axes], d, axes, stride[d], padding[d], offset)
        position = start + within * dilation[d]
        inside &= (position >= 0) & (position < size[d])
        index = index * size[d] + position
    return torch.where(inside, index, -1)


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """torch's max pooling and the packed window offsets of the maxima, in y's memory order."""
    axes = len(kernel)
    layout = memory_format(x, axes)
    y, index = _POOL[axes](x, kernel, stride, padding, dilation, ceil_mode, return_indices=True)
    y = _with_layout(y, layout)
    offset = _offsets(index, x.shape[-axes:], kernel, stride, padding, dilation)
    flat = memory_order(offset, y.stride())
    packed, shift = [], 0
    for part in digits(offset_bits(kernel)):
        packed.append(packing.pack(((flat >> shift) & 0xFF).to(torch.uint8), part))
        shift += part
    return y, torch.cat(packed)


def max_pool_indices(
    codes: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_size: Sequence[int],
    output_size: Sequence[int],
    output_stride: Sequence[int],
) -> Tensor:
    """torch's int64 indices of the maxima, rebuilt from the packed offsets."""
    axes, count = len(kernel), math.prod(output_size)
    offset = torch.empty_strided(
        tuple(output_size), tuple(output_stride), dtype=torch.int64, device=codes.device
    )
    flat = offset.as_strided((count,), (1,)).zero_()
    begin = shift = 0
    for part in digits(offset_bits(kernel)):
        end = begin + packed_bytes(count, part)
        flat |= packing.unpack(codes[begin:end], part, count).long() << shift
        begin, shift = end, shift + part
    return _indices(offset, input_size[-axes:], kernel, stride, padding, dilation)


def max_pool_backward(
    grad_output: Tensor,
    codes: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_size: Sequence[int],
    output_stride: Sequence[int],
) -> Tensor:
    """Adds every dy to the input position that its offset names; laid out as the output was.

    A window that lies wholly in the padding has no such position, and its dy goes nowhere.
    """
    axes = len(kernel)
    size = grad_output.shape
    index = max_pool_indices(
        codes, kernel, stride, padding, dilation, input_size, size, output_stride
    )
    planes = math.prod(size[:-axes])
    dtype = compute_dtype(grad_output)
    total = torch.zeros(
        planes, math.prod(input_size[-axes:]), dtype=dtype, device=grad_output.device
    )
    if grad_output.numel():
        index = index.reshape(planes, -1)
        inside = index >= 0
        source = grad_output.reshape(planes, -1).to(dtype).where(inside, 0.0)
        total.scatter_add_(1, index.where(inside, 0), source)
    grad_input = total.to(grad_output.dtype).view(tuple(input_size))
    layout = output_format(size, output_stride, axes)
    return _with_layout(grad_input, layout)

"""The Triton kernel of rotary position embedding: a program rotates all heads of one position."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.elementwise.kernels import rounded


@triton.jit
def _rotate(
    x_ptr, y_ptr, x_stride, y_stride, cos1, cos2, sin1, sin2,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """All heads of one position at `x_ptr`; heads lie `x_stride` apart."""
    head, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (head < HEADS) & (column < SIZE // 2)
    place = x_ptr + head * x_stride + column
    x1 = tl.load(place, inside, other=0.0)
    dtype: tl.constexpr = x1.dtype
    x1 = x1.to(tl.float32)
    x2 = tl.load(place + SIZE // 2, inside, other=0.0).to(tl.float32)
    # Rounded as torch's operations round.
    if TRANSPOSED:
        first, second = x2 * sin2, -(x1 * sin1)
    else:
        first, second = -x2 * sin1, x1 * sin2
    y1 = rounded(x1 * cos1, dtype) + rounded(first, dtype)
    y2 = rounded(x2 * cos2, dtype) + rounded(second, dtype)
    place = y_ptr + head * y_stride + column
    tl.store(place, y1.to(dtype), inside)
    tl.store(place + SIZE // 2, y2.to(dtype), inside)


@quick
@triton.jit
def _rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, length,
    q_batch, q_head, q_row, k_batch, k_head, k_row,
    q_out_batch, q_out_head, q_out_row, k_out_batch, k_out_head, k_out_row, angle_batch, angle_row,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Names with batch, head and row are strides."""
    position = tl.program_id(0).to(tl.int64)
    batch, row = position // length, position % length
    column = tl.arange(0, WIDTH)[None, :]
    angle = batch * angle_batch + row * angle_row + column
    inside = column < SIZE // 2
    cos1 = tl.load(cos_ptr + angle, inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + angle + SIZE // 2, inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + angle, inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + angle + SIZE // 2, inside, other=0.0).to(tl.float32)
    _rotate(
        q_ptr + batch * q_batch + row * q_row, q_out_ptr + batch * q_out_batch + row * q_out_row,
        q_head, q_out_head, cos1, cos2, sin1, sin2, Q_HEADS, Q_BLOCK, SIZE, WIDTH, TRANSPOSED,
    )  # fmt: skip
    _rotate(
        k_ptr + batch * k_batch + row * k_row, k_out_ptr + batch * k_out_batch + row * k_out_row,
        k_head, k_out_head, cos1, cos2, sin1, sin2, K_HEADS, K_BLOCK, SIZE, WIDTH, TRANSPOSED,
    )  # fmt: skip


@functools.lru_cache(LAUNCHES)
def _launch(shape: torch.Size, k_heads: int, strides: tuple[int, ...], transposed: bool) -> Launch:
    batch, heads, length, size = shape
    return _rotary_kernel.prepare(
        (batch * length,),
        length,
        *strides,
        Q_HEADS=heads,
        K_HEADS=k_heads,
        Q_BLOCK=triton.next_power_of_2(heads),
        K_BLOCK=triton.next_power_of_2(k_heads),
        SIZE=size,
        WIDTH=triton.next_power_of_2(size // 2),
        TRANSPOSED=transposed,
        num_warps=4,
    )


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    y, z = torch.empty_like(q), torch.empty_like(k)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    if q.numel() == 0:
        return y, z
    angle_batch = cos.stride(0) if cos.shape[0] > 1 else 0
    strides = (
        *(stride for x in (q, k, y, z) for stride in x.stride()[:3]), angle_batch, cos.stride(1)
    )  # fmt: skip
    _launch(q.shape, k.shape[1], strides, transposed)(q, k, cos, sin, y, z)
    return y, z

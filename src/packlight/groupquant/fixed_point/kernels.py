"""Triton kernels of fixed-point codes. Launchers have the signatures of reference.py.

Statistics, and the sums of the backward pass, are left to torch's own kernels, which know every
memory format. The backward pass hands them the codes themselves, as whole numbers in the gradient's
dtype (exact up to 8 bits in bfloat16): with CENTRE for the mean, UNIT for 1 / deviation and SCALE
for the weight, torch's formula is that of x~.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import quick
from packlight.groupquant.fixed_point import reference
from packlight.groupquant.fixed_point.method import EDGE, WIDTH
from packlight.packing.kernels import (
    code_of,
    empty_word,
    load_rows,
    load_word,
    store_row,
    store_word,
)
from packlight.packing.layout import dense_stride, lanes, memory_order, packed_bytes

STEP = tl.constexpr(reference.STEP)
LOW = tl.constexpr(reference.LOW)
SHIFT = tl.constexpr(reference.SHIFT)
UNIT = tl.constexpr(reference.UNIT)
CENTRE = tl.constexpr(reference.CENTRE)
SCALE = tl.constexpr(reference.SCALE)
FAR = tl.constexpr(reference.FAR)
EDGE_ = tl.constexpr(EDGE)
WIDTH_ = tl.constexpr(WIDTH)

# What `_decode_kernel` makes of a code.
NUMBER = tl.constexpr(0)
VALUE = tl.constexpr(1)
RELU = tl.constexpr(2)
MASK = tl.constexpr(3)


@quick
@triton.jit
def _table_kernel(
    mean_ptr,  # [channels] float32, as the rest
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,  # [6, channels]
    channels,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The table of a batch norm, as `reference.channel_table`."""
    COUNT: tl.constexpr = 1 << BITS
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = channel < channels
    mean = tl.load(mean_ptr + channel, there, other=0.0)
    rstd = tl.load(rstd_ptr + channel, there, other=1.0)
    gamma = tl.full([BLOCK], 1.0, dtype=tl.float32)
    beta = tl.zeros([BLOCK], dtype=tl.float32)
    if WEIGHT:
        gamma = tl.load(weight_ptr + channel, there, other=1.0).to(tl.float32)
    if BIAS:
        beta = tl.load(bias_ptr + channel, there, other=0.0).to(tl.float32)
    position = tl.div_rn(beta, tl.abs(gamma)) * (COUNT / WIDTH_)
    position = tl.where(position == position, position, -FAR)  # 0 / 0, and NaN
    position = tl.minimum(tl.maximum(position, -FAR), FAR)
    whole = tl.floor(position)
    phase = tl.where(tl.abs(position) < FAR, position - whole, 0.0)
    centre = phase + (COUNT - 1) / 2 + 0.0 * (mean + rstd)
    step = tl.abs(gamma) * (WIDTH_ / COUNT)
    unit = tl.where(gamma < 0, -WIDTH_ / COUNT, WIDTH_ / COUNT)
    shift = tl.minimum(tl.maximum(COUNT // 2 - whole, 1.0), COUNT - 1.0)
    tl.store(table_ptr + STEP * channels + channel, step, there)
    tl.store(table_ptr + LOW * channels + channel, beta - step * centre, there)
    tl.store(table_ptr + SHIFT * channels + channel, shift, there)
    tl.store(table_ptr + UNIT * channels + channel, unit, there)
    tl.store(table_ptr + CENTRE * channels + channel, centre, there)
    tl.store(table_ptr + SCALE * channels + channel, gamma * rstd * tl.div_rn(1.0, unit), there)


@triton.jit
def _channel(first, lane, inner, channels):
    """The channel [BLOCK] of elements `first + lane`: (element // inner) % channels.

    One division of long numbers a block; those of each lane are short.
    """
    period = inner.to(tl.int64) * channels
    local = (first % period).to(tl.int32) + lane
    return (local // inner) % channels


@quick
@triton.jit
def _forward_kernel(
    x_ptr,  # [n], in the memory order of y, as the rest
    y_ptr,  # [n]
    codes_ptr,  # [BITS * groups]
    mean_ptr,  # [channels]
    rstd_ptr,  # [channels]
    weight_ptr,  # [channels]
    bias_ptr,  # [channels]
    table_ptr,  # [6, channels]
    n,
    groups,
    inner,
    channels,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    SAME: tl.constexpr,  # the eight elements of a word are of one channel
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (x - mean) rstd gamma + beta, and its codes."""
    COUNT: tl.constexpr = 1 << BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)  # Triton passes 1 as a constant, which has no `to`
    inner = tl.full([], inner, tl.int32)
    channels = tl.full([], channels, tl.int32)
    lane = tl.arange(0, BLOCK)
    xs = load_rows(x_ptr + start, start, lane, n, groups, FULL)
    word = empty_word(BLOCK, BITS)
    for j in tl.static_range(8):
        if j == 0 or not SAME:
            channel = _channel(j * groups + start, lane, inner, channels)
            mean = tl.load(mean_ptr + channel)
            rstd = tl.load(rstd_ptr + channel)
            if WEIGHT:
                gamma = tl.load(weight_ptr + channel).to(tl.float32)
            if BIAS:
                beta = tl.load(bias_ptr + channel).to(tl.float32)
            inverse = tl.div_rn(1.0, tl.load(table_ptr + UNIT * channels + channel))
            offset = tl.load(table_ptr + CENTRE * channels + channel)
            offset = offset + (0.5 - EDGE_ * COUNT / WIDTH_)
            shift = tl.load(table_ptr + SHIFT * channels + channel)
        x_hat = (xs[j].to(tl.float32) - mean) * rstd
        y = x_hat
        if WEIGHT:
            y = y * gamma
        if BIAS:
            y = y + beta
        y = y.to(y_ptr.dtype.element_ty)
        store_row(y_ptr + start, y, j, start, lane, n, groups, FULL)
        code = tl.floor(x_hat * inverse + offset)
        code = tl.minimum(tl.maximum(code, 0.0), COUNT - 1.0)  # NaN becomes a number here
        # The side of 0 by y itself, which is what a ReLU sees.
        negative = y.to(tl.float32) <= 0
        code = tl.where(negative, tl.minimum(code, shift - 1), tl.maximum(code, shift))
        word |= code.to(tl.int32).to(word.dtype) << (j * BITS)
    if FULL:
        store_word(codes_ptr + start, word, lane, groups, None, BITS)
    else:
        store_word(codes_ptr + start, word, lane, groups, lane < groups - start, BITS)


@quick
@triton.jit
def _decode_kernel(
    codes_ptr,  # [BITS * groups]
    table_ptr,  # [6, channels]
    dy_ptr,  # [n], for MASK
    y_ptr,  # [n]
    n,
    groups,
    inner,
    channels,
    MODE: tl.constexpr,
    BITS: tl.constexpr,
    SAME: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The codes as numbers, what they stand for, the ReLU of it, or dy where that is positive."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)
    inner = tl.full([], inner, tl.int32)
    channels = tl.full([], channels, tl.int32)
    lane = tl.arange(0, BLOCK)
    if FULL:
        word = load_word(codes_ptr + start, lane, groups, None, BLOCK, BITS)
    else:
        word = load_word(codes_ptr + start, lane, groups, lane < groups - start, BLOCK, BITS)
    if MODE == MASK:
        dys = load_rows(dy_ptr + start, start, lane, n, groups, FULL)
    for j in tl.static_range(8):
        if MODE != NUMBER and (j == 0 or not SAME):
            channel = _channel(j * groups + start, lane, inner, channels)
            shift = tl.load(table_ptr + SHIFT * channels + channel)
            step = tl.load(table_ptr + STEP * channels + channel)
            low = tl.load(table_ptr + LOW * channels + channel)
        y = code_of(word, j, BITS).to(tl.float32)
        if MODE != NUMBER:
            positive = y >= shift
        if MODE == MASK:
            y = tl.where(positive, dys[j].to(tl.float32), 0.0)
        if (MODE != NUMBER) and (MODE != MASK):
            y = y * step + low
            if MODE == RELU:
                y = tl.maximum(y, step / 2, propagate_nan=tl.PropagateNan.ALL)
                y = tl.where(positive, y, 0.0)
        store_row(y_ptr + start, y, j, start, lane, n, groups, FULL)


# --- Launchers.

# Words a program, as few-bit kernels have it.
BLOCK = 512
TABLE_BLOCK = 128


def _statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation a channel, in float32; updates the running statistics."""
    if not x.is_cuda:  # Triton's interpreter; what follows has no kernel on the CPU
        _, mean, rstd = torch.native_batch_norm(
            x.float(), None, None, running_mean, running_var, True, momentum, eps
        )
        return mean, rstd
    mean, rstd = torch.batch_norm_stats(x, eps)
    if running_mean is not None:
        count = x.numel() // x.shape[1]
        torch.batch_norm_gather_stats(
            x, mean[None], rstd[None], running_mean, running_var, momentum, eps, count
        )
    return mean, rstd


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    stride = dense_stride(x)
    y = x.new_empty_strided(x.shape, stride)
    flat = memory_order(x, stride)
    dense = flat.as_strided(x.shape, stride)
    mean, rstd = _statistics(dense, running_mean, running_var, momentum, eps)
    n, channels, groups = x.numel(), x.shape[1], lanes(x.numel())
    codes = x.new_empty(packed_bytes(n, bits), dtype=torch.uint8)
    table = mean.new_empty(reference.ROWS, channels)
    parameters = (mean if weight is None else weight, mean if bias is None else bias)
    given = {"WEIGHT": weight is not None, "BIAS": bias is not None}
    _table_kernel[(triton.cdiv(channels, TABLE_BLOCK),)](
        mean, rstd, *parameters, table, channels, **given, BITS=bits, BLOCK=TABLE_BLOCK, num_warps=4
    )
    _forward_kernel[(triton.cdiv(groups, BLOCK),)](
        flat,
        y,
        codes,
        mean,
        rstd,
        *parameters,
        table,
        n,
        groups,
        stride[1],
        channels,
        **given,
        BITS=bits,
        SAME=groups % (stride[1] * channels) == 0,
        FULL=n == 8 * groups and groups % BLOCK == 0,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return y, codes, table


def _decode(
    codes: Tensor, table: Tensor, dy: Tensor | None, y: Tensor, bits: int, mode: tl.constexpr
) -> Tensor:
    """Runs over the codes into `y`, which is dense."""
    n, groups = y.numel(), lanes(y.numel())
    if n == 0:
        return y
    _decode_kernel[(triton.cdiv(groups, BLOCK),)](
        codes,
        table,
        y if dy is None else memory_order(dy, y.stride()),
        y,
        n,
        groups,
        y.stride(1),
        y.shape[1],
        MODE=mode.value,
        BITS=bits,
        SAME=groups % (y.stride(1) * y.shape[1]) == 0,
        FULL=n == 8 * groups and groups % BLOCK == 0,
        BLOCK=BLOCK,
        num_warps=4,
    )
    return y


def batch_norm_backward(
    grad_output: Tensor, codes: Tensor, table: Tensor, stride: Sequence[int], bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = grad_output.new_empty_strided(grad_output.shape, tuple(stride))
    _decode(codes, table, None, numbers, bits, NUMBER)
    flat = memory_order(grad_output, stride)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        flat.as_strided(grad_output.shape, tuple(stride)),
        numbers,
        table[reference.SCALE],
        None,
        None,
        table[reference.CENTRE],
        table[reference.UNIT],
        True,
        0.0,
        [True, True, True],
    )
    if dx.stride() != tuple(stride):
        dx = dx.new_empty_strided(dx.shape, tuple(stride)).copy_(dx)
    return dx, dgamma, dbeta


def relu_backward(
    grad_output: Tensor, codes: Tensor, table: Tensor, stride: Sequence[int], bits: int
) -> Tensor:
    dx = grad_output.new_empty_strided(grad_output.shape, tuple(stride))
    return _decode(codes, table, grad_output, dx, bits, MASK)


def rebuild(
    codes: Tensor,
    table: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    bits: int,
    dtype: torch.dtype,
    relu: bool,
) -> Tensor:
    y = codes.new_empty_strided(tuple(shape), tuple(stride), dtype=dtype)
    return _decode(codes, table, None, y, bits, RELU if relu else VALUE)

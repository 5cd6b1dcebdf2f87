"""Triton kernels of fixed-point codes. Launchers have the signatures of reference.py.

Memory is seen as [outer, channels, inner], whatever the strides, and value t of a channel lies at
(t // inner, channel, t % inner): channels-last is inner = 1. Where sums over a channel are asked
for, a program has a tile [ROWS, COLUMNS] of values and channels (COLUMNS is 1 unless channels are
neighbours), takes tile after tile, and writes its share as a row of [2, parts, channels] in
float32; a small kernel ends the sums and writes what comes of them above. Their order is fixed, so
a run repeats bit for bit on the same device.

Traffic in bytes an element, of 16-bit tensors at 4 bits: statistics 2, forward 4.5, sums of the
backward pass 2.5, its dx 4.5.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick, together
from packlight.groupquant.fixed_point import reference
from packlight.groupquant.fixed_point.method import EDGE
from packlight.layers import channel_norms
from packlight.packing.kernels import (
    code_at,
    code_of,
    empty_word,
    load_rows,
    load_word,
    store_row,
    store_word,
)
from packlight.packing.layout import dense_stride, laid_out, lanes, packed_bytes, write_back

STEP = tl.constexpr(reference.STEP)
LOW = tl.constexpr(reference.LOW)
SHIFT = tl.constexpr(reference.SHIFT)
UNIT = tl.constexpr(reference.UNIT)
CENTRE = tl.constexpr(reference.CENTRE)
SCALE = tl.constexpr(reference.SCALE)
FAR = tl.constexpr(reference.FAR)
LEAST = tl.constexpr(channel_norms.LEAST)
EDGE_ = tl.constexpr(EDGE)

# What `_decode_kernel` makes of a code.
VALUE = tl.constexpr(0)
RELU = tl.constexpr(1)
MASK = tl.constexpr(2)


@triton.jit
def _tile(
    block,
    tile,
    inner,
    channels,
    LARGE: tl.constexpr,  # places need 64 bits
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Channels [1, COLUMNS], values [ROWS, 1] and places [ROWS, COLUMNS] of a tile."""
    channel = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    t = tl.full([ROWS, 1], tile, tl.int64 if LARGE else tl.int32) * ROWS
    t += tl.arange(0, ROWS)[:, None]
    return channel, t, (t // inner * channels + channel) * inner + t % inner


@quick
@triton.jit
def _statistics_kernel(
    x_ptr,  # [n]
    parts_ptr,  # [4 + 2 parts, channels]: mean and sum of squared deviations, from row 4 on
    size,  # values a channel
    inner,
    channels,
    share,  # values of a part
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,  # tiles on their way at once
):
    """Sums of x - shift and of its square, with the mean of a first tile for the shift.

    One element far off among the m of that tile moves the shift by 1 / m of its distance; so what
    cancels in the end stays within share / m^2 roundings.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    first = part * (share // ROWS)
    channel, t, place = _tile(block, first, inner, channels, LARGE, ROWS, COLUMNS)
    inside = channel < channels
    x = tl.load(x_ptr + place, (t < size) & inside, other=0.0).to(tl.float32)
    begin = tl.full([], part, tl.int64) * share
    count = tl.minimum(size - begin, share)
    shift = tl.sum(x, 0, keep_dims=True) / tl.minimum(count, ROWS).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    tiles = tl.minimum(first + share // ROWS, tl.cdiv(size, ROWS))
    for tile in range(first, tiles, UNROLL):
        xs, there = (), ()
        for k in tl.static_range(UNROLL):
            _, t, place = _tile(block, tile + k, inner, channels, LARGE, ROWS, COLUMNS)
            there = there + (t < size,)
            xs = xs + (tl.load(x_ptr + place, there[k] & inside, other=0.0),)
        for k in tl.static_range(UNROLL):
            difference = tl.where(there[k], xs[k].to(tl.float32) - shift, 0.0)
            total += difference
            squares += difference * difference
    total = tl.sum(total, 0, keep_dims=True)
    squares = tl.sum(squares, 0, keep_dims=True)
    mean = total / count.to(tl.float32)
    squares -= total * mean
    squares = tl.where(squares < 0, 0.0, squares)  # keeps NaN
    row_ptr = parts_ptr + (4 + part.to(tl.int64)) * channels + channel
    tl.store(row_ptr, shift + mean, inside)
    tl.store(row_ptr + tl.num_programs(1).to(tl.int64) * channels, squares, inside)


@quick
@triton.jit
def _table_kernel(
    parts_ptr,  # [4 + 2 parts, channels], as `_statistics_kernel` leaves it; gets four rows:
    # mean, rstd, gamma and beta
    running_mean_ptr,  # [channels], as the rest
    running_var_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,  # [6, channels]
    size,
    channels,
    share,
    parts,
    momentum,
    eps,
    RUNNING_MEAN: tl.constexpr,
    RUNNING_VAR: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,  # of a bin, in standard deviations
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics, the running ones, and the table of a batch norm, as `reference.channel_table`."""
    COUNT: tl.constexpr = 1 << BITS
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = channel < channels
    part = tl.arange(0, PARTS)[:, None].to(tl.int64)
    given = (part < parts) & there[None, :]
    part_ptr = parts_ptr + (4 + part) * channels + channel[None, :]
    means = tl.load(part_ptr, given, other=0.0)
    squares = tl.load(part_ptr + tl.full([], parts, tl.int64) * channels, given, other=0.0)
    values = tl.minimum(size - part * share, share).to(tl.float32)
    # Differences from the first part, since a mean may be large beside what is to be added up.
    mean = tl.load(parts_ptr + 4 * channels + channel, there, other=0.0)
    difference = tl.where(given, (means - mean[None, :]) * values, 0.0)
    all_values = tl.full([], size, tl.int64).to(tl.float32)
    mean += tl.sum(difference, 0) / all_values
    difference = means - mean[None, :]
    squares += tl.where(given, difference * difference * values, 0.0)
    square = tl.sum(squares, 0)
    var = square / all_values
    rstd = tl.where(var + eps == 0, 0.0, tl.div_rn(1.0, tl.sqrt_rn(var + eps)))
    tl.store(parts_ptr + channel, mean, there)
    tl.store(parts_ptr + channels + channel, rstd, there)
    if RUNNING_MEAN:
        running = tl.load(running_mean_ptr + channel, there, other=0.0).to(tl.float32)
        running = (1 - momentum) * running + momentum * mean
        tl.store(running_mean_ptr + channel, running, there)
    if RUNNING_VAR:
        running = tl.load(running_var_ptr + channel, there, other=0.0).to(tl.float32)
        running = (1 - momentum) * running + momentum * (square / (all_values - 1))
        tl.store(running_var_ptr + channel, running, there)
    gamma = tl.full([BLOCK], 1.0, dtype=tl.float32)
    beta = tl.zeros([BLOCK], dtype=tl.float32)
    if WEIGHT:
        gamma = tl.load(weight_ptr + channel, there, other=1.0).to(tl.float32)
    if BIAS:
        beta = tl.load(bias_ptr + channel, there, other=0.0).to(tl.float32)
    tl.store(parts_ptr + 2 * channels + channel, gamma, there)
    tl.store(parts_ptr + 3 * channels + channel, beta, there)
    # As `reference.deviation`.
    width = WIDTH * tl.sqrt_rn(
        tl.maximum(1 - eps * rstd * rstd, LEAST, propagate_nan=tl.PropagateNan.ALL)
    )
    position = tl.div_rn(tl.div_rn(beta, tl.abs(gamma)), width)
    position = tl.where(position == position, position, -FAR)  # 0 / 0, and NaN
    position = tl.minimum(tl.maximum(position, -FAR), FAR)
    whole = tl.floor(position)
    phase = tl.where(tl.abs(position) < FAR, position - whole, 0.0)
    centre = phase + (COUNT - 1) / 2 + 0.0 * (mean + rstd)
    step = tl.abs(gamma) * width
    unit = tl.where(gamma < 0, -width, width)
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
    y_ptr,  # [n], may be x_ptr
    codes_ptr,  # [BITS * groups]
    moments_ptr,  # its first four rows as `_table_kernel` leaves them
    table_ptr,  # [6, channels]
    other_ptr,  # [n], with SUM: the other term
    signs_ptr,  # [groups], with SUM: where the sum is positive
    n,
    groups,
    inner,
    channels,
    RELU: tl.constexpr,  # y = relu(batch_norm(x))
    SUM: tl.constexpr,  # y = relu(batch_norm(x) + other)
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,  # of a bin, in standard deviations
    SAME: tl.constexpr,  # the eight elements of a word are of one channel
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = (x - mean) rstd gamma + beta and its codes; the ReLU of it, or of its sum."""
    COUNT: tl.constexpr = 1 << BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)  # Triton passes 1 as a constant, which has no `to`
    inner = tl.full([], inner, tl.int32)
    channels = tl.full([], channels, tl.int32)
    lane = tl.arange(0, BLOCK)
    xs = load_rows(x_ptr + start, start, lane, n, groups, FULL)
    word = empty_word(BLOCK, BITS)
    if SUM:
        others = load_rows(other_ptr + start, start, lane, n, groups, FULL)
        signs = empty_word(BLOCK, 1)
    for j in tl.static_range(8):
        if j == 0 or not SAME:
            channel = _channel(j * groups + start, lane, inner, channels)
            mean = tl.load(moments_ptr + channel)
            rstd = tl.load(moments_ptr + channels + channel)
            gamma = tl.load(moments_ptr + 2 * channels + channel)
            beta = tl.load(moments_ptr + 3 * channels + channel)
            inverse = tl.div_rn(1.0, tl.load(table_ptr + UNIT * channels + channel))
            offset = tl.load(table_ptr + CENTRE * channels + channel)
            offset = offset + (0.5 - EDGE_ / WIDTH)
            shift = tl.load(table_ptr + SHIFT * channels + channel)
        x_hat = (xs[j].to(tl.float32) - mean) * rstd
        y = (x_hat * gamma + beta).to(y_ptr.dtype.element_ty)
        code = tl.floor(x_hat * inverse + offset)
        code = tl.minimum(tl.maximum(code, 0.0), COUNT - 1.0)  # NaN becomes a number here
        # The side of 0 by y itself, which is what a ReLU sees.
        negative = y.to(tl.float32) <= 0
        code = tl.where(negative, tl.minimum(code, shift - 1), tl.maximum(code, shift))
        word |= code.to(tl.int32).to(word.dtype) << (j * BITS)
        if SUM:  # of terms that are rounded, as torch's
            y = (y.to(tl.float32) + others[j].to(tl.float32)).to(y_ptr.dtype.element_ty)
            negative = y.to(tl.float32) <= 0
            signs |= tl.where(negative, 0, 1) << j
        if RELU or SUM:
            y = tl.where(negative, 0.0, y.to(tl.float32))
        store_row(y_ptr + start, y, j, start, lane, n, groups, FULL)
    there = None if FULL else lane < groups - start
    store_word(codes_ptr + start, word, lane, groups, there, BITS)
    if SUM:
        store_word(signs_ptr + start, signs, lane, groups, there, 1)


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
    """What the codes stand for, the ReLU of it, or dy where that is positive."""
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
        if j == 0 or not SAME:
            channel = _channel(j * groups + start, lane, inner, channels)
            shift = tl.load(table_ptr + SHIFT * channels + channel)
            step = tl.load(table_ptr + STEP * channels + channel)
            low = tl.load(table_ptr + LOW * channels + channel)
        y = code_of(word, j, BITS).to(tl.float32)
        positive = y >= shift
        if MODE == MASK:
            y = tl.where(positive, dys[j].to(tl.float32), 0.0)
        else:
            y = y * step + low
            if MODE == RELU:
                y = tl.maximum(y, step / 2, propagate_nan=tl.PropagateNan.ALL)
                y = tl.where(positive, y, 0.0)
        store_row(y_ptr + start, y, j, start, lane, n, groups, FULL)


@triton.jit
def _gradients_and_codes(
    dy_ptr,
    codes_ptr,
    signs_ptr,
    place,
    mask,
    n,
    groups,
    shift,
    RELU: tl.constexpr,  # g = dy where the code is of a positive value
    SUM: tl.constexpr,  # g = dy where the sum was positive; without either, g = dy
    BITS: tl.constexpr,
    SAME: tl.constexpr,
    FULL: tl.constexpr,
):
    """The gradients of a tile and its codes in float32, 8 of each if it is one of words, else 1."""
    gs, codes = (), ()
    if SAME:
        # A byte has one code of 8 bits or two of 4, so there is no need to put a word together.
        planes = ()
        for p in tl.static_range(BITS):
            byte = tl.load(codes_ptr + p * groups + place, mask, other=0)
            planes = planes + (byte.to(tl.int32),)
        if SUM:
            signs = tl.load(signs_ptr + place, mask, other=0).to(tl.int32)
        dys = ()
        for j in tl.static_range(8):
            there = mask if FULL else mask & (place < n - j * groups)
            dys = dys + (tl.load(dy_ptr + j * groups + place, there, other=0.0),)
        for j in tl.static_range(8):
            code = planes[j * BITS // 8] >> (j * BITS % 8)
            code = (code & ((1 << BITS) - 1)).to(tl.float32)
            g = dys[j].to(tl.float32)
            if RELU:
                g = tl.where(code >= shift, g, 0.0)
            if SUM:
                g = tl.where((signs >> j) & 1 != 0, g, 0.0)
            codes = codes + (code,)
            gs = gs + (g,)
    else:
        code = code_at(codes_ptr, place, groups, mask, BITS).to(tl.float32)
        g = tl.load(dy_ptr + place, mask, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(code >= shift, g, 0.0)
        if SUM:
            g = tl.where(code_at(signs_ptr, place, groups, mask, 1) != 0, g, 0.0)
        codes = (code,)
        gs = (g,)
    return gs, codes


@quick
@triton.jit
def _sums_kernel(
    dy_ptr,  # [n]
    codes_ptr,  # [BITS * groups]
    table_ptr,  # [6, channels]
    parts_ptr,  # [4 + 2 parts, channels]: sums of g and of g (code - CENTRE), from row 4 on
    signs_ptr,  # [groups], with SUM
    n,
    groups,
    size,  # words a channel if they are of one channel each, else values
    inner,
    channels,
    share,  # of them, in a part
    RELU: tl.constexpr,  # as in `_gradients_and_codes`
    SUM: tl.constexpr,
    BITS: tl.constexpr,
    SAME: tl.constexpr,  # the eight elements of a word are of one channel
    FULL: tl.constexpr,  # and all there
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    block, part = tl.program_id(0), tl.program_id(1)
    n = tl.full([], n, tl.int64 if LARGE else tl.int32)
    groups = tl.full([], groups, tl.int64 if LARGE else tl.int32)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = channel < channels
    centre = tl.load(table_ptr + CENTRE * channels + channel, inside, other=0.0)
    shift = tl.load(table_ptr + SHIFT * channels + channel, inside, other=0.0)
    sum_g = tl.zeros([ROWS, COLUMNS], tl.float32)
    sum_product = tl.zeros([ROWS, COLUMNS], tl.float32)
    first = part * (share // ROWS)
    for tile in range(first, tl.minimum(first + share // ROWS, tl.cdiv(size, ROWS))):
        _, t, place = _tile(block, tile, inner, channels, LARGE, ROWS, COLUMNS)
        mask = (t < size) & inside
        gs, codes = _gradients_and_codes(
            dy_ptr, codes_ptr, signs_ptr, place, mask, n, groups, shift, RELU, SUM, BITS, SAME, FULL
        )
        for j in tl.static_range(8 if SAME else 1):
            sum_g += gs[j]
            sum_product += gs[j] * (codes[j] - centre)
    row_ptr = parts_ptr + (4 + part.to(tl.int64)) * channels + channel
    tl.store(row_ptr, tl.sum(sum_g, 0, keep_dims=True), inside)
    row_ptr += tl.num_programs(1).to(tl.int64) * channels
    tl.store(row_ptr, tl.sum(sum_product, 0, keep_dims=True), inside)


@quick
@triton.jit
def _finish_kernel(
    parts_ptr,  # [4 + 2 parts, channels], as `_sums_kernel` leaves it; gets a plan of four rows:
    # dx = plan[0] (g - plan[1] - plan[2] code), and SHIFT
    table_ptr,  # [6, channels]
    dgamma_ptr,  # [channels]
    dbeta_ptr,  # [channels]
    size,  # values a channel
    channels,
    parts,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = channel < channels
    part = tl.arange(0, PARTS)[:, None]
    given = (part < parts) & there[None, :]
    part_ptr = parts_ptr + (4 + part) * channels + channel[None, :]
    dbeta = tl.sum(tl.load(part_ptr, given, other=0.0), 0)
    product = tl.sum(tl.load(part_ptr + parts * channels, given, other=0.0), 0)
    unit = tl.load(table_ptr + UNIT * channels + channel, there, other=0.0)
    centre = tl.load(table_ptr + CENTRE * channels + channel, there, other=0.0)
    scale = tl.load(table_ptr + SCALE * channels + channel, there, other=0.0)
    shift = tl.load(table_ptr + SHIFT * channels + channel, there, other=0.0)
    values = tl.full([], size, tl.int64).to(tl.float32)
    dgamma = product * unit
    slope = dgamma / values * unit
    tl.store(dgamma_ptr + channel, dgamma, there)
    tl.store(dbeta_ptr + channel, dbeta, there)
    tl.store(parts_ptr + channel, scale * unit, there)
    tl.store(parts_ptr + channels + channel, dbeta / values - slope * centre, there)
    tl.store(parts_ptr + 2 * channels + channel, slope, there)
    tl.store(parts_ptr + 3 * channels + channel, shift, there)


@quick
@triton.jit
def _dx_kernel(
    dy_ptr,  # [n]
    codes_ptr,  # [BITS * groups]
    plan_ptr,  # its first four rows as `_finish_kernel` leaves them
    signs_ptr,  # [groups], with SUM
    dx_ptr,  # [n]
    n,
    groups,
    size,
    inner,
    channels,
    RELU: tl.constexpr,  # as in `_gradients_and_codes`
    SUM: tl.constexpr,
    BITS: tl.constexpr,
    SAME: tl.constexpr,
    FULL: tl.constexpr,
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx = SCALE UNIT (g - mean g - x~ mean(g x~))."""
    blocks = tl.cdiv(channels, COLUMNS)
    n = tl.full([], n, tl.int64 if LARGE else tl.int32)
    groups = tl.full([], groups, tl.int64 if LARGE else tl.int32)
    # Programs that follow each other have neighbouring channels.
    block, tile = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    channel, t, place = _tile(block, tile, inner, channels, LARGE, ROWS, COLUMNS)
    inside = channel < channels
    mask = (t < size) & inside
    shift = tl.load(plan_ptr + 3 * channels + channel, inside, other=0.0)
    gs, codes = _gradients_and_codes(
        dy_ptr, codes_ptr, signs_ptr, place, mask, n, groups, shift, RELU, SUM, BITS, SAME, FULL
    )
    factor = tl.load(plan_ptr + channel, inside, other=0.0)
    base = tl.load(plan_ptr + channels + channel, inside, other=0.0)
    slope = tl.load(plan_ptr + 2 * channels + channel, inside, other=0.0)
    for j in tl.static_range(8 if SAME else 1):
        dx = factor * (gs[j] - base - slope * codes[j])
        there = mask if FULL else mask & (place < n - j * groups)
        tl.store(dx_ptr + j * groups + place, dx.to(dx_ptr.dtype.element_ty), there)


# --- Launchers.

# Words a program of the kernels that know no channels, as few-bit kernels have it.
BLOCK = 512
# Channels that lie side by side in a tile.
COLUMNS = 64
# Warps of a program, whose threads hold 16 bytes of a row each: sums over channels, and dx.
SUM_WARPS = 8
DX_WARPS = 4
# Programs a multiprocessor that sum up.
PROGRAMS = 4
# Tiles of statistics on their way at once.
UNROLL = 4
# Parts times channels of a program that ends sums, and its warps.
ENDING = 8192
END_WARPS = 8
# Elements of a tensor whose places are 32-bit numbers, with room for the tiles at its end.
SHORT = 2**30


class _Cut(NamedTuple):
    """How [outer, channels, inner] falls into tiles."""

    rows: int
    columns: int
    blocks: int  # of columns


def _cut(channels: int, inner: int, itemsize: int, warps: int) -> _Cut:
    columns = min(COLUMNS, triton.next_power_of_2(channels)) if inner == 1 else 1
    rows = warps * 32 * (16 // itemsize) // columns
    return _Cut(rows, columns, triton.cdiv(channels, columns))


def _inner(channels: int, stride: Sequence[int]) -> int:
    return stride[1] if channels > 1 else 1  # strides of one channel say nothing


def _programs(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 3
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def _parts(device: torch.device, size: int, step: int, blocks: int) -> tuple[int, int]:
    """Parts, and the values of each, that `size` values a channel make in steps of `step`."""
    steps = triton.cdiv(size, step)
    share = triton.cdiv(steps, max(1, _programs(device) // blocks))
    return triton.cdiv(steps, share), share * step


def _ending(device: torch.device, channels: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants of a kernel that ends sums."""
    parts = triton.next_power_of_2(_programs(device))
    block = min(128, max(1, ENDING // parts))
    return (triton.cdiv(channels, block),), {"PARTS": parts, "BLOCK": block}


def _words(n: int, channels: int, inner: int) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """Grid, numbers and constants of a kernel that knows no channels."""
    groups = lanes(n)
    constants = {
        "SAME": groups % (inner * channels) == 0,
        "FULL": n == 8 * groups and groups % BLOCK == 0,
        "BLOCK": BLOCK,
        "num_warps": 4,
    }
    return (triton.cdiv(groups, BLOCK),), (n, groups, inner, channels), constants


# By momentum and eps too: another momentum at every call takes a new launch of what is compiled.
@functools.lru_cache(LAUNCHES)
def _batch_norm_launch(
    shape: torch.Size,
    stride: tuple[int, ...],
    itemsize: int,
    given: tuple[bool, bool, bool, bool],  # running mean and variance, weight and bias
    numbers: tuple[float, float],  # momentum and eps
    code: tuple[int, float],  # bits and width
    relu: bool,
    added: bool,
    device: torch.device,
) -> tuple[Launch, int, int, int]:
    """The launch of statistics, table and output, and what is needed for it.

    That is bytes of the codes and of the mask of a sum, and rows of the moments.
    """
    n, channels = shape.numel(), shape[1]
    inner, large = _inner(channels, stride), n >= SHORT
    cut = _cut(channels, inner, itemsize, SUM_WARPS)
    size = n // channels
    parts, share = _parts(device, size, cut.rows * UNROLL, cut.blocks)
    statistics = _statistics_kernel.prepare(
        (cut.blocks, parts),
        size,
        inner,
        channels,
        share,
        LARGE=large,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        UNROLL=UNROLL,
        num_warps=SUM_WARPS,
    )
    grid, ending = _ending(device, channels)
    running_mean, running_var, weight, bias = given
    bits, width = code
    table = _table_kernel.prepare(
        grid,
        size,
        channels,
        share,
        parts,
        *numbers,
        RUNNING_MEAN=running_mean,
        RUNNING_VAR=running_var,
        WEIGHT=weight,
        BIAS=bias,
        BITS=bits,
        WIDTH=width,
        **ending,
        num_warps=END_WARPS,
    )
    grid, sizes, constants = _words(n, channels, inner)
    output = _forward_kernel.prepare(
        grid, *sizes, RELU=relu, SUM=added, BITS=bits, WIDTH=width, **constants
    )
    # Of x, y, codes, moments, table, other, signs, running mean and variance, weight, bias.
    every = (statistics, (0, 3)), (table, (3, 7, 8, 9, 10, 4)), (output, (0, 1, 2, 3, 4, 5, 6))
    return together(*every), packed_bytes(n, bits), packed_bytes(n, 1), 4 + 2 * parts


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
    width: float,
    y: Tensor,
    relu: bool = False,
    other: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Codes, table, and with another term the mask of the sum; fills `y`, which may be `x`.

    Both are of one dense stride, and have elements.
    """
    stride, channels = y.stride(), x.shape[1]
    given = (
        running_mean is not None,
        running_var is not None,
        weight is not None,
        bias is not None,
    )
    numbers, code = (float(momentum), float(eps)), (bits, float(width))
    launch, size, mask_size, rows = _batch_norm_launch(
        x.shape, stride, x.dtype.itemsize, given, numbers, code, relu, other is not None, x.device
    )
    codes = x.new_empty(size, dtype=torch.uint8)
    table = x.new_empty(reference.ROWS, channels, dtype=torch.float32)
    moments = table.new_empty(rows, channels)
    weight = moments if weight is None else weight.contiguous()
    bias = moments if bias is None else bias.contiguous()
    new_mean = moments if running_mean is None else running_mean.contiguous()
    new_var = moments if running_var is None else running_var.contiguous()
    signs = codes if other is None else codes.new_empty(mask_size)
    term = x if other is None else laid_out(other, stride)
    launch(x, y, codes, moments, table, term, signs, new_mean, new_var, weight, bias)
    if running_mean is not None and running_mean is not new_mean:
        running_mean.copy_(new_mean)
    if running_var is not None and running_var is not new_var:
        running_var.copy_(new_var)
    return (codes, table) if other is None else (codes, table, signs)


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
    width: float,
) -> tuple[Tensor, ...]:
    settings = (weight, bias, running_mean, running_var, momentum, eps, bits, width)
    if x.numel() == 0:
        return reference.batch_norm(x, *settings)
    y = torch.empty_like(x)
    return y, *_batch_norm(laid_out(x, y.stride()), *settings, y)


def _overwritten(
    x: Tensor, settings: tuple[Any, ...], relu: bool, other: Tensor | None
) -> tuple[Tensor, ...]:
    """What is kept; the result is written over x."""
    dense = laid_out(x, dense_stride(x))
    made = _batch_norm(dense, *settings, dense, relu, other)
    write_back(x, dense)
    return made


def batch_norm_(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
    width: float,
    relu: bool,
) -> tuple[Tensor, ...]:
    settings = (weight, bias, running_mean, running_var, momentum, eps, bits, width)
    if x.numel() == 0:
        return reference.batch_norm_(x, *settings, relu)
    return _overwritten(x, settings, relu, None)


def batch_norm_sum_(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
    width: float,
    other: Tensor,
) -> tuple[Tensor, ...]:
    settings = (weight, bias, running_mean, running_var, momentum, eps, bits, width)
    if x.numel() == 0:
        return reference.batch_norm_sum_(x, *settings, other)
    return _overwritten(x, settings, False, other)


@functools.lru_cache(LAUNCHES)
def _decode_launch(n: int, channels: int, inner: int, bits: int, mode: int) -> Launch:
    grid, numbers, constants = _words(n, channels, inner)
    return _decode_kernel.prepare(grid, *numbers, MODE=mode, BITS=bits, **constants)


def _decode(
    codes: Tensor, table: Tensor, dy: Tensor | None, y: Tensor, bits: int, mode: tl.constexpr
) -> Tensor:
    """Runs over the codes into `y`, which is dense."""
    n, channels, stride = y.numel(), y.shape[1], y.stride()
    if n:
        launch = _decode_launch(n, channels, _inner(channels, stride), bits, mode.value)
        launch(codes, table, y if dy is None else laid_out(dy, stride), y)
    return y


@functools.lru_cache(LAUNCHES)
def _backward_launch(
    n: int,
    channels: int,
    inner: int,
    itemsize: int,
    bits: int,
    relu: bool,
    added: bool,
    device: torch.device,
) -> tuple[Launch, int]:
    """The launch of the sums, of their end and of dx, and the rows of the sums."""
    groups, large = lanes(n), n >= SHORT
    same = groups % (inner * channels) == 0
    size = (groups if same else n) // channels
    block = {"BITS": bits, "SAME": same, "FULL": not same or n == 8 * groups, "LARGE": large}
    block |= {"RELU": relu, "SUM": added}
    cut = _cut(channels, inner, itemsize, SUM_WARPS)
    parts, share = _parts(device, size, cut.rows, cut.blocks)
    sums = _sums_kernel.prepare(
        (cut.blocks, parts),
        n,
        groups,
        size,
        inner,
        channels,
        share,
        **block,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        num_warps=SUM_WARPS,
    )
    grid, ending = _ending(device, channels)
    finish = _finish_kernel.prepare(
        grid, n // channels, channels, parts, **ending, num_warps=END_WARPS
    )
    cut = _cut(channels, inner, itemsize, DX_WARPS)
    dx = _dx_kernel.prepare(
        (cut.blocks * triton.cdiv(size, cut.rows),),
        n,
        groups,
        size,
        inner,
        channels,
        **block,
        ROWS=cut.rows,
        COLUMNS=cut.columns,
        num_warps=DX_WARPS,
    )
    # Of dy, codes, table, sums, mask, the gradients of weight and bias, dx.
    every = (sums, (0, 1, 2, 3, 4)), (finish, (3, 2, 5, 6)), (dx, (0, 1, 3, 4, 7))
    return together(*every), 4 + 2 * parts


def batch_norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    table: Tensor,
    stride: Sequence[int],
    bits: int,
    relu: bool = False,
    signs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels = grad_output.numel(), table.shape[1]
    if n == 0:
        return reference.batch_norm_backward(grad_output, codes, table, stride, bits, relu, signs)
    dy = laid_out(grad_output, stride)
    dx = torch.empty_like(dy)
    inner, of_sum = _inner(channels, stride), signs is not None
    launch, rows = _backward_launch(
        n, channels, inner, dx.dtype.itemsize, bits, relu, of_sum, dx.device
    )
    mask = codes if signs is None else signs
    sums = table.new_empty(rows, channels)
    dgamma, dbeta = table.new_empty(channels), table.new_empty(channels)
    launch(dy, codes, table, sums, mask, dgamma, dbeta, dx)
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

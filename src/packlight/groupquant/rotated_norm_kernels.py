"""Triton kernels of layer and RMS norm with rotated packs.

Tensor cores take 16 groups a warp, so many that a tile that holds rows leaves too few registers, and
that rows of another length than a power of two leave some of them empty. So a tile has NQ groups of
each of ROWS rows here, and a program goes over its rows tile by tile, twice: first for what is
summed over a row, then for what is written. The second time they are in the cache. The gradients of
weight and bias are sums over rows, which a kernel of its own adds up, a tile of columns a program.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight._seed_kernels import seed_value
from packlight.groupquant.grouping import Grouping
from packlight.groupquant.kernels import constants
from packlight.groupquant.pack_kernels import load_codes, store_codes
from packlight.groupquant.tile_kernels import (
    load_part,
    load_raw_tile,
    load_raw_whole,
    load_tile,
    part_there,
    rows_tile,
    store_tile,
    store_whole,
    to_float32,
)


@triton.jit
def over_row(sums, ROWS: tl.constexpr, NQ: tl.constexpr):
    """[ROWS NQ, 1] sums of each row, of [ROWS NQ, SIZE]."""
    sums = tl.sum(sums, 1)
    if ROWS == 1:
        sums = tl.zeros([NQ], dtype=tl.float32) + tl.sum(sums, 0)
    elif NQ > 1:
        whole = tl.sum(tl.reshape(sums, [ROWS, NQ]), 1)
        sums = tl.reshape(tl.broadcast_to(whole[:, None], [ROWS, NQ]), [ROWS * NQ])
    return sums[:, None]


@triton.jit
def total_of(tile):
    """The sum of the eight tensors of a tile."""
    return ((tile[0] + tile[1]) + (tile[2] + tile[3])) + (
        (tile[4] + tile[5]) + (tile[6] + tile[7])
    )


@triton.jit
def less(tile, mean, room, SIZE: tl.constexpr, FULL: tl.constexpr):
    """A tile less `mean`, 0 past the end of rows."""
    out = ()
    for p in tl.static_range(8):
        if FULL:
            out = out + (tile[p] - mean,)
        else:
            out = out + (tl.where(part_there(room, SIZE, p), tile[p] - mean, 0.0),)
    return out


@triton.jit
def times(a, b):
    """The products of two tiles."""
    out = ()
    for p in tl.static_range(8):
        out = out + (a[p] * b[p],)
    return out


@quick
@triton.jit(do_not_specialize=["seed"])
def _forward_kernel(
    x_ptr,  # [rows, width]
    y_ptr,  # [rows, width]
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    codes_ptr,
    scales_ptr,
    rstd_ptr,  # [rows]
    weight_copy_ptr,  # [width]
    bias_copy_ptr,  # [width]
    seed,  # a number, or a pointer to one
    rows,
    width,
    row_groups,
    eps,
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    SEED: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    NQ: tl.constexpr,
    TILES: tl.constexpr,  # a row
):
    COLUMNS: tl.constexpr = NQ * 8 * SIZE
    NARROW: tl.constexpr = y_ptr.dtype.element_ty == tl.bfloat16
    HELD: tl.constexpr = tl.bfloat16 if NARROW else tl.float32
    first = tl.program_id(0) == 0
    row = tl.program_id(0).to(tl.int64) * ROWS
    starts, room, in_row, group = rows_tile(width, rows - row, ROWS, NQ, SIZE)
    x_ptr += row * width
    y_ptr += row * width
    here = (group == 0) & (room > 0)
    # Of sums of squares about the mean of the first tile no more is lost than a share of TILES.
    pivot = tl.zeros([ROWS * NQ, 1], dtype=tl.float32)
    if CENTER:
        head = load_tile(x_ptr, starts, room, SIZE, FULL)
        pivot = over_row(total_of(head), ROWS, NQ) / tl.minimum(width, COLUMNS)
    total = tl.zeros([ROWS * NQ, SIZE], dtype=tl.float32)
    squares = total
    for i in tl.range(TILES, num_stages=1):
        left = room - i * COLUMNS
        tile = load_tile(x_ptr + i * COLUMNS, starts, left, SIZE, FULL)
        if CENTER:
            tile = less(tile, pivot, left, SIZE, FULL)
            total += total_of(tile)
        squares += total_of(times(tile, tile))
    square = over_row(squares, ROWS, NQ) / width
    if CENTER:
        rest = over_row(total, ROWS, NQ) / width
        square -= rest * rest
        pivot += rest
    rstd = tl.rsqrt(square + eps)
    tl.store(rstd_ptr + (row + in_row)[:, None], rstd, here[:, None])
    for i in tl.range(TILES, num_stages=1):
        left = room - i * COLUMNS
        bundle = group + i * NQ
        column = bundle * (8 * SIZE)
        raw = load_raw_tile(x_ptr + i * COLUMNS, starts, left, SIZE, FULL)
        normal, out = (), ()
        for p in tl.static_range(8):
            y = to_float32(raw[p])
            if CENTER:
                y -= pivot
                if not FULL:
                    y = tl.where(part_there(left, SIZE, p), y, 0.0)
            y *= rstd
            normal = normal + (y.to(HELD),)
            if WEIGHT:
                weight = load_part(weight_ptr, column, width - column, SIZE, p, FULL)
                if first:
                    store_tile(weight_copy_ptr, weight, column, width - column, SIZE, p, FULL)
                y *= to_float32(weight)
            if BIAS:
                bias = load_part(bias_ptr, column, width - column, SIZE, p, FULL)
                if first:
                    store_tile(bias_copy_ptr, bias, column, width - column, SIZE, p, FULL)
                y += to_float32(bias)
            out = out + (y.to(y_ptr.dtype.element_ty),)
        store_whole(y_ptr + i * COLUMNS, out, starts, left, SIZE, True, FULL)
        store_codes(
            normal, codes_ptr, scales_ptr,
            (row + in_row) * row_groups + bundle, seed_value(seed, SEED), row + in_row, bundle,
            left, (), SIZE, PARTS, BITS, CODE, SEED, 0, None, FULL,
        )  # fmt: skip


@triton.jit
def gradient(
    dy, weight_ptr, column, width, WEIGHT: tl.constexpr, SIZE: tl.constexpr, p: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """The gradient of part p of the normalised values."""
    g = to_float32(dy)
    if WEIGHT:
        g *= to_float32(load_part(weight_ptr, column, width - column, SIZE, p, FULL))
    return g


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # [rows, width]
    codes_ptr,
    scales_ptr,
    rstd_ptr,  # [rows]
    weight_ptr,  # [width]
    dx_ptr,  # [rows, width]
    rows,
    width,
    row_groups,
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    NQ: tl.constexpr,
    TILES: tl.constexpr,
):
    COLUMNS: tl.constexpr = NQ * 8 * SIZE
    row = tl.program_id(0).to(tl.int64) * ROWS
    starts, room, in_row, bundle = rows_tile(width, rows - row, ROWS, NQ, SIZE)
    dy_ptr += row * width
    dx_ptr += row * width
    rstd = tl.load(rstd_ptr + row + in_row, row + in_row < rows, other=0.0)[:, None]
    products = tl.zeros([ROWS * NQ, SIZE], dtype=tl.float32)
    total = products
    for i in tl.range(TILES, num_stages=1):
        left = room - i * COLUMNS
        group = bundle + i * NQ
        dy = load_raw_whole(dy_ptr + i * COLUMNS, starts, left, SIZE, True, FULL)
        x_hat = load_codes(
            codes_ptr, scales_ptr, (row + in_row) * row_groups + group, left, SIZE, PARTS, BITS,
            CODE, FULL,
        )  # fmt: skip
        for p in tl.static_range(8):
            g = gradient(dy[p], weight_ptr, group * (8 * SIZE), width, WEIGHT, SIZE, p, FULL)
            products += g * x_hat[p]
            if CENTER:
                total += g
    slope = over_row(products, ROWS, NQ) / width * rstd
    mean = over_row(total, ROWS, NQ) / width * rstd
    for i in tl.range(TILES, num_stages=1):
        left = room - i * COLUMNS
        group = bundle + i * NQ
        again = load_raw_whole(dy_ptr + i * COLUMNS, starts, left, SIZE, True, FULL)
        normal = load_codes(
            codes_ptr, scales_ptr, (row + in_row) * row_groups + group, left, SIZE, PARTS, BITS,
            CODE, FULL,
        )  # fmt: skip
        dx = ()
        for p in tl.static_range(8):
            d = gradient(again[p], weight_ptr, group * (8 * SIZE), width, WEIGHT, SIZE, p, FULL)
            d = tl.fma(d, rstd, -normal[p] * slope)
            if CENTER:
                d -= mean
            dx = dx + (d.to(dx_ptr.dtype.element_ty),)
        store_whole(dx_ptr + i * COLUMNS, dx, starts, left, SIZE, True, FULL)


@quick
@triton.jit
def _sums_kernel(
    dy_ptr,  # [rows, width]
    codes_ptr,
    scales_ptr,
    dweight_ptr,  # [programs, width] fp32
    dbias_ptr,  # [programs, width] fp32
    rows,
    width,
    row_groups,
    steps,  # rows a program
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    NQ: tl.constexpr,
):
    """Gradients of weight and bias: the share of some rows, of a tile of columns."""
    COLUMNS: tl.constexpr = NQ * 8 * SIZE
    first = tl.program_id(1) * COLUMNS
    row = tl.program_id(0).to(tl.int64) * steps
    end = tl.minimum(row + steps, rows)
    zero = tl.zeros([ROWS * NQ, SIZE], dtype=tl.float32)
    dweight = (zero, zero, zero, zero, zero, zero, zero, zero)
    dbias = dweight
    while row < end:
        starts, room, in_row, bundle = rows_tile(width - first, end - row, ROWS, NQ, SIZE)
        starts = in_row * width + bundle * (8 * SIZE)
        dy = load_raw_whole(dy_ptr + row * width + first, starts, room, SIZE, True, FULL)
        if NEED_WEIGHT:
            group = (row + in_row) * row_groups + tl.program_id(1) * NQ + bundle
            x_hat = load_codes(
                codes_ptr, scales_ptr, group, room, SIZE, PARTS, BITS, CODE, FULL
            )
            sums = ()
            for p in tl.static_range(8):
                sums = sums + (tl.fma(to_float32(dy[p]), x_hat[p], dweight[p]),)
            dweight = sums
        if NEED_BIAS:
            sums = ()
            for p in tl.static_range(8):
                sums = sums + (dbias[p] + to_float32(dy[p]),)
            dbias = sums
        row += ROWS
    partial = tl.program_id(0).to(tl.int64) * width + first
    column = tl.arange(0, NQ) * (8 * SIZE)
    for p in tl.static_range(8):
        if NEED_WEIGHT:
            sums = over_rows(dweight[p], ROWS)
            store_tile(dweight_ptr + partial, sums, column, width - first - column, SIZE, p, FULL)
        if NEED_BIAS:
            sums = over_rows(dbias[p], ROWS)
            store_tile(dbias_ptr + partial, sums, column, width - first - column, SIZE, p, FULL)


@triton.jit
def over_rows(x, ROWS: tl.constexpr):
    """[NQ, SIZE] sums over the rows of a tile."""
    if ROWS == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, [ROWS, x.shape[0] // ROWS, x.shape[1]]), 0)


# --- Launchers.

PLACES = 256  # a warp: what one product on tensor cores takes
PROGRAMS = 132 * 32  # of sums
WARPS = (1, 1, 1)  # forward, backward, sums


class Shape(NamedTuple):
    """How rows are given to programs."""

    bundles: int
    rows: int
    tiles: int
    full: bool


def shape_of(grouping: Grouping, warps: int) -> Shape:
    groups = grouping.row_groups
    held = warps * PLACES // grouping.size
    bundles = min(held, groups & -groups)
    rows = held // bundles
    full = grouping.width % grouping.group_size == 0 and grouping.rows % rows == 0
    return Shape(bundles, rows, -(-groups // bundles), full)


@functools.lru_cache(LAUNCHES)
def forward_launch(
    grouping: Grouping, eps: float, center: bool, weight: bool, bias: bool, seed: int
) -> Launch:
    shape = shape_of(grouping, WARPS[0])
    return _forward_kernel.prepare(
        (-(-grouping.rows // shape.rows),),
        grouping.rows,
        grouping.width,
        grouping.row_groups,
        eps,
        CENTER=center,
        WEIGHT=weight,
        BIAS=bias,
        **constants(grouping),
        SEED=seed,
        FULL=shape.full,
        ROWS=shape.rows,
        NQ=shape.bundles,
        TILES=shape.tiles,
        num_warps=WARPS[0],
    )


@functools.lru_cache(LAUNCHES)
def backward_launch(grouping: Grouping, center: bool, weight: bool) -> Launch:
    shape = shape_of(grouping, WARPS[1])
    return _backward_kernel.prepare(
        (-(-grouping.rows // shape.rows),),
        grouping.rows,
        grouping.width,
        grouping.row_groups,
        CENTER=center,
        WEIGHT=weight,
        **constants(grouping),
        FULL=shape.full,
        ROWS=shape.rows,
        NQ=shape.bundles,
        TILES=shape.tiles,
        num_warps=WARPS[1],
    )


@functools.lru_cache(LAUNCHES)
def sums_launch(grouping: Grouping, need_weight: bool, need_bias: bool) -> tuple[Launch, int]:
    """The launch, and how many partial sums it writes."""
    shape = shape_of(grouping, WARPS[2])
    programs = max(1, min(grouping.rows // shape.rows, PROGRAMS // shape.tiles))
    steps = -(-grouping.rows // programs)
    steps = -(-steps // shape.rows) * shape.rows
    programs = -(-grouping.rows // steps)
    launch = _sums_kernel.prepare(
        (programs, shape.tiles),
        grouping.rows,
        grouping.width,
        grouping.row_groups,
        steps,
        NEED_WEIGHT=need_weight,
        NEED_BIAS=need_bias,
        **constants(grouping),
        FULL=shape.full,
        ROWS=shape.rows,
        NQ=shape.bundles,
        num_warps=WARPS[2],
    )
    return launch, programs

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
from packlight.groupquant.minmax_kernels import PLAIN
from packlight.groupquant.rotated_kernels import load_rotated, store_rotated
from packlight.groupquant.tile_kernels import (
    load_part,
    load_raw_tile,
    load_tile,
    part_there,
    rows_tile,
    store_tile,
    store_whole,
    to_float32,
    whole_of,
)


@triton.jit
def over_row(x, ROWS: tl.constexpr):
    """[ROWS NQ, 1] sums of each row of a tile [ROWS NQ, COLUMNS]."""
    sums = tl.sum(x, 1)
    NQ: tl.constexpr = sums.shape[0] // ROWS
    if ROWS == 1:
        sums = tl.zeros([NQ], dtype=tl.float32) + tl.sum(sums, 0)
    elif NQ > 1:
        whole = tl.sum(tl.reshape(sums, [ROWS, NQ]), 1)
        sums = tl.reshape(tl.broadcast_to(whole[:, None], [ROWS, NQ]), [ROWS * NQ])
    return sums[:, None]


@triton.jit
def of_eight(x, SIZE: tl.constexpr):
    """[Q, SIZE] sums of eight neighbours, which are in one thread."""
    return tl.sum(tl.reshape(x, [x.shape[0], SIZE, 8]), 2)


@triton.jit
def load_groups(x_ptr, offsets, there, FULL: tl.constexpr):
    """A tile in float32, 0 where groups have ended."""
    if FULL:
        x = tl.load(x_ptr + offsets)
    else:
        x = tl.load(x_ptr + offsets, there, other=0.0)
    return to_float32(x)


@triton.jit
def store_groups(y_ptr, offsets, there, y, FULL: tl.constexpr):
    y = y.to(y_ptr.dtype.element_ty)
    if FULL:
        tl.store(y_ptr + offsets, y)
    else:
        tl.store(y_ptr + offsets, y, there)


@triton.jit
def packed(
    codes_ptr, scales_ptr, group, room, SIZE: tl.constexpr, BITS: tl.constexpr,
    NARROW: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The tile that was packed, in float32."""
    parts = load_rotated(codes_ptr, scales_ptr, group, room, SIZE, BITS, FULL, PLAIN, NARROW)
    return to_float32(whole_of(parts, SIZE))


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
    seed,  # a number, or a pointer to one
    weight_copy_ptr,  # [width]
    bias_copy_ptr,  # [width]
    rows,
    width,
    row_groups,
    eps,
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
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
    # The last rows may be those of two programs, which write the same.
    row = tl.maximum(tl.minimum(tl.program_id(0) * ROWS, rows - ROWS), 0).to(tl.int64)
    starts, room, in_row, group = rows_tile(width, rows - row, ROWS, NQ, SIZE)
    x_ptr += row * width
    y_ptr += row * width
    here = (group == 0) & (room > 0)
    # Of sums of squares about the mean of the first tile no more is lost than a share of TILES.
    pivot = tl.zeros([ROWS * NQ, 1], dtype=tl.float32)
    if CENTER:
        head = load_tile(x_ptr, starts, room, SIZE, FULL)
        pivot = over_row(total_of(head), ROWS) / tl.minimum(width, COLUMNS)
    total = tl.zeros([ROWS * NQ, SIZE], dtype=tl.float32)
    squares = total
    for i in tl.range(TILES, num_stages=1):
        left = room - i * COLUMNS
        tile = load_tile(x_ptr + i * COLUMNS, starts, left, SIZE, FULL)
        if CENTER:
            tile = less(tile, pivot, left, SIZE, FULL)
            total += total_of(tile)
        squares += total_of(times(tile, tile))
    square = over_row(squares, ROWS) / width
    if CENTER:
        rest = over_row(total, ROWS) / width
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
        store_rotated(
            normal, codes_ptr, scales_ptr, (row + in_row) * row_groups + bundle,
            seed_value(seed, SEED).to(tl.int64), left, (), SIZE, BITS, 0, FULL,
        )  # fmt: skip


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
    BITS: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    NQ: tl.constexpr,
    TILES: tl.constexpr,
):
    COLUMNS: tl.constexpr = NQ * 8 * SIZE
    NARROW: tl.constexpr = dx_ptr.dtype.element_ty == tl.bfloat16
    # The last rows may be those of two programs, which write the same.
    row = tl.maximum(tl.minimum(tl.program_id(0) * ROWS, rows - ROWS), 0).to(tl.int64)
    starts, room, in_row, bundle = rows_tile(width, rows - row, ROWS, NQ, SIZE)
    place = tl.arange(0, 8 * SIZE)[None, :]
    offsets, columns = starts[:, None] + place, (bundle * (8 * SIZE))[:, None] + place
    group = (row + in_row) * row_groups + bundle
    dy_ptr += row * width
    dx_ptr += row * width
    rstd = tl.load(rstd_ptr + row + in_row, row + in_row < rows, other=0.0)[:, None]
    products = tl.zeros([ROWS * NQ, SIZE], dtype=tl.float32)
    total = products
    for i in tl.range(TILES, num_stages=1):
        left = room - i * COLUMNS
        g = load_groups(dy_ptr + i * COLUMNS, offsets, place < left[:, None], FULL)
        if WEIGHT:
            inside = columns + i * COLUMNS < width
            g *= load_groups(weight_ptr + i * COLUMNS, columns, inside, FULL)
        x_hat = packed(codes_ptr, scales_ptr, group + i * NQ, left, SIZE, BITS, NARROW, FULL)
        products += of_eight(g * x_hat, SIZE)
        if CENTER:
            total += of_eight(g, SIZE)
    slope = over_row(products, ROWS) / width * rstd
    mean = over_row(total, ROWS) / width * rstd
    for i in tl.range(TILES, num_stages=1):
        left = room - i * COLUMNS
        there = place < left[:, None]
        d = load_groups(dy_ptr + i * COLUMNS, offsets, there, FULL)
        if WEIGHT:
            inside = columns + i * COLUMNS < width
            d *= load_groups(weight_ptr + i * COLUMNS, columns, inside, FULL)
        normal = packed(codes_ptr, scales_ptr, group + i * NQ, left, SIZE, BITS, NARROW, FULL)
        d = tl.fma(d, rstd, -normal * slope)
        if CENTER:
            d -= mean
        store_groups(dx_ptr + i * COLUMNS, offsets, there, d, FULL)


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
    BITS: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    NQ: tl.constexpr,
):
    """Gradients of weight and bias: the share of some rows, of a tile of columns."""
    NARROW: tl.constexpr = dy_ptr.dtype.element_ty == tl.bfloat16
    first = tl.program_id(1) * NQ * 8 * SIZE
    row = tl.program_id(0).to(tl.int64) * steps
    end = tl.minimum(row + steps, rows)
    starts, _, in_row, bundle = rows_tile(width, ROWS, ROWS, NQ, SIZE)
    place = tl.arange(0, 8 * SIZE)[None, :]
    offsets, columns = starts[:, None] + place, (bundle * (8 * SIZE))[:, None] + place
    dweight = tl.zeros([NQ, 8 * SIZE], dtype=tl.float32)
    dbias = dweight
    while row < end:
        room = tl.where(in_row < end - row, width - first - bundle * (8 * SIZE), 0)
        there = place < room[:, None]
        dy = load_groups(dy_ptr + row * width + first, offsets, there, FULL)
        if NEED_WEIGHT:
            group = (row + in_row) * row_groups + tl.program_id(1) * NQ + bundle
            x_hat = packed(codes_ptr, scales_ptr, group, room, SIZE, BITS, NARROW, FULL)
            dweight += over_rows(dy * x_hat, ROWS)
        if NEED_BIAS:
            dbias += over_rows(dy, ROWS)
        row += ROWS
    partial = tl.program_id(0).to(tl.int64) * width + first
    columns = (tl.arange(0, NQ) * (8 * SIZE))[:, None] + place
    inside = first + columns < width
    if NEED_WEIGHT:
        store_groups(dweight_ptr + partial, columns, inside, dweight, FULL)
    if NEED_BIAS:
        store_groups(dbias_ptr + partial, columns, inside, dbias, FULL)


@triton.jit
def over_rows(x, ROWS: tl.constexpr):
    """[NQ, COLUMNS] sums over the rows of a tile."""
    if ROWS == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, [ROWS, x.shape[0] // ROWS, x.shape[1]]), 0)


# --- Launchers.

PLACES = 256  # a warp: what one product on tensor cores takes
PROGRAMS = 132 * 32  # of sums
MOST = 4  # warps
# Of a row a tile, in sums over rows: those that a thread has are of the same columns then.
MOST_GROUPS = 2


class Shape(NamedTuple):
    """How rows are given to programs."""

    bundles: int
    rows: int
    tiles: int
    full: bool
    warps: int


def shape_of(grouping: Grouping, most: int | None = None) -> Shape:
    """Tiles of as many groups of a row as divide it, a power of two, and as many rows as that
    leaves room for; one tile a row where warps suffice. `most` bounds the groups.
    """
    groups = grouping.row_groups
    divisor = groups & -groups
    if most is not None:
        divisor = min(divisor, most)
    held = PLACES // grouping.size
    warps = max(1, min(MOST, divisor // held))
    bundles = min(warps * held, divisor)
    rows = warps * held // bundles
    full = grouping.width % grouping.group_size == 0 and grouping.rows >= rows
    return Shape(bundles, rows, groups // bundles, full, warps)


@functools.lru_cache(LAUNCHES)
def forward_launch(
    grouping: Grouping, eps: float, center: bool, weight: bool, bias: bool, seed: int
) -> Launch:
    shape = shape_of(grouping)
    return _forward_kernel.prepare(
        (-(-grouping.rows // shape.rows),),
        grouping.rows,
        grouping.width,
        grouping.row_groups,
        eps,
        CENTER=center,
        WEIGHT=weight,
        BIAS=bias,
        SIZE=grouping.size,
        BITS=grouping.bits,
        SEED=seed,
        FULL=shape.full,
        ROWS=shape.rows,
        NQ=shape.bundles,
        TILES=shape.tiles,
        num_warps=shape.warps,
    )


@functools.lru_cache(LAUNCHES)
def backward_launch(grouping: Grouping, center: bool, weight: bool) -> Launch:
    shape = shape_of(grouping)
    return _backward_kernel.prepare(
        (-(-grouping.rows // shape.rows),),
        grouping.rows,
        grouping.width,
        grouping.row_groups,
        CENTER=center,
        WEIGHT=weight,
        SIZE=grouping.size,
        BITS=grouping.bits,
        FULL=shape.full,
        ROWS=shape.rows,
        NQ=shape.bundles,
        TILES=shape.tiles,
        num_warps=shape.warps,
    )


@functools.lru_cache(LAUNCHES)
def sums_launch(grouping: Grouping, need_weight: bool, need_bias: bool) -> tuple[Launch, int]:
    """The launch, and how many partial sums it writes."""
    shape = shape_of(grouping, MOST_GROUPS)
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
        SIZE=grouping.size,
        BITS=grouping.bits,
        FULL=shape.full and grouping.rows % shape.rows == 0,
        ROWS=shape.rows,
        NQ=shape.bundles,
        num_warps=shape.warps,
    )
    return launch, programs

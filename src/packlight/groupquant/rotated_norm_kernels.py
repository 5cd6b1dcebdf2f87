"""Triton kernels that go backward through a layer norm with rotated packs.

Tensor cores take 16 groups a warp: a tile of whole rows leaves no registers for the sums that are
the gradients of weight and bias, and rows of another length than a power of two leave some of it
empty. So these have kernels of their own, and a tile has NQ groups of each of ROWS rows, as many as
divide a row. Where that is not all of it, what is summed over rows of a tile is written by the
kernel of those gradients, which comes first then.
"""

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from packlight._launch import LAUNCHES, Launch, quick
from packlight.groupquant.grouping import Grouping
from packlight.groupquant.minmax_kernels import PLAIN
from packlight.groupquant.rotated_kernels import load_rotated
from packlight.groupquant.tile_kernels import rows_tile, to_float32, whole_of


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
    parts = load_rotated(codes_ptr, scales_ptr, group, room, SIZE, BITS, FULL, PLAIN, NARROW, False)
    return to_float32(whole_of(parts, SIZE))


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # [rows, width]
    codes_ptr,
    scales_ptr,
    rstd_ptr,  # [rows]
    weight_ptr,  # [width]
    dx_ptr,  # [rows, width]
    parts_ptr,  # [2, SHARES, rows] fp32, where there are several
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
    SHARES: tl.constexpr,  # of `parts_ptr`, 1 where a tile has whole rows
):
    NARROW: tl.constexpr = dx_ptr.dtype.element_ty == tl.bfloat16
    # The last rows may be those of two programs, which write the same.
    row = tl.maximum(tl.minimum(tl.program_id(0) * ROWS, rows - ROWS), 0).to(tl.int64)
    tile = tl.program_id(1)
    starts, room, in_row, bundle = rows_tile(width, rows - row, ROWS, NQ, SIZE)
    first = tile * (NQ * 8 * SIZE)
    place = tl.arange(0, 8 * SIZE)[None, :]
    offsets, columns = starts[:, None] + place, (bundle * (8 * SIZE))[:, None] + place
    room -= first
    there = place < room[:, None]
    group = (row + in_row) * row_groups + bundle + tile * NQ
    in_rows = row + in_row < rows
    rstd = tl.load(rstd_ptr + row + in_row, in_rows, other=0.0)[:, None]
    g = load_groups(dy_ptr + row * width + first, offsets, there, FULL)
    if WEIGHT:
        g *= load_groups(weight_ptr + first, columns, columns + first < width, FULL)
    x_hat = packed(codes_ptr, scales_ptr, group, room, SIZE, BITS, NARROW, FULL)
    if SHARES == 1:
        product = over_row(of_eight(g * x_hat, SIZE), ROWS)
        total = over_row(of_eight(g, SIZE), ROWS) if CENTER else product
    else:
        product = tl.zeros([ROWS * NQ, 1], dtype=tl.float32)
        total = product
        for i in tl.static_range(SHARES):
            source = parts_ptr + i * rows + row + in_row
            product += tl.load(source, in_rows, other=0.0)[:, None]
            if CENTER:
                total += tl.load(source + SHARES * rows, in_rows, other=0.0)[:, None]
    d = tl.fma(g, rstd, -x_hat * (product / width * rstd))
    if CENTER:
        d -= total / width * rstd
    store_groups(dx_ptr + row * width + first, offsets, there, d, FULL)


@quick
@triton.jit
def _sums_kernel(
    dy_ptr,  # [rows, width]
    codes_ptr,
    scales_ptr,
    weight_ptr,  # [width]
    dweight_ptr,  # [programs, width] fp32
    dbias_ptr,  # [programs, width] fp32
    parts_ptr,  # [2, SHARES, rows] fp32, where there are several
    rows,
    width,
    row_groups,
    steps,  # rows a program
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    SHARES: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether groups are whole
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    NQ: tl.constexpr,
):
    """Gradients of weight and bias: the share of some rows, of a tile of columns.

    And of each row, the share of this tile in what its gradient takes of the whole row.
    """
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
        if WHOLE:
            there = (room > 0)[:, None]
        else:
            there = place < room[:, None]
        dy = load_groups(dy_ptr + row * width + first, offsets, there, FULL)
        if NEED_WEIGHT or SHARES > 1:
            group = (row + in_row) * row_groups + tl.program_id(1) * NQ + bundle
            x_hat = packed(codes_ptr, scales_ptr, group, room, SIZE, BITS, NARROW, FULL)
            product = dy * x_hat
        if NEED_WEIGHT:
            dweight += over_rows(product, ROWS)
        dbias += over_rows(dy, ROWS)
        if SHARES > 1:
            total = dy
            if WEIGHT:
                weight = load_groups(weight_ptr + first, columns, first + columns < width, WHOLE)
                product *= weight
                total *= weight
            target = parts_ptr + tl.program_id(1) * rows + row + tl.arange(0, ROWS)
            inside = row + tl.arange(0, ROWS) < end
            tl.store(target, row_sums(product, ROWS, SIZE), inside)
            if CENTER:
                tl.store(target + SHARES * rows, row_sums(total, ROWS, SIZE), inside)
        row += ROWS
    partial = tl.program_id(0).to(tl.int64) * width + first
    columns = (tl.arange(0, NQ) * (8 * SIZE))[:, None] + place
    inside = first + columns < width
    if NEED_WEIGHT:
        store_groups(dweight_ptr + partial, columns, inside, dweight, WHOLE)
    store_groups(dbias_ptr + partial, columns, inside, dbias, WHOLE)


@triton.jit
def row_sums(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """[ROWS] sums of the rows of a tile."""
    return tl.sum(tl.reshape(tl.sum(of_eight(x, SIZE), 1), [ROWS, x.shape[0] // ROWS]), 1)


@triton.jit
def over_rows(x, ROWS: tl.constexpr):
    """[NQ, COLUMNS] sums over the rows of a tile."""
    if ROWS == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, [ROWS, x.shape[0] // ROWS, x.shape[1]]), 0)


# --- Launchers.

TURNED_PLACES = 256  # a warp: what one product on tensor cores takes
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
    held = TURNED_PLACES // grouping.size
    warps = max(1, min(MOST, divisor // held))
    bundles = min(warps * held, divisor)
    rows = warps * held // bundles
    full = grouping.width % grouping.group_size == 0 and grouping.rows >= rows
    return Shape(bundles, rows, groups // bundles, full, warps)


def shares_of(grouping: Grouping) -> int:
    """How many tiles' sums of a row there are, 1 where a tile has whole rows."""
    if shape_of(grouping).tiles == 1:
        return 1
    return shape_of(grouping, MOST_GROUPS).tiles


@functools.lru_cache(LAUNCHES)
def backward_launch(grouping: Grouping, center: bool, weight: bool) -> Launch:
    shape = shape_of(grouping)
    return _backward_kernel.prepare(
        (-(-grouping.rows // shape.rows), shape.tiles),
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
        SHARES=shares_of(grouping),
        num_warps=shape.warps,
    )


@functools.lru_cache(LAUNCHES)
def sums_launch(
    grouping: Grouping, center: bool, weight: bool, need_weight: bool
) -> tuple[Launch, int]:
    """The launch, and how many partial sums of columns it writes."""
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
        CENTER=center,
        WEIGHT=weight,
        NEED_WEIGHT=need_weight,
        SHARES=shares_of(grouping),
        SIZE=grouping.size,
        BITS=grouping.bits,
        WHOLE=shape.full,
        FULL=shape.full and grouping.rows % shape.rows == 0,
        ROWS=shape.rows,
        NQ=shape.bundles,
        num_warps=shape.warps,
    )
    return launch, programs

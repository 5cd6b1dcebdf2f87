"""Triton kernels of layer and RMS norm: output, pack and rstd in one pass, backward in one pass.

A program walks over rows, a row a tile (see `tile_kernels.py`), with weights in registers. The
backward adds up its rows' share of the weight and bias gradients in registers as well.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, new, new_like, new_rows, quick, together
from packlight._seed_kernels import seed_argument, seed_kind, seed_value
from packlight.elementwise.kernels import rounded
from packlight.groupquant import rotated_norm_kernels as rotated_norms
from packlight.groupquant.grouping import ROTATED, Grouping, Groups
from packlight.groupquant.kernels import TURNED_CODE, constants, new_pack, sized
from packlight.groupquant.minmax_kernels import PLAIN
from packlight.groupquant.norm_reference import output_dtype
from packlight.groupquant.pack_kernels import load_codes, pack_value, store_codes
from packlight.groupquant.rotated_norm_kernels import TURNED_PLACES
from packlight.groupquant.tile_kernels import (
    ask_for,
    load_part,
    load_raw_whole,
    load_tile,
    part_there,
    row_tile,
    rows_tile,
    store_tile,
    store_whole,
    to_float32,
)


@triton.jit
def row_sums(tile, in_row, ROWS: tl.constexpr):
    """[NQ, 1] sums of each row of the eight tensors of a tile, for each of its bundles."""
    pairs = ((tile[0] + tile[1]) + (tile[2] + tile[3])) + (
        (tile[4] + tile[5]) + (tile[6] + tile[7])
    )
    return over_row(pairs, in_row, ROWS)


@triton.jit
def over_row(sums, in_row, ROWS: tl.constexpr):
    """[NQ, 1] sums of each row of one tensor, for each of its bundles."""
    sums = tl.sum(sums, 1)
    if sums.shape[0] > ROWS:
        groups = sums
        for row in tl.static_range(ROWS):
            whole = tl.sum(tl.where(in_row == row, groups, 0.0), 0)
            sums = tl.where(in_row == row, whole, sums)
    return sums[:, None]


@triton.jit
def load_parameter(
    p_ptr, copy_ptr, bundle, width, GIVEN: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """A parameter as a tile, which the first program copies; an empty tuple for none.

    Also unless it is to be KEPT, for lack of registers: see `parameter_part`.
    """
    tile = ()
    if GIVEN:
        column = bundle * (8 * SIZE)
        found = load_tile(p_ptr, column, width - column, SIZE, FULL)
        if tl.program_id(0) == 0:
            for p in tl.static_range(8):
                store_tile(copy_ptr, found[p], column, width - column, SIZE, p, FULL)
        if KEPT:
            tile = found
    return tile


@triton.jit
def parameter_part(
    tile, p_ptr, bundle, width, SIZE: tl.constexpr, p: tl.constexpr, FULL: tl.constexpr
):
    """Part p of what `load_parameter` gave, or would have given had it been kept."""
    if len(tile) == 0:
        column = bundle * (8 * SIZE)
        return to_float32(load_part(p_ptr, column, width - column, SIZE, p, FULL))
    else:
        return tile[p]


@triton.jit
def norm_rows(
    tile, y_ptr, weight, weight_ptr, bias, bias_ptr, codes_ptr, scales_ptr, rstd_ptr, seed, row,
    starts, room, in_row, bundle, width, row_groups, eps, CENTER: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    BITS: tl.constexpr, CODE: tl.constexpr, SEED: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr, X: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Output, pack and rstd of the rows of a tile that is 0 past the end of each.

    X is the dtype of what is normalised, ROUNDED that to which x_hat is rounded before it meets the
    weight, None for none.
    """
    if CENTER:
        mean = row_sums(tile, in_row, ROWS) / width
        centered = ()
        for p in tl.static_range(8):
            if FULL:
                centered = centered + (tile[p] - mean,)
            else:
                inside = part_there(room, SIZE, p)
                centered = centered + (tl.where(inside, tile[p] - mean, 0.0),)
        tile = centered
    squares = ()
    for p in tl.static_range(8):
        squares = squares + (tile[p] * tile[p],)
    rstd = tl.rsqrt(row_sums(squares, in_row, ROWS) / width + eps)
    tl.store(rstd_ptr + (row + in_row)[:, None], rstd, ((bundle == 0) & (room > 0))[:, None])
    normal, out = (), ()
    for p in tl.static_range(8):
        x_hat = tile[p] * rstd
        y = x_hat
        if ROUNDED is not None:
            y = rounded(y, ROUNDED)
        if WEIGHT:
            y = y * parameter_part(weight, weight_ptr, bundle, width, SIZE, p, FULL)
        if BIAS:
            y = y + parameter_part(bias, bias_ptr, bundle, width, SIZE, p, FULL)
        normal = normal + (pack_value(x_hat, X, CODE),)
        out = out + (y.to(y_ptr.dtype.element_ty),)
    store_whole(y_ptr + row * width, out, starts, room, SIZE, CODE == TURNED_CODE, FULL)
    group = (row + in_row) * row_groups + bundle * (8 // PARTS)
    store_codes(
        normal, codes_ptr, scales_ptr, group, seed,
        row + in_row, bundle, room, (), SIZE, PARTS, BITS, CODE, SEED, 0, None, FULL,
    )  # fmt: skip


@triton.jit
def row_gradients(
    dy, weight_ptr, codes_ptr, scales_ptr, rstd_ptr, row, room, in_row, bundle, width, row_groups,
    dweight, dbias, CENTER: tl.constexpr, WEIGHT: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr,
    CODE: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, DX: tl.constexpr,
):  # fmt: skip
    """What comes of a tile of gradients: dx, and the sums `dweight` and `dbias` so far."""
    group = (row + in_row) * row_groups + bundle * (8 // PARTS)
    NARROW: tl.constexpr = dy[0].dtype == tl.bfloat16
    x_hat = load_codes(
        codes_ptr, scales_ptr, group, room, SIZE, PARTS, BITS, CODE, FULL, PLAIN, NARROW
    )
    if FULL:
        rstd = tl.load(rstd_ptr + row + in_row)[:, None]
    else:
        rstd = tl.load(rstd_ptr + row + in_row, room > 0, other=0.0)[:, None]
    # By parts: loaded and widened as they are needed, there are registers for the rest.
    weights, biases = (), ()
    products = tl.zeros(x_hat[0].shape, dtype=tl.float32)
    total = products
    for p in tl.static_range(8):
        g = to_float32(dy[p])
        if NEED_WEIGHT:
            weights = weights + (tl.fma(g, to_float32(x_hat[p]), dweight[p]),)
        if NEED_BIAS:
            biases = biases + (dbias[p] + g,)
        if WEIGHT:
            g = g * parameter_part((), weight_ptr, bundle, width, SIZE, p, FULL)
        products += g * to_float32(x_hat[p])
        if CENTER:
            total += g
    # Of x_hat: 0 past the row's end, as g is 0 there.
    slope = over_row(products, in_row, ROWS) / width
    mean = 0.0
    if CENTER:
        mean = over_row(total, in_row, ROWS) / width
    dx = ()
    for p in tl.static_range(8):
        g = to_float32(dy[p])
        if WEIGHT:
            g = g * parameter_part((), weight_ptr, bundle, width, SIZE, p, FULL)
        d = (g - mean - to_float32(x_hat[p]) * slope) * rstd
        dx = dx + (d.to(DX),)
    if not NEED_WEIGHT:
        weights = dweight
    if not NEED_BIAS:
        biases = dbias
    return dx, weights, biases


@triton.jit
def store_sums(
    dweight, dbias, dweight_ptr, dbias_ptr, width, NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr, NQ: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """This program's share of the gradients of weight and bias."""
    partial = tl.program_id(0).to(tl.int64) * width
    starts, room = row_tile(width, NQ, SIZE)
    for p in tl.static_range(8):
        if NEED_WEIGHT:
            sums = over_rows(dweight[p], ROWS)
            store_tile(dweight_ptr + partial, sums, starts, room, SIZE, p, FULL)
        if NEED_BIAS:
            sums = over_rows(dbias[p], ROWS)
            store_tile(dbias_ptr + partial, sums, starts, room, SIZE, p, FULL)


@triton.jit
def over_rows(x, ROWS: tl.constexpr):
    """[NQ, SIZE] sums over the rows of a tile."""
    if ROWS == 1:
        return x
    else:
        return tl.sum(tl.reshape(x, [ROWS, x.shape[0] // ROWS, x.shape[1]]), 0)


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
    steps,  # rows a program
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
    AHEAD: tl.constexpr,  # whether the next rows are brought near meanwhile
    ROWS: tl.constexpr,
    NQ: tl.constexpr,  # bundles a row
    ROUNDED: tl.constexpr,  # the dtype of x_hat when it meets the weight, None for float32
):
    row = tl.program_id(0).to(tl.int64) * steps
    end = tl.minimum(row + steps, rows)
    starts, room, in_row, bundle = rows_tile(width, end - row, ROWS, NQ, SIZE)
    weight = load_parameter(weight_ptr, weight_copy_ptr, bundle, width, WEIGHT, False, SIZE, FULL)
    bias = load_parameter(bias_ptr, bias_copy_ptr, bundle, width, BIAS, False, SIZE, FULL)
    while row < end:
        _, room, _, _ = rows_tile(width, end - row, ROWS, NQ, SIZE)
        tile = load_tile(x_ptr + row * width, starts, room, SIZE, FULL)
        if AHEAD:
            later = tl.minimum(row + ROWS, rows - ROWS) * width
            ask_for(x_ptr + later, ROWS * NQ * 8 * SIZE)
        norm_rows(
            tile, y_ptr, weight, weight_ptr, bias, bias_ptr, codes_ptr, scales_ptr, rstd_ptr,
            seed_value(seed, SEED), row, starts, room, in_row, bundle, width, row_groups, eps,
            CENTER, WEIGHT, BIAS, SIZE, PARTS, BITS, CODE, SEED, FULL, ROWS,
            x_ptr.dtype.element_ty, ROUNDED,
        )  # fmt: skip
        row += ROWS


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # [rows, width]
    codes_ptr,
    scales_ptr,
    rstd_ptr,  # [rows]
    weight_ptr,  # [width]
    dx_ptr,  # [rows, width]
    other_ptr,  # [rows, width], what is added to it
    dweight_ptr,  # [programs, width] fp32
    dbias_ptr,  # [programs, width] fp32
    rows,
    width,
    row_groups,
    steps,
    ADDS: tl.constexpr,
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    FULL: tl.constexpr,
    AHEAD: tl.constexpr,  # whether the next rows are brought near meanwhile
    ROWS: tl.constexpr,
    NQ: tl.constexpr,  # bundles a row
):
    row = tl.program_id(0).to(tl.int64) * steps
    end = tl.minimum(row + steps, rows)
    zero = tl.zeros([ROWS * NQ, SIZE], dtype=tl.float32)
    dweight = (zero, zero, zero, zero, zero, zero, zero, zero)
    dbias = dweight
    while row < end:
        starts, room, in_row, bundle = rows_tile(width, end - row, ROWS, NQ, SIZE)
        dy = load_raw_whole(dy_ptr + row * width, starts, room, SIZE, CODE == TURNED_CODE, FULL)
        if AHEAD:
            later = tl.minimum(row + ROWS, rows - ROWS)
            ask_for(dy_ptr + later * width, ROWS * NQ * 8 * SIZE)
            ask_for(codes_ptr + later * (NQ * SIZE * BITS), ROWS * NQ * SIZE * BITS)
        dx, dweight, dbias = row_gradients(
            dy, weight_ptr, codes_ptr, scales_ptr, rstd_ptr, row, room, in_row, bundle, width,
            row_groups, dweight, dbias, CENTER, WEIGHT, NEED_WEIGHT, NEED_BIAS, SIZE, PARTS, BITS,
            CODE, FULL, ROWS, dx_ptr.dtype.element_ty,
        )  # fmt: skip
        if ADDS:
            other = load_raw_whole(
                other_ptr + row * width, starts, room, SIZE, CODE == TURNED_CODE, FULL
            )
            sums = ()
            for p in tl.static_range(8):
                sums = sums + (to_float32(dx[p]) + to_float32(other[p]),)
            dx = sums
        store_whole(dx_ptr + row * width, dx, starts, room, SIZE, CODE == TURNED_CODE, FULL)
        row += ROWS
    store_sums(
        dweight, dbias, dweight_ptr, dbias_ptr, width, NEED_WEIGHT, NEED_BIAS, NQ, SIZE, FULL, ROWS
    )


@quick
@triton.jit
def _add_up_kernel(
    dweight_ptr,  # [programs, width] fp32
    dbias_ptr,
    dweight_sum_ptr,  # [width] fp32
    dbias_sum_ptr,
    programs,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over the programs of a backward pass, of one tensor or of two."""
    parts_ptr, sum_ptr = dweight_ptr, dweight_sum_ptr
    if tl.program_id(1) == 1:
        parts_ptr, sum_ptr = dbias_ptr, dbias_sum_ptr
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        there = (row < programs)[:, None] & inside[None, :]
        total += tl.load(parts_ptr + row[:, None] * width + column[None, :], there, other=0.0)
    tl.store(sum_ptr + column, tl.sum(total, 0), inside)


# --- Launchers, with the signatures of norm_reference.py.

TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Programs of a backward pass: enough to fill the device, few enough that partial sums stay small.
PROGRAMS = 132 * 8
# Times as many of a forward pass, which has no sums: none of the device waits for the last of them.
WAVES = 8
# Of a row a program, in sums over programs: a line of memory.
COLUMNS = 32
# Places a warp. In the forward pass a thread then has 32 elements: with fewer, what a group has in
# common takes a shuffle each; with more, too few threads run at once.
FORWARD_PLACES = 128
BACKWARD_PLACES = 64
# With the sum of one parameter's gradient, of which each program writes a part: so there are no
# more than run at once.
SUMMING_PLACES = 128


class Shape(NamedTuple):
    """How rows are given to programs."""

    bundles: int  # a row, up to a power of two
    rows: int  # a tile
    full: bool  # whether tiles are whole
    warps: int
    programs: int
    steps: int  # rows a program


def _launch_shape(grouping: Grouping, plain: int, programs: int) -> Shape:
    """`plain` places a warp, or what one product on tensor cores takes."""
    bundles = triton.next_power_of_2(-(-grouping.width // (8 * grouping.size)))
    places = bundles * grouping.size
    turned = grouping.code == ROTATED
    warps = max(1, min(16, places // (TURNED_PLACES if turned else plain)))
    rows = max(1, TURNED_PLACES // places) if turned else 1
    programs = max(1, min(grouping.rows, programs * 4 // warps))
    steps = -(-grouping.rows // programs)
    steps = -(-steps // rows) * rows
    full = grouping.width == 8 * places and grouping.rows % rows == 0
    return Shape(bundles, rows, full, warps, -(-grouping.rows // steps), steps)


@functools.lru_cache(LAUNCHES)
def _forward_launch(
    grouping: Grouping,
    eps: float,
    center: bool,
    weight: bool,
    bias: bool,
    seed: int,
    rounded_to: torch.dtype | None,
) -> Launch:
    shape = _launch_shape(grouping, FORWARD_PLACES, PROGRAMS * WAVES)
    return _forward_kernel.prepare(
        (shape.programs,),
        grouping.rows,
        grouping.width,
        grouping.row_groups,
        shape.steps,
        eps,
        CENTER=center,
        WEIGHT=weight,
        BIAS=bias,
        **constants(grouping),
        SEED=seed,
        FULL=shape.full,
        AHEAD=grouping.code == ROTATED and shape.full,
        ROWS=shape.rows,
        NQ=shape.bundles,
        ROUNDED=None if rounded_to is None else TRITON[rounded_to],
        num_warps=shape.warps,
    )


def norm(
    x: Tensor,
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    groups: Groups,
    seed: Tensor | None,
    number: int,
    rounded_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = x.numel()
    rows = n // width
    grouping, size, count = sized(rows, width, *groups)
    y = new_like(x, output_dtype(x, weight, rounded_to))
    codes, scales = new_pack(x, size, count)
    rstd = new(x, rows, torch.float32)
    copies = [new(x, 0, x.dtype) if p is None else new_like(p) for p in (weight, bias)]
    if n == 0:
        for copy, parameter in zip(copies, (weight, bias), strict=True):
            if parameter is not None:
                copy.copy_(parameter)
        return y, codes, scales, rstd, *copies
    given = (weight is not None, bias is not None, seed_kind(seed, number), rounded_to)
    _forward_launch(grouping, eps, center, *given)(
        x,
        y,
        x if weight is None else weight,
        x if bias is None else bias,
        codes,
        scales,
        rstd,
        *copies,
        seeds=(seed_argument(seed, number),),
    )
    return y, codes, scales, rstd, *copies


@functools.lru_cache(LAUNCHES)
def sums_launch(programs: int, width: int, tensors: int) -> Launch:
    """Writes the sums over programs of the parts [programs, width] of one tensor or two.

    Called with the parts of the first and of the last, then with their sums.
    """
    return _add_up_kernel.prepare(
        (triton.cdiv(width, COLUMNS), tensors),
        programs,
        width,
        ROWS=256,
        COLUMNS=COLUMNS,
        num_warps=4,
    )


def with_sums(
    launch: Launch, programs: int, width: int, others: int, need_weight: bool, need_bias: bool
) -> Launch:
    """A launch that writes parts of weight and bias, and behind it the sums over its programs.

    Parts are behind `others` tensors, and their sums behind them. What is not needed is not read.
    """
    steps = [(launch, tuple(range(others + 2)))]
    if count := need_weight + need_bias:
        first, last = others + (not need_weight), others + need_bias
        sums = sums_launch(programs, width, count)
        steps.append((sums, (first, last, first + 2, last + 2)))
    return together(*steps)


@functools.lru_cache(LAUNCHES)
def _backward_launch(
    grouping: Grouping,
    adds: bool,
    center: bool,
    weight: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Launch, int]:
    """The launch, and its programs, each of which writes a partial sum."""
    places, programs, turned = BACKWARD_PLACES, PROGRAMS, grouping.code == ROTATED
    summing = need_weight + need_bias == 1  # there are no registers for more places of two
    if summing:
        places = SUMMING_PLACES
        programs = PROGRAMS // 4 if turned else PROGRAMS // 2
    shape = _launch_shape(grouping, places, programs)
    launch = _backward_kernel.prepare(
        (shape.programs,),
        grouping.rows,
        grouping.width,
        grouping.row_groups,
        shape.steps,
        ADDS=adds,
        CENTER=center,
        WEIGHT=weight,
        NEED_WEIGHT=need_weight,
        NEED_BIAS=need_bias,
        **constants(grouping),
        FULL=shape.full,
        AHEAD=(summing or turned) and shape.full,
        ROWS=shape.rows,
        NQ=shape.bundles,
        num_warps=shape.warps,
    )
    return launch, shape.programs


@functools.lru_cache(LAUNCHES)
def _summed_launch(
    grouping: Grouping,
    adds: bool,
    center: bool,
    weight: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Launch, int]:
    """`_backward_launch`, and behind it the sums over its programs."""
    launch, programs = _backward_launch(grouping, adds, center, weight, need_weight, need_bias)
    return with_sums(launch, programs, grouping.width, 7, need_weight, need_bias), programs


@functools.lru_cache(LAUNCHES)
def _rotated_launch(
    grouping: Grouping, center: bool, weight: bool, need_weight: bool
) -> tuple[Launch, int]:
    """The same of rotated groups with a bias, for whose sums there is a kernel of its own.

    There are no registers for both sums.
    """
    parts, programs = rotated_norms.sums_launch(grouping, center, weight, need_weight)
    rows = rotated_norms.backward_launch(grouping, center, weight)
    sums = sums_launch(programs, grouping.width, 1 + need_weight)
    first = 4 if need_weight else 5
    steps = (
        (parts, (0, 1, 2, 3, 4, 5, 6)),
        (rows, (0, 1, 2, 7, 3, 8, 6)),
        (sums, (first, 5, first + 5, 10)),
    )
    return together(*steps), programs


def norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    center: bool,
    need_weight: bool,
    need_bias: bool,
    groups: Groups,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = rstd.numel(), grad_output.shape[-1]
    dx = new_like(grad_output)
    if dx.numel() == 0:
        counts = width if need_weight else 0, width if need_bias else 0
        return dx, rstd.new_zeros(counts[0]), rstd.new_zeros(counts[1])
    grouping, *_ = sized(rows, width, *groups)
    gamma = grad_output if weight is None else weight
    dweight = new(rstd, width if need_weight else 0, rstd.dtype)
    dbias = new(rstd, width if need_bias else 0, rstd.dtype)
    if need_bias and grouping.code == ROTATED:
        launch, programs = _rotated_launch(grouping, center, weight is not None, need_weight)
        shares = rotated_norms.shares_of(grouping)
        of_rows = rstd.new_empty(2, shares, rows) if shares > 1 else rstd
        dbias_parts = new_rows(rstd, programs, width, rstd.dtype)
        dweight_parts = new_like(dbias_parts) if need_weight else dbias_parts
        parts = (dweight_parts, dbias_parts, of_rows)
        launch(grad_output, codes, scales, gamma, *parts, rstd, dx, dweight, dbias)
        if added is not None:
            dx.add_(added)
        return dx, dweight, dbias
    flags = (added is not None, center, weight is not None, need_weight, need_bias)
    launch, programs = _summed_launch(grouping, *flags)
    dweight_parts = new_rows(rstd, programs, width, rstd.dtype) if need_weight else dweight
    dbias_parts = new_rows(rstd, programs, width, rstd.dtype) if need_bias else dbias
    other, sums = dx if added is None else added, (dweight, dbias)
    launch(grad_output, codes, scales, rstd, gamma, dx, other, dweight_parts, dbias_parts, *sums)
    return dx, dweight, dbias

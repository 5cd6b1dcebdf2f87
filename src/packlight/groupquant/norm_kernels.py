"""Triton kernels of layer and RMS norm: output, pack and rstd in one pass, backward in one pass.

A program walks over rows, a row a tile (see `tile_kernels.py`), with weights in registers. The
backward adds up its rows' share of the weight and bias gradients in registers as well.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight._seed_kernels import seed_argument, seed_kind, seed_value
from packlight.groupquant.grouping import Grouping, Groups
from packlight.groupquant.kernels import constants, new_pack, sized
from packlight.groupquant.pack_kernels import load_codes, store_codes
from packlight.groupquant.tile_kernels import load_tile, store_tile, tile_offsets


@triton.jit
def tile_sum(tile):
    """The sum of all elements of the eight tensors of a tile."""
    pairs = ((tile[0] + tile[1]) + (tile[2] + tile[3])) + (
        (tile[4] + tile[5]) + (tile[6] + tile[7])
    )
    return tl.sum(tl.sum(pairs, 1), 0)


@triton.jit
def load_parameter(
    p_ptr, copy_ptr, width, GIVEN: tl.constexpr, NQ: tl.constexpr, SIZE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """A parameter as a tile, which the first program copies; an empty tuple for none."""
    tile = ()
    if GIVEN:
        tile = load_tile(p_ptr, width, NQ, SIZE, FULL)
        if tl.program_id(0) == 0:
            for j in tl.static_range(8):
                store_tile(copy_ptr, tile[j], width, NQ, SIZE, j, FULL)
    return tile


@triton.jit
def norm_row(
    tile, y_ptr, weight, bias, codes_ptr, scales_ptr, rstd_ptr, seed, row, width, row_groups, eps,
    CENTER: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, SIZE: tl.constexpr,
    PARTS: tl.constexpr, BITS: tl.constexpr, CODE: tl.constexpr, SEED: tl.constexpr,
    FULL: tl.constexpr, NQ: tl.constexpr,
):  # fmt: skip
    """Output, pack and rstd of one row, a tile that is 0 past the row's end."""
    if CENTER:
        mean = tile_sum(tile) / width
        centered = ()
        for j in tl.static_range(8):
            if FULL:
                centered = centered + (tile[j] - mean,)
            else:
                inside = tile_offsets(NQ, SIZE, j) < width
                centered = centered + (tl.where(inside, tile[j] - mean, 0.0),)
        tile = centered
    squares = ()
    for j in tl.static_range(8):
        squares = squares + (tile[j] * tile[j],)
    rstd = tl.rsqrt(tile_sum(squares) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    normal = ()
    for j in tl.static_range(8):
        x_hat = tile[j] * rstd
        normal = normal + (x_hat,)
        y = x_hat
        if WEIGHT:
            y = y * weight[j]
        if BIAS:
            y = y + bias[j]
        store_tile(y_ptr + row * width, y, width, NQ, SIZE, j, FULL)
    store_codes(
        normal, codes_ptr, scales_ptr, row * row_groups, seed, row, 0, width, (), NQ, SIZE, PARTS,
        BITS, CODE, SEED, 0, None, FULL,
    )  # fmt: skip


@triton.jit
def row_gradients(
    dy, weight_ptr, codes_ptr, scales_ptr, rstd_ptr, row, width, row_groups, dweight, dbias,
    CENTER: tl.constexpr, WEIGHT: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr,
    CODE: tl.constexpr, FULL: tl.constexpr, NQ: tl.constexpr,
):  # fmt: skip
    """What comes of one row of gradients: dx, and the sums `dweight` and `dbias` so far."""
    group = row * row_groups
    x_hat = load_codes(codes_ptr, scales_ptr, group, width, NQ, SIZE, PARTS, BITS, CODE, FULL)
    rstd = tl.load(rstd_ptr + row)
    if NEED_WEIGHT:
        total = ()
        for j in tl.static_range(8):
            total = total + (tl.fma(dy[j], x_hat[j], dweight[j]),)
        dweight = total
    if NEED_BIAS:
        total = ()
        for j in tl.static_range(8):
            total = total + (dbias[j] + dy[j],)
        dbias = total
    g = dy
    if WEIGHT:
        weight = load_tile(weight_ptr, width, NQ, SIZE, FULL)
        g = ()
        for j in tl.static_range(8):
            g = g + (dy[j] * weight[j],)
    products = ()
    for j in tl.static_range(8):
        products = products + (g[j] * x_hat[j],)
    slope = tile_sum(products) / width  # of x_hat: 0 past the row's end, as g is 0 there
    mean = 0.0
    if CENTER:
        mean = tile_sum(g) / width
    dx = ()
    for j in tl.static_range(8):
        dx = dx + ((g[j] - mean - x_hat[j] * slope) * rstd,)
    return dx, dweight, dbias


@triton.jit
def store_sums(
    dweight, dbias, dweight_ptr, dbias_ptr, width, NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr, NQ: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """This program's share of the gradients of weight and bias."""
    partial = tl.program_id(0).to(tl.int64) * width
    for j in tl.static_range(8):
        if NEED_WEIGHT:
            store_tile(dweight_ptr + partial, dweight[j], width, NQ, SIZE, j, FULL)
        if NEED_BIAS:
            store_tile(dbias_ptr + partial, dbias[j], width, NQ, SIZE, j, FULL)


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
    NQ: tl.constexpr,
):
    weight = load_parameter(weight_ptr, weight_copy_ptr, width, WEIGHT, NQ, SIZE, FULL)
    bias = load_parameter(bias_ptr, bias_copy_ptr, width, BIAS, NQ, SIZE, FULL)
    row = tl.program_id(0).to(tl.int64) * steps
    end = tl.minimum(row + steps, rows)
    while row < end:
        tile = load_tile(x_ptr + row * width, width, NQ, SIZE, FULL)
        norm_row(
            tile, y_ptr, weight, bias, codes_ptr, scales_ptr, rstd_ptr, seed_value(seed, SEED), row,
            width, row_groups, eps, CENTER, WEIGHT, BIAS, SIZE, PARTS, BITS, CODE, SEED, FULL, NQ,
        )  # fmt: skip
        row += 1


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # [rows, width]
    codes_ptr,
    scales_ptr,
    rstd_ptr,  # [rows]
    weight_ptr,  # [width]
    dx_ptr,  # [rows, width]
    dweight_ptr,  # [programs, width] fp32
    dbias_ptr,  # [programs, width] fp32
    rows,
    width,
    row_groups,
    steps,
    CENTER: tl.constexpr,
    WEIGHT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    FULL: tl.constexpr,
    NQ: tl.constexpr,
):
    zero = tl.zeros([NQ, SIZE], dtype=tl.float32)
    dweight = (zero, zero, zero, zero, zero, zero, zero, zero)
    dbias = dweight
    row = tl.program_id(0).to(tl.int64) * steps
    end = tl.minimum(row + steps, rows)
    while row < end:
        dy = load_tile(dy_ptr + row * width, width, NQ, SIZE, FULL)
        dx, dweight, dbias = row_gradients(
            dy, weight_ptr, codes_ptr, scales_ptr, rstd_ptr, row, width, row_groups, dweight, dbias,
            CENTER, WEIGHT, NEED_WEIGHT, NEED_BIAS, SIZE, PARTS, BITS, CODE, FULL, NQ,
        )  # fmt: skip
        for j in tl.static_range(8):
            store_tile(dx_ptr + row * width, dx[j], width, NQ, SIZE, j, FULL)
        row += 1
    store_sums(
        dweight, dbias, dweight_ptr, dbias_ptr, width, NEED_WEIGHT, NEED_BIAS, NQ, SIZE, FULL
    )


# --- Launchers, with the signatures of norm_reference.py.

# Programs: enough to fill the device, few enough that partial sums stay small.
PROGRAMS = 132 * 8


def _launch_shape(grouping: Grouping) -> tuple[int, bool, int, int, int]:
    """Bundles a row, whether they are whole, warps, programs, and rows a program."""
    bundle = 8 * grouping.size
    bundles = -(-grouping.width // bundle)
    nq = triton.next_power_of_2(bundles)
    warps = max(1, min(16, nq * grouping.size // 64))
    programs = max(1, min(grouping.rows, PROGRAMS * 4 // warps))
    steps = -(-grouping.rows // programs)
    return nq, grouping.width == nq * bundle, warps, -(-grouping.rows // steps), steps


@functools.lru_cache(LAUNCHES)
def _forward_launch(
    grouping: Grouping, eps: float, center: bool, weight: bool, bias: bool, seed: int
) -> Launch:
    nq, full, warps, programs, steps = _launch_shape(grouping)
    return _forward_kernel.prepare(
        (programs,),
        grouping.rows,
        grouping.width,
        grouping.row_groups,
        steps,
        eps,
        CENTER=center,
        WEIGHT=weight,
        BIAS=bias,
        **constants(grouping),
        SEED=seed,
        FULL=full,
        NQ=nq,
        num_warps=warps,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = x.numel()
    rows = n // width
    grouping, size, count = sized(rows, width, *groups)
    y = torch.empty_like(x)
    codes, scales = new_pack(x, size, count)
    rstd = x.new_empty(rows, dtype=torch.float32)
    copies = [x.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias)]
    if n == 0:
        for copy, parameter in zip(copies, (weight, bias), strict=True):
            if parameter is not None:
                copy.copy_(parameter)
        return y, codes, scales, rstd, *copies
    given = (weight is not None, bias is not None, seed_kind(seed, number))
    _forward_launch(grouping, eps, center, *given)(
        x,
        y,
        x if weight is None else weight,
        x if bias is None else bias,
        codes,
        scales,
        rstd,
        seed_argument(seed, number),
        *copies,
    )
    return y, codes, scales, rstd, *copies


@functools.lru_cache(LAUNCHES)
def _backward_launch(
    grouping: Grouping, center: bool, weight: bool, need_weight: bool, need_bias: bool
) -> tuple[Launch, int]:
    """The launch, and its programs, each of which writes a partial sum."""
    nq, full, warps, programs, steps = _launch_shape(grouping)
    launch = _backward_kernel.prepare(
        (programs,),
        grouping.rows,
        grouping.width,
        grouping.row_groups,
        steps,
        CENTER=center,
        WEIGHT=weight,
        NEED_WEIGHT=need_weight,
        NEED_BIAS=need_bias,
        **constants(grouping),
        FULL=full,
        NQ=nq,
        num_warps=warps,
    )
    return launch, programs


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
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = rstd.numel(), grad_output.shape[-1]
    dx = torch.empty_like(grad_output)
    nothing = rstd.new_empty(0)
    if dx.numel() == 0:
        zeros = rstd.new_zeros(width)
        return dx, zeros if need_weight else nothing, zeros.clone() if need_bias else nothing
    grouping, *_ = sized(rows, width, *groups)
    needs = (need_weight, need_bias)
    launch, programs = _backward_launch(grouping, center, weight is not None, *needs)
    dweight = rstd.new_empty(programs, width) if need_weight else nothing
    dbias = rstd.new_empty(programs, width) if need_bias else nothing
    gamma = grad_output if weight is None else weight
    launch(grad_output, codes, scales, rstd, gamma, dx, dweight, dbias)
    return dx, dweight.sum(0) if need_weight else nothing, dbias.sum(0) if need_bias else nothing

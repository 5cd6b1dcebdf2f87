"""Triton kernels of layer_norm(dropout(x) + residual): sum, output and pack in one pass each way.

The mask is that of a dropout by itself (`packing/layout.py`): eight elements that share two draws
and a byte lie an eighth of the tensor apart. Where that is a whole number of rows, the *stripe*, a
program takes eight rows that lie a stripe apart, draws once for all of them and writes their bytes.
Other shapes take the kernels one by one.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, new, new_like, new_rows, quick
from packlight._seed_kernels import seed_argument, seed_kind, seed_value
from packlight.elementwise.kernels import rounded
from packlight.fewbit import dropout_kernels
from packlight.fewbit.dropout_kernels import draws_of
from packlight.fewbit.dropout_reference import drop_below
from packlight.fewbit.kernels import decode_backward
from packlight.groupquant.grouping import ROTATED, Grouping, Groups
from packlight.groupquant.kernels import constants, new_pack, sized
from packlight.groupquant.norm_kernels import (
    PROGRAMS,
    TRITON,
    load_parameter,
    norm,
    norm_backward,
    norm_rows,
    row_gradients,
    store_sums,
    with_sums,
)
from packlight.groupquant.rotated_norm_kernels import TURNED_PLACES
from packlight.groupquant.tile_kernels import load_tile, part, part_there, rows_tile, store_tile
from packlight.packing.layout import lanes, packed_bytes

_ROWS = 8  # a byte of the mask


@quick
@triton.jit(do_not_specialize=["mask_seed", "seed", "drop_below"])
def _forward_kernel(
    x_ptr,  # [rows, width]
    residual_ptr,  # [rows, width]
    y_ptr,  # [rows, width]
    weight_ptr,  # [width]
    bias_ptr,  # [width]
    mask_ptr,  # [stripe, width]
    codes_ptr,
    scales_ptr,
    rstd_ptr,  # [rows]
    weight_copy_ptr,  # [width]
    bias_copy_ptr,  # [width]
    mask_seed,  # a number, or a pointer to one
    seed,
    stripe,
    width,
    row_groups,
    steps,  # rows of the stripe a program
    eps,
    drop_below,
    scale,
    ROWS: tl.constexpr,  # 8, or 1 where nothing is dropped
    SUM: tl.constexpr,  # the dtype of the sum
    MASK_SEED: tl.constexpr,
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
    starts, room, in_row, bundle = rows_tile(width, 1, 1, NQ, SIZE)
    weight = load_parameter(weight_ptr, weight_copy_ptr, bundle, width, WEIGHT, True, SIZE, FULL)
    bias = load_parameter(bias_ptr, bias_copy_ptr, bundle, width, BIAS, True, SIZE, FULL)
    first = tl.program_id(0).to(tl.int64) * steps
    end = tl.minimum(first + steps, stripe)
    while first < end:
        bits = ()
        if ROWS > 1:
            below = tl.full([], drop_below, tl.uint32)
            for j in tl.static_range(8):
                place = first * width + part(starts, SIZE, j)
                draws = draws_of(seed_value(mask_seed, MASK_SEED), place)
                byte = tl.zeros([NQ, SIZE], dtype=tl.int32)
                for k in tl.static_range(8):
                    byte |= (draws[k] >= below).to(tl.int32) << k
                store_tile(mask_ptr + first * width, byte, starts, room, SIZE, j, FULL)
                bits = bits + (byte,)
        for k in range(ROWS):
            row = first + k * stripe
            x = load_tile(x_ptr + row * width, starts, room, SIZE, FULL)
            residual = load_tile(residual_ptr + row * width, starts, room, SIZE, FULL)
            tile = ()
            for j in tl.static_range(8):
                term = x[j]
                if ROWS > 1:
                    kept = ((bits[j] >> k) & 1) != 0
                    term = tl.where(kept, term * scale, term * 0.0)
                    term = rounded(term, x_ptr.dtype.element_ty)
                tile = tile + (rounded(term + residual[j], SUM),)
            norm_rows(
                tile, y_ptr, weight, weight_ptr, bias, bias_ptr, codes_ptr, scales_ptr, rstd_ptr,
                seed_value(seed, SEED), row, starts, room, in_row, bundle, width, row_groups, eps,
                True, WEIGHT, BIAS, SIZE, PARTS, BITS, CODE, SEED, FULL, 1,
                y_ptr.dtype.element_ty, None,
            )  # fmt: skip
        first += 1


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # [rows, width]
    codes_ptr,
    scales_ptr,
    rstd_ptr,  # [rows]
    weight_ptr,  # [width]
    mask_ptr,  # [stripe, width]
    dresidual_ptr,  # [rows, width]
    dx_ptr,  # [rows, width]
    dweight_ptr,  # [programs, width] fp32
    dbias_ptr,  # [programs, width] fp32
    stripe,
    width,
    row_groups,
    steps,
    scale,
    ROWS: tl.constexpr,
    APART: tl.constexpr,  # whether the gradients of x and of the residual are two tensors
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
    starts, room, in_row, bundle = rows_tile(width, 1, 1, NQ, SIZE)
    zero = tl.zeros([NQ, SIZE], dtype=tl.float32)
    dweight = (zero, zero, zero, zero, zero, zero, zero, zero)
    dbias = dweight
    first = tl.program_id(0).to(tl.int64) * steps
    end = tl.minimum(first + steps, stripe)
    while first < end:
        bits = ()
        if ROWS > 1:
            for j in tl.static_range(8):
                place = mask_ptr + first * width + part(starts, SIZE, j)
                if FULL:
                    byte = tl.load(place)
                else:
                    byte = tl.load(place, part_there(room, SIZE, j), other=0)
                bits = bits + (byte.to(tl.int32),)
        for k in range(ROWS):
            row = first + k * stripe
            dy = load_tile(dy_ptr + row * width, starts, room, SIZE, FULL)
            total, dweight, dbias = row_gradients(
                dy, weight_ptr, codes_ptr, scales_ptr, rstd_ptr, row, room, in_row, bundle, width,
                row_groups, dweight, dbias, True, WEIGHT, NEED_WEIGHT, NEED_BIAS, SIZE, PARTS, BITS,
                CODE, FULL, 1, tl.float32,
            )  # fmt: skip
            for j in tl.static_range(8):
                store_tile(dresidual_ptr + row * width, total[j], starts, room, SIZE, j, FULL)
                if APART:
                    dx = rounded(total[j], dx_ptr.dtype.element_ty)
                    if ROWS > 1:
                        dx = dx * tl.where(((bits[j] >> k) & 1) != 0, scale, 0.0)
                    store_tile(dx_ptr + row * width, dx, starts, room, SIZE, j, FULL)
        first += 1
    store_sums(
        dweight, dbias, dweight_ptr, dbias_ptr, width, NEED_WEIGHT, NEED_BIAS, NQ, SIZE, FULL, 1
    )


# --- Launchers, with the signatures of norm_reference.py.


def _is_striped(n: int, width: int, p: float) -> bool:
    """Whether the eight elements of a byte of the mask lie a whole number of rows apart."""
    return not p or (n // width % _ROWS == 0 and lanes(n) * _ROWS == n)


def _launch_shape(grouping: Grouping, rows: int) -> tuple[int, int, bool, int, int, int]:
    """The stripe, bundles a row, whether they are whole, warps, programs, and rows a program."""
    bundle = 8 * grouping.size
    nq = triton.next_power_of_2(-(-grouping.width // bundle))
    if grouping.code == ROTATED:
        places = TURNED_PLACES
    else:  # of eight rows at a time there are few programs, so each has more threads
        places = 64 if rows == 1 else 32
    warps = max(1, min(16, nq * grouping.size // places))
    stripe = grouping.rows // rows
    steps = -(-stripe // max(1, min(stripe, PROGRAMS * 4 // warps)))
    return stripe, nq, grouping.width == nq * bundle, warps, -(-stripe // steps), steps


@functools.lru_cache(LAUNCHES)
def _forward_launch(
    grouping: Grouping,
    total: torch.dtype,
    p: float,
    eps: float,
    weight: bool,
    bias: bool,
    mask_seed: int,
    seed: int,
) -> Launch:
    rows = _ROWS if p else 1
    stripe, nq, full, warps, programs, steps = _launch_shape(grouping, rows)
    return _forward_kernel.prepare(
        (programs,),
        stripe,
        grouping.width,
        grouping.row_groups,
        steps,
        eps,
        drop_below(p),
        1 / (1 - p),
        ROWS=rows,
        SUM=TRITON[total],
        MASK_SEED=mask_seed,
        WEIGHT=weight,
        BIAS=bias,
        **constants(grouping),
        SEED=seed,
        FULL=full,
        NQ=nq,
        num_warps=warps,
    )


def post_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype,
    groups: Groups,
    mask_seed: Tensor | None,
    mask_number: int,
    seed: Tensor | None,
    number: int,
) -> tuple[Tensor, ...]:
    n, width = x.numel(), x.shape[-1]
    if n == 0 or not _is_striped(n, width, p):
        mask = x.new_empty(0, dtype=torch.uint8)
        if p:
            x, mask = dropout_kernels.dropout(x, mask_seed, mask_number, p, True)
        total = (x + residual).to(dtype)
        return *norm(total, width, weight, bias, eps, True, groups, seed, number), mask
    grouping, size, count = sized(n // width, width, *groups)
    y = new_like(x, dtype)
    codes, scales = new_pack(x, size, count)
    rstd = new(x, n // width, torch.float32)
    copies = [new(x, 0, x.dtype) if each is None else new_like(each) for each in (weight, bias)]
    mask = new(x, packed_bytes(n, 1) if p else 0, torch.uint8)
    given = (weight is not None, bias is not None)
    seeds = (seed_kind(mask_seed, mask_number) if p else 0, seed_kind(seed, number))
    total_dtype = torch.promote_types(x.dtype, residual.dtype)
    _forward_launch(grouping, total_dtype, p, eps, *given, *seeds)(
        x,
        residual,
        y,
        x if weight is None else weight,
        x if bias is None else bias,
        mask,
        codes,
        scales,
        rstd,
        *copies,
        seeds=(seed_argument(mask_seed, mask_number), seed_argument(seed, number)),
    )
    return y, codes, scales, rstd, *copies, mask


@functools.lru_cache(LAUNCHES)
def _backward_launch(
    grouping: Grouping, p: float, apart: bool, weight: bool, need_weight: bool, need_bias: bool
) -> tuple[Launch, int]:
    """The launch, and its programs, each of which writes a partial sum."""
    rows = _ROWS if p else 1
    stripe, nq, full, warps, programs, steps = _launch_shape(grouping, rows)
    launch = _backward_kernel.prepare(
        (programs,),
        stripe,
        grouping.width,
        grouping.row_groups,
        steps,
        1 / (1 - p),
        ROWS=rows,
        APART=apart,
        WEIGHT=weight,
        NEED_WEIGHT=need_weight,
        NEED_BIAS=need_bias,
        **constants(grouping),
        FULL=full,
        NQ=nq,
        num_warps=warps,
    )
    return launch, programs


@functools.lru_cache(LAUNCHES)
def _summed_launch(
    grouping: Grouping, p: float, apart: bool, weight: bool, need_weight: bool, need_bias: bool
) -> tuple[Launch, int]:
    """`_backward_launch`, and behind it the sums over its programs."""
    launch, programs = _backward_launch(grouping, p, apart, weight, need_weight, need_bias)
    return with_sums(launch, programs, grouping.width, 8, need_weight, need_bias), programs


def post_norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    mask: Tensor,
    p: float,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    need_weight: bool,
    need_bias: bool,
    groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:
    n, width = grad_output.numel(), grad_output.shape[-1]
    count = need_weight + need_bias
    apart = p > 0 or dtype != residual_dtype
    if n == 0 or not _is_striped(n, width, p):
        total, *sums = norm_backward(
            grad_output, codes, scales, rstd, weight, True, need_weight, need_bias, groups
        )
        dx = total.to(dtype) if apart else rstd.new_empty(0)
        if p:
            dx = decode_backward(dx, mask, 1, (0.0, 1 / (1 - p)), False, dx.stride())
        return dx, total.to(residual_dtype), torch.cat(sums).view(count, width)
    dresidual = new_like(grad_output, residual_dtype)
    dx = new_like(grad_output, dtype) if apart else new(rstd, 0, rstd.dtype)
    grouping, *_ = sized(n // width, width, *groups)
    needs = (need_weight, need_bias)
    launch, programs = _summed_launch(grouping, p, apart, weight is not None, *needs)
    sums = new_rows(rstd, count, width, rstd.dtype)
    # What is not needed is not written.
    parts = [new_rows(rstd, programs, width, rstd.dtype) for _ in range(count)] or [sums]
    rows = sums.unbind() or (sums,)
    launch(
        grad_output,
        codes,
        scales,
        rstd,
        grad_output if weight is None else weight,
        mask,
        dresidual,
        dx,
        parts[0],
        parts[-1],
        rows[0],
        rows[-1],
    )
    return dx, dresidual, sums

"""Triton kernels that pack a tensor, give it back, and do the work of an activation meanwhile.

`pack_kernels.py` has the pack of a tile, which they share.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight import _torch
from packlight._launch import LAUNCHES, Launch, new, new_like, quick
from packlight._seed_kernels import seed_argument, seed_kind, seed_value
from packlight.elementwise.derivative_kernels import DERIVATIVE
from packlight.elementwise.kernels import DIGITS, FORWARD, clamp
from packlight.elementwise.limits import limits, pack_limits
from packlight.groupquant.grouping import ROTATED, Grouping, Groups
from packlight.groupquant.minmax_kernels import KEPT, LOST, LOWER, PLAIN, REPLACES, UPPER
from packlight.groupquant.pack_kernels import load_codes, packed_tile, store_codes
from packlight.groupquant.tile_kernels import (
    ask_for,
    load_columns,
    load_raw_columns,
    load_raw_tile,
    load_raw_whole,
    plus,
    row_tile,
    store_whole,
    to_float32,
)
from packlight.packing.layout import dense_stride, laid_out, write_back

HALF_MAX = tl.constexpr(65504.0)
TURNED_CODE = tl.constexpr(ROTATED)


@quick
@triton.jit(do_not_specialize=["seed"])
def _quantize_kernel(
    x_ptr,  # [rows, width]
    y_ptr,  # [rows, width]
    shift_ptr,  # of SHIFT groups
    codes_ptr,  # [rows, row_groups, SIZE]
    scales_ptr,  # [rows, row_groups]
    seed,  # a number, or a pointer to one
    width,
    row_groups,
    tiles,  # a row
    a,
    b,
    lowest,  # and the rest of `Limits`
    highest,
    below,
    above,
    edge,
    FORWARD: tl.constexpr,  # None: nothing but the pack
    SHIFT: tl.constexpr,  # 0: the pack is of x itself
    PERIOD: tl.constexpr,  # groups after which the shift begins again
    DIGITS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    SEED: tl.constexpr,
    LIMITED: tl.constexpr,
    GREATEST: tl.constexpr,
    FULL: tl.constexpr,
    ONE_ROW: tl.constexpr,
    NQ: tl.constexpr,
):
    """Pack of x, or of x less a shift, and y = f(x) in the same pass."""
    if ONE_ROW:
        row, tile = tl.full((), 0, tl.int64), tl.program_id(0)
    else:
        row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    bundle = tl.full((), NQ, tl.int64) * tile
    start = row * width + bundle * (8 * SIZE)
    starts, room = row_tile(width - bundle * (8 * SIZE), NQ, SIZE)
    bundle += tl.arange(0, NQ)
    raw = load_raw_tile(x_ptr + start, starts, room, SIZE, FULL)
    if SHIFT > 0:
        shift = load_raw_columns(shift_ptr, bundle, room, PERIOD, SHIFT, SIZE, PARTS, FULL)
        less = ()
        for p in tl.static_range(8):
            less = less + (plus(raw[p], shift[p], -1).to(x_ptr.dtype.element_ty),)
        raw = less
    if FORWARD is not None:
        y = ()
        for p in tl.static_range(8):
            y = y + (FORWARD(to_float32(raw[p]), a, b, DIGITS),)
        store_whole(y_ptr + start, y, starts, room, SIZE, CODE == TURNED_CODE, FULL)
    within = (lowest, highest, below, above, edge)
    store_codes(
        packed_tile(raw, x_ptr.dtype.element_ty, CODE), codes_ptr, scales_ptr,
        row * row_groups + bundle * (8 // PARTS), seed_value(seed, SEED),
        tl.broadcast_to(row, [NQ]), bundle, room, within, SIZE, PARTS, BITS, CODE, SEED, LIMITED,
        GREATEST, FULL,
    )  # fmt: skip


@quick
@triton.jit
def _dequantize_kernel(
    codes_ptr,  # [rows, row_groups, SIZE]
    scales_ptr,  # [rows, row_groups]
    y_ptr,  # [rows, width]
    weight_ptr,  # [width], or of PERIOD groups
    bias_ptr,  # of BIAS groups
    width,
    row_groups,
    tiles,
    a,
    b,
    FORWARD: tl.constexpr,  # None: the value itself
    DIGITS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,  # 0: none
    PERIOD: tl.constexpr,  # groups after which weight and bias begin again
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    FULL: tl.constexpr,
    ONE_ROW: tl.constexpr,
    NQ: tl.constexpr,
):
    """f(v) or v weight + bias of the packed values v."""
    if ONE_ROW:
        row = tl.full((), 0, tl.int64)
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
            _dequantize_tile(
                codes_ptr, scales_ptr, y_ptr, weight_ptr, bias_ptr, row, tile, width, row_groups,
                a, b, FORWARD, DIGITS, WEIGHT, BIAS, PERIOD, SIZE, PARTS, BITS, CODE, FULL, NQ,
            )  # fmt: skip
    else:
        row, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
        _dequantize_tile(
            codes_ptr, scales_ptr, y_ptr, weight_ptr, bias_ptr, row, tile, width, row_groups,
            a, b, FORWARD, DIGITS, WEIGHT, BIAS, PERIOD, SIZE, PARTS, BITS, CODE, FULL, NQ,
        )  # fmt: skip


@triton.jit
def _dequantize_tile(
    codes_ptr, scales_ptr, y_ptr, weight_ptr, bias_ptr, row, tile, width, row_groups, a, b,
    FORWARD: tl.constexpr, DIGITS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    PERIOD: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr,
    CODE: tl.constexpr, FULL: tl.constexpr, NQ: tl.constexpr,
):  # fmt: skip
    bundle = tl.full((), NQ, tl.int64) * tile
    start = row * width + bundle * (8 * SIZE)
    starts, room = row_tile(width - bundle * (8 * SIZE), NQ, SIZE)
    bundle += tl.arange(0, NQ)
    group = row * row_groups + bundle * (8 // PARTS)
    NARROW: tl.constexpr = y_ptr.dtype.element_ty == tl.bfloat16
    tile = load_codes(
        codes_ptr, scales_ptr, group, room, SIZE, PARTS, BITS, CODE, FULL,
        PLAIN if FORWARD is None else LOST, NARROW,
    )  # fmt: skip
    if WEIGHT:
        weight = load_columns(weight_ptr, bundle, room, PERIOD, SIZE, PARTS, FULL)
    if BIAS > 0:
        bias = load_raw_columns(bias_ptr, bundle, room, PERIOD, BIAS, SIZE, PARTS, FULL)
    out = ()
    for p in tl.static_range(8):
        y = tile[p]
        if FORWARD is not None:
            y = FORWARD(to_float32(y), a, b, DIGITS)
        if WEIGHT:
            y = to_float32(y) * weight[p]
        if BIAS > 0:
            y = plus(y, bias[p])
        if FORWARD is None and y_ptr.dtype.element_ty == tl.float16:
            y = clamp(y, -HALF_MAX, HALF_MAX)  # the other dtypes hold whatever a pack does
        out = out + (y,)
    store_whole(y_ptr + start, out, starts, room, SIZE, CODE == TURNED_CODE, FULL)


@quick
@triton.jit
def _activation_backward_kernel(
    dy_ptr,  # [n]
    codes_ptr,
    scales_ptr,
    dx_ptr,  # [n]
    width,  # n
    a,
    b,
    DERIVATIVE: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    FULL: tl.constexpr,
    AHEAD: tl.constexpr,
    NQ: tl.constexpr,
):
    """dx = dy f'(x~)."""
    bundle = tl.program_id(0).to(tl.int64) * NQ
    start = bundle * (8 * SIZE)
    starts, room = row_tile(width - start, NQ, SIZE)
    dy = load_raw_whole(dy_ptr + start, starts, room, SIZE, CODE == TURNED_CODE, FULL)
    if AHEAD > 0:
        later = tl.minimum(tl.program_id(0) + AHEAD, tl.num_programs(0) - 1).to(tl.int64) * NQ
        ask_for(dy_ptr + later * (8 * SIZE), NQ * 8 * SIZE)
        ask_for(codes_ptr + later * (SIZE * BITS), NQ * SIZE * BITS)
    bundle += tl.arange(0, NQ)
    group = bundle * (8 // PARTS)
    NARROW: tl.constexpr = dx_ptr.dtype.element_ty == tl.bfloat16
    tile = load_codes(
        codes_ptr, scales_ptr, group, room, SIZE, PARTS, BITS, CODE, FULL, KEPT, NARROW
    )
    dx = ()
    for p in tl.static_range(8):
        d = to_float32(dy[p]) * DERIVATIVE(to_float32(tile[p]), a, b)
        dx = dx + (d.to(dx_ptr.dtype.element_ty),)
    store_whole(dx_ptr + start, dx, starts, room, SIZE, CODE == TURNED_CODE, FULL)


# --- Launchers, with the signatures of reference.py.


class Setting(NamedTuple):
    """Places a program, eight elements each, and its warps."""

    block: int
    warps: int


# 64 elements a thread take the fewest instructions for each, and most registers: with 32 more
# threads run at once. The fastest of 2^27 elements on an H200.
PACK = Setting(1024, 4)
ACTIVATION = Setting(512, 4)
UNPACK = Setting(512, 4)
REBUILD = Setting(1024, 4)  # through a function
BACKWARD = Setting(1024, 4)
# Of whatever packs or reads rotated groups: a warp has what one product on tensor cores takes, and
# waits for few others.
TURNED = Setting(512, 2)
TURNED_READER = Setting(256, 1)  # of readers, which have fewer instructions


def setting_for(grouping: Grouping, plain: Setting, reads: bool = False) -> Setting:
    """`plain`, or that of rotated groups."""
    if grouping.code != ROTATED:
        return plain
    return TURNED_READER if reads else TURNED


def constants(grouping: Grouping) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {
        "SIZE": grouping.size,
        "PARTS": grouping.parts,
        "BITS": grouping.bits,
        "CODE": grouping.code,
    }


def tile_of(grouping: Grouping, block: int) -> tuple[int, int, bool]:
    """Bundles a tile of `block` places, tiles a row, and whether every tile is whole."""
    bundle = 8 * grouping.size
    bundles = -(-grouping.width // bundle)
    nq = max(1, min(block // grouping.size, triton.next_power_of_2(bundles)))
    return nq, -(-bundles // nq), grouping.width % (nq * bundle) == 0


def one_row(grouping: Grouping) -> Grouping:
    """The same groups as those of one row, where none ends with a row."""
    if grouping.width % grouping.group_size:
        return grouping
    return grouping._replace(rows=1, width=grouping.rows * grouping.width)


# Of kernels of rotated groups of bfloat16 numbers, which take up to 16 more where they may: with
# fewer, more warps run at once. A pack .864 of a copy for .839; SiLU forward .332 ms for .360, and
# backward .336 for .366.
PACK_REGISTERS, ACTIVATION_REGISTERS, BACKWARD_REGISTERS = 64, 72, 96
CUDA = torch.version.hip is None
# Tiles that a program reads at most, one after the other: what is the same for all is computed
# once, and with more of them the last programs are waited for. And programs for a whole device.
SHARE = 2
# How many tiles ahead the programs of a backward pass have brought near: half as many as run at
# once (SiLU .331 ms; .343 with twice as many, .345 with half, .365 with none). Those that pack, or
# read a pack alone, have nothing of it, or are slower.
AHEAD = 1320
PROGRAMS = 1 << 13


@functools.lru_cache(LAUNCHES)
def sized(rows: int, width: int, *groups: int) -> tuple[Grouping, int, int]:
    """A grouping, and how many bytes of codes and how many words it has."""
    grouping = Grouping(rows, width, *groups)
    return grouping, grouping.code_bytes, grouping.words


def new_pack(x: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Codes and words, as many as `sized` says, on the device of `x`."""
    return new(x, size, torch.uint8), new(x, count, torch.int32)


def greatest(dtype: torch.dtype) -> float:
    """The greatest number that a code of such a tensor may stand for."""
    return limits(dtype).highest


def limited(dtype: torch.dtype, name: str = "", parameters: Sequence[float] = ()) -> int:
    """What the limits of a pack of such a tensor ask for: LOWER, UPPER and REPLACES."""
    within, greatest = limits(dtype, name, parameters), torch.finfo(dtype).max
    lower = within.lowest > -greatest or within.below == within.below
    upper = within.highest < greatest or within.above == within.above
    replaces = within.below > within.lowest or within.above < within.highest
    lower, upper = (side or within.edge < math.inf for side in (lower, upper))
    return LOWER.value * lower + UPPER.value * upper + REPLACES.value * replaces


def _two(parameters: Sequence[float]) -> tuple[float, float]:
    if not parameters:
        return 0.0, 0.0
    a, b = (*parameters, 0.0)[:2]
    return float(a), float(b)


def bounded(grouping: Grouping, dtype: torch.dtype, full: bool, registers: int) -> dict[str, int]:
    """A bound of registers as an option of a launch, where it is known to help."""
    helps = CUDA and grouping.code == ROTATED and dtype == torch.bfloat16 and full
    return {"maxnreg": registers} if helps else {}


@functools.lru_cache(LAUNCHES)
def _quantize_launch(
    grouping: Grouping, dtype: torch.dtype, name: str, parameters: tuple[float, ...],
    seed: int, shift: int = 0, period: int = 0,
) -> Launch:  # fmt: skip
    """`shift`: groups of one, which begins again after so many as `period` says."""
    block, warps = setting_for(grouping, ACTIVATION if name else PACK)
    if grouping.code == ROTATED:  # whose random numbers are those of groups, not of rows
        grouping = one_row(grouping)
    nq, tiles, full = tile_of(grouping, block)
    registers = ACTIVATION_REGISTERS if name else PACK_REGISTERS
    return _quantize_kernel.prepare(
        (grouping.rows * tiles,),
        grouping.width,
        grouping.row_groups,
        tiles,
        *_two(parameters),
        *pack_limits(dtype, name, parameters, grouping.bits),
        FORWARD=FORWARD[name] if name else None,
        SHIFT=shift,
        PERIOD=period,
        DIGITS=DIGITS[dtype],
        **constants(grouping),
        SEED=seed,
        LIMITED=limited(dtype, name, parameters),
        GREATEST=greatest(dtype),
        FULL=full,
        ONE_ROW=grouping.rows == 1,
        NQ=nq,
        num_warps=warps,
        **bounded(grouping, dtype, full, registers),
    )


def _pack(
    x: Tensor, y: Tensor | None, name: str, parameters: Sequence[float], width: int,
    groups: Groups, seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n = x.numel()
    grouping, size, count = sized(n // width if width else 0, width, *groups)
    codes, scales = new_pack(x, size, count)
    if n == 0:
        return codes, scales
    launch = _quantize_launch(grouping, x.dtype, name, tuple(parameters), seed_kind(seed, number))
    launch(x, x if y is None else y, x, codes, scales, seeds=(seed_argument(seed, number),))
    return codes, scales


def quantize(
    x: Tensor, stride: Sequence[int], groups: Groups, seed: Tensor | None, number: int
) -> tuple[Tensor, Tensor]:
    return _pack(laid_out(x, stride), None, "", (), x.numel(), groups, seed, number)


def quantize_less(
    x: Tensor, stride: Sequence[int], shift: Tensor, width: int, groups: Groups,
    seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, size = x.numel(), groups[1]
    grouping, *counts = sized(1 if n else 0, n, *groups)
    codes, scales = new_pack(x, *counts)
    if n:
        rows = shift.numel() // size, width // size
        launch = _quantize_launch(grouping, x.dtype, "", (), seed_kind(seed, number), *rows)
        dense = laid_out(x, stride)
        launch(dense, dense, shift, codes, scales, seeds=(seed_argument(seed, number),))
    return codes, scales


@functools.lru_cache(LAUNCHES)
def _dequantize_launch(
    grouping: Grouping,
    dtype: torch.dtype,
    name: str,
    a: float,
    b: float,
    weight: bool,
    bias: int,  # groups
) -> Launch:
    block, warps = setting_for(grouping, REBUILD if name else UNPACK, reads=True)
    period = grouping.row_groups
    grouping = one_row(grouping)
    nq, tiles, full = tile_of(grouping, block)
    alone = grouping.code == ROTATED and grouping.rows == 1
    share = max(1, min(SHARE, tiles // PROGRAMS)) if alone else 1
    return _dequantize_kernel.prepare(
        (grouping.rows * -(-tiles // share),),
        grouping.width,
        grouping.row_groups,
        tiles,
        a,
        b,
        FORWARD=FORWARD[name] if name else None,
        DIGITS=DIGITS[dtype],
        WEIGHT=weight,
        BIAS=bias,
        PERIOD=period if weight or bias else 0,
        **constants(grouping),
        FULL=full,
        ONE_ROW=alone,
        NQ=nq,
        num_warps=warps,
    )


def dequantize(
    codes: Tensor,
    scales: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    width: int,
    groups: Groups,
    dtype: torch.dtype,
    name: str,
    parameters: Sequence[float],
    weight: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    y = _torch.empty(codes, tuple(shape), tuple(stride), dtype)
    n = y.numel()
    if n == 0:
        return y
    grouping, *_ = sized(n // width, width, *groups)
    given = (weight is not None, 0 if bias is None else -(-bias.numel() // groups[1]))
    launch = _dequantize_launch(grouping, dtype, name, *_two(parameters), *given)
    launch(codes, scales, y, y if weight is None else weight, y if bias is None else bias)
    return y


def activation(
    x: Tensor, name: str, parameters: Sequence[float], groups: Groups,
    seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = new_like(x)
    n = x.numel()
    return y, *_pack(laid_out(x, y.stride()), y, name, parameters, n, groups, seed, number)


def activation_(
    x: Tensor, name: str, parameters: Sequence[float], groups: Groups,
    seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dense = laid_out(x, dense_stride(x))
    pack = _pack(dense, dense, name, parameters, x.numel(), groups, seed, number)
    write_back(x, dense)
    return pack


@functools.lru_cache(LAUNCHES)
def _activation_backward_launch(
    grouping: Grouping, dtype: torch.dtype, name: str, a: float, b: float
) -> Launch:
    block, warps = setting_for(grouping, BACKWARD, reads=True)
    nq, tiles, full = tile_of(grouping, block)
    return _activation_backward_kernel.prepare(
        (tiles,),
        grouping.width,
        a,
        b,
        DERIVATIVE=DERIVATIVE[name],
        **constants(grouping),
        FULL=full,
        AHEAD=AHEAD if grouping.code == ROTATED and full else 0,
        NQ=nq,
        num_warps=warps,
        **bounded(grouping, dtype, full, BACKWARD_REGISTERS),
    )


def activation_backward(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    name: str,
    parameters: Sequence[float],
    stride: Sequence[int],
    groups: Groups,
) -> Tensor:
    dx = _torch.empty(grad_output, tuple(grad_output.shape), tuple(stride), grad_output.dtype)
    _differentiate(laid_out(grad_output, stride), codes, scales, dx, name, parameters, groups)
    return dx


def activation_backward_(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    name: str,
    parameters: Sequence[float],
    groups: Groups,
) -> None:
    dense = laid_out(grad_output, dense_stride(grad_output))
    _differentiate(dense, codes, scales, dense, name, parameters, groups)
    write_back(grad_output, dense)


def _differentiate(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    dx: Tensor,
    name: str,
    parameters: Sequence[float],
    groups: Groups,
) -> None:
    """dx, which may be dy itself."""
    n = dx.numel()
    if n:
        grouping, *_ = sized(1, n, *groups)
        launch = _activation_backward_launch(grouping, dx.dtype, name, *_two(parameters))
        launch(dy, codes, scales, dx)

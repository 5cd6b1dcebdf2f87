"""Triton kernels of gated units: the product and the packs of both factors in one pass."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight import _torch
from packlight._launch import LAUNCHES, Launch, new_like, quick
from packlight._seed_kernels import seed_argument, seed_kind, seed_value
from packlight.elementwise.derivative_kernels import DERIVATIVE
from packlight.elementwise.kernels import DIGITS, FORWARD
from packlight.elementwise.limits import limits, pack_limits
from packlight.groupquant.draw_kernels import other_seed
from packlight.groupquant.grouping import ROTATED, Grouping, Groups
from packlight.groupquant.kernels import (
    TURNED_CODE,
    Setting,
    constants,
    greatest,
    limited,
    new_pack,
    setting_for,
    sized,
    tile_of,
)
from packlight.groupquant.minmax_kernels import KEPT, LOST, PLAIN, REPLACES
from packlight.groupquant.pack_kernels import load_codes, packed_tile, store_codes
from packlight.groupquant.tile_kernels import (
    ask_for,
    load_raw_tile,
    load_raw_whole,
    row_tile,
    store_whole,
    to_float32,
)
from packlight.packing.layout import laid_out


@quick
@triton.jit(do_not_specialize=["seed"])
def _gated_kernel(
    gate_ptr,  # [n]
    up_ptr,  # [n]
    y_ptr,  # [n]
    gate_codes_ptr,
    gate_scales_ptr,
    up_codes_ptr,
    up_scales_ptr,
    seed,  # a number, or a pointer to one
    width,  # n
    lowest,  # and the rest of `Limits`, for gate
    highest,
    below,
    above,
    edge,
    up_lowest,  # for up
    up_highest,
    up_below,
    up_above,
    up_edge,
    FORWARD: tl.constexpr,
    DIGITS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    SEED: tl.constexpr,
    LIMITED: tl.constexpr,
    UP_LIMITED: tl.constexpr,
    GREATEST: tl.constexpr,
    FULL: tl.constexpr,
    NQ: tl.constexpr,
):
    """y = f(gate) up, and the packs of gate and up."""
    bundle = tl.program_id(0).to(tl.int64) * NQ
    start = bundle * (8 * SIZE)
    starts, room = row_tile(width - start, NQ, SIZE)
    bundle += tl.arange(0, NQ)
    group = bundle * (8 // PARTS)
    key, row = seed_value(seed, SEED), tl.zeros([NQ], dtype=tl.int64)
    gate = load_raw_tile(gate_ptr + start, starts, room, SIZE, FULL)
    # One after the other: registers for both would leave room for few programs at once.
    factors = ()
    for p in tl.static_range(8):
        # torch rounds f(gate) to the tensors' dtype before it multiplies.
        factors = factors + (
            FORWARD(to_float32(gate[p]), 0.0, 0.0, DIGITS).to(y_ptr.dtype.element_ty),
        )
    within = (lowest, highest, below, above, edge)
    store_codes(
        packed_tile(gate, gate_ptr.dtype.element_ty, CODE), gate_codes_ptr, gate_scales_ptr, group,
        key, row, bundle, room, within, SIZE, PARTS,
        BITS, CODE, SEED, LIMITED, GREATEST, FULL,
    )  # fmt: skip
    up = load_raw_tile(up_ptr + start, starts, room, SIZE, FULL)
    y = ()
    for p in tl.static_range(8):
        y = y + (to_float32(factors[p]) * to_float32(up[p]),)
    store_whole(y_ptr + start, y, starts, room, SIZE, CODE == TURNED_CODE, FULL)
    within = (up_lowest, up_highest, up_below, up_above, up_edge)
    store_codes(
        packed_tile(up, up_ptr.dtype.element_ty, CODE), up_codes_ptr, up_scales_ptr, group,
        other_seed(key), row, bundle, room, within, SIZE, PARTS, BITS, CODE, SEED, UP_LIMITED,
        GREATEST, FULL,
    )  # fmt: skip


@quick
@triton.jit
def _gated_backward_kernel(
    dy_ptr,  # [n], with DERIVATIVE
    gate_codes_ptr,
    gate_scales_ptr,
    up_codes_ptr,
    up_scales_ptr,
    dgate_ptr,  # [n], with DERIVATIVE
    dup_ptr,  # [n], or the rebuilt product without DERIVATIVE
    width,  # n
    FORWARD: tl.constexpr,
    DERIVATIVE: tl.constexpr,  # None: rebuild f(gate~) up~
    THROUGH: tl.constexpr,
    REPLACED: tl.constexpr,  # the gate's pack may hold numbers in place of infinities
    DIGITS: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    BITS: tl.constexpr,
    CODE: tl.constexpr,
    FULL: tl.constexpr,
    AHEAD: tl.constexpr,
    NQ: tl.constexpr,
):
    """dgate = dy up~ f'(gate~) and dup = dy f(gate~), or the product f(gate~) up~ itself.

    Unless THROUGH, dy up~ in place of dgate.
    """
    bundle = tl.program_id(0).to(tl.int64) * NQ
    start = bundle * (8 * SIZE)
    starts, room = row_tile(width - start, NQ, SIZE)
    bundle += tl.arange(0, NQ)
    group = bundle * (8 // PARTS)
    if AHEAD > 0:
        later = tl.minimum(tl.program_id(0) + AHEAD, tl.num_programs(0) - 1).to(tl.int64) * NQ
        if DERIVATIVE is not None:
            ask_for(dy_ptr + later * (8 * SIZE), NQ * 8 * SIZE)
        ask_for(gate_codes_ptr + later * (SIZE * BITS), NQ * SIZE * BITS)
        ask_for(up_codes_ptr + later * (SIZE * BITS), NQ * SIZE * BITS)
    if DERIVATIVE is not None:
        dy = load_raw_whole(dy_ptr + start, starts, room, SIZE, CODE == TURNED_CODE, FULL)
    NARROW: tl.constexpr = dup_ptr.dtype.element_ty == tl.bfloat16
    factor = load_codes(
        gate_codes_ptr, gate_scales_ptr, group, room, SIZE, PARTS, BITS, CODE, FULL, LOST, NARROW
    )
    gate = factor
    if REPLACED and DERIVATIVE is not None:
        gate = load_codes(
            gate_codes_ptr, gate_scales_ptr, group, room, SIZE, PARTS, BITS, CODE, FULL, KEPT,
            NARROW,
        )  # fmt: skip
    up = load_codes(
        up_codes_ptr, up_scales_ptr, group, room, SIZE, PARTS, BITS, CODE, FULL, PLAIN, NARROW
    )
    # By parts, which are widened as they are needed: there are registers for the rest.
    first, second = (), ()
    for p in tl.static_range(8):
        f = FORWARD(to_float32(factor[p]), 0.0, 0.0, DIGITS)
        if DERIVATIVE is None:
            result = f * to_float32(up[p])
        else:
            d = to_float32(dy[p])
            dgate = d * to_float32(up[p])
            if THROUGH:
                dgate *= DERIVATIVE(to_float32(gate[p]), 0.0, 0.0)
            first = first + (dgate.to(dup_ptr.dtype.element_ty),)
            result = d * f
        second = second + (result.to(dup_ptr.dtype.element_ty),)
    if DERIVATIVE is not None:
        store_whole(dgate_ptr + start, first, starts, room, SIZE, CODE == TURNED_CODE, FULL)
    store_whole(dup_ptr + start, second, starts, room, SIZE, CODE == TURNED_CODE, FULL)


GATED = Setting(1024, 8)
GATED_BACKWARD = Setting(1024, 8)
PRODUCT = Setting(1024, 4)
# As in `kernels.py`. At 4 and 2 bits the backward pass takes .344 and .302 ms for .375 and .358 of
# none, .363 and .310 with twice as many; the product .186 and .162 for .193 and .167.
AHEAD, PRODUCT_AHEAD = 256, 512


@functools.lru_cache(LAUNCHES)
def _gated_launch(grouping: Grouping, dtype: torch.dtype, name: str, seed: int) -> Launch:
    block, warps = setting_for(grouping, GATED)
    nq, tiles, full = tile_of(grouping, block)
    return _gated_kernel.prepare(
        (tiles,),
        grouping.width,
        *pack_limits(dtype, name, bits=grouping.bits),
        *limits(dtype),
        FORWARD=FORWARD[name],
        DIGITS=DIGITS[dtype],
        **constants(grouping),
        SEED=seed,
        LIMITED=limited(dtype, name),
        UP_LIMITED=limited(dtype),
        GREATEST=greatest(dtype),
        FULL=full,
        NQ=nq,
        num_warps=warps,
    )


def gated(
    gate: Tensor, up: Tensor, name: str, groups: Groups, seed: Tensor | None, number: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = new_like(gate)
    n = y.numel()
    grouping, size, count = sized(1, n, *groups)
    gate_pack, up_pack = new_pack(gate, size, count), new_pack(gate, size, count)
    if n:
        _gated_launch(grouping, gate.dtype, name, seed_kind(seed, number))(
            laid_out(gate, y.stride()),
            laid_out(up, y.stride()),
            y,
            *gate_pack,
            *up_pack,
            seeds=(seed_argument(seed, number),),
        )
    return y, *gate_pack, *up_pack


@functools.lru_cache(LAUNCHES)
def _gated_backward_launch(
    grouping: Grouping, dtype: torch.dtype, name: str, product: bool, through: bool
) -> Launch:
    block, warps = setting_for(grouping, PRODUCT if product else GATED_BACKWARD)
    nq, tiles, full = tile_of(grouping, block)
    return _gated_backward_kernel.prepare(
        (tiles,),
        grouping.width,
        FORWARD=FORWARD[name],
        DERIVATIVE=None if product else DERIVATIVE[name],
        THROUGH=through,
        REPLACED=bool(limited(dtype, name) & REPLACES.value),
        DIGITS=DIGITS[dtype],
        **constants(grouping),
        FULL=full,
        AHEAD=(PRODUCT_AHEAD if product else AHEAD) if grouping.code == ROTATED and full else 0,
        NQ=nq,
        num_warps=warps,
    )


def gated_backward(
    grad_output: Tensor,
    gate_codes: Tensor,
    gate_scales: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    name: str,
    stride: Sequence[int],
    groups: Groups,
    through: bool,
) -> tuple[Tensor, Tensor]:
    shape, stride = tuple(grad_output.shape), tuple(stride)
    dgate = _torch.empty(grad_output, shape, stride, grad_output.dtype)
    dup = _torch.empty(grad_output, shape, stride, grad_output.dtype)
    n = dgate.numel()
    packs = (gate_codes, gate_scales, up_codes, up_scales)
    if n:
        grouping, *_ = sized(1, n, *groups)
        launch = _gated_backward_launch(grouping, dgate.dtype, name, False, through)
        launch(laid_out(grad_output, stride), *packs, dgate, dup)
    return dgate, dup


def gated_backward_(
    grad_output: Tensor,
    gate_codes: Tensor,
    gate_scales: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    name: str,
    groups: Groups,
) -> Tensor:
    dup = new_like(grad_output)
    packs = (gate_codes, gate_scales, up_codes, up_scales)
    if n := dup.numel():
        grouping, *_ = sized(1, n, *groups)
        launch = _gated_backward_launch(grouping, dup.dtype, name, False, True)
        # A program has read its part of the gradient before it writes there.
        launch(grad_output, *packs, grad_output, dup)
    return dup


def gated_product(
    gate_codes: Tensor,
    gate_scales: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    name: str,
    shape: Sequence[int],
    stride: Sequence[int],
    groups: Groups,
    dtype: torch.dtype,
) -> Tensor:
    y = _torch.empty(gate_codes, tuple(shape), tuple(stride), dtype)
    n = y.numel()
    packs = (gate_codes, gate_scales, up_codes, up_scales)
    if n:
        grouping, *_ = sized(1, n, *groups)
        launch = _gated_backward_launch(grouping, dtype, name, True, True)
        launch(y, *packs, y, y)
    return y

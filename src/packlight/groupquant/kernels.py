"""Triton kernels of group quantisation: building blocks for tiles of groups, and what uses them.

A tile is NQ bundles of a row. A bundle is 8 / PARTS consecutive groups, so that a thread holds
eight elements for each byte position, whatever the bits: `parts` elements of one byte in each of
8 / parts groups. Element (q, s, p, i) of a tile lies ((q SETS + s) PARTS + p) SIZE + i behind its
start. The eight random numbers of a byte position are one call of Philox.

float32 numbers from 2^(23 - f) to 2^(24 - f) lie 2^-f apart. So (x - low) / step + 2^(23 - f) + u
has the fraction in its low f bits and the code, floor((x - low) / step + u), right above them. The
quotient is rounded to a multiple of 2^-f thereby, and so is u: the expected code is that multiple.

Differences are taken of halves, at the price of whole ones, which may overflow.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight._philox import PAIR_MULTIPLIER, PAIR_WEYL
from packlight._seed_kernels import seed_argument, seed_kind, seed_value
from packlight.elementwise.derivative_kernels import DERIVATIVE
from packlight.elementwise.kernels import DIGITS, FORWARD, PTX, clamp
from packlight.elementwise.limits import limits
from packlight.groupquant.grouping import Grouping, Groups
from packlight.groupquant.reference import ROUNDS, SIGN, TINY
from packlight.packing.layout import laid_out

INFINITY = tl.constexpr(float("inf"))
WHOLE = tl.constexpr(8388608.0)
LEAST_STEP = tl.constexpr(TINY)
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
MULTIPLIER = tl.constexpr(PAIR_MULTIPLIER)
WEYL = tl.constexpr(PAIR_WEYL)
SIGN_BIT = tl.constexpr(SIGN)
HALF_MAX = tl.constexpr(65504.0)

# What there is to be done of limits, or-ed: values beyond them, and infinities to replace.
LOWER = tl.constexpr(1)
UPPER = tl.constexpr(2)
REPLACES = tl.constexpr(4)

# What `load_codes` makes of groups with numbers in place of infinities: what a derivative reads,
# NaN for what reads the function, and nothing where there are none.
KEPT = tl.constexpr(0)
LOST = tl.constexpr(1)
PLAIN = tl.constexpr(2)


@triton.jit
def _lower(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def tile_offsets(NQ: tl.constexpr, SIZE: tl.constexpr, j: tl.constexpr):
    """[NQ, SIZE] offsets of element j = s PARTS + p of every byte position of a tile."""
    bundle = tl.arange(0, NQ) * (8 * SIZE)
    return bundle[:, None] + (j * SIZE + tl.arange(0, SIZE))[None, :]


@triton.jit
def to_float32(x):
    if PTX and x.dtype == tl.bfloat16:
        # One instruction each. Triton moves every other one down first, then both up.
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;", "=f,=f,r", [x],
            dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(tl.float32)


@triton.jit
def load_tile(x_ptr, left, NQ: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr):
    """The eight [NQ, SIZE] float32 tensors of a tile at `x_ptr`, 0 past the row's end.

    `left` elements are left of the row.
    """
    tile = ()
    for j in tl.static_range(8):
        offsets = tile_offsets(NQ, SIZE, j)
        if FULL:
            x = tl.load(x_ptr + offsets)
        else:
            x = tl.load(x_ptr + offsets, offsets < left, other=0.0)
        tile = tile + (to_float32(x),)
    return tile


@triton.jit
def load_columns(
    p_ptr, first, left, PERIOD: tl.constexpr, NQ: tl.constexpr, SIZE: tl.constexpr,
    BITS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """What `load_tile` gives, of a parameter for a tile that starts at group `first`.

    It is as long as PERIOD groups, and begins again after so many.
    """
    PARTS: tl.constexpr = 8 // BITS
    SETS: tl.constexpr = 8 // PARTS
    tile = ()
    for j in tl.static_range(8):
        group = (first + tl.arange(0, NQ) * SETS + j // PARTS).to(tl.uint32) % PERIOD
        within = (j % PARTS) * SIZE + tl.arange(0, SIZE)
        source = p_ptr + group[:, None] * (PARTS * SIZE) + within[None, :]
        if FULL:
            p = tl.load(source)
        else:
            p = tl.load(source, tile_offsets(NQ, SIZE, j) < left, other=0.0)
        tile = tile + (to_float32(p),)
    return tile


@triton.jit
def store_tile(
    y_ptr, y, left, NQ: tl.constexpr, SIZE: tl.constexpr, j: tl.constexpr, FULL: tl.constexpr
):
    """Stores element j of a tile in the dtype of `y_ptr`."""
    offsets = tile_offsets(NQ, SIZE, j)
    y = y.to(y_ptr.dtype.element_ty)
    if FULL:
        tl.store(y_ptr + offsets, y)
    else:
        tl.store(y_ptr + offsets, y, offsets < left)


@triton.jit
def random_tile(seed, row, bundle, SIZE: tl.constexpr, NQ: tl.constexpr):
    """Two [NQ, SIZE] uint32 tensors for the byte positions of bundles [NQ] of a row."""
    seed = seed.to(tl.uint64)
    key = seed.to(tl.uint32)
    c0 = bundle.to(tl.uint32)[:, None] * SIZE + tl.arange(0, SIZE).to(tl.uint32)[None, :]
    c1 = tl.zeros([NQ, SIZE], dtype=tl.uint32) + (row.to(tl.uint32) ^ (seed >> 32).to(tl.uint32))
    for _ in tl.static_range(PHILOX_ROUNDS):
        high = tl.umulhi(c0, MULTIPLIER)
        low = tl.mul(c0, MULTIPLIER, sanitize_overflow=False)
        c0, c1 = high ^ key ^ c1, low
        key = tl.add(key, WEYL, sanitize_overflow=False)
    return c0, c1


@triton.jit
def group_scales(
    tile, s: tl.constexpr, left, within, NQ: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr,
    LIMITED: tl.constexpr, GREATEST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """What set s of the groups of a tile is packed by, [NQ] each.

    Minimum and maximum within the limits, the half of the minimum as it is kept, the inverse of
    half a step, and the word of both scales.
    """
    PARTS: tl.constexpr = 8 // BITS
    TOP: tl.constexpr = (1 << BITS) - 1
    for p in tl.static_range(PARTS):
        below, above = tile[s * PARTS + p], tile[s * PARTS + p]
        if not FULL:
            inside = tile_offsets(NQ, SIZE, s * PARTS + p) < left
            below = tl.where(inside, below, INFINITY)
            above = tl.where(inside, above, -INFINITY)
        if p == 0:
            low, high = below, above
        else:
            low, high = _lower(low, below), _higher(high, above)
    low, high = tl.reduce(low, 1, _lower), tl.reduce(high, 1, _higher)
    if LIMITED != 0:
        lowest, highest, instead_below, instead_above, edge = within
        far_below, far_above = low <= -edge, high >= edge
        if REPLACES & LIMITED:
            replaced = far_below & (instead_below > lowest)
            replaced |= far_above & (instead_above < highest)
        if LOWER & LIMITED:
            low = tl.where(far_below, instead_below, clamp(low, lowest, highest))
        if UPPER & LIMITED:
            high = tl.where(far_above, instead_above, clamp(high, lowest, highest))
        high = _higher(high, low)
    bits = low.to(tl.int32, bitcast=True)
    low_bits = (bits + tl.where(bits < 0, 0xFFFF, 0)) & -65536
    half_low = low_bits.to(tl.float32, bitcast=True) * 0.5
    half_spread = tl.fma(high, 0.5, -half_low)
    exact_bits = (half_spread * (2.0 / TOP)).to(tl.int32, bitcast=True)
    step_bits = tl.maximum((exact_bits + 0xFFFF) & -65536, LEAST_STEP)
    step_bits = tl.where(half_spread < INFINITY, step_bits, 0x7FC00000)
    step = step_bits.to(tl.float32, bitcast=True)
    if GREATEST is not None:
        # Kept rounded down where the last code would stand for more than is finite.
        past = tl.fma(step, TOP / 2, half_low) > GREATEST / 2
        step_bits = tl.where(past, exact_bits & -65536, step_bits)
    if REPLACES & LIMITED:
        step_bits = tl.where(replaced, step_bits | SIGN_BIT, step_bits)
    return low, high, half_low, reciprocal(step) * 2.0, low_bits | ((step_bits >> 16) & 0xFFFF)


@triton.jit
def reciprocal(step):
    """1 / step, correctly rounded: as step has 8 significant bits, one Newton step is enough."""
    if PTX:
        near = tl.inline_asm_elementwise(
            "rcp.approx.f32 $0, $1;", "=f,f", [step], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.fma(near, tl.fma(-step, near, 1.0), near)
    else:
        return tl.div_rn(1.0, step)


@triton.jit
def code_and_fraction(
    x, half_low, inverse, draws, j: tl.constexpr, BITS: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """int32 bits of the float32 number that holds the code of element j, as said above.

    `inverse` is that of half a step.
    """
    FRACTION: tl.constexpr = 15 if BITS == 8 else 16
    BASE: tl.constexpr = (150 - FRACTION) << 23  # bits of 2^(23 - FRACTION)
    TURN: tl.constexpr = j % 4 if STOCHASTIC else 0  # bytes
    if STOCHASTIC:
        word = draws[j // 4]
        if BITS == 8:  # 15 of the 16 bits
            word = word & (0x7FFF7FFF if TURN % 2 == 0 else 0xFF7FFF7F)
    else:
        word = tl.full(x.shape, 1 << (FRACTION - 1), tl.uint32)
    if PTX:
        # prmt sets two bytes of the word below two of the base. program_id(2) is 0, but unknown to
        # the compiler, which therefore keeps the base in a register and does not load it each time.
        # Were the difference Triton's, LLVM would fuse it with a product that gave x: the minimum
        # of a group, exact, could then lie below the minimum after rounding.
        return tl.inline_asm_elementwise(
            "{.reg .b32 u; .reg .f32 v;"
            "prmt.b32 u, $4, $5, $6; fma.rn.f32 v, $1, 0f3F000000, $2; fma.rn.f32 $0, v, $3, u;}",
            "=r,f,f,f,r,r,r",
            [x, -half_low, inverse, word, BASE + tl.program_id(2),
             0x7600 + (TURN + 1) % 4 * 16 + TURN],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        if TURN > 0:
            word = (word >> (8 * TURN)) | (word << (32 - 8 * TURN))
        u = ((word & 0xFFFF) | BASE).to(tl.float32, bitcast=True)
        # The quotient is at most TOP (1 + 2^-24). A product that is rounded first may be more.
        value = tl.minimum((x * 0.5 - half_low) * inverse, 1.0 * ((1 << BITS) - 1)) + u
        return value.to(tl.int32, bitcast=True)


@triton.jit
def join_codes(parts, BITS: tl.constexpr):
    """uint8 bytes of the codes of their parts, each as `code_and_fraction` gives it."""
    if PTX and BITS == 8:
        return tl.inline_asm_elementwise(  # bits 15 to 22 of each
            "{.reg .b32 a, b; prmt.b32 a, $1, $2, 0x6521; prmt.b32 b, $3, $4, 0x6521;"
            "shl.b32 a, a, 1; shl.b32 b, b, 1; prmt.b32 $0, a, b, 0x7531;}",
            "=r,r,r,r,r", [parts[0]], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    elif PTX:
        byte = _third_bytes(parts[0])
        for p in tl.static_range(1, 8 // BITS):
            byte = _insert(byte, _third_bytes(parts[p]), p * BITS)
        return byte
    else:
        byte = tl.zeros_like(parts[0])
        for p in tl.static_range(8 // BITS):
            code = (parts[p] >> (15 if BITS == 8 else 16)) & ((1 << BITS) - 1)
            byte |= code << (p * BITS)
        return byte.to(tl.uint8)


@triton.jit
def _third_bytes(x):
    """Bits 16 to 23: the code, below zeros. After a NaN they are anything."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 a, b; prmt.b32 a, $1, $2, 0x0062; prmt.b32 b, $3, $4, 0x0062;"
        "prmt.b32 $0, a, b, 0x5410;}",
        "=r,r,r,r,r", [x], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _insert(byte, code, SHIFT: tl.constexpr):
    """The low SHIFT bits of the byte, and above them the code."""
    KEEP: tl.constexpr = ((1 << SHIFT) - 1) * 0x01010101
    return tl.inline_asm_elementwise(
        f"{{.reg .b32 a; shl.b32 a, $2, {SHIFT}; lop3.b32 $0, $1, a, {KEEP}, 0xE4;}}",
        "=r,r,r", [byte, code], dtype=tl.uint8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def store_codes(
    tile, codes_ptr, scales_ptr, draws, left, within, NQ: tl.constexpr, SIZE: tl.constexpr,
    BITS: tl.constexpr, STOCHASTIC: tl.constexpr, LIMITED: tl.constexpr, GREATEST: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Quantises a tile; `codes_ptr` and `scales_ptr` point at those of its first group.

    `within` is a tuple of `Limits`, LIMITED what of them there is to be done. GREATEST is the
    greatest number that a code may stand for, None where values are too small to come near.
    """
    PARTS: tl.constexpr = 8 // BITS
    SETS: tl.constexpr = 8 // PARTS
    for s in tl.static_range(SETS):
        low, high, half_low, inverse, word = group_scales(
            tile, s, left, within, NQ, SIZE, BITS, LIMITED, GREATEST, FULL
        )
        half_low = half_low[:, None]
        inverse = tl.broadcast_to(inverse[:, None], [NQ, SIZE])
        parts = ()
        for p in tl.static_range(PARTS):
            x = tile[s * PARTS + p]
            if LOWER & LIMITED:
                x = tl.maximum(x, low[:, None])
            if UPPER & LIMITED:
                x = tl.minimum(x, high[:, None])
            parts = parts + (
                code_and_fraction(x, half_low, inverse, draws, s * PARTS + p, BITS, STOCHASTIC),
            )
        byte = join_codes(parts, BITS)
        group = tl.arange(0, NQ) * SETS + s
        target = codes_ptr + group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        if FULL:
            tl.store(target, byte)
            tl.store(scales_ptr + group, word)
        else:
            there = group * (PARTS * SIZE) < left
            tl.store(target, byte, there[:, None])
            tl.store(scales_ptr + group, word, there)


@triton.jit
def load_codes(
    codes_ptr, scales_ptr, left, NQ: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr,
    FULL: tl.constexpr, REPLACED: tl.constexpr = PLAIN,
):  # fmt: skip
    """The eight float32 tensors that codes and scales of a tile stand for.

    REPLACED says what becomes of groups with numbers in place of infinities, if there may be any.
    """
    PARTS: tl.constexpr = 8 // BITS
    SETS: tl.constexpr = 8 // PARTS
    TOP: tl.constexpr = (1 << BITS) - 1
    tile = ()
    for s in tl.static_range(SETS):
        group = tl.arange(0, NQ) * SETS + s
        source = codes_ptr + group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        if FULL:
            byte = tl.load(source).to(tl.int32)
            word = tl.load(scales_ptr + group)
        else:
            there = group * (PARTS * SIZE) < left
            byte = tl.load(source, there[:, None], other=0).to(tl.int32)
            word = tl.load(scales_ptr + group, there, other=0)
        low = (word & -65536).to(tl.float32, bitcast=True)
        step_bits = word << 16
        if REPLACED == KEPT:
            step_bits &= 0x7FFFFFFF
        elif REPLACED == LOST:
            step_bits = tl.where(step_bits < 0, 0x7FC00000, step_bits)
        step = tl.broadcast_to(step_bits.to(tl.float32, bitcast=True)[:, None], [NQ, SIZE])
        for p in tl.static_range(PARTS):
            # An integer below 2^23 in the low bits of 2^23 is that much more than 2^23.
            code = ((byte >> (p * BITS)) & TOP) | 0x4B000000
            value = code.to(tl.float32, bitcast=True) - WHOLE
            if PTX:
                value = tl.fma(value, step, low[:, None])
            else:  # the interpreter rounds the product, which may overflow
                value = (value * (step * 0.5) + low[:, None] * 0.5) * 2.0
            tile = tile + (value,)
    return tile


@quick
@triton.jit(do_not_specialize=["seed"])
def _quantize_kernel(
    x_ptr,  # [rows, width]
    y_ptr,  # [rows, width]
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
    DIGITS: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    SEED: tl.constexpr,
    LIMITED: tl.constexpr,
    GREATEST: tl.constexpr,
    FULL: tl.constexpr,
    NQ: tl.constexpr,
):
    """Pack of x, and y = f(x) in the same pass."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    bundle = (tl.program_id(0) % tiles).to(tl.int64) * NQ
    start = row * width + bundle * (8 * SIZE)
    group = row * row_groups + bundle * BITS  # a bundle is 8 / PARTS = BITS groups
    left = width - bundle * (8 * SIZE)
    tile = load_tile(x_ptr + start, left, NQ, SIZE, FULL)
    if FORWARD is not None:
        for j in tl.static_range(8):
            y = FORWARD(tile[j], a, b, DIGITS)
            store_tile(y_ptr + start, y, left, NQ, SIZE, j, FULL)
    draws = ()
    if SEED:
        key = seed_value(seed, SEED)
        draws = random_tile(key, row, bundle + tl.arange(0, NQ), SIZE, NQ)
    within = (lowest, highest, below, above, edge)
    store_codes(
        tile, codes_ptr + group * SIZE, scales_ptr + group, draws, left, within, NQ, SIZE, BITS,
        SEED != 0, LIMITED, GREATEST, FULL,
    )  # fmt: skip


@quick
@triton.jit
def _dequantize_kernel(
    codes_ptr,  # [rows, row_groups, SIZE]
    scales_ptr,  # [rows, row_groups]
    y_ptr,  # [rows, width]
    weight_ptr,  # [width], or of PERIOD groups
    bias_ptr,
    width,
    row_groups,
    tiles,
    a,
    b,
    FORWARD: tl.constexpr,  # None: the value itself
    DIGITS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    PERIOD: tl.constexpr,  # groups after which weight and bias begin again
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    FULL: tl.constexpr,
    NQ: tl.constexpr,
):
    """f(v) or v weight + bias of the packed values v."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * (NQ * BITS)  # group of the row: a bundle is BITS of them
    bundle = (tl.program_id(0) % tiles).to(tl.int64) * NQ
    column = bundle * (8 * SIZE)
    group = row * row_groups + bundle * BITS
    left = width - column
    tile = load_codes(
        codes_ptr + group * SIZE, scales_ptr + group, left, NQ, SIZE, BITS, FULL,
        PLAIN if FORWARD is None else LOST,
    )  # fmt: skip
    if WEIGHT:
        weight = load_columns(weight_ptr, first, left, PERIOD, NQ, SIZE, BITS, FULL)
    if BIAS:
        bias = load_columns(bias_ptr, first, left, PERIOD, NQ, SIZE, BITS, FULL)
    for j in tl.static_range(8):
        y = tile[j]
        if FORWARD is not None:
            y = FORWARD(y, a, b, DIGITS)
        if WEIGHT:
            y = y * weight[j]
        if BIAS:
            y = y + bias[j]
        if FORWARD is None and y_ptr.dtype.element_ty == tl.float16:
            y = clamp(y, -HALF_MAX, HALF_MAX)  # the other dtypes hold whatever a pack does
        store_tile(y_ptr + row * width + column, y, left, NQ, SIZE, j, FULL)


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
    BITS: tl.constexpr,
    FULL: tl.constexpr,
    NQ: tl.constexpr,
):
    """dx = dy f'(x~)."""
    bundle = tl.program_id(0).to(tl.int64) * NQ
    start = bundle * (8 * SIZE)
    left = width - start
    group = bundle * BITS
    dy = load_tile(dy_ptr + start, left, NQ, SIZE, FULL)
    tile = load_codes(
        codes_ptr + group * SIZE, scales_ptr + group, left, NQ, SIZE, BITS, FULL, KEPT
    )
    for j in tl.static_range(8):
        dx = dy[j] * DERIVATIVE(tile[j], a, b)
        store_tile(dx_ptr + start, dx, left, NQ, SIZE, j, FULL)


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
    BITS: tl.constexpr,
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
    left = width - start
    group = bundle * BITS
    draws = ()
    key, row = 0, tl.zeros([], dtype=tl.int64)
    if SEED:
        key = seed_value(seed, SEED)
        draws = random_tile(key, row, bundle + tl.arange(0, NQ), SIZE, NQ)
    gate = load_tile(gate_ptr + start, left, NQ, SIZE, FULL)
    # One after the other: registers for both would leave room for few programs at once.
    factors = ()
    for j in tl.static_range(8):
        # torch rounds f(gate) to the tensors' dtype before it multiplies.
        factors = factors + (FORWARD(gate[j], 0.0, 0.0, DIGITS).to(y_ptr.dtype.element_ty),)
    within = (lowest, highest, below, above, edge)
    store_codes(
        gate, gate_codes_ptr + group * SIZE, gate_scales_ptr + group, draws, left, within, NQ, SIZE,
        BITS, SEED != 0, LIMITED, GREATEST, FULL,
    )  # fmt: skip
    if SEED:
        draws = random_tile(key, row + 1, bundle + tl.arange(0, NQ), SIZE, NQ)
    up = load_tile(up_ptr + start, left, NQ, SIZE, FULL)
    for j in tl.static_range(8):
        y = to_float32(factors[j]) * up[j]
        store_tile(y_ptr + start, y, left, NQ, SIZE, j, FULL)
    within = (up_lowest, up_highest, up_below, up_above, up_edge)
    store_codes(
        up, up_codes_ptr + group * SIZE, up_scales_ptr + group, draws, left, within, NQ, SIZE, BITS,
        SEED != 0, UP_LIMITED, GREATEST, FULL,
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
    BITS: tl.constexpr,
    FULL: tl.constexpr,
    NQ: tl.constexpr,
):
    """dgate = dy up~ f'(gate~) and dup = dy f(gate~), or the product f(gate~) up~ itself.

    Unless THROUGH, dy up~ in place of dgate.
    """
    bundle = tl.program_id(0).to(tl.int64) * NQ
    start = bundle * (8 * SIZE)
    left = width - start
    group = bundle * BITS
    if DERIVATIVE is not None:
        dy = load_tile(dy_ptr + start, left, NQ, SIZE, FULL)
    factor = load_codes(
        gate_codes_ptr + group * SIZE, gate_scales_ptr + group, left, NQ, SIZE, BITS, FULL, LOST
    )
    gate = factor
    if REPLACED and DERIVATIVE is not None:
        gate = load_codes(
            gate_codes_ptr + group * SIZE, gate_scales_ptr + group, left, NQ, SIZE, BITS, FULL, KEPT
        )
    up = load_codes(up_codes_ptr + group * SIZE, up_scales_ptr + group, left, NQ, SIZE, BITS, FULL)
    for j in tl.static_range(8):
        f = FORWARD(factor[j], 0.0, 0.0, DIGITS)
        if DERIVATIVE is None:
            store_tile(dup_ptr + start, f * up[j], left, NQ, SIZE, j, FULL)
        else:
            dgate = dy[j] * up[j]
            if THROUGH:
                dgate *= DERIVATIVE(gate[j], 0.0, 0.0)
            store_tile(dgate_ptr + start, dgate, left, NQ, SIZE, j, FULL)
            store_tile(dup_ptr + start, dy[j] * f, left, NQ, SIZE, j, FULL)


# --- Launchers, with the signatures of reference.py.


class Setting(NamedTuple):
    """Byte positions a program, eight elements each, and its warps."""

    block: int
    warps: int


# 64 elements a thread take the fewest instructions for each, and most registers: with 32 more
# threads run at once. The fastest of 2^27 elements on an H200.
PACK = Setting(1024, 4)
ACTIVATION = Setting(512, 4)
UNPACK = Setting(512, 4)
REBUILD = Setting(1024, 4)  # through a function
BACKWARD = Setting(1024, 4)
GATED = Setting(1024, 8)
GATED_BACKWARD = Setting(1024, 8)
PRODUCT = Setting(1024, 4)


def tile_of(grouping: Grouping, block: int) -> tuple[int, int, bool]:
    """Bundles a tile of `block` byte positions, tiles a row, and whether every tile is whole."""
    bundle = 8 * grouping.group_bytes
    bundles = -(-grouping.width // bundle)
    nq = max(1, min(block // grouping.group_bytes, triton.next_power_of_2(bundles)))
    return nq, -(-bundles // nq), grouping.width % (nq * bundle) == 0


@functools.lru_cache(LAUNCHES)
def sized(rows: int, width: int, bits: int, group_size: int) -> tuple[Grouping, int, int]:
    """A grouping, and how many bytes of codes and how many scales it has."""
    grouping = Grouping(rows, width, bits, group_size)
    return grouping, grouping.code_bytes, grouping.groups


def _greatest(dtype: torch.dtype) -> float:
    """The greatest number that a code of such a tensor may stand for."""
    return limits(dtype).highest


def _limited(dtype: torch.dtype, name: str = "", parameters: Sequence[float] = ()) -> int:
    """What the limits of a pack of such a tensor ask for: LOWER, UPPER and REPLACES."""
    within, greatest = limits(dtype, name, parameters), torch.finfo(dtype).max
    lower = within.lowest > -greatest or within.below == within.below
    upper = within.highest < greatest or within.above == within.above
    replaces = within.below > within.lowest or within.above < within.highest
    lower, upper = (side or within.edge < math.inf for side in (lower, upper))
    return LOWER.value * lower + UPPER.value * upper + REPLACES.value * replaces


def _two(parameters: Sequence[float]) -> tuple[float, float]:
    a, b = (*parameters, 0.0, 0.0)[:2]
    return float(a), float(b)


@functools.lru_cache(LAUNCHES)
def _quantize_launch(
    grouping: Grouping, dtype: torch.dtype, name: str, parameters: tuple[float, ...],
    seed: int,
) -> Launch:  # fmt: skip
    block, warps = ACTIVATION if name else PACK
    nq, tiles, full = tile_of(grouping, block)
    return _quantize_kernel.prepare(
        (grouping.rows * tiles,),
        grouping.width,
        grouping.row_groups,
        tiles,
        *_two(parameters),
        *limits(dtype, name, parameters),
        FORWARD=FORWARD[name] if name else None,
        DIGITS=DIGITS[dtype],
        SIZE=grouping.group_bytes,
        BITS=grouping.bits,
        SEED=seed,
        LIMITED=_limited(dtype, name, parameters),
        GREATEST=_greatest(dtype),
        FULL=full,
        NQ=nq,
        num_warps=warps,
    )


def _pack(
    x: Tensor, y: Tensor | None, name: str, parameters: Sequence[float], width: int,
    groups: Groups, seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n = x.numel()
    grouping, size, count = sized(n // width if width else 0, width, *groups)
    codes, scales = x.new_empty(size, dtype=torch.uint8), x.new_empty(count, dtype=torch.int32)
    if n == 0:
        return codes, scales
    launch = _quantize_launch(grouping, x.dtype, name, tuple(parameters), seed_kind(seed, number))
    launch(x, x if y is None else y, codes, scales, seed_argument(seed, number))
    return codes, scales


def quantize(
    x: Tensor, stride: Sequence[int], groups: Groups, seed: Tensor | None, number: int
) -> tuple[Tensor, Tensor]:
    return _pack(laid_out(x, stride), None, "", (), x.numel(), groups, seed, number)


@functools.lru_cache(LAUNCHES)
def _dequantize_launch(
    grouping: Grouping,
    dtype: torch.dtype,
    name: str,
    a: float,
    b: float,
    weight: bool,
    bias: bool,
) -> Launch:
    block, warps = REBUILD if name else UNPACK
    period = grouping.row_groups
    if grouping.width % grouping.group_size == 0:  # rows are one row: tiles need not end with them
        grouping = grouping._replace(rows=1, width=grouping.rows * grouping.width)
    nq, tiles, full = tile_of(grouping, block)
    return _dequantize_kernel.prepare(
        (grouping.rows * tiles,),
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
        SIZE=grouping.group_bytes,
        BITS=grouping.bits,
        FULL=full,
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
    y = codes.new_empty_strided(shape, stride, dtype=dtype)
    n = y.numel()
    if n == 0:
        return y
    grouping, *_ = sized(n // width, width, *groups)
    given = (weight is not None, bias is not None)
    launch = _dequantize_launch(grouping, dtype, name, *_two(parameters), *given)
    launch(codes, scales, y, y if weight is None else weight, y if bias is None else bias)
    return y


def activation(
    x: Tensor, name: str, parameters: Sequence[float], groups: Groups,
    seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x)
    n = x.numel()
    return y, *_pack(laid_out(x, y.stride()), y, name, parameters, n, groups, seed, number)


@functools.lru_cache(LAUNCHES)
def _activation_backward_launch(grouping: Grouping, name: str, a: float, b: float) -> Launch:
    nq, tiles, full = tile_of(grouping, BACKWARD.block)
    return _activation_backward_kernel.prepare(
        (tiles,),
        grouping.width,
        a,
        b,
        DERIVATIVE=DERIVATIVE[name],
        SIZE=grouping.group_bytes,
        BITS=grouping.bits,
        FULL=full,
        NQ=nq,
        num_warps=BACKWARD.warps,
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
    dx = grad_output.new_empty_strided(grad_output.shape, tuple(stride))
    n = dx.numel()
    if n == 0:
        return dx
    grouping, *_ = sized(1, n, *groups)
    launch = _activation_backward_launch(grouping, name, *_two(parameters))
    launch(laid_out(grad_output, stride), codes, scales, dx)
    return dx


@functools.lru_cache(LAUNCHES)
def _gated_launch(grouping: Grouping, dtype: torch.dtype, name: str, seed: int) -> Launch:
    nq, tiles, full = tile_of(grouping, GATED.block)
    return _gated_kernel.prepare(
        (tiles,),
        grouping.width,
        *limits(dtype, name),
        *limits(dtype),
        FORWARD=FORWARD[name],
        DIGITS=DIGITS[dtype],
        SIZE=grouping.group_bytes,
        BITS=grouping.bits,
        SEED=seed,
        LIMITED=_limited(dtype, name),
        UP_LIMITED=_limited(dtype),
        GREATEST=_greatest(dtype),
        FULL=full,
        NQ=nq,
        num_warps=GATED.warps,
    )


def gated(
    gate: Tensor, up: Tensor, name: str, groups: Groups, seed: Tensor | None, number: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(gate)
    n = y.numel()
    grouping, size, count = sized(1, n, *groups)
    gate_pack, up_pack = (
        (gate.new_empty(size, dtype=torch.uint8), gate.new_empty(count, dtype=torch.int32))
        for _ in range(2)
    )
    if n:
        _gated_launch(grouping, gate.dtype, name, seed_kind(seed, number))(
            laid_out(gate, y.stride()),
            laid_out(up, y.stride()),
            y,
            *gate_pack,
            *up_pack,
            seed_argument(seed, number),
        )
    return y, *gate_pack, *up_pack


@functools.lru_cache(LAUNCHES)
def _gated_backward_launch(
    grouping: Grouping, dtype: torch.dtype, name: str, product: bool, through: bool
) -> Launch:
    block, warps = PRODUCT if product else GATED_BACKWARD
    nq, tiles, full = tile_of(grouping, block)
    return _gated_backward_kernel.prepare(
        (tiles,),
        grouping.width,
        FORWARD=FORWARD[name],
        DERIVATIVE=None if product else DERIVATIVE[name],
        THROUGH=through,
        REPLACED=bool(_limited(dtype, name) & REPLACES.value),
        DIGITS=DIGITS[dtype],
        SIZE=grouping.group_bytes,
        BITS=grouping.bits,
        FULL=full,
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
    dgate = grad_output.new_empty_strided(grad_output.shape, tuple(stride))
    dup = torch.empty_like(dgate)
    n = dgate.numel()
    packs = (gate_codes, gate_scales, up_codes, up_scales)
    if n:
        grouping, *_ = sized(1, n, *groups)
        launch = _gated_backward_launch(grouping, dgate.dtype, name, False, through)
        launch(laid_out(grad_output, stride), *packs, dgate, dup)
    return dgate, dup


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
    y = gate_codes.new_empty_strided(shape, stride, dtype=dtype)
    n = y.numel()
    packs = (gate_codes, gate_scales, up_codes, up_scales)
    if n:
        grouping, *_ = sized(1, n, *groups)
        launch = _gated_backward_launch(grouping, dtype, name, True, True)
        launch(y, *packs, y, y)
    return y

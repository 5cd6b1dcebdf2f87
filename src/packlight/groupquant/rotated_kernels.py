"""The rotated code in Triton: see `rotated_reference.py` for what it is.

A tile has eight parts of each group [NQ, SIZE], so the Hadamard matrix of a group is that of eight
times that of SIZE: three rounds of sums and differences between the parts, in registers, and for
each part a product with +-1 on tensor cores. All but the latter is in float16, two numbers an
instruction (`rotated_ptx.py`).
"""

import triton
import triton.language as tl

from packlight.elementwise.kernels import PTX
from packlight.elementwise.limits import GREATEST as _GREATEST
from packlight.groupquant.draw_kernels import group_hashes, load_seed, sign_halves, store_seed
from packlight.groupquant.minmax_kernels import (
    INFINITY,
    REPLACES,
    SEED_WORDS,
    group_range,
    limited_to,
    scale_of,
)
from packlight.groupquant.rotated_ptx import DECODE, ENCODE, INPUTS, TURN
from packlight.groupquant.rotated_reference import FORMULAS, LEAST
from packlight.groupquant.tile_kernels import part_there

GREATEST = tl.constexpr(_GREATEST)
BOUNDS = tl.constexpr(tuple(FORMULAS[bits].bound for bits in (1, 2, 3, 4)))
STEPS = tl.constexpr(tuple(FORMULAS[bits].step for bits in (1, 2, 3, 4)))
LASTS = tl.constexpr(tuple(FORMULAS[bits].last for bits in (1, 2, 3, 4)))
ENCODE_PTX = tl.constexpr(ENCODE)
DECODE_PTX = tl.constexpr(DECODE)
TURN_PTX = tl.constexpr(TURN)
INPUTS_PTX = tl.constexpr(INPUTS)
EXPONENT = tl.constexpr(0x7F800000)
LEAST_INNER = tl.constexpr(LEAST)
HALF_GREATEST = tl.constexpr(65504.0)
# Of tl.dot's inner dimension.
NARROW = tl.constexpr(16)


@triton.jit
def hadamard(NQ: tl.constexpr, SIZE: tl.constexpr):
    """What `product` multiplies by: the Hadamard matrix of SIZE, as often as tensor cores ask."""
    WIDTH: tl.constexpr = SIZE if SIZE >= NARROW or NQ * SIZE < NARROW else NARROW
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    # Bit v of the constant is the parity of the bits of v; it becomes the sign of 1.
    parity = (0x69969669 ^ -1) >> (i & j & (SIZE - 1))
    matrix = (((parity << 15) & 0x8000) | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)
    if WIDTH > SIZE:
        matrix = tl.where(i // SIZE == j // SIZE, matrix, 0.0)
    return matrix


@triton.jit
def product(x, matrix, NQ: tl.constexpr, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """[NQ, SIZE] of DTYPE, of float16 `x` and the Hadamard matrix of SIZE."""
    if SIZE >= NARROW:
        return tl.dot(x, matrix, out_dtype=DTYPE)
    elif NQ * SIZE >= NARROW:  # several groups a row
        rows = tl.reshape(x, [NQ * SIZE // NARROW, NARROW])
        return tl.reshape(tl.dot(rows, matrix, out_dtype=DTYPE), [NQ, SIZE])
    else:
        whole = x.to(tl.float32)[:, :, None] * matrix.to(tl.float32)[None, :, :]
        return tl.sum(whole, 1).to(DTYPE)


@triton.jit
def across(parts):
    """Eight tensors times the Hadamard matrix of eight."""
    for step in tl.static_range(3):
        sums = ()
        for p in tl.static_range(8):
            if p & (1 << step) == 0:
                sums = sums + (parts[p] + parts[p ^ (1 << step)],)
            else:
                sums = sums + (parts[p ^ (1 << step)] - parts[p],)
        parts = sums
    return parts


@triton.jit
def with_half_sign(x, signs, p: tl.constexpr):
    """float16 `x` with the sign that element p of each place has."""
    flipped = x.to(tl.int16, bitcast=True) ^ ((signs << p) & -0x8000)
    return flipped.to(tl.float16, bitcast=True)


@triton.jit
def with_sign(x, signs, p: tl.constexpr):
    """The same of float32."""
    flipped = x.to(tl.int32, bitcast=True) ^ ((signs.to(tl.int32) << (16 + p)) & -2147483648)
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def signed_across(z, signs):
    """`across` of float16 numbers with their signs."""
    if PTX:
        return tl.inline_asm_elementwise(
            TURN_PTX, INPUTS_PTX[8] + ",r,r,r,r,r,r,r,r,r",
            [z[0], z[1], z[2], z[3], z[4], z[5], z[6], z[7], signs],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16) * 2, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        signed = ()
        for p in tl.static_range(8):
            signed = signed + (with_half_sign(z[p], signs, p),)
        return across(signed)


@triton.jit
def nearest_bfloat16(x):
    """float32 `x`, finite, rounded to a bfloat16 number, as int32 bits with a zero low half."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536


@triton.jit
def code_of(y, BITS: tl.constexpr):
    """The code of each float16 number, as float32."""
    TOP: tl.constexpr = (1 << BITS) - 1
    half = tl.full([], 0.5 / BOUNDS[BITS - 1], tl.float16).to(tl.float32)
    u = tl.minimum(tl.maximum(y.to(tl.float32) * half + 0.5, 0.0), 1.0)
    u = u.to(tl.float16).to(tl.float32)
    if BITS > 2:
        slope = (3 * TOP - 2 * TOP * u).to(tl.float16).to(tl.float32)
        u = (u * u).to(tl.float16).to(tl.float32) * slope
    else:
        u = u * TOP
    return (u + 8388608.0) - 8388608.0


@triton.jit
def level(code, BITS: tl.constexpr):
    """The level of each code, a float32 number, in float16."""
    s = ((code - ((1 << BITS) - 1) / 2) * STEPS[BITS - 1]).to(tl.float16)
    if BITS > 2:
        square = (s * s).to(tl.float32)
        s = s * (square * square + 1.0).to(tl.float16)
    return s


@triton.jit
def encoded(y, BITS: tl.constexpr):
    """The pieces of the codes of eight parts, integers of 16 bits, and the sum of y l(code)."""
    if PTX and BITS < 3:
        return tl.inline_asm_elementwise(
            ENCODE_PTX[BITS - 1], INPUTS_PTX[2] + ",r,r,r,r,r,r,r,r",
            [y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]],
            dtype=(tl.int16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif PTX:
        return tl.inline_asm_elementwise(
            ENCODE_PTX[BITS - 1], INPUTS_PTX[3] + ",r,r,r,r,r,r,r,r",
            [y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]],
            dtype=(tl.int16, tl.int16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        whole = tl.zeros(y[0].shape, dtype=tl.int32)
        inner = tl.zeros(y[0].shape, dtype=tl.float32)
        for p in tl.static_range(8):
            code = code_of(y[p], BITS)
            whole |= code.to(tl.int32) << (BITS * p)
            inner += y[p].to(tl.float32) * level(code, BITS).to(tl.float32)
        if BITS < 3:
            return whole.to(tl.int16), inner.to(tl.float16)
        else:
            return whole.to(tl.int16), (whole >> 16).to(tl.int16), inner.to(tl.float16)


@triton.jit
def decoded(pieces, BITS: tl.constexpr):
    """Levels of eight parts of the pieces of their codes, turned between the parts."""
    if PTX and BITS < 3:
        return tl.inline_asm_elementwise(
            DECODE_PTX[BITS - 1], INPUTS_PTX[8] + ",r", [pieces[0]],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16) * 2, is_pure=True, pack=2,
        )  # fmt: skip
    elif PTX:
        return tl.inline_asm_elementwise(
            DECODE_PTX[BITS - 1], INPUTS_PTX[8] + ",r,r", [pieces[0], pieces[1]],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16) * 2, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        whole = pieces[0].to(tl.int32) & 0xFFFF
        if BITS > 2:
            whole |= pieces[1].to(tl.int32) << 16
        levels = ()
        for p in tl.static_range(8):
            code = (whole >> (BITS * p)) & ((1 << BITS) - 1)
            levels = levels + (level(code.to(tl.float32), BITS),)
        return across(levels)


@triton.jit
def piece_pointers(codes_ptr, group, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Where the pieces of the codes of groups [NQ] lie, [NQ, SIZE] each; the second past 2 bits."""
    start = codes_ptr + group[:, None] * (SIZE * BITS)
    place = tl.arange(0, SIZE)[None, :]
    halves = tl.pointer_type(tl.int16)
    if BITS == 1:
        return (start + place,)
    elif BITS == 2:
        return (start.to(halves) + place,)
    elif BITS == 3:
        return (start.to(halves) + place, start + 2 * SIZE + place)
    else:
        return (start.to(halves) + place, start.to(halves) + SIZE + place)


@triton.jit
def store_rotated(
    tile, codes_ptr, scales_ptr, group, seed, room, within, SIZE: tl.constexpr,
    BITS: tl.constexpr, LIMITED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """See `store_codes`."""
    NQ: tl.constexpr = group.shape[0]
    WIDTH: tl.constexpr = 8 * SIZE
    replaced = tl.zeros([NQ], dtype=tl.int1)
    values = tile
    if LIMITED != 0:
        low, high, replaced = group_range(tile, room, within, SIZE, LIMITED, FULL)
        values = ()
        for p in tl.static_range(8):
            x = limited_to(tile[p], low, high, LIMITED)
            if not FULL:
                x = tl.where(part_there(room, SIZE, p), x, 0.0)
            values = values + (x,)
    total = values[0]
    for p in tl.static_range(1, 8):
        total += values[p]
    if LIMITED != 0:
        greatest = tl.maximum(tl.abs(low), tl.abs(high))
    else:
        greatest = tl.abs(values[0])
        for p in tl.static_range(1, 8):
            greatest = tl.maximum(greatest, tl.abs(values[p]))
        greatest = tl.max(greatest, 1)
    # Divided by a power of two, so that no square overflows or underflows.
    exponent = greatest.to(tl.int32, bitcast=True) & EXPONENT
    exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 253 << 23)
    unit = exponent.to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    if FULL:
        share = tl.full([NQ], 1.0 / WIDTH, tl.float32)
    else:
        count = tl.minimum(tl.maximum(room, 1), WIDTH)
        share = 1.0 / count.to(tl.float32)
    mean = tl.sum(total * share[:, None], 1)
    finite = tl.abs(mean) < INFINITY
    if LIMITED != 0:
        finite &= high * 0.5 - low * 0.5 < INFINITY
    mean_bits = nearest_bfloat16(mean)
    mean = mean_bits.to(tl.float32, bitcast=True)

    middle = (mean * inverse)[:, None]
    squares = tl.zeros([NQ, SIZE], dtype=tl.float32)
    halves = ()
    for p in tl.static_range(8):
        d = values[p] * inverse[:, None] - middle
        if not FULL:
            d = tl.where(part_there(room, SIZE, p), d, 0.0)
        halves = halves + (d.to(tl.float16),)
        squares += d * d
    squares = tl.sum(squares, 1)
    normal = tl.minimum(tl.rsqrt(squares), HALF_GREATEST).to(tl.float16)

    store_seed(scales_ptr, seed, group)
    signs = sign_halves(group_hashes(seed, group), SIZE)
    signed = signed_across(halves, signs)
    matrix = hadamard(NQ, SIZE)
    turned = ()
    for p in tl.static_range(8):
        y = product(signed[p], matrix, NQ, SIZE, tl.float16)
        turned = turned + (y * normal[:, None],)
    found = encoded(turned, BITS)
    inner = tl.sum(found[len(found) - 1].to(tl.float32), 1)
    scale = unit * (squares * normal.to(tl.float32) / inner)
    scale = tl.where(inner > LEAST_INNER, scale, 0.0)
    scale = tl.minimum(scale, (GREATEST - tl.abs(mean)) / (LASTS[BITS - 1] * WIDTH))
    word = tl.where(finite, mean_bits, 0x7FC00000) | ((nearest_bfloat16(scale) >> 16) & 0xFFFF)
    if REPLACES & LIMITED:
        word = tl.where(replaced, word | 0x8000, word)
    there = room > 0
    pointers = piece_pointers(codes_ptr, group, SIZE, BITS)
    for i in tl.static_range(1 if BITS < 3 else 2):
        piece = found[i].to(pointers[i].dtype.element_ty)
        tl.store(pointers[i], piece, None if FULL else there[:, None])
    tl.store(scales_ptr + SEED_WORDS + group, word, None if FULL else there)


@triton.jit
def load_rotated(
    codes_ptr, scales_ptr, group, room, SIZE: tl.constexpr, BITS: tl.constexpr,
    FULL: tl.constexpr, REPLACED: tl.constexpr,
):  # fmt: skip
    """See `load_codes`."""
    NQ: tl.constexpr = group.shape[0]
    there = room > 0
    pointers = piece_pointers(codes_ptr, group, SIZE, BITS)
    pieces = ()
    for i in tl.static_range(1 if BITS < 3 else 2):
        if FULL:
            piece = tl.load(pointers[i])
        else:
            piece = tl.load(pointers[i], there[:, None], other=0)
        pieces = pieces + (piece.to(tl.int16),)
    if FULL:
        word = tl.load(scales_ptr + SEED_WORDS + group)
    else:
        word = tl.load(scales_ptr + SEED_WORDS + group, there, other=0)
    mean = (word & -65536).to(tl.float32, bitcast=True)[:, None]
    scale = tl.broadcast_to(scale_of(word, REPLACED)[:, None], [NQ, SIZE])
    signs = sign_halves(group_hashes(load_seed(scales_ptr), group), SIZE)
    matrix = hadamard(NQ, SIZE)
    levels = decoded(pieces, BITS)
    tile = ()
    for p in tl.static_range(8):
        turned = product(levels[p], matrix, NQ, SIZE, tl.float32)
        tile = tile + (tl.fma(with_sign(turned, signs, p), scale, mean),)
    return tile

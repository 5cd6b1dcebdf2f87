"""The rotated code in Triton: see `rotated_reference.py` for what it is.

A tile has eight parts of each group [NQ, SIZE], so the Hadamard matrix of a group is that of eight
times that of SIZE: three rounds of sums and differences between the parts, in registers, and for
each part a product with +-1 on tensor cores. All but the latter is in float16, two numbers an
instruction.
"""

import triton
import triton.language as tl

from packlight.elementwise.kernels import PTX
from packlight.elementwise.limits import GREATEST as _GREATEST
from packlight.groupquant.draw_kernels import group_hashes, load_seed, sign_words, store_seed
from packlight.groupquant.minmax_kernels import (
    INFINITY,
    REPLACES,
    SEED_WORDS,
    SIGN_BIT,
    group_range,
    limited_to,
    scale_of,
)
from packlight.groupquant.rotated_reference import FORMULAS, LEAST, PART
from packlight.groupquant.tile_kernels import load_bytes, store_bytes, tile_offsets

SIXTEENTH = tl.constexpr(PART)
LEAST_SPREAD = tl.constexpr(LEAST)
GREATEST = tl.constexpr(_GREATEST)
FACTORS = tl.constexpr(tuple(FORMULAS[bits] for bits in (1, 2, 3, 4)))
# Of tl.dot's inner dimension.
NARROW = tl.constexpr(16)


@triton.jit
def hadamard(NQ: tl.constexpr, SIZE: tl.constexpr):
    """What `product` multiplies by: the Hadamard matrix of SIZE, as often as tensor cores ask."""
    WIDTH: tl.constexpr = SIZE if SIZE >= NARROW or NQ * SIZE < NARROW else NARROW
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    common = i & j & (SIZE - 1)
    if SIZE > 16:
        common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    matrix = 1 - 2 * (common & 1)
    if WIDTH > SIZE:
        matrix = tl.where(i // SIZE == j // SIZE, matrix, 0)
    return matrix.to(tl.float16)


@triton.jit
def product(x, matrix, NQ: tl.constexpr, SIZE: tl.constexpr):
    """[NQ, SIZE] float32 of float16 `x` and the Hadamard matrix of SIZE."""
    if SIZE >= NARROW:
        return tl.dot(x, matrix)
    elif NQ * SIZE >= NARROW:  # several groups a row
        rows = tl.reshape(x, [NQ * SIZE // NARROW, NARROW])
        return tl.reshape(tl.dot(rows, matrix), [NQ, SIZE])
    else:
        return tl.sum(x.to(tl.float32)[:, :, None] * matrix.to(tl.float32)[None, :, :], 1)


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
def with_sign(x, signs, p: tl.constexpr):
    """`x` with the sign that element p of each place has."""
    flipped = x.to(tl.int32, bitcast=True) ^ ((signs << p).to(tl.int32, bitcast=True) & SIGN_BIT)
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def with_half_sign(x, signs, p: tl.constexpr):
    """The same of float16 `x`, by the upper halves of the words."""
    if PTX:
        return tl.inline_asm_elementwise(
            f"{{.reg .b32 a; shl.b32 a, $2, {p}; lop3.b32 $0, $1, a, 0x80008000, 0x78;}}",
            "=r,r,r", [x, signs], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        flipped = x.to(tl.int16, bitcast=True) ^ ((signs << p) & -0x8000)
        return flipped.to(tl.float16, bitcast=True)


@triton.jit
def without_fraction(number):
    """16 + code of a float16 number with a fraction behind."""
    if PTX:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xFFC0FFC0;",
            "=r,r", [number], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return (number.to(tl.int16, bitcast=True) & -64).to(tl.float16, bitcast=True)


@triton.jit
def sixth_bytes(number, BITS: tl.constexpr):
    """The code of such a number, as a byte with anything above it."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a, b; shr.u32 a, $1, 6; shr.u32 b, $2, 6; prmt.b32 $0, a, b, 0x6420;}",
            "=r,r,r", [number], dtype=tl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (number.to(tl.int16, bitcast=True) >> 6) & ((1 << BITS) - 1)


@triton.jit
def nearest_bfloat16(x):
    """float32 `x`, finite, rounded to a bfloat16 number, as int32 bits with a zero low half."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536


@triton.jit
def half(x: tl.constexpr):
    """A number of float16: of float32 it would make that of what it is multiplied by."""
    return tl.full([], x, tl.float16)


@triton.jit
def level(number, BITS: tl.constexpr):
    """l(code) of 16 + code, float16."""
    s = number - half(16.0 + ((1 << BITS) - 1) / 2)
    if FACTORS[BITS - 1][2] == 0.0:
        return s
    else:
        square = s * s
        return s * (square * square * half(FACTORS[BITS - 1][2]) + half(1.0))


@triton.jit
def store_rotated(
    tile, codes_ptr, scales_ptr, group, seed, left, within, NQ: tl.constexpr, SIZE: tl.constexpr,
    BITS: tl.constexpr, LIMITED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """See `store_codes`."""
    WIDTH: tl.constexpr = 8 * SIZE
    local = tl.arange(0, NQ)
    low = tl.zeros([NQ], dtype=tl.float32)
    high = low
    replaced = tl.zeros([NQ], dtype=tl.int1)
    if LIMITED != 0:
        low, high, replaced = group_range(tile, 0, left, within, NQ, SIZE, 8, LIMITED, FULL)
    share = 1.0 / WIDTH
    if not FULL:
        count = tl.minimum(tl.maximum(left - local * WIDTH, 1), WIDTH)
        share = (1.0 / count.to(tl.float32))[:, None]
    total = tl.zeros([NQ, SIZE], dtype=tl.float32)
    values = ()
    for p in tl.static_range(8):
        x = limited_to(tile[p], low, high, LIMITED)
        if LIMITED != 0 and not FULL:
            x = tl.where(tile_offsets(NQ, SIZE, p) < left, x, 0.0)
        values = values + (x,)
        total += x * share
    mean = tl.sum(total, 1)
    finite = tl.abs(mean) < INFINITY
    if LIMITED != 0:
        finite &= high * 0.5 - low * 0.5 < INFINITY
    mean_bits = nearest_bfloat16(mean)
    mean = mean_bits.to(tl.float32, bitcast=True)

    greatest = tl.zeros([NQ, SIZE], dtype=tl.float32)
    differences = ()
    for p in tl.static_range(8):
        d = values[p] * SIXTEENTH - (mean * SIXTEENTH)[:, None]
        if not FULL:
            d = tl.where(tile_offsets(NQ, SIZE, p) < left, d, 0.0)
        differences = differences + (d,)
        greatest = tl.maximum(greatest, tl.abs(d))
    greatest = tl.max(greatest, 1)
    spread = greatest >= LEAST_SPREAD
    inverse = tl.where(spread, 1.0 / tl.where(spread, greatest, 1.0), 0.0)[:, None]

    store_seed(scales_ptr, seed, group)
    signs = sign_words(group_hashes(seed, group + local), SIZE)
    half_signs = (signs >> 16).to(tl.int16)
    matrix = hadamard(NQ, SIZE)
    squares = tl.zeros([NQ, SIZE], dtype=tl.float32)
    signed = ()
    for p in tl.static_range(8):
        z = differences[p] * inverse
        squares += z * z
        signed = signed + (with_half_sign(z.to(tl.float16), half_signs, p),)
    signed = across(signed)
    turned = ()
    for p in tl.static_range(8):
        turned = turned + (product(signed[p], matrix, NQ, SIZE),)

    squares = tl.sum(squares, 1)
    normal = tl.where(spread, tl.rsqrt(tl.where(spread, squares, 1.0)), 0.0)
    inner = tl.zeros([NQ, SIZE], dtype=tl.float16)
    codes = ()
    for p in tl.static_range(8):
        y = (turned[p] * normal[:, None]).to(tl.float16)
        t = tl.minimum(tl.maximum(y, half(-FACTORS[BITS - 1][3])), half(FACTORS[BITS - 1][3]))
        if FACTORS[BITS - 1][1] != 0.0:
            t = t * (half(1.0) - half(FACTORS[BITS - 1][1]) * (t * t))
        # 16 + code has the code in its bits from 6 up, above a fraction of six bits.
        number = t * half(FACTORS[BITS - 1][0]) + half(16.0 + (1 << BITS) // 2)
        codes = codes + (sixth_bytes(number, BITS),)
        inner += y * level(without_fraction(number), BITS)
    inner = tl.sum(inner.to(tl.float32), 1)
    scale = tl.where(spread, greatest / tl.where(spread, normal * inner, 1.0), 0.0)
    scale *= 1.0 / SIXTEENTH
    scale = tl.minimum(scale, (GREATEST - tl.abs(mean)) / (FACTORS[BITS - 1][4] * WIDTH))
    word = tl.where(finite, mean_bits, 0x7FC00000) | ((nearest_bfloat16(scale) >> 16) & 0xFFFF)
    if REPLACES & LIMITED:
        word = tl.where(replaced, word | 0x8000, word)
    there = None if FULL else local * WIDTH < left
    store_bytes(codes, codes_ptr, group + local, there, NQ, SIZE, 8, BITS)
    tl.store(scales_ptr + SEED_WORDS + group + local, word, there)


@triton.jit
def load_rotated(
    codes_ptr, scales_ptr, group, left, NQ: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr,
    FULL: tl.constexpr, REPLACED: tl.constexpr,
):  # fmt: skip
    """See `load_codes`."""
    local = tl.arange(0, NQ)
    there = None if FULL else local * (8 * SIZE) < left
    codes = load_bytes(codes_ptr, group + local, there, NQ, SIZE, 8, BITS)
    word = tl.load(scales_ptr + SEED_WORDS + group + local, there, other=None if FULL else 0)
    mean = (word & -65536).to(tl.float32, bitcast=True)[:, None]
    scale = tl.broadcast_to(scale_of(word, REPLACED)[:, None], [NQ, SIZE])
    signs = sign_words(group_hashes(load_seed(scales_ptr), group + local), SIZE)
    matrix = hadamard(NQ, SIZE)
    levels = ()
    for p in tl.static_range(8):
        number = ((codes[p] << 6) | 0x4C00).to(tl.int16).to(tl.float16, bitcast=True)  # 16 + code
        levels = levels + (level(number, BITS),)
    levels = across(levels)
    tile = ()
    for p in tl.static_range(8):
        turned = product(levels[p], matrix, NQ, SIZE)
        tile = tile + (tl.fma(with_sign(turned, signs, p), scale, mean),)
    return tile

"""The rotated code in Triton: see `rotated_reference.py` for what it is.

A tile has eight parts of each group [NQ, SIZE], so the Hadamard matrix of a group is that of eight
times that of SIZE: three rounds of sums and differences between the parts, and for each part a
product with +-1 on tensor cores. All but the latter is in float16, two numbers an instruction
(`rotated_ptx.py`), which one of the four pipes of an SM's quarter computes at half its rate: so
where numbers are packed, which keeps that pipe busy, two of the rounds are sums of products.
"""

import triton
import triton.language as tl

from packlight.elementwise.kernels import PTX
from packlight.elementwise.limits import GREATEST as _GREATEST
from packlight.groupquant.draw_kernels import group_hashes, load_seed, sign_halves, store_seed
from packlight.groupquant.minmax_kernels import (
    INFINITY,
    LOWER,
    REPLACES,
    SEED_WORDS,
    group_range,
    limited_to,
    lower_of,
    scale_of,
)
from packlight.groupquant.rotated_ptx import (
    DECODE,
    DIFFER,
    ENCODE,
    INPUTS,
    LIMIT,
    RESTORE,
    SQUARES,
    SURVEY,
    TURN,
)
from packlight.groupquant.rotated_reference import FORMULAS, LEAST, LIFT
from packlight.groupquant.tile_kernels import part_there, tile_to_float32, to_float32

GREATEST = tl.constexpr(_GREATEST)
BOUNDS = tl.constexpr(tuple(FORMULAS[bits].bound for bits in (1, 2, 3, 4)))
STEPS = tl.constexpr(tuple(FORMULAS[bits].step for bits in (1, 2, 3, 4)))
RISE = tl.constexpr(LIFT)
LASTS = tl.constexpr(tuple(FORMULAS[bits].last for bits in (1, 2, 3, 4)))
ENCODE_PTX = tl.constexpr(ENCODE)
DECODE_PTX = tl.constexpr(DECODE)
TURN_PTX = tl.constexpr(TURN)
LIMIT_PTX = tl.constexpr(LIMIT)
SURVEY_PTX = tl.constexpr(SURVEY)
DIFFER_PTX = tl.constexpr(DIFFER)
SQUARES_PTX = tl.constexpr(SQUARES)
RESTORE_PTX = tl.constexpr(RESTORE)
INPUTS_PTX = tl.constexpr(INPUTS)
EXPONENT = tl.constexpr(0x7F800000)
LEAST_INNER = tl.constexpr(LEAST)
HALF_GREATEST = tl.constexpr(65504.0)
# Of tl.dot's inner dimension.
NARROW = tl.constexpr(16)


@triton.jit
def hadamard(NQ: tl.constexpr, SIZE: tl.constexpr, dtype: tl.constexpr, MINUS: tl.constexpr):
    """What `product` multiplies by: the Hadamard matrix of SIZE, as often as tensor cores ask.

    MINUS: the same with the other signs.
    """
    WIDTH: tl.constexpr = SIZE if SIZE >= NARROW or NQ * SIZE < NARROW else NARROW
    i = tl.arange(0, WIDTH)[:, None]
    j = tl.arange(0, WIDTH)[None, :]
    # Bit v of the constant is the parity of the bits of v; it becomes the sign of 1.
    parity = (0x69969669 ^ (0 if MINUS else -1)) >> (i & j & (SIZE - 1))
    if dtype == tl.float32:
        matrix = 1.0 - 2.0 * (parity & 1).to(tl.float32)
    elif dtype == tl.bfloat16:
        matrix = (((parity << 15) & 0x8000) | 0x3F80).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        matrix = (((parity << 15) & 0x8000) | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)
    if WIDTH > SIZE:
        matrix = tl.where(i // SIZE == j // SIZE, matrix, 0.0)
    return matrix


@triton.jit
def product(x, matrix, NQ: tl.constexpr, SIZE: tl.constexpr):
    """[NQ, SIZE] float32 of `x` and the Hadamard matrix of SIZE."""
    if SIZE >= NARROW:
        return tl.dot(x, matrix)
    elif NQ * SIZE >= NARROW:  # several groups a row
        rows = tl.reshape(x, [NQ * SIZE // NARROW, NARROW])
        return tl.reshape(tl.dot(rows, matrix), [NQ, SIZE])
    else:
        return tl.sum(x.to(tl.float32)[:, :, None] * matrix.to(tl.float32)[None, :, :], 1)


@triton.jit
def products(parts, NQ: tl.constexpr, SIZE: tl.constexpr):
    """Float16 products of eight parts with the Hadamard matrix, after the first step between them,
    and the others.
    """
    kind: tl.constexpr = tl.bfloat16 if PTX else tl.float32
    plus = hadamard(NQ, SIZE, kind, False)
    minus = hadamard(NQ, SIZE, kind, True)
    turned = ()
    for p in tl.static_range(8):
        if SIZE >= NARROW:
            total = tl.dot(parts[p % 2], plus)
            total = tl.dot(parts[p % 2 + 2], minus if p & 2 else plus, total)
            total = tl.dot(parts[p % 2 + 4], minus if p & 4 else plus, total)
            total = tl.dot(parts[p % 2 + 6], minus if (p & 2) * 2 ^ (p & 4) else plus, total)
        else:
            total = product(parts[p % 2], plus, NQ, SIZE)
            total += product(parts[p % 2 + 2], minus if p & 2 else plus, NQ, SIZE)
            total += product(parts[p % 2 + 4], minus if p & 4 else plus, NQ, SIZE)
            other = minus if (p & 2) * 2 ^ (p & 4) else plus
            total += product(parts[p % 2 + 6], other, NQ, SIZE)
        turned = turned + (total.to(tl.float16),)
    return turned


@triton.jit
def across(parts, STEPS: tl.constexpr, dtype: tl.constexpr):
    """Steps of the Hadamard matrix of eight between eight tensors, each rounded to dtype."""
    for step in tl.static_range(STEPS):
        sums = ()
        for p in tl.static_range(8):
            if p & (1 << step) == 0:
                sums = sums + (rounded(parts[p] + parts[p ^ (1 << step)], dtype),)
            else:
                sums = sums + (rounded(parts[p ^ (1 << step)] - parts[p], dtype),)
        parts = sums
    return parts


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` to the precision of dtype: bfloat16 in float32, in which the interpreter can reckon."""
    if dtype == tl.bfloat16:
        return nearest_bfloat16(x).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def with_sign(x, signs, p: tl.constexpr):
    """The same of float32."""
    flipped = x.to(tl.int32, bitcast=True) ^ ((signs.to(tl.int32) << (16 + p)) & -2147483648)
    return flipped.to(tl.float32, bitcast=True)


@triton.jit
def signed_across(d, signs):
    """Float32 numbers as bfloat16 ones, with their signs, and the first step between them."""
    parts = ()
    if PTX:
        for p in tl.static_range(8):
            parts = parts + (d[p].to(tl.bfloat16),)
        return tl.inline_asm_elementwise(
            TURN_PTX, INPUTS_PTX[8] + ",r,r,r,r,r,r,r,r,r",
            [parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], parts[6], parts[7], signs],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16) * 2, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        for p in tl.static_range(8):
            parts = parts + (with_sign(rounded(d[p], tl.bfloat16), signs, p),)
        return across(parts, 1, tl.bfloat16)


@triton.jit
def nearest_bfloat16(x):
    """float32 `x`, finite, rounded to a bfloat16 number, as int32 bits with a zero low half."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536


@triton.jit
def code_of(y, by, BITS: tl.constexpr):
    """The code of each float16 number, in units of twice the bound over `by`, as float32."""
    TOP: tl.constexpr = (1 << BITS) - 1
    u = tl.minimum(tl.maximum(y.to(tl.float32) * by.to(tl.float32) + 0.5, 0.0), 1.0)
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
        s = s * (square * square + RISE).to(tl.float16)
    return s


@triton.jit
def encoded(y, by, BITS: tl.constexpr):
    """The pieces of the codes of eight parts, integers of 16 bits, and the sum of y l(code) over
    those that are counted.

    `by` [NQ, 1] makes of y what codes are of, over twice their bound.
    """
    if PTX and BITS < 3:
        return tl.inline_asm_elementwise(
            ENCODE_PTX[BITS - 1], INPUTS_PTX[2] + ",r,r,r,r,r,r,r,r,r",
            [y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7], by],
            dtype=(tl.int16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif PTX:
        return tl.inline_asm_elementwise(
            ENCODE_PTX[BITS - 1], INPUTS_PTX[3] + ",r,r,r,r,r,r,r,r,r",
            [y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7], by],
            dtype=(tl.int16, tl.int16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        whole = tl.zeros(y[0].shape, dtype=tl.int32)
        inner = tl.zeros(y[0].shape, dtype=tl.float32)
        for p in tl.static_range(8):
            code = code_of(y[p], by, BITS)
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
        return across(levels, 3, tl.float16)


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
def power_of_two(greatest):
    """The one below it, and its inverse, so that no square of x / unit overflows or underflows."""
    exponent = greatest.to(tl.int32, bitcast=True) & EXPONENT
    exponent = tl.minimum(tl.maximum(exponent, 1 << 23), 253 << 23)
    inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32, bitcast=True), inverse


@triton.jit
def limited_below(x, within):
    """A tile of bfloat16 numbers where limits ask for no more than LOWER, and whether that holds
    of what is not finite.
    """
    lowest, _, below, _, _ = within
    bound = tl.full(x[0].shape, lowest, tl.float32).to(tl.bfloat16)
    found = tl.inline_asm_elementwise(
        LIMIT_PTX, INPUTS_PTX[9] + ",r,r,r,r,r,r,r,r,r",
        [x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7], bound],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16) * 3, is_pure=True, pack=2,
    )  # fmt: skip
    low = tl.reduce(to_float32(found[8]), 1, lower_of)
    # A NaN is none of them, and -inf only where something stands for it.
    whole = low >= tl.where(below == below, -INFINITY, -GREATEST)
    limited = (
        found[0], found[1], found[2], found[3], found[4], found[5], found[6], found[7]
    )  # fmt: skip
    return limited, whole


@triton.jit
def halves_of(x, BIT: tl.constexpr):
    """Two [Q, SIZE / 2] of the places whose number has this bit, and of those whose has not."""
    Q: tl.constexpr = x.shape[0]
    SIZE: tl.constexpr = x.shape[1]
    x = tl.permute(tl.reshape(x, [Q, SIZE >> (BIT + 1), 2, 1 << BIT]), (0, 1, 3, 2))
    low, high = tl.split(x)
    return tl.reshape(low, [Q, SIZE // 2]), tl.reshape(high, [Q, SIZE // 2])


@triton.jit
def greater_bfloat16(low, high):
    return tl.inline_asm_elementwise(
        "max.bf16x2 $0, $1, $2;", "=r,r,r",
        [low, high], dtype=tl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def over_places(x):
    """[NQ] float32 sums of float16 numbers of products' results, two an instruction at first."""
    SIZE: tl.constexpr = x.shape[1]
    if PTX and SIZE >= NARROW:  # a thread has places 8 apart
        low, high = halves_of(x, 3)
        x = tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;", "=r,r,r",
            [low, high], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return tl.sum(x.to(tl.float32), 1)


@triton.jit
def turned_pairs(x, seed, group, SIZE: tl.constexpr):
    """As `turned_values`, of whole groups of bfloat16 numbers, two an instruction.

    Sums of eight numbers are of their precision, others of float32. What is turned is over
    SIZE / 8 units, if that is above one, so that its squares have float16 sums: none is above that
    of all, which is at most 2^14.
    """
    total, greatest = tl.inline_asm_elementwise(
        SURVEY_PTX, INPUTS_PTX[2] + ",r,r,r,r,r,r,r,r",
        [x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
        dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
    for _ in tl.static_range(2):  # a thread has places 2 and 4 apart
        low, high = halves_of(greatest, 1)
        greatest = greater_bfloat16(low, high)
    mean = tl.sum(to_float32(total), 1) * (256.0 / (8 * SIZE))
    unit, inverse = power_of_two(tl.max(to_float32(greatest), 1))
    inverse *= 1.0 / max(1.0, SIZE / 8)
    finite = tl.abs(mean) < INFINITY
    mean_bits = nearest_bfloat16(mean)
    middle = -(mean_bits.to(tl.float32, bitcast=True) * inverse)
    signs = sign_halves(group_hashes(seed, group), SIZE)
    turned = tl.inline_asm_elementwise(
        DIFFER_PTX, INPUTS_PTX[8] + ",r,r,r,r,r,r,r,r,r,r,r",
        [x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7],
         inverse.to(tl.bfloat16)[:, None], middle.to(tl.bfloat16)[:, None], signs],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16) * 2, is_pure=True, pack=2,
    )  # fmt: skip
    return turned, unit, mean_bits, finite


@triton.jit
def squares_of(y):
    """[NQ] sums of squares of float16 numbers of eight parts."""
    squares = tl.inline_asm_elementwise(
        SQUARES_PTX, "=r,r,r,r,r,r,r,r,r",
        [y[0], y[1], y[2], y[3], y[4], y[5], y[6], y[7]],
        dtype=tl.float16, is_pure=True, pack=2,
    )  # fmt: skip
    return over_places(squares)


@triton.jit
def ratio(x, y):
    """x / y of normal numbers."""
    if PTX:
        return tl.inline_asm_elementwise(
            "{.reg .f32 t; rcp.approx.ftz.f32 t, $2; mul.f32 $0, $1, t;}", "=f,f,f",
            [x, y], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return x / y


@triton.jit
def inverse_root(x):
    """1 / sqrt(x) of normal numbers."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.rsqrt(x)


@triton.jit
def turned_values(
    values, seed, group, room, low, high, SIZE: tl.constexpr, LIMITED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Parts of H D (x - m) / unit before the product, the sum of squares of (x - m) / unit, the
    unit, the bits of m, and whether all is finite.
    """
    WIDTH: tl.constexpr = 8 * SIZE
    if LIMITED != 0:
        greatest = tl.maximum(tl.abs(low), tl.abs(high))
    else:
        greatest = tl.abs(values[0])
        for p in tl.static_range(1, 8):
            greatest = tl.maximum(greatest, tl.abs(values[p]))
        greatest = tl.max(greatest, 1)
    unit, inverse = power_of_two(greatest)
    if FULL:
        share = tl.full(room.shape, 1.0 / WIDTH, tl.float32)
    else:
        count = tl.minimum(tl.maximum(room, 1), WIDTH)
        share = 1.0 / count.to(tl.float32)
    total = values[0] * share[:, None]
    for p in tl.static_range(1, 8):
        total += values[p] * share[:, None]
    mean = tl.sum(total, 1)
    finite = tl.abs(mean) < INFINITY
    mean_bits = nearest_bfloat16(mean)
    middle = (mean_bits.to(tl.float32, bitcast=True) * inverse)[:, None]
    squares = tl.zeros(values[0].shape, dtype=tl.float32)
    parts = ()
    for p in tl.static_range(8):
        d = values[p] * inverse[:, None] - middle
        if not FULL:
            d = tl.where(part_there(room, SIZE, p), d, 0.0)
        parts = parts + (d,)
        squares += d * d
    signs = sign_halves(group_hashes(seed, group), SIZE)
    return signed_across(parts, signs), tl.sum(squares, 1), unit, mean_bits, finite


@triton.jit
def store_rotated(
    tile, codes_ptr, scales_ptr, group, seed, room, within, SIZE: tl.constexpr,
    BITS: tl.constexpr, LIMITED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """See `store_codes`."""
    NQ: tl.constexpr = group.shape[0]
    WIDTH: tl.constexpr = 8 * SIZE
    replaced = tl.zeros([NQ], dtype=tl.int1)
    low = tl.zeros([NQ], dtype=tl.float32)
    high = low
    store_seed(scales_ptr, seed, group)
    NARROW_TILE: tl.constexpr = PTX and FULL and tile[0].dtype == tl.bfloat16
    values = tile
    whole = tl.full([NQ], True, tl.int1)
    if NARROW_TILE and LIMITED == LOWER:
        values, whole = limited_below(tile, within)
    elif LIMITED != 0 or not NARROW_TILE:
        values = tile_to_float32(tile)
        if LIMITED != 0:
            low, high, replaced = group_range(values, 0, room, within, SIZE, 8, LIMITED, FULL)
        limited = ()
        for p in tl.static_range(8):
            x = limited_to(values[p], low, high, LIMITED)
            if LIMITED != 0 and not FULL:
                x = tl.where(part_there(room, SIZE, p), x, 0.0)
            limited = limited + (x.to(tl.bfloat16 if NARROW_TILE else tl.float32),)
        values = limited
    if NARROW_TILE:
        parts, unit, mean_bits, finite = turned_pairs(values, seed, group, SIZE)
    else:
        parts, squares, unit, mean_bits, finite = turned_values(
            values, seed, group, room, low, high, SIZE, LIMITED, FULL
        )
    finite &= whole
    if LIMITED != 0:
        finite &= high * 0.5 - low * 0.5 < INFINITY
    mean = mean_bits.to(tl.float32, bitcast=True)
    turned = products(parts, NQ, SIZE)
    if NARROW_TILE:
        squares = squares_of(turned) * (1.0 / WIDTH)
        UNITS: tl.constexpr = max(1.0, SIZE / 8)
    else:
        UNITS: tl.constexpr = 1.0
    normal = tl.minimum(inverse_root(squares), HALF_GREATEST)
    by = (normal * (0.5 / BOUNDS[BITS - 1])).to(tl.float16)[:, None]
    found = encoded(turned, by, BITS)
    inner = over_places(found[len(found) - 1])
    scale = unit * (ratio(squares, inner) * UNITS)
    scale = tl.where(inner * normal > LEAST_INNER, scale, 0.0)
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
    FULL: tl.constexpr, REPLACED: tl.constexpr, NARROW: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """See `load_codes`. ONCE: not read again by the same program, which would be computed twice."""
    NQ: tl.constexpr = group.shape[0]
    there = room > 0
    # All is asked for before anything is waited for.
    seed = load_seed(scales_ptr)
    if FULL:
        word = tl.load(scales_ptr + SEED_WORDS + group)
    else:
        word = tl.load(scales_ptr + SEED_WORDS + group, there, other=0)
    pointers = piece_pointers(codes_ptr, group, SIZE, BITS)
    pieces = ()
    for i in tl.static_range(1 if BITS < 3 else 2):
        if FULL:
            piece = tl.load(pointers[i])
        else:
            piece = tl.load(pointers[i], there[:, None], other=0)
        pieces = pieces + (piece.to(tl.int16),)
    if PTX and ONCE and BITS > 2:  # Triton exchanges what a tensor core takes where it was loaded
        pieces = tl.inline_asm_elementwise(
            "mov.b32 $0, $2; mov.b32 $1, $3;", "=r,=r,r,r", [pieces[0], pieces[1]],
            dtype=(tl.int16, tl.int16), is_pure=False, pack=2,
        )  # fmt: skip
    mean = (word & -65536).to(tl.float32, bitcast=True)[:, None]
    scale = scale_of(word, REPLACED)[:, None]
    signs = sign_halves(group_hashes(seed, group), SIZE)
    matrix = hadamard(NQ, SIZE, tl.float16, False)
    levels = decoded(pieces, BITS)
    tile = ()
    if PTX and NARROW:
        for p in tl.static_range(8):
            tile = tile + (product(levels[p], matrix, NQ, SIZE).to(tl.bfloat16),)
        return tl.inline_asm_elementwise(
            RESTORE_PTX, INPUTS_PTX[8] + ",r,r,r,r,r,r,r,r,r,r,r",
            [tile[0], tile[1], tile[2], tile[3], tile[4], tile[5], tile[6], tile[7],
             signs, scale.to(tl.bfloat16), mean.to(tl.bfloat16)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16) * 2, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        scale = tl.broadcast_to(scale, [NQ, SIZE])
        for p in tl.static_range(8):
            turned = product(levels[p], matrix, NQ, SIZE)
            tile = tile + (tl.fma(with_sign(turned, signs, p), scale, mean),)
        return tile

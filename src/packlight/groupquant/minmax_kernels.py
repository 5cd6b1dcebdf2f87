"""The min-max code in Triton: minimum and step of a group, and codes between; see the reference.

float32 numbers from 2^(23 - f) to 2^(24 - f) lie 2^-f apart. So (x - low) / step + 2^(23 - f) + u
has the fraction in its low f bits and the code, floor((x - low) / step + u), right above them. The
quotient is rounded to a multiple of 2^-f thereby, and so is u: the expected code is that multiple.

Differences are taken of halves, at the price of whole ones, which may overflow.

With an offset, u and what a code is counted from are numbers of the group: a pack takes no more
instructions an element than rounding to nearest, and reading one no more than without.
"""

import triton
import triton.language as tl

from packlight.elementwise.kernels import PTX, clamp
from packlight.groupquant.draw_kernels import group_hashes, load_seed, random_tile, store_seed
from packlight.groupquant.grouping import HEADER
from packlight.groupquant.grouping import OFFSET as _OFFSET
from packlight.groupquant.minmax_reference import COARSE, SIGN, TINY
from packlight.groupquant.tile_kernels import code_bytes, load_bytes, part_there, store_bytes

INFINITY = tl.constexpr(float("inf"))
WHOLE = tl.constexpr(8388608.0)
LEAST_STEP = tl.constexpr(TINY)
SIGN_BIT = tl.constexpr(SIGN)
COARSE_STEP = tl.constexpr(COARSE)
OFFSET = tl.constexpr(_OFFSET)
LARGE = tl.constexpr(3e38)
SEED_WORDS = tl.constexpr(HEADER)

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
def lower_of(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _higher(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def group_range(
    tile, s: tl.constexpr, room, within, SIZE: tl.constexpr, PARTS: tl.constexpr,
    LIMITED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Minimum and maximum of set s of the groups of a tile within the limits, [NQ] each.

    And whether there are numbers in place of infinities.
    """
    for p in tl.static_range(PARTS):
        below, above = tile[s * PARTS + p], tile[s * PARTS + p]
        if not FULL:
            inside = part_there(room, SIZE, s * PARTS + p)
            below = tl.where(inside, below, INFINITY)
            above = tl.where(inside, above, -INFINITY)
        if p == 0:
            low, high = below, above
        else:
            low, high = lower_of(low, below), _higher(high, above)
    low, high = tl.reduce(low, 1, lower_of), tl.reduce(high, 1, _higher)
    replaced = tl.zeros(room.shape, dtype=tl.int1)
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
    return low, high, replaced


@triton.jit
def limited_to(x, low, high, LIMITED: tl.constexpr):
    """[NQ, SIZE] values between minimum and maximum [NQ] of their groups, where limits ask."""
    if LOWER & LIMITED:
        x = tl.maximum(x, low[:, None])
    if UPPER & LIMITED:
        x = tl.minimum(x, high[:, None])
    return x


@triton.jit
def group_scales(
    low, high, replaced, BITS: tl.constexpr, CODE: tl.constexpr, LIMITED: tl.constexpr,
    GREATEST: tl.constexpr,
):  # fmt: skip
    """By what groups of this range are packed, [NQ] each.

    The half of the minimum as it is kept, the step, the inverse of half a step, and the word of
    both scales.
    """
    TOP: tl.constexpr = (1 << BITS) - 1
    bits = low.to(tl.int32, bitcast=True)
    low_bits = (bits + tl.where(bits < 0, 0xFFFF, 0)) & -65536
    low = low_bits.to(tl.float32, bitcast=True)
    half_low = low * 0.5
    half_spread = tl.fma(high, 0.5, -half_low)
    if CODE == OFFSET:
        exact = half_spread * tl.where(low == 0.0, 2.0 / (TOP - 1), 2.0 / TOP)
    else:
        exact = half_spread * (2.0 / TOP)
    exact_bits = exact.to(tl.int32, bitcast=True)
    step_bits = tl.maximum((exact_bits + 0xFFFF) & -65536, LEAST_STEP)
    step_bits = tl.where(half_spread < INFINITY, step_bits, 0x7FC00000)
    step = step_bits.to(tl.float32, bitcast=True)
    if GREATEST is not None:
        # Kept rounded down where the last code would stand for more than is finite.
        past = tl.fma(step, TOP / 2, half_low) > GREATEST / 2
        step_bits = tl.where(past, exact_bits & -65536, step_bits)
    if REPLACES & LIMITED:
        step_bits = tl.where(replaced, step_bits | SIGN_BIT, step_bits)
    return half_low, step, reciprocal(step) * 2.0, low_bits | ((step_bits >> 16) & 0xFFFF)


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
def saturated(x, factor):
    """x factor between 0 and 1, 0 for NaN."""
    if PTX:
        return tl.inline_asm_elementwise(
            "mul.rn.sat.f32 $0, $1, $2;", "=f,f,f", [x, factor],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.minimum(tl.maximum(x * factor, 0.0), 1.0)


@triton.jit
def code_by_offset(x, half_low, inverse, first, more):
    """As `code_and_fraction`, of an addend 2^(23 - f) + u of the group, and 1 more of x > 0.

    `more` is 0 in groups that do not begin at 0. Comparing would take half of what limits a pack:
    comparisons and selections are as slow as two products.
    """
    addend = tl.fma(saturated(x, LARGE), more, first)
    if PTX:  # not to be fused otherwise, as said there
        return tl.inline_asm_elementwise(
            "{.reg .f32 v; fma.rn.f32 v, $1, 0f3F000000, $2; fma.rn.f32 $0, v, $3, $4;}",
            "=r,f,f,f,f", [x, -half_low, inverse, addend],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return ((x * 0.5 - half_low) * inverse + addend).to(tl.int32, bitcast=True)


@triton.jit
def group_offsets(seed, group, step, BITS: tl.constexpr):
    """u [NQ] of groups with this step, and whether it is that of every coarse step, 1/2."""
    FRACTION: tl.constexpr = 15 if BITS == 8 else 16
    whole = (group_hashes(seed, group) >> (32 - FRACTION)).to(tl.int32)
    fine = tl.abs(step) < COARSE_STEP
    return tl.where(fine, whole.to(tl.float32) * (1.0 / (1 << FRACTION)), 0.5), fine


@triton.jit
def store_minmax(
    tile, codes_ptr, scales_ptr, group, seed, row, bundle, room, within, SIZE: tl.constexpr,
    PARTS: tl.constexpr, BITS: tl.constexpr, CODE: tl.constexpr, STOCHASTIC: tl.constexpr,
    LIMITED: tl.constexpr, GREATEST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """See `store_codes`."""
    draws = ()
    if CODE == OFFSET:
        store_seed(scales_ptr, seed, group)
        scales_ptr += SEED_WORDS
    elif STOCHASTIC:
        draws = random_tile(seed, row, bundle, SIZE)
    for s in tl.static_range(8 // PARTS):
        low, high, replaced = group_range(tile, s, room, within, SIZE, PARTS, LIMITED, FULL)
        half_low, step, inverse, word = group_scales(
            low, high, replaced, BITS, CODE, LIMITED, GREATEST
        )
        if CODE == OFFSET:
            u, _ = group_offsets(seed, group + s, step, BITS)
            from_zero = half_low == 0.0
            base = 256.0 if BITS == 8 else 128.0
            start = tl.where(from_zero, base, base + u)[:, None]
            more = tl.where(from_zero, u + 1.0, 0.0)[:, None]
        half_low = half_low[:, None]
        inverse = tl.broadcast_to(inverse[:, None], [inverse.shape[0], SIZE])
        parts = ()
        for p in tl.static_range(PARTS):
            x = limited_to(tile[s * PARTS + p], low, high, LIMITED)
            if CODE == OFFSET:
                code = code_by_offset(x, half_low, inverse, start, more)
            else:
                code = code_and_fraction(
                    x, half_low, inverse, draws, s * PARTS + p, BITS, STOCHASTIC
                )
            parts = parts + (code_bytes(code, BITS),)
        there = None if FULL else room > s * PARTS * SIZE
        store_bytes(parts, codes_ptr, group + s, there, SIZE, PARTS, BITS)
        tl.store(scales_ptr + group + s, word, there)


@triton.jit
def load_minmax(
    codes_ptr, scales_ptr, group, room, SIZE: tl.constexpr, PARTS: tl.constexpr,
    BITS: tl.constexpr, CODE: tl.constexpr, FULL: tl.constexpr, REPLACED: tl.constexpr,
):  # fmt: skip
    """See `load_codes`."""
    HALF: tl.constexpr = 2.0**-16 if BITS == 8 else 2.0**-17  # of what u is a multiple of
    if CODE == OFFSET:
        seed = load_seed(scales_ptr)
        scales_ptr += SEED_WORDS
    tile = ()
    for s in tl.static_range(8 // PARTS):
        there = None if FULL else room > s * PARTS * SIZE
        codes = load_bytes(codes_ptr, group + s, there, SIZE, PARTS, BITS)
        word = tl.load(scales_ptr + group + s, there, other=None if FULL else 0)
        low = (word & -65536).to(tl.float32, bitcast=True)
        step = scale_of(word, REPLACED)
        if CODE == OFFSET:
            u, fine = group_offsets(seed, group + s, step, BITS)
            from_zero = low == 0.0
            middle = tl.where(fine, 0.5 - HALF, 0.5) - u - tl.where(from_zero, 1.0, 0.0)
            low = (low * 0.5 + step * 0.5 * middle) * 2.0
            more = tl.where(from_zero, low, 0.0)[:, None]
            low = tl.where(from_zero, 0.0, low)
        step = tl.broadcast_to(step[:, None], [step.shape[0], SIZE])
        for p in tl.static_range(PARTS):
            # An integer below 2^23 in the low bits of 2^23 is that much more than 2^23.
            code = (codes[p] | 0x4B000000).to(tl.float32, bitcast=True) - WHOLE
            if PTX:
                value = tl.fma(code, step, low[:, None])
            else:  # the interpreter rounds the product, which may overflow
                value = (code * (step * 0.5) + low[:, None] * 0.5) * 2.0
            if CODE == OFFSET:  # `more` of all codes but that of 0
                value = tl.fma(saturated(code, 1.0), more, value)
            tile = tile + (value,)
    return tile


@triton.jit
def scale_of(word, REPLACED: tl.constexpr):
    """The step in the low half of a group's word, whose sign says that infinities were replaced."""
    bits = word << 16
    if REPLACED == KEPT:
        bits &= 0x7FFFFFFF
    elif REPLACED == LOST:
        bits = tl.where(bits < 0, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)

"""The pack of a tile in Triton, by whichever code: see `tile_kernels.py` for what a tile is."""

import triton
import triton.language as tl

from packlight.groupquant.grouping import ROTATED as _ROTATED
from packlight.groupquant.minmax_kernels import PLAIN, load_minmax, store_minmax
from packlight.groupquant.rotated_kernels import load_rotated, store_rotated
from packlight.groupquant.tile_kernels import to_float32

ROTATED = tl.constexpr(_ROTATED)


@triton.jit
def packed_tile(tile, dtype: tl.constexpr, CODE: tl.constexpr):
    """What `store_codes` is to be given of a tile that came of a tensor of this dtype.

    A rotated pack takes bfloat16 numbers as they are, two an instruction.
    """
    values = ()
    for p in tl.static_range(8):
        values = values + (pack_value(tile[p], dtype, CODE),)
    return values


@triton.jit
def pack_value(x, dtype: tl.constexpr, CODE: tl.constexpr):
    """A part of `packed_tile`."""
    if CODE == ROTATED and dtype == tl.bfloat16:
        return x.to(tl.bfloat16)
    else:
        return to_float32(x)


@triton.jit
def store_codes(
    tile, codes_ptr, scales_ptr, group, seed, row, bundle, room, within, SIZE: tl.constexpr,
    PARTS: tl.constexpr, BITS: tl.constexpr, CODE: tl.constexpr, SEED: tl.constexpr,
    LIMITED: tl.constexpr, GREATEST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Quantises a tile of bundles of a row or of several, [NQ] each, by their first groups.

    `within` is a tuple of `Limits`, LIMITED what of them there is to be done. GREATEST is the
    greatest number that a code may stand for, None where values are too small to come near.
    """
    seed = seed.to(tl.int64)
    if CODE == ROTATED:
        store_rotated(
            tile, codes_ptr, scales_ptr, group, seed, room, within, SIZE, BITS, LIMITED, FULL
        )
    else:
        store_minmax(
            tile, codes_ptr, scales_ptr, group, seed, row, bundle, room, within, SIZE, PARTS,
            BITS, CODE, SEED != 0, LIMITED, GREATEST, FULL,
        )  # fmt: skip


@triton.jit
def load_codes(
    codes_ptr, scales_ptr, group, room, SIZE: tl.constexpr, PARTS: tl.constexpr,
    BITS: tl.constexpr, CODE: tl.constexpr, FULL: tl.constexpr, REPLACED: tl.constexpr = PLAIN,
    NARROW: tl.constexpr = False,
):  # fmt: skip
    """The eight float32 tensors of a tile of bundles by their first groups [NQ].

    REPLACED says what becomes of groups with numbers in place of infinities, if there may be any.
    NARROW: they may be bfloat16 ones, where that takes fewer instructions.
    """
    if CODE == ROTATED:
        return load_rotated(
            codes_ptr, scales_ptr, group, room, SIZE, BITS, FULL, REPLACED, NARROW, True
        )
    else:
        return load_minmax(
            codes_ptr, scales_ptr, group, room, SIZE, PARTS, BITS, CODE, FULL, REPLACED
        )

"""The pack of a tile in Triton, by whichever code: see `tile_kernels.py` for what a tile is."""

import triton
import triton.language as tl

from packlight.groupquant.minmax_kernels import PLAIN, load_minmax, store_minmax


@triton.jit
def store_codes(
    tile, codes_ptr, scales_ptr, group, seed, row, bundle, left, within, NQ: tl.constexpr,
    SIZE: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, SEED: tl.constexpr,
    LIMITED: tl.constexpr, GREATEST: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Quantises a tile whose first group is `group` of the pack, and `bundle` of the row.

    `left` elements are left of the row. `within` is a tuple of `Limits`, LIMITED what of them there
    is to be done. GREATEST is the greatest number that a code may stand for, None where values are
    too small to come near.
    """
    store_minmax(
        tile, codes_ptr, scales_ptr, group, seed, row, bundle, left, within, NQ, SIZE, PARTS, BITS,
        SEED != 0, LIMITED, GREATEST, FULL,
    )  # fmt: skip


@triton.jit
def load_codes(
    codes_ptr, scales_ptr, group, left, NQ: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    BITS: tl.constexpr, FULL: tl.constexpr, REPLACED: tl.constexpr = PLAIN,
):  # fmt: skip
    """The eight float32 tensors of the tile that starts at a group of the pack.

    REPLACED says what becomes of groups with numbers in place of infinities, if there may be any.
    """
    return load_minmax(
        codes_ptr, scales_ptr, group, left, NQ, SIZE, PARTS, BITS, FULL, REPLACED
    )

"""Random numbers of groups in Triton: see `draws.py`."""

import triton
import triton.language as tl

from packlight._philox import PAIR_MULTIPLIER, PAIR_WEYL
from packlight.groupquant.draws import ROUNDS

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
MULTIPLIER = tl.constexpr(PAIR_MULTIPLIER)
WEYL = tl.constexpr(PAIR_WEYL)


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
def other_seed(seed):
    """Of the second pack of an operator: see `draws.other_seed`."""
    return seed ^ (1 << 32)

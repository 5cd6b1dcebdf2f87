"""Random numbers of groups in Triton: see `draws.py`."""

import triton
import triton.language as tl

from packlight._philox import PAIR_MULTIPLIER, PAIR_WEYL
from packlight.elementwise.kernels import PTX
from packlight.groupquant.draws import HASH, ROUNDS, STEP

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
MULTIPLIER = tl.constexpr(PAIR_MULTIPLIER)
WEYL = tl.constexpr(PAIR_WEYL)
HASH_0 = tl.constexpr(HASH[0])
HASH_1 = tl.constexpr(HASH[1])
PLACE_STEP = tl.constexpr(STEP)


@triton.jit
def random_tile(seed, row, bundle, SIZE: tl.constexpr):
    """Two [NQ, SIZE] uint32 tensors for the places of bundles [NQ] of their rows."""
    seed = seed.to(tl.uint64)
    key = seed.to(tl.uint32)
    c0 = bundle.to(tl.uint32)[:, None] * SIZE + tl.arange(0, SIZE).to(tl.uint32)[None, :]
    c1 = tl.broadcast_to((row.to(tl.uint32) ^ (seed >> 32).to(tl.uint32))[:, None], c0.shape)
    for _ in tl.static_range(PHILOX_ROUNDS):
        high = tl.umulhi(c0, MULTIPLIER)
        low = tl.mul(c0, MULTIPLIER, sanitize_overflow=False)
        c0, c1 = high ^ key ^ c1, low
        key = tl.add(key, WEYL, sanitize_overflow=False)
    return c0, c1


@triton.jit
def other_seed(seed):
    """Of the second pack of an operator: see `draws.other_seed`."""
    return seed.to(tl.int64) ^ (1 << 32)


@triton.jit
def mixed(x):
    """See `draws.mixed`."""
    x ^= x >> 16
    x = tl.mul(x, HASH_0, sanitize_overflow=False)
    x ^= x >> 15
    x = tl.mul(x, HASH_1, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def group_hashes(seed, group):
    """32 bits for each group [NQ] of a pack."""
    seed = seed.to(tl.uint64)
    low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    return mixed(group.to(tl.uint32) ^ mixed(mixed(low) ^ high))


@triton.jit
def sign_halves(hashes, SIZE: tl.constexpr):
    """[NQ, SIZE] of int16: bit 15 - p is the sign of element p of each place; see `draws.signs`."""
    place = tl.arange(0, SIZE)
    step = tl.mul((place // 4 + 1).to(tl.uint32), PLACE_STEP, sanitize_overflow=False)
    words = mixed(hashes[:, None] ^ step[None, :])
    if PTX:  # two an instruction, each byte twice
        byte = tl.broadcast_to((place % 4)[None, :], words.shape)
        return tl.inline_asm_elementwise(
            "{.reg .b32 s; mad.lo.u32 s, $3, 0x0011, 0x4400; mad.lo.u32 s, $4, 0x1100, s;"
            " prmt.b32 $0, $1, $2, s;}",
            "=r,r,r,r,r", [words, byte], dtype=tl.int16, is_pure=True, pack=2,
        )  # fmt: skip
    return ((words >> (place % 4 * 8).to(tl.uint32)[None, :]) << 8).to(tl.int16)


@triton.jit
def store_seed(scales_ptr, seed, group):
    """Writes the seed to the head of a pack, where the first group is among groups [NQ]."""
    head = scales_ptr + tl.zeros(group.shape, dtype=tl.int32)
    tl.store(head, seed.to(tl.int32), group == 0)
    tl.store(head + 1, (seed >> 32).to(tl.int32), group == 0)


@triton.jit
def load_seed(scales_ptr):
    """The seed at the head of a pack, int64."""
    low, high = tl.load(scales_ptr), tl.load(scales_ptr + 1)
    return (high.to(tl.int64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.int64)

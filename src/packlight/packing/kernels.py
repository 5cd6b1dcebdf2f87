"""Building blocks for kernels that read or write packed codes; the layout is in `layout.py`.

Below them the two kernels that need nothing else: a mask to one bit an element, and back.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.packing.layout import laid_out, lanes, packed_bytes


@triton.jit
def empty_word(BLOCK: tl.constexpr, BITS: tl.constexpr):
    """[BLOCK] words without codes: 8 codes of up to 4 bits fit 32 bits, longer ones need 64."""
    if BITS <= 4:
        return tl.zeros([BLOCK], dtype=tl.int32)
    else:
        return tl.zeros([BLOCK], dtype=tl.int64)


@triton.jit
def load_rows(x_ptr, start, lane, n, groups, FULL: tl.constexpr):
    """The eight elements of every word of a block, 8 tensors [BLOCK]. `x_ptr` points at the block.

    FULL says that every block is whole, so that nothing is masked.
    """
    rows = ()
    for j in tl.static_range(8):
        if FULL:
            rows = rows + (tl.load(x_ptr + j * groups + lane),)
        else:
            inside = (lane < groups - start) & (lane < n - start - j * groups)
            rows = rows + (tl.load(x_ptr + j * groups + lane, inside, other=0.0),)
    return rows


@triton.jit
def store_row(y_ptr, y, j: tl.constexpr, start, lane, n, groups, FULL: tl.constexpr):
    """Stores row j of a block in the dtype of `y_ptr`."""
    y = y.to(y_ptr.dtype.element_ty)
    if FULL:
        tl.store(y_ptr + j * groups + lane, y)
    else:
        inside = (lane < groups - start) & (lane < n - start - j * groups)
        tl.store(y_ptr + j * groups + lane, y, inside)


@triton.jit
def store_word(packed_ptr, word, lane, groups, mask, BITS: tl.constexpr):
    """Stores [BLOCK] words of 8 codes, byte p into plane p. `packed_ptr` points at the block."""
    for p in tl.static_range(BITS):
        byte = ((word >> (8 * p)) & 0xFF).to(tl.uint8)
        tl.store(packed_ptr + p * groups + lane, byte, mask)


@triton.jit
def load_word(packed_ptr, lane, groups, mask, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """The inverse of `store_word`."""
    word = empty_word(BLOCK, BITS)
    for p in tl.static_range(BITS):
        if mask is None:
            byte = tl.load(packed_ptr + p * groups + lane)
        else:
            byte = tl.load(packed_ptr + p * groups + lane, mask, other=0)
        word |= byte.to(word.dtype) << (8 * p)
    return word


@triton.jit
def code_of(word, j: tl.constexpr, BITS: tl.constexpr):
    """Code j of the 8 in each word, as int32."""
    return ((word >> (j * BITS)) & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit
def code_at(packed_ptr, place, groups, mask, BITS: tl.constexpr):
    """The codes of elements `place`, a tensor of any shape, as int32: each is looked up by itself.

    For elements that are not met eight of a word at a time.
    """
    lane = tl.zeros(place.shape, tl.int32)
    for step in tl.static_range(2, -1, -1):  # place // groups, which is below 8
        over = place >= groups << step
        place = tl.where(over, place - (groups << step), place)
        lane = tl.where(over, lane + (1 << step), lane)
    bit = lane * BITS
    byte_ptr = packed_ptr + (bit >> 3) * groups + place
    code = tl.load(byte_ptr, mask, other=0).to(tl.int32)
    shift = bit & 7
    if 8 % BITS != 0:  # a code may lie in two bytes
        high = tl.load(byte_ptr + groups, mask & (shift + BITS > 8), other=0).to(tl.int32)
        code |= high << 8
    return (code >> shift) & ((1 << BITS) - 1)


# --- Masks.

BLOCK = 512


@quick
@triton.jit
def _pack_mask_kernel(
    x_ptr,  # [n], bytes of 0 and 1
    codes_ptr,  # [groups]
    n,
    groups,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)  # Triton passes 1 as a constant, which has no `to`
    lane = tl.arange(0, BLOCK)
    rows = load_rows(x_ptr + start, start, lane, n, groups, FULL)
    word = empty_word(BLOCK, 1)
    for j in tl.static_range(8):
        word |= rows[j].to(tl.int32) << j
    store_word(codes_ptr + start, word, lane, groups, lane < groups - start, 1)


@quick
@triton.jit
def _unpack_mask_kernel(
    y_ptr,  # [n], bytes of 0 and 1
    codes_ptr,  # [groups]
    n,
    groups,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)
    lane = tl.arange(0, BLOCK)
    word = load_word(codes_ptr + start, lane, groups, lane < groups - start, BLOCK, 1)
    for j in tl.static_range(8):
        store_row(y_ptr + start, code_of(word, j, 1), j, start, lane, n, groups, FULL)


@functools.lru_cache(LAUNCHES)
def _launch(kernel: quick, n: int) -> Launch:
    groups = lanes(n)
    full = n == 8 * groups and groups % BLOCK == 0
    grid = (triton.cdiv(groups, BLOCK),)
    return kernel.prepare(grid, n, groups, FULL=full, BLOCK=BLOCK, num_warps=4)


def pack_mask(mask: Tensor, stride: Sequence[int]) -> Tensor:
    n = mask.numel()
    packed = mask.new_empty(packed_bytes(n, 1))
    if n:
        _launch(_pack_mask_kernel, n)(laid_out(mask, stride), packed)
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    mask = packed.new_empty_strided(tuple(shape), tuple(stride), dtype=torch.bool)
    n = mask.numel()
    if n:
        _launch(_unpack_mask_kernel, n)(mask.view(torch.uint8), packed)
    return mask

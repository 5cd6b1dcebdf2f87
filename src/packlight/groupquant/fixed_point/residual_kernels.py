"""The Triton kernel of residual sums: up to `SLOTS` links in one pass over memory."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.groupquant.fixed_point import reference
from packlight.groupquant.fixed_point.kernels import _channel, _inner, _words
from packlight.groupquant.fixed_point.residual_ops import links
from packlight.packing.kernels import code_of, load_rows, load_word, store_row
from packlight.packing.layout import laid_out

STEP = tl.constexpr(reference.STEP)
LOW = tl.constexpr(reference.LOW)


@triton.jit
def _add_link(
    sums,
    codes_ptr,
    table_ptr,
    mask_ptr,
    start,
    lane,
    groups,
    inner,
    channels,
    MASKED: tl.constexpr,
    BITS: tl.constexpr,
    SAME: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The eight sums of every word of a block, this link added."""
    there = None if FULL else lane < groups - start
    word = load_word(codes_ptr + start, lane, groups, there, BLOCK, BITS)
    if MASKED:
        signs = load_word(mask_ptr + start, lane, groups, there, BLOCK, 1)
    more = ()
    for j in tl.static_range(8):
        if j == 0 or not SAME:
            channel = _channel(j * groups + start, lane, inner, channels)
            step = tl.load(table_ptr + STEP * channels + channel)
            low = tl.load(table_ptr + LOW * channels + channel)
        y = sums[j] + (code_of(word, j, BITS).to(tl.float32) * step + low)
        if MASKED:
            y = tl.where(code_of(signs, j, 1) != 0, y, 0.0)
        more = more + (y,)
    return more


@quick
@triton.jit
def _residual_kernel(
    x_ptr,  # [n], what the links are added to
    y_ptr,  # [n], may be x_ptr
    codes_ptr,  # [BITS * groups], of the first link
    table_ptr,  # [6, channels]
    mask_ptr,  # [groups]
    codes1_ptr,
    table1_ptr,
    mask1_ptr,
    codes2_ptr,
    table2_ptr,
    mask2_ptr,
    codes3_ptr,
    table3_ptr,
    mask3_ptr,
    n,
    groups,
    inner,
    channels,
    START: tl.constexpr,  # else there is no x, and the links are added to 0
    LINKS: tl.constexpr,
    MASKS: tl.constexpr,  # bit i: link i has a mask
    BITS: tl.constexpr,
    SAME: tl.constexpr,  # the eight elements of a word are of one channel
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)  # Triton passes 1 as a constant, which has no `to`
    inner = tl.full([], inner, tl.int32)
    channels = tl.full([], channels, tl.int32)
    lane = tl.arange(0, BLOCK)
    sums = ()
    if START:
        xs = load_rows(x_ptr + start, start, lane, n, groups, FULL)
        for j in tl.static_range(8):
            sums = sums + (xs[j].to(tl.float32),)
    else:
        for _ in tl.static_range(8):
            sums = sums + (tl.zeros([BLOCK], dtype=tl.float32),)
    sums = _add_link(
        sums, codes_ptr, table_ptr, mask_ptr,
        start, lane, groups, inner, channels, MASKS & 1, BITS, SAME, FULL, BLOCK,
    )  # fmt: skip
    if LINKS > 1:
        sums = _add_link(
            sums, codes1_ptr, table1_ptr, mask1_ptr,
            start, lane, groups, inner, channels, MASKS & 2, BITS, SAME, FULL, BLOCK,
        )  # fmt: skip
    if LINKS > 2:
        sums = _add_link(
            sums, codes2_ptr, table2_ptr, mask2_ptr,
            start, lane, groups, inner, channels, MASKS & 4, BITS, SAME, FULL, BLOCK,
        )  # fmt: skip
    if LINKS > 3:
        sums = _add_link(
            sums, codes3_ptr, table3_ptr, mask3_ptr,
            start, lane, groups, inner, channels, MASKS & 8, BITS, SAME, FULL, BLOCK,
        )  # fmt: skip
    for j in tl.static_range(8):
        store_row(y_ptr + start, sums[j], j, start, lane, n, groups, FULL)


# --- The launcher, with the signature of the reference.

# Links a pass. A further one costs 5 bits an element, a further pass two values.
SLOTS = 4


@functools.lru_cache(LAUNCHES)
def _launch(
    n: int, channels: int, inner: int, bits: int, start: bool, masked: tuple[bool, ...]
) -> Launch:
    """That of as many links as `masked` has, those it names with a mask."""
    grid, numbers, constants = _words(n, channels, inner)
    return _residual_kernel.prepare(
        grid,
        *numbers,
        START=start,
        LINKS=len(masked),
        MASKS=sum(mask << i for i, mask in enumerate(masked)),
        BITS=bits,
        **constants,
    )


def residual(
    start: Tensor | None,
    codes: Tensor,
    table: Tensor,
    kept: Sequence[Tensor],
    masked: Sequence[bool],
    shape: Sequence[int],
    stride: Sequence[int],
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    y = codes.new_empty_strided(tuple(shape), tuple(stride), dtype=dtype)
    n, channels = y.numel(), y.shape[1]
    if n == 0:
        return y
    inner = _inner(channels, stride)
    x = None if start is None else laid_out(start, stride)
    chain = list(links((codes, table, *kept), masked))
    for first in range(0, len(chain), SLOTS):
        part, masks = chain[first : first + SLOTS], tuple(masked[first : first + SLOTS])
        tensors: list[Tensor] = []
        for link in part:  # where there is no mask, none is read
            tensors += link if len(link) == 3 else (*link, link[0])
        tensors += tensors[:3] * (SLOTS - len(part))
        launch = _launch(n, channels, inner, bits, x is not None, masks)
        launch(y if x is None else x, y, *tensors)
        x = y
    return y

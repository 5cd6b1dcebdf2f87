"""What the codes of groups by offset stand for, in Triton: see `minmax_reference.line`."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.groupquant.draw_kernels import load_seed
from packlight.groupquant.grouping import HEADER
from packlight.groupquant.minmax_kernels import KEPT, SEED_WORDS, group_offsets, scale_of

BLOCK = 512


@quick
@triton.jit
def _line_kernel(
    scales_ptr,  # [SEED_WORDS + groups]
    first_ptr,  # [groups], as all below
    step_ptr,
    lowest_ptr,
    groups,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    HALF: tl.constexpr = 2.0**-16 if BITS == 8 else 2.0**-17  # of what u is a multiple of
    seed = load_seed(scales_ptr)
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = group < groups
    word = tl.load(scales_ptr + SEED_WORDS + group, there, other=0)
    low = (word & -65536).to(tl.float32, bitcast=True)
    step = scale_of(word, KEPT)
    u, fine = group_offsets(seed, group, step, BITS)
    from_zero = low == 0.0
    half_step = step * 0.5
    nothing = half_step * 0.0
    middle = tl.where(fine, 0.5 - HALF, 0.5) - u - tl.where(from_zero, 1.0, 0.0)
    first = low * 0.5 + half_step * middle
    tl.store(first_ptr + group, first, there)
    tl.store(step_ptr + group, half_step, there)
    tl.store(lowest_ptr + group, tl.where(from_zero, nothing, (first + nothing) * 2.0), there)


@functools.lru_cache(LAUNCHES)
def _line_launch(groups: int, bits: int) -> Launch:
    grid = (triton.cdiv(groups, BLOCK),)
    return _line_kernel.prepare(grid, groups, BITS=bits, BLOCK=BLOCK, num_warps=4)


def line(scales: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = scales.numel() - HEADER
    made = [scales.new_empty(groups, dtype=torch.float32) for _ in range(3)]
    if groups:
        _line_launch(groups, bits)(scales, *made)
    return made[0], made[1], made[2]

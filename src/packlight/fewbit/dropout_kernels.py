"""Dropout in one pass: draws, output and packed mask. The backward is the activations' kernel."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight._seed_kernels import seed_argument, seed_kind, seed_value
from packlight.fewbit.dropout_reference import drop_below
from packlight.packing.kernels import empty_word, load_rows, store_row, store_word
from packlight.packing.layout import dense_stride, laid_out, lanes, packed_bytes, write_back

BLOCK = 512


@triton.jit
def draws_of(seed, group):
    """The draws of the eight elements of each of these groups, a tensor of any shape."""
    group = group.to(tl.int32)
    zero = tl.zeros_like(group)
    return tl.philox(seed, group, zero, zero, zero) + tl.philox(seed, group, zero + 1, zero, zero)


@quick
@triton.jit(do_not_specialize=["drop_below", "seed"])
def _dropout_kernel(
    x_ptr,  # [n]
    y_ptr,  # [n], may be x_ptr
    codes_ptr,  # [groups]
    seed,  # a number, or a pointer to one
    n,
    groups,
    drop_below,
    scale,
    KEEP_CODES: tl.constexpr,
    SEED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)  # Triton passes 1 as a constant, which has no `to`
    lane = tl.arange(0, BLOCK)
    x_ptr += start
    y_ptr += start
    codes_ptr += start

    xs = load_rows(x_ptr, start, lane, n, groups, FULL)
    draws = draws_of(seed_value(seed, SEED), start + lane)

    word = empty_word(BLOCK, 1)
    for j in tl.static_range(8):
        kept = draws[j] >= tl.full([], drop_below, tl.uint32)
        y = tl.where(kept, xs[j].to(tl.float32) * scale, xs[j].to(tl.float32) * 0.0)
        store_row(y_ptr, y, j, start, lane, n, groups, FULL)
        word |= kept.to(tl.int32) << j
    if KEEP_CODES:
        store_word(codes_ptr, word, lane, groups, lane < groups - start, 1)


@quick
@triton.jit(do_not_specialize=["drop_below"])
def _mask_kernel(
    codes_ptr,  # [groups]
    seed_ptr,  # [1]
    groups,
    drop_below,
    BLOCK: tl.constexpr,
):
    """The mask alone: of any element, those of a group past the end too."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    draws = draws_of(tl.load(seed_ptr), start + lane)
    word = empty_word(BLOCK, 1)
    for j in tl.static_range(8):
        word |= (draws[j] >= tl.full([], drop_below, tl.uint32)).to(tl.int32) << j
    store_word(codes_ptr + start, word, lane, groups, lane < groups - start, 1)


@functools.lru_cache(LAUNCHES)
def _prepared(n: int, p: float, keep_codes: bool, seed: int) -> Launch:
    groups = lanes(n)
    return _dropout_kernel.prepare(
        (triton.cdiv(groups, BLOCK),),
        n,
        groups,
        drop_below(p),
        1 / (1 - p),
        KEEP_CODES=keep_codes,
        SEED=seed,
        FULL=n == 8 * groups and groups % BLOCK == 0,
        BLOCK=BLOCK,
        num_warps=4,
    )


def _launch(
    x: Tensor, y: Tensor, seed: Tensor | None, number: int, p: float, keep_codes: bool
) -> Tensor:
    n = x.numel()
    codes = x.new_empty(packed_bytes(n, 1) if keep_codes else 0, dtype=torch.uint8)
    if n:
        launch = _prepared(n, p, keep_codes, seed_kind(seed, number))
        launch(x, y, codes, seeds=(seed_argument(seed, number),))
    return codes


@functools.lru_cache(LAUNCHES)
def _prepared_mask(groups: int, p: float) -> Launch:
    grid = (triton.cdiv(groups, BLOCK),)
    return _mask_kernel.prepare(grid, groups, drop_below(p), BLOCK=BLOCK, num_warps=4)


def dropout_mask(seed: Tensor, count: int, p: float) -> Tensor:
    codes = seed.new_empty(packed_bytes(count, 1), dtype=torch.uint8)
    if count:
        _prepared_mask(lanes(count), p)(codes, seed)
    return codes


def dropout(
    x: Tensor, seed: Tensor | None, number: int, p: float, keep_codes: bool
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    return y, _launch(laid_out(x, y.stride()), y, seed, number, p, keep_codes)


def dropout_(x: Tensor, seed: Tensor | None, number: int, p: float, keep_codes: bool) -> Tensor:
    dense = laid_out(x, dense_stride(x))
    codes = _launch(dense, dense, seed, number, p, keep_codes)
    write_back(x, dense)
    return codes

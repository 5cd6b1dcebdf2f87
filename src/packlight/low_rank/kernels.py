"""Triton kernels: the wide tensor goes through once, whatever the rank."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.low_rank import reference
from packlight.low_rank.ops import in_tf32

MOST = 64  # ranks above take more shared memory than small GPUs have (99 KiB)


@triton.jit
def _rounded(x, PRECISION: tl.constexpr):
    """float32 to the 10 bits of TF32, to nearest as cuBLAS does: tensor cores cut bits off.

    Three products take what is cut off as well.
    """
    if PRECISION != "tf32":
        return x
    bits = x.to(tl.int32, bitcast=True)
    near = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < float("inf"), near, x)


@triton.jit
def _dot(wide, narrow, total, FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """total + wide narrow, or narrow wide unless FIRST: 32 bits times 16.

    Where TF32 is allowed, which leaves 2^-12 of a number out, bfloat16 is multiplied as it is, by
    two parts of the other side, which leave 2^-17 out. Tensor cores cut off what they add up in
    bfloat16: 5e-5 of a sum of 14336 on an H200, where three products of TF32 have 4e-7.
    """
    if narrow.dtype == tl.bfloat16 and PRECISION == "tf32":
        for _ in tl.static_range(2):
            part = wide.to(tl.bfloat16)
            if FIRST:
                total = tl.dot(part, narrow, total)
            else:
                total = tl.dot(narrow, part, total)
            wide -= part.to(tl.float32)
    else:
        wide = _rounded(wide, PRECISION)
        if FIRST:
            total = tl.dot(wide, narrow.to(tl.float32), total, input_precision=PRECISION)
        else:
            total = tl.dot(narrow.to(tl.float32), wide, total, input_precision=PRECISION)
    return total


@quick
@triton.jit
def _narrowed_kernel(
    x_ptr,  # [rows, width], rows by their step
    factor_ptr,  # [width, rank], by its steps
    parts_ptr,  # [parts, rows, rank]
    rows,
    width,
    row_step,
    rank,
    step,  # of the factor from place to place of the width
    rank_step,
    each,  # places to a part
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x factor over the places of a part, of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, RANK)
    inside, ranks = row < rows, r < rank
    part = tl.program_id(1)
    total = tl.zeros([ROWS, RANK], dtype=tl.float32)
    for start in range(0, each, PLACES):
        place = part * each + start + tl.arange(0, PLACES)
        there = place < width  # parts are whole tiles of places
        x = tl.load(
            x_ptr + row[:, None] * row_step + place[None, :], inside[:, None] & there[None, :], 0.0
        )
        factor = tl.load(
            factor_ptr + place[:, None] * step + r[None, :] * rank_step,
            there[:, None] & ranks[None, :],
            0.0,
        )
        total = _dot(factor, x, total, False, PRECISION)
    parts_ptr += part.to(tl.int64) * rows * rank
    tl.store(parts_ptr + row[:, None] * rank + r[None, :], total, inside[:, None] & ranks[None, :])


@quick
@triton.jit
def _add_widened_kernel(
    y_ptr,  # [rows, width], rows by their step
    low_ptr,  # [rows, rank]
    factor_ptr,  # [rank, width], by its steps
    rows,
    width,
    row_step,
    rank,
    step,
    rank_step,
    scaling,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y + s low factor, of a tile of ROWS x PLACES."""
    across = tl.cdiv(width, PLACES)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = (tl.program_id(0) % across) * PLACES + tl.arange(0, PLACES)
    r = tl.arange(0, RANK)
    inside, there, ranks = row < rows, place < width, r < rank
    at = row[:, None] * row_step + place[None, :]
    mask = inside[:, None] & there[None, :]
    y = tl.load(y_ptr + at, mask, 0.0)
    low = tl.load(low_ptr + row[:, None] * rank + r[None, :], inside[:, None] & ranks[None, :], 0.0)
    factor = tl.load(
        factor_ptr + place[None, :] * step + r[:, None] * rank_step,
        there[None, :] & ranks[:, None],
        0.0,
    )
    if factor.dtype == tl.float32:
        low, factor = _rounded(low, PRECISION), _rounded(factor, PRECISION)
        delta = tl.dot(low, factor, input_precision=PRECISION) * scaling
    else:  # as torch's operations round it
        delta = tl.dot(low, factor).to(factor.dtype).to(tl.float32) * scaling
        delta = delta.to(factor.dtype).to(tl.float32)
    if ROUNDS:
        delta = delta.to(y.dtype).to(tl.float32)
    tl.store(y_ptr + at, (y.to(tl.float32) + delta).to(y.dtype), mask)


@quick
@triton.jit
def _outer_kernel(
    x_ptr,  # [rows, width], rows by their step
    low_ptr,  # [rows, rank]
    parts_ptr,  # [parts, rank, width]
    rows,
    width,
    row_step,
    rank,
    each,  # rows to a part
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """low^T x over the rows of a part, at PLACES places."""
    place = tl.program_id(0) * PLACES + tl.arange(0, PLACES)
    part = tl.program_id(1)
    r = tl.arange(0, RANK)
    there, ranks = place < width, r < rank
    first = part.to(tl.int64) * each
    total = tl.zeros([RANK, PLACES], dtype=tl.float32)
    for start in range(0, each, ROWS):
        row = first + start + tl.arange(0, ROWS)
        inside = row < rows  # parts are whole tiles of rows
        x = tl.load(
            x_ptr + row[:, None] * row_step + place[None, :], inside[:, None] & there[None, :], 0.0
        )
        low = tl.load(
            low_ptr + row[None, :] * rank + r[:, None], inside[None, :] & ranks[:, None], 0.0
        )
        total = _dot(low, x, total, True, PRECISION)
    parts_ptr += part.to(tl.int64) * rank * width
    tl.store(
        parts_ptr + r[:, None] * width + place[None, :], total, ranks[:, None] & there[None, :]
    )


# ---- launches ------------------------------------------------------------------------------------
#
# Tiles and programs are those of an H200, rank 16, where copies of tensors of 4096 places and more
# take 3.5 to 4.2 TB/s and these 2.0 to 3.6: four to eight times as fast as the reference. In three
# products, 1.4 to 2.9 and four to five times; with rank 64 1.2 to 2.2, and two to five times.

_PROGRAMS = 256  # two to a multiprocessor; more have more parts to add up
_FEWEST = 1024  # places to a part: of fewer, adding up takes longer than is gained

# x A of fewer rows is left to the reference: few programs each walk far. At 128 rows it takes 0.3
# to 1.1 of the kernel's time, at 1024 0.7 to 2.1, by rank and precision.
_ROWS = 1024

_Steps = tuple[int, int]
_Wide = tuple[int, int, int]  # rows, width, and the step from row to row


def _rank(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def _precision() -> str:
    """How torch multiplies float32 with these settings: rounded to 10 bits, or as three products.

    What has 16 bits is not rounded.
    """
    return "tf32" if in_tf32() else "tf32x3"


def _parts(count: int, most: int, tile: int) -> tuple[int, int]:
    """How many parts of whole tiles, at most so many, and what each has of the count."""
    each = triton.cdiv(triton.cdiv(count, max(1, most)), tile) * tile
    return triton.cdiv(count, each), each


@functools.lru_cache(LAUNCHES)
def _narrowed_launch(x: _Wide, rank: int, steps: _Steps, precision: str) -> tuple[Launch, int]:
    """And the number of parts."""
    rows, width, _ = x
    tile, places = min(max(triton.next_power_of_2(rows), 16), 64), 2048 // _rank(rank)
    across = triton.cdiv(rows, tile)
    parts, each = _parts(width, min(triton.cdiv(_PROGRAMS, across), width // _FEWEST), places)
    launch = _narrowed_kernel.prepare(
        (across, parts), *x, rank, *steps, each,
        ROWS=tile, PLACES=places, RANK=_rank(rank), PRECISION=precision, num_warps=4, num_stages=3,
    )  # fmt: skip
    return launch, parts


@functools.lru_cache(LAUNCHES)
def _add_widened_launch(
    y: _Wide, rank: int, steps: _Steps, scaling: float, rounds: bool, precision: str
) -> Launch:
    rows, width, _ = y
    # Where ranks lie side by side in the factor, few places are read at a time.
    tile, places = (32, 128) if steps[0] == 1 else (64, 64)
    return _add_widened_kernel.prepare(
        (triton.cdiv(rows, tile) * triton.cdiv(width, places),), *y, rank, *steps, scaling,
        ROUNDS=rounds, ROWS=tile, PLACES=places, RANK=_rank(rank), PRECISION=precision, num_warps=4,
    )  # fmt: skip


@functools.lru_cache(LAUNCHES)
def _outer_launch(x: _Wide, rank: int, precision: str) -> tuple[Launch, int]:
    """And the number of parts."""
    rows, width, _ = x
    tile, places = 64 if rank <= 32 else 32, 128
    across = triton.cdiv(width, places)
    most = min(triton.cdiv(_PROGRAMS, across), triton.cdiv(rows, 4 * tile))
    parts, each = _parts(rows, most, tile)
    launch = _outer_kernel.prepare(
        (across, parts), *x, rank, each,
        ROWS=tile, PLACES=places, RANK=_rank(rank), PRECISION=precision, num_warps=4, num_stages=3,
    )  # fmt: skip
    return launch, parts


def _wide(x: Tensor) -> _Wide:
    return x.shape[0], x.shape[1], x.stride(0)


def _takes(wide: Tensor, narrow: Tensor, rank: int, alike: bool = False) -> bool:
    """Whether a kernel is worth it, and can do it: a narrow side of 32 bits beside 16.

    Products `alike` in dtype are left to cuBLAS, which reads and writes no more; sums are not.
    """
    dtypes = (torch.float32, wide.dtype) if alike else (torch.float32,)
    halves = wide.dtype.itemsize == 2 and narrow.dtype in dtypes
    return halves and 0 < rank <= MOST and wide.stride(1) == 1 and wide.numel() > 0


def narrowed(x: Tensor, factor: Tensor) -> Tensor:
    rank = factor.shape[1]
    if x.shape[0] < _ROWS or not _takes(x, factor, rank):
        return reference.narrowed(x, factor)
    steps = (factor.stride(0), factor.stride(1))
    launch, parts = _narrowed_launch(_wide(x), rank, steps, _precision())
    found = factor.new_empty(parts, x.shape[0], rank)
    launch(x, factor, found)
    return found[0] if parts == 1 else found.sum(0)


def add_widened_(y: Tensor, low: Tensor, factor: Tensor, scaling: float, rounds: bool) -> None:
    rank = low.shape[1]
    takes = _takes(y, low, rank, alike=True) and low.is_contiguous() and factor.dtype == low.dtype
    if not takes:
        reference.add_widened_(y, low, factor, scaling, rounds)
        return
    steps = (factor.stride(1), factor.stride(0))
    launch = _add_widened_launch(_wide(y), rank, steps, scaling, rounds, _precision())
    launch(y, low, factor)


def outer(x: Tensor, low: Tensor) -> Tensor:
    rank = low.shape[1]
    if not (_takes(x, low, rank) and low.is_contiguous()):
        return reference.outer(x, low)
    launch, parts = _outer_launch(_wide(x), rank, _precision())
    found = low.new_empty(parts, rank, x.shape[1])
    launch(x, low, found)
    return found[0] if parts == 1 else found.sum(0)

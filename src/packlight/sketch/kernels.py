"""Triton kernels of sketches. S is made in registers, entry by entry, and never stored.

A program of the transforms makes the rows that one block gives, for some columns: a small matrix of
signs times a tile of the block's rows, on tensor cores. X is read once, and only the rows that are
kept are made and written. Which token is where, and which rows are taken, comes from a plan of four
bytes a token, since every program would compute it anew. The dense kinds are a matrix product whose
left factor is made as it is needed, for every tile of columns anew.

Numbers that vary with the number of tokens are not specialised on: batches of many lengths would
compile the same kernel over and over.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.sketch import reference
from packlight.sketch.method import TRANSFORMS, Blocks
from packlight.sketch.reference import BUNDLE, CHOICE, DRAW, POLYNOMIALS, ROUNDS, SHIFT, Steps

PHILOX_ROUNDS = tl.constexpr(ROUNDS)
CHOICE_COUNTER = tl.constexpr(CHOICE)
SHIFT_COUNTER = tl.constexpr(SHIFT)
DRAW_COUNTER = tl.constexpr(DRAW)
PI = tl.constexpr(math.pi)
ROOT_2 = tl.constexpr(math.sqrt(2))

# Tile shapes: columns and places of a transform, columns and tokens of a dense sketch, columns of a
# row that is moved.
COLUMNS = 128
PLACES = 64
WARPS = 4
DENSE_COLUMNS = 128
DENSE_TOKENS = 64
ROW_COLUMNS = 1024
PLAN = 128
STATISTICS_ROWS = 4


@triton.jit
def _words(seed, c0, c1):
    """Philox words for counters of one shape."""
    c0 = c0.to(tl.uint32)
    zero = tl.zeros_like(c0)
    return tl.philox(seed, c0, zero + c1.to(tl.uint32), zero, zero, n_rounds=PHILOX_ROUNDS)


@triton.jit
def _below(word, bound):
    """A 32-bit word as a number below `bound`, as int64."""
    return (word.to(tl.int64) * bound) >> 32


@quick
@triton.jit(do_not_specialize=["rows", "count", "base", "extra"])
def _plan_kernel(
    places_ptr,  # [count * LENGTH]: the token at every place, -1 - token where its sign is negative
    chosen_ptr,  # [rows]: which row of its block's transform every row of the sketch is
    seed_ptr,  # [1]
    rows,
    count,  # blocks
    base,
    extra,
    LENGTH: tl.constexpr,
    DEGREE: tl.constexpr,
    POLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """See `places` and `chosen_rows` of the reference."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    block, place = i // LENGTH, i % LENGTH
    shift = _below(_words(seed, place, tl.full([BLOCK], SHIFT_COUNTER, tl.int32))[0], count)
    token = place * count + ((block + shift) % count).to(tl.int32)
    words = _words(seed, block, place >> 7)
    part = (place >> 5) & 3
    low = tl.where(part == 0, words[0], words[1])
    high = tl.where(part == 2, words[2], words[3])
    word = tl.where(part < 2, low, high)
    negative = (word >> (place & 31).to(tl.uint32)) & 1
    tl.store(places_ptr + i, tl.where(negative == 1, -1 - token, token), i < count * LENGTH)

    long = extra * (base + 1)  # rows of the blocks that give one more
    block = tl.where(i < long, i // (base + 1), extra + (i - long) // base)
    factor = tl.where(i < long, i % (base + 1), (i - long) % base)
    words = _words(seed, block, tl.full([BLOCK], CHOICE_COUNTER, tl.int32))
    alpha = _below(words[0], LENGTH - 1).to(tl.int32) + 1
    chosen = words[1].to(tl.int32, bitcast=True) & (LENGTH - 1)
    for bit in tl.static_range(DEGREE):
        chosen = chosen ^ tl.where(((alpha >> bit) & 1) == 1, factor, 0)
        factor = factor << 1
        factor = tl.where((factor & LENGTH) != 0, factor ^ POLY, factor)
    tl.store(chosen_ptr + i, chosen, i < rows)


@triton.jit
def _entries(row, place, KIND: tl.constexpr, LENGTH: tl.constexpr):
    """sqrt(LENGTH) times the entries of the orthogonal transform; see `transform_entries`."""
    if KIND == "srht":
        bits = row & place
        bits = bits ^ (bits >> 16)
        bits = bits ^ (bits >> 8)
        bits = bits ^ (bits >> 4)
        bits = bits ^ (bits >> 2)
        bits = bits ^ (bits >> 1)
        return (1 - 2 * (bits & 1)).to(tl.float32)
    else:
        if KIND == "dct":  # the phase may wrap around, which a multiple of 4 LENGTH does not see
            phase = (2 * place + 1) * row
            alone = row == 0
        else:
            sine = tl.where(row > LENGTH // 2, 1, 0)
            phase = 4 * (row - LENGTH // 2 * sine) * place - LENGTH * sine
            alone = (row == 0) | (row == LENGTH // 2)
        angle = (phase & (4 * LENGTH - 1)).to(tl.float32) * (PI / (2 * LENGTH))
        return tl.where(alone, 1.0, ROOT_2) * tl.cos(angle)


@quick
@triton.jit(do_not_specialize=["tokens", "base", "extra"])
def _transform_kernel(
    x_ptr,  # [tokens, features], rows `stride` apart
    y_ptr,  # [rows, features]
    places_ptr,  # see `_plan_kernel`
    chosen_ptr,
    tokens,
    features,
    stride,
    base,
    extra,
    KIND: tl.constexpr,
    LENGTH: tl.constexpr,
    TILES: tl.constexpr,  # of rows, a block
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Columns first, so that what runs at a time reads whole rows.
    across = tl.cdiv(features, COLUMNS)
    tile = tl.program_id(0) // across
    block = tile // TILES
    block_rows = base + tl.where(block < extra, 1, 0)
    s = (tile % TILES) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    row = block.to(tl.int64) * base + tl.minimum(block, extra) + s
    chosen = tl.load(chosen_ptr + row, s < block_rows, other=0)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = column < features
    dtype = y_ptr.dtype.element_ty
    places_ptr += block.to(tl.int64) * LENGTH
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, LENGTH, PLACES):
        place = start + tl.arange(0, PLACES)  # [PLACES]
        signed = tl.load(places_ptr + place)
        token = tl.where(signed < 0, -1 - signed, signed).to(tl.int64)
        mask = (token < tokens)[:, None] & inside[None, :]
        x = tl.load(x_ptr + token[:, None] * stride + column[None, :], mask, other=0.0)
        sign = tl.where(signed < 0, -1.0, 1.0)
        entries = _entries(chosen[:, None], place[None, :], KIND, LENGTH) * sign[None, :]
        total = tl.dot(entries.to(dtype), x.to(dtype), total, input_precision=PRECISION)
    total = total / tl.sqrt_rn(block_rows.to(tl.float32))
    mask = (s < block_rows)[:, None] & inside[None, :]
    tl.store(y_ptr + row[:, None] * features + column[None, :], total.to(dtype), mask)


@triton.jit
def _normals(first, second):
    """Two normal numbers from two random words (Box and Muller)."""
    u = ((first >> 8).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 16777216)
    v = ((second >> 8).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 16777216)
    radius, angle = tl.sqrt(-2.0 * tl.log(u)), (2.0 * PI) * v
    return radius * tl.cos(angle), radius * tl.sin(angle)


@quick
@triton.jit(do_not_specialize=["tokens", "rows"])
def _gaussian_kernel(
    x_ptr,  # [tokens, features], rows `stride` apart
    y_ptr,  # [rows, features]
    seed_ptr,  # [1]
    tokens,
    features,
    stride,
    rows,
    scale,
    BUNDLE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    QUARTER: tl.constexpr = BUNDLE // 4
    bundle = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = column < features
    seed = tl.load(seed_ptr)
    quarter = tl.arange(0, QUARTER)
    counter = (bundle * QUARTER + quarter)[:, None]
    dtype = y_ptr.dtype.element_ty
    total0 = tl.zeros([QUARTER, COLUMNS], dtype=tl.float32)
    total1, total2, total3 = total0, total0, total0
    for start in range(0, tokens, TOKENS):  # a `while` would not be pipelined
        token = start + tl.arange(0, TOKENS).to(tl.int64)  # [TOKENS]
        mask = (token < tokens)[:, None] & inside[None, :]
        x = tl.load(x_ptr + token[:, None] * stride + column[None, :], mask, other=0.0).to(dtype)
        both = tl.zeros([QUARTER, TOKENS], dtype=tl.int64)
        words = _words(seed, both + token[None, :], both + counter)
        s0, s1 = _normals(words[0], words[1])
        s2, s3 = _normals(words[2], words[3])
        total0 = tl.dot(s0.to(dtype), x, total0, input_precision=PRECISION)
        total1 = tl.dot(s1.to(dtype), x, total1, input_precision=PRECISION)
        total2 = tl.dot(s2.to(dtype), x, total2, input_precision=PRECISION)
        total3 = tl.dot(s3.to(dtype), x, total3, input_precision=PRECISION)
    first = bundle * BUNDLE + quarter
    _store(y_ptr, total0 * scale, first, column, rows, features)
    _store(y_ptr, total1 * scale, first + QUARTER, column, rows, features)
    _store(y_ptr, total2 * scale, first + 2 * QUARTER, column, rows, features)
    _store(y_ptr, total3 * scale, first + 3 * QUARTER, column, rows, features)


@triton.jit
def _store(y_ptr, y, row, column, rows, features):
    mask = (row < rows)[:, None] & (column < features)[None, :]
    address = row.to(tl.int64)[:, None] * features + column[None, :]
    tl.store(y_ptr + address, y.to(y_ptr.dtype.element_ty), mask)


@quick
@triton.jit(do_not_specialize=["tokens", "rows"])
def _rademacher_kernel(
    x_ptr,  # [tokens, features], rows `stride` apart
    y_ptr,  # [rows, features]
    seed_ptr,  # [1]
    tokens,
    features,
    stride,
    rows,
    scale,
    BUNDLE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    bundle = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = column < features
    seed = tl.load(seed_ptr)
    row = tl.arange(0, BUNDLE)[:, None]
    dtype = y_ptr.dtype.element_ty
    total = tl.zeros([BUNDLE, COLUMNS], dtype=tl.float32)
    for start in range(0, tokens, TOKENS):  # a `while` would not be pipelined
        token = start + tl.arange(0, TOKENS).to(tl.int64)  # [TOKENS]
        mask = (token < tokens)[:, None] & inside[None, :]
        x = tl.load(x_ptr + token[:, None] * stride + column[None, :], mask, other=0.0).to(dtype)
        words = _words(seed, token, tl.zeros([TOKENS], dtype=tl.int32) + bundle)
        low = tl.where(row < 32, words[0][None, :], words[1][None, :])
        high = tl.where(row < 96, words[2][None, :], words[3][None, :])
        bits = tl.where(row < 64, low, high) >> (row & 31).to(tl.uint32)
        signs = 1.0 - 2.0 * (bits & 1).to(tl.float32)
        total = tl.dot(signs.to(dtype), x, total, input_precision=PRECISION)
    first = bundle * BUNDLE + tl.arange(0, BUNDLE)
    _store(y_ptr, total * scale, first, column, rows, features)


def _precision(dtype: torch.dtype) -> str | None:
    """float32 is not rounded to what tensor cores take."""
    return "ieee" if dtype == torch.float32 else None


@functools.lru_cache(LAUNCHES)
def _transform_launches(
    tokens: int, features: int, stride: int, rows: int, kind: str, dtype: torch.dtype
) -> tuple[Launch, Launch, int]:
    """Those of the plan and of the transform, and the places of the plan."""
    blocks = Blocks.of(tokens, rows)
    length, count, base, extra = blocks
    degree = length.bit_length() - 1
    plan = _plan_kernel.prepare(
        (triton.cdiv(count * length, PLAN),),
        rows,
        count,
        base,
        extra,
        LENGTH=length,
        DEGREE=degree,
        POLY=POLYNOMIALS[degree - 1],
        BLOCK=PLAN,
        num_warps=4,
    )
    most = blocks.block_rows(0)
    tile_rows = min(64, max(16, triton.next_power_of_2(most)))
    tiles = triton.cdiv(most, tile_rows)
    transform = _transform_kernel.prepare(
        (count * tiles * triton.cdiv(features, COLUMNS),),
        tokens,
        features,
        stride,
        base,
        extra,
        KIND=kind,
        LENGTH=length,
        TILES=tiles,
        ROWS=tile_rows,
        PLACES=min(PLACES, length),
        COLUMNS=COLUMNS,
        PRECISION=_precision(dtype),
        num_warps=WARPS,
    )
    return plan, transform, count * length


def _transform(x: Tensor, seed: Tensor, kind: str, y: Tensor) -> None:
    rows = y.shape[0]
    plan, transform, count = _transform_launches(*x.shape, x.stride(0), rows, kind, y.dtype)
    places = x.new_empty(count, dtype=torch.int32)
    chosen = x.new_empty(rows, dtype=torch.int32)
    plan(places, chosen, seed)
    transform(x, y, places, chosen)


@functools.lru_cache(LAUNCHES)
def _dense_launch(
    tokens: int, features: int, stride: int, rows: int, kind: str, dtype: torch.dtype
) -> Launch:
    kernel = _gaussian_kernel if kind == "gaussian" else _rademacher_kernel
    return kernel.prepare(
        (triton.cdiv(rows, BUNDLE), triton.cdiv(features, DENSE_COLUMNS)),
        tokens,
        features,
        stride,
        rows,
        1 / math.sqrt(rows),
        BUNDLE=BUNDLE,
        TOKENS=DENSE_TOKENS // 2 if dtype == torch.float32 else DENSE_TOKENS,  # else it spills
        COLUMNS=DENSE_COLUMNS,
        PRECISION=_precision(dtype),
        num_warps=8,
    )


def _dense(x: Tensor, seed: Tensor, kind: str, y: Tensor) -> None:
    _dense_launch(*x.shape, x.stride(0), y.shape[0], kind, y.dtype)(x, y, seed)


def _rows_in_order(x: Tensor) -> Tensor:
    """`x` with the values of a row side by side; a copy where they are not."""
    return x if x.stride(1) == 1 else x.contiguous()


def apply(x: Tensor, seed: Tensor, kind: str, y: Tensor) -> None:
    if x.shape[0] <= 8:  # a block is shorter than what a tensor core takes
        reference.apply(x, seed, kind, y)
    elif y.numel():
        function = _transform if kind in TRANSFORMS else _dense
        function(_rows_in_order(x), seed, kind, y)


@quick
@triton.jit(do_not_specialize=["tokens"])
def _statistics_kernel(
    x_ptr,  # [tokens, features], rows `stride` apart
    norms_ptr,  # [tokens]
    draws_ptr,  # [tokens]
    seed_ptr,  # [1]
    tokens,
    features,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    there = token < tokens
    squares = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    x_ptr += token[:, None] * stride
    start = tl.zeros([], dtype=tl.int32)
    while start < features:
        column = start + tl.arange(0, COLUMNS)  # [COLUMNS]
        mask = there[:, None] & (column < features)[None, :]
        x = tl.load(x_ptr + column[None, :], mask, other=0.0).to(tl.float32)
        squares += x * x
        start += COLUMNS
    tl.store(norms_ptr + token, tl.sqrt_rn(tl.sum(squares, 1)), there)
    words = _words(tl.load(seed_ptr), token, tl.full([ROWS], DRAW_COUNTER, tl.int32))
    tl.store(draws_ptr + token, words[0].to(tl.int64), there)


@functools.lru_cache(LAUNCHES)
def _statistics_launch(tokens: int, features: int, stride: int) -> Launch:
    return _statistics_kernel.prepare(
        (triton.cdiv(tokens, STATISTICS_ROWS),),
        tokens,
        features,
        stride,
        ROWS=STATISTICS_ROWS,
        COLUMNS=ROW_COLUMNS,
        num_warps=8,
    )


def row_statistics(x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    tokens, features = x.shape
    norms = x.new_empty(tokens, dtype=torch.float32)
    draws = x.new_empty(tokens, dtype=torch.int64)
    if tokens:
        x = _rows_in_order(x)
        _statistics_launch(tokens, features, x.stride(0))(x, norms, draws, seed)
    return norms, draws


@quick
@triton.jit
def _gather_kernel(
    x_ptr,  # [tokens, features], rows `stride` apart
    y_ptr,  # [rows, features]
    index_ptr,  # [rows]
    weight_ptr,  # [rows], if HAS_WEIGHT
    features,
    stride,
    HAS_WEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    mask = column < features
    x_ptr += tl.load(index_ptr + row).to(tl.int64) * stride
    x = tl.load(x_ptr + column, mask)
    if HAS_WEIGHT:
        x = x.to(tl.float32) * tl.load(weight_ptr + row)
    tl.store(y_ptr + row * features + column, x.to(y_ptr.dtype.element_ty), mask)


@functools.lru_cache(LAUNCHES)
def _gather_launch(rows: int, features: int, stride: int, weighted: bool) -> Launch:
    return _gather_kernel.prepare(
        (rows, triton.cdiv(features, ROW_COLUMNS)),
        features,
        stride,
        HAS_WEIGHT=weighted,
        COLUMNS=ROW_COLUMNS,
        num_warps=4,
    )


def gather(x: Tensor, index: Tensor, weight: Tensor | None, y: Tensor) -> None:
    if y.numel():
        x = _rows_in_order(x)
        launch = _gather_launch(*y.shape, x.stride(0), weight is not None)
        launch(x, y, index, y if weight is None else weight)


_STEPS = Steps(apply, row_statistics, gather)


def keep(x: Tensor, seed: Tensor, kind: str, rows: int, dtype: torch.dtype) -> Tensor:
    return reference.keep(x, seed, kind, rows, dtype, _STEPS)


def weight_gradient(
    grad_output: Tensor,
    kept: Tensor,
    total: Tensor | None,
    kind: str,
    rows: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    return reference.weight_gradient(grad_output, kept, total, kind, rows, features, dtype, _STEPS)

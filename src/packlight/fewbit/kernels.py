"""Triton kernels of the few-bit activations: one forward and one backward for all of them.

A program handles BLOCK words of 8 codes (layout in `packing/layout.py`): each thread reads eight
rows of neighbouring elements, computes outputs and codes in fp32, and writes both in one pass.
Which activation it is comes in as a function, a compile-time constant; which codebook, as data.

The forward in 16 bits is limited by arithmetic: about 27 instructions an element at full bandwidth
on an H200. Hence the forms below: one exponential in place of erf, a sign bit where the derivative
is symmetric, a tree of compares with borders in registers.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.elementwise.kernels import DIGITS, FORWARD
from packlight.fewbit.activations import EXACT, NON_FINITE
from packlight.fewbit.bins import bins_of
from packlight.packing.kernels import (
    code_of,
    empty_word,
    load_rows,
    load_word,
    store_row,
    store_word,
)
from packlight.packing.layout import dense_stride, laid_out, lanes, packed_bytes, write_back

# --- Codes of the exact activations, as in activations.EXACT.


@triton.jit
def _code_abs(x, _a, _b):
    return tl.where(x > 0, 2, tl.where(x < 0, 0, 1))


@triton.jit
def _code_band(x, lambd, _):
    return tl.where((x >= -lambd) & (x <= lambd), 0, 1)


@triton.jit
def _code_clamp(x, low, high):
    return tl.where((x >= low) & (x <= high), 1, 0)


@triton.jit
def _code_hardsigmoid(x, _a, _b):
    return tl.where((x > -3.0) & (x < 3.0), 1, 0)


@triton.jit
def _code_hardtanh(x, low, high):
    return tl.where((x <= low) | (x >= high), 0, 1)


@triton.jit
def _code_leaky_relu(x, _a, _b):
    return tl.where(x > 0, 1, 0)


@triton.jit
def _code_relu(x, _a, _b):
    return tl.where(x <= 0, 0, 1)


@triton.jit
def _code_relu6(x, _a, _b):
    return tl.where((x <= 0) | (x >= 6.0), 0, 1)


@triton.jit
def _code_threshold(x, threshold, _):
    return tl.where(x <= threshold, 0, 1)


CODE = {
    "abs": _code_abs,
    "clamp": _code_clamp,
    "hardshrink": _code_band,
    "hardsigmoid": _code_hardsigmoid,
    "hardtanh": _code_hardtanh,
    "leaky_relu": _code_leaky_relu,
    "relu": _code_relu,
    "relu6": _code_relu6,
    "softshrink": _code_band,
    "threshold": _code_threshold,
}


# --- Codes of a codebook: the number of borders below t, in one of three ways.


@triton.jit
def _load_borders(borders_ptr, DEPTH: tl.constexpr):
    """The 2^DEPTH - 1 borders as scalars, which stay in registers."""
    borders = ()
    for i in tl.static_range(2**DEPTH - 1):
        borders = borders + (tl.load(borders_ptr + i),)
    return borders


@triton.jit
def _bit(position: tl.constexpr):
    """2^position as an int32 constant; position 31 is the sign."""
    return ((1 << position) ^ 0x80000000) - 0x80000000


@triton.jit
def _code_tree(t, borders, DEPTH: tl.constexpr, SHIFT: tl.constexpr):
    """The code, shifted left by SHIFT, by DEPTH compares: each halves the tuple of borders."""
    code = 0
    for d in tl.static_range(DEPTH):
        above = t > borders[2 ** (DEPTH - 1 - d) - 1]
        code |= tl.where(above, _bit(DEPTH - 1 - d + SHIFT), 0)
        half = ()
        for i in tl.static_range(2 ** (DEPTH - 1 - d) - 1):
            half = half + (tl.where(above, borders[2 ** (DEPTH - 1 - d) + i], borders[i]),)
        borders = half
    return code


@triton.jit
def _code_bins(t, table_ptr, scale, offset, low, last, FOLDED: tl.constexpr):
    """The code by equal bins with at most one border each, as `bins_of` lays them out.

    Adding 2^23 rounds to an integer and leaves it in the low bits. An entry is the bin's border
    (inf where there is none), whose low 8 bits are zero, and in these the number of borders below.
    """
    if not FOLDED:  # |x| starts at 0, where the bins do
        t = tl.maximum(t, low)
    index = tl.fma(t, scale, offset).to(tl.int32, bitcast=True) - 0x4B000000
    entry = tl.load(table_ptr + tl.minimum(index, last))  # NaN and infinity end up there too
    border = (entry & -256).to(tl.float32, bitcast=True)
    return (entry & 255) + (t > border).to(tl.int32)


@triton.jit
def _code_search(t, borders_ptr, DEPTH: tl.constexpr):
    """The code by binary search in memory, for borders too close for bins."""
    code = tl.zeros(t.shape, dtype=tl.int32)
    for d in tl.static_range(DEPTH):
        border = tl.load(borders_ptr + code + (2 ** (DEPTH - 1 - d) - 1))
        code += tl.where(t > border, 2 ** (DEPTH - 1 - d), 0)
    return code


# --- The two kernels.

# The parities of a codebook as compile-time constants.
PARITY = {"none": 0, "even": 1, "odd": 2}
NONE = tl.constexpr(0)
ODD = tl.constexpr(2)

ANY_NONFINITE = tl.constexpr(NON_FINITE)

# Up to three borders stay in registers; a deeper tree runs out of predicate registers.
TREE_DEPTH = tl.constexpr(2)


@quick
@triton.jit
def _forward_kernel(
    x_ptr,  # [n]
    y_ptr,  # [n], may be x_ptr
    codes_ptr,  # [BITS * groups], and the flag byte if POISON
    table_ptr,  # bins if BINS, else [2^DEPTH - 1] fp32 borders
    n,
    groups,
    a,
    b,
    center,
    scale,
    offset,
    low,
    last,
    FORWARD: tl.constexpr,  # None: codes only
    CODE: tl.constexpr,  # None: code by the borders
    PARITY: tl.constexpr,
    SHIFTED: tl.constexpr,  # coded is x - center, where center is not 0
    POISON: tl.constexpr,
    BITS: tl.constexpr,
    BINS: tl.constexpr,
    DIGITS: tl.constexpr,
    FULL: tl.constexpr,  # every program has BLOCK whole groups, so nothing is masked
    BLOCK: tl.constexpr,
):
    DEPTH: tl.constexpr = BITS - 1 if PARITY == ODD else BITS
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)  # Triton passes 1 as a constant, which has no `to`
    lane = tl.arange(0, BLOCK)
    flag_ptr = codes_ptr + BITS * groups
    x_ptr += start
    y_ptr += start
    codes_ptr += start

    # All loads come first: the stores below may alias them, so the compiler would not move them up.
    xs = load_rows(x_ptr, start, lane, n, groups, FULL)
    borders = ()
    if CODE is None and DEPTH <= TREE_DEPTH:
        borders = _load_borders(table_ptr, DEPTH)

    word = empty_word(BLOCK, BITS)
    bad = tl.zeros([BLOCK], dtype=tl.float32)
    low_x = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(8):
        x = xs[j].to(tl.float32)
        if FORWARD is not None:
            y = FORWARD(x, a, b, DIGITS)
            store_row(y_ptr, y, j, start, lane, n, groups, FULL)

        if CODE is not None:
            word |= CODE(x, a, b).to(word.dtype) << (j * BITS)
        else:
            if SHIFTED:
                s = x - center
            else:
                s = x
            t = s if PARITY == NONE else tl.abs(s)
            if DEPTH <= TREE_DEPTH:
                word |= _code_tree(t, borders, DEPTH, j * BITS)
            elif BINS:
                code = _code_bins(t, table_ptr, scale, offset, low, last, PARITY != NONE)
                word |= code.to(word.dtype) << (j * BITS)
            else:
                word |= _code_search(t, table_ptr, DEPTH).to(word.dtype) << (j * BITS)
            if PARITY == ODD:
                sign = s.to(tl.int32, bitcast=True)
                if BITS <= 4:
                    word |= (sign >> (32 - (j + 1) * BITS)) & _bit((j + 1) * BITS - 1)
                else:
                    word |= ((sign >> 31) & 1).to(word.dtype) << ((j + 1) * BITS - 1)

        if POISON == ANY_NONFINITE:
            bad += x * 0.0
        elif POISON != 0:
            bad = tl.maximum(bad, x, propagate_nan=tl.PropagateNan.ALL)
            if (POISON & 2) != 0:  # NEGATIVE_INFINITY
                low_x = tl.minimum(low_x, x)

    if FULL:
        store_word(codes_ptr, word, lane, groups, None, BITS)
    else:
        store_word(codes_ptr, word, lane, groups, lane < groups - start, BITS)
    if POISON != 0:
        poisoned = bad != bad
        if POISON != ANY_NONFINITE:
            if (POISON & 4) != 0:  # POSITIVE_INFINITY
                poisoned |= bad == float("inf")
            if (POISON & 2) != 0:  # NEGATIVE_INFINITY
                poisoned |= low_x == float("-inf")
        tl.store(flag_ptr, 1, tl.max(poisoned.to(tl.int32), 0) != 0)


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # [n]
    codes_ptr,  # [BITS * groups], and the flag byte if FLAGGED
    levels_ptr,  # [2^BITS] fp32, and as many NaN, which the flag selects
    dx_ptr,  # [n]
    n,
    groups,
    BITS: tl.constexpr,
    FLAGGED: tl.constexpr,
    MASK: tl.constexpr,  # level 0 gives 0 whatever dy
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)  # Triton passes 1 as a constant, which has no `to`
    lane = tl.arange(0, BLOCK)
    if FLAGGED:
        levels_ptr += tl.load(codes_ptr + BITS * groups).to(tl.int32) << BITS
    dy_ptr += start
    dx_ptr += start
    codes_ptr += start

    dys = load_rows(dy_ptr, start, lane, n, groups, FULL)
    if FULL:
        word = load_word(codes_ptr, lane, groups, None, BLOCK, BITS)
    else:
        word = load_word(codes_ptr, lane, groups, lane < groups - start, BLOCK, BITS)
    if BITS == 1:
        low = tl.load(levels_ptr)
        high = tl.load(levels_ptr + 1)

    for j in tl.static_range(8):
        code = code_of(word, j, BITS)
        if BITS == 1:
            level = tl.where(code != 0, high, low)
        else:
            level = tl.load(levels_ptr + code)
        dx = dys[j].to(tl.float32) * level
        if MASK:
            dx = tl.where(level == 0, 0.0, dx)
        store_row(dx_ptr, dx, j, start, lane, n, groups, FULL)


# --- Launchers, with the signatures of reference.py.

# Tables kept on devices. A captured CUDA graph holds their addresses, so none should leave early.
TABLES = 4096
# Words a program. Of 256 to 2048, and 2 to 8 warps, this is the best or near it in 16 and 32 bits.
BLOCK = 512


@functools.lru_cache(maxsize=TABLES)
def _levels(values: tuple[float, ...], bits: int, device: torch.device) -> Tensor:
    """Levels by code, then as many NaN. Kept: a copy from the host at every call would wait."""
    padded = values + (math.nan,) * (2 ** (bits + 1) - len(values))
    return torch.tensor(padded, dtype=torch.float32, device=device)


class _Borders(NamedTuple):
    """The kernel's arguments for a codebook: a table on the device, and how to enter its bins."""

    table: Tensor
    bins: bool
    scale: float = 0.0
    offset: float = 0.0
    low: float = 0.0
    last: int = 0


@functools.lru_cache(maxsize=TABLES)
def _borders(values: tuple[float, ...], depth: int, folded: bool, device: torch.device) -> _Borders:
    """The cheapest form for these borders: registers, bins, or binary search."""
    if depth > TREE_DEPTH.value and (bins := bins_of(np.asarray(values, dtype=np.float32), folded)):
        entries, scale, offset, low = bins
        table = torch.from_numpy(entries).to(device)
        return _Borders(table, True, scale, offset, low, len(entries) - 1)
    return _Borders(torch.tensor(values or (0.0,), dtype=torch.float32, device=device), False)


def borders_on(device: torch.device, borders: Sequence[float], bits: int, parity: str) -> _Borders:
    return _borders(tuple(borders), bits - (parity == "odd"), parity != "none", device)


def levels_on(device: torch.device, levels: Sequence[float], bits: int) -> Tensor:
    return _levels(tuple(levels), bits, device)


@functools.lru_cache(LAUNCHES)
def _forward_launch(
    n: int,
    dtype: torch.dtype,
    name: str | None,
    coded: str,
    a: float,
    b: float,
    bits: int,
    parity: str,
    center: float,
    poison: int,
    bins: bool,
    *entry: float,
) -> Launch:
    """`name` is the function to compute, `coded` the one whose exact codes are stored."""
    groups = lanes(n)
    return _forward_kernel.prepare(
        (triton.cdiv(groups, BLOCK),),
        n,
        groups,
        a,
        b,
        center,
        *entry,
        FORWARD=None if name is None else FORWARD[name],
        CODE=CODE.get(coded),
        PARITY=PARITY[parity],
        SHIFTED=center != 0,
        POISON=poison,
        BITS=bits,
        BINS=bins,
        DIGITS=DIGITS[dtype],
        FULL=n == 8 * groups and groups % BLOCK == 0,
        BLOCK=BLOCK,
        num_warps=4,
    )


def _launch_forward(
    x: Tensor,
    y: Tensor | None,
    name: str,
    parameters: Sequence[float],
    bits: int,
    borders: Sequence[float],
    parity: str,
    center: float,
    poison: int,
) -> Tensor:
    """Runs over `x` into `y` (of the same layout; may be `x`, or None) and returns the codes."""
    n = x.numel()
    codes = x.new_empty(packed_bytes(n, bits) + int(poison != 0), dtype=torch.uint8)
    if poison:
        codes[-1:].zero_()
    if n == 0:
        return codes
    if name in EXACT:
        parameters = EXACT[name].compared(parameters, x)
    a, b = map(float, (*parameters, 0.0, 0.0)[:2])
    table, *entry = borders_on(x.device, borders, bits, parity)
    function = None if y is None else name
    how = (bits, parity, float(center), poison, *entry)
    launch = _forward_launch(n, x.dtype, function, name, a, b, *how)
    launch(x, x if y is None else y, codes, table)
    return codes


def activation(
    x: Tensor,
    name: str,
    parameters: Sequence[float],
    bits: int,
    borders: Sequence[float],
    parity: str,
    center: float,
    poison: int,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    dense, how = laid_out(x, y.stride()), (bits, borders, parity, center, poison)
    return y, _launch_forward(dense, y, name, parameters, *how)


def activation_(
    x: Tensor,
    name: str,
    parameters: Sequence[float],
    bits: int,
    borders: Sequence[float],
    parity: str,
    center: float,
    poison: int,
) -> Tensor:
    dense, how = laid_out(x, dense_stride(x)), (bits, borders, parity, center, poison)
    codes = _launch_forward(dense, dense, name, parameters, *how)
    write_back(x, dense)
    return codes


def encode(
    x: Tensor,
    bits: int,
    borders: Sequence[float],
    parity: str,
    center: float,
    poison: int,
    stride: Sequence[int],
) -> Tensor:
    dense = laid_out(x, stride)
    return _launch_forward(dense, None, "", (), bits, borders, parity, center, poison)


@functools.lru_cache(LAUNCHES)
def _backward_launch(n: int, bits: int, flagged: bool, mask: bool) -> Launch:
    groups = lanes(n)
    return _backward_kernel.prepare(
        (triton.cdiv(groups, BLOCK),),
        n,
        groups,
        BITS=bits,
        FLAGGED=flagged,
        MASK=mask,
        FULL=n == 8 * groups and groups % BLOCK == 0,
        BLOCK=BLOCK,
        num_warps=4,
    )


def decode_backward(
    grad_output: Tensor,
    codes: Tensor,
    bits: int,
    levels: Sequence[float],
    mask: bool,
    stride: Sequence[int],
) -> Tensor:
    grad_input = grad_output.new_empty_strided(grad_output.shape, tuple(stride))
    n = grad_output.numel()
    if n == 0:
        return grad_input
    launch = _backward_launch(n, bits, codes.numel() > packed_bytes(n, bits), mask)
    table = levels_on(codes.device, levels, bits)
    launch(laid_out(grad_output, stride), codes, table, grad_input)
    return grad_input

"""Max pooling that keeps window offsets: one forward and one backward kernel for 1 to 3 dimensions.

Memory is seen as [slabs, D, H, W, C]: a slab is an element of the batch in channels-last, one
channel of it (C = 1) else. A program has a tile [ROWS, COLUMNS, CHANNELS] of one slab, so places
are short numbers that take no division by sizes. The backward gathers: every input element asks the
windows that span it whether it was their maximum. No atomics, so the result does not depend on
timing.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.fewbit import pooling_reference as reference
from packlight.packing import reference as packing
from packlight.packing.kernels import code_at, store_word
from packlight.packing.layout import laid_out, lanes, packed_bytes

# Loops of so many rounds are unrolled.
UNROLLED = tl.constexpr(16)
# A thread has 16 bytes of a tile, 8 where they are not read at once; a program so many warps.
WARPS = 4
# Channels that lie side by side in a tile.
CHANNELS = 64
# Elements of a slab whose places are 32-bit numbers, with room for the tiles at its end.
SHORT = 2**30


@triton.jit
def _tile(
    C,
    D,
    H,
    W,
    LARGE: tl.constexpr,  # places within a slab, one element of the batch, need 64 bits
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """A program's tile of a tensor [slabs, D, H, W, C]: slab, d, h, w and c, the latter as axes."""
    index: tl.constexpr = tl.int64 if LARGE else tl.int32
    place = tl.program_id(0)
    c = place % tl.cdiv(C, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)[None, None, :]
    place = place // tl.cdiv(C, CHANNELS)
    w = place % tl.cdiv(W, COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)[None, :, None]
    place = place // tl.cdiv(W, COLUMNS)
    h = place % tl.cdiv(H, ROWS) * ROWS + tl.arange(0, ROWS)[:, None, None]
    place = place // tl.cdiv(H, ROWS)
    return place // D, (place % D).to(index), h.to(index), w.to(index), c.to(index)


@triton.jit
def _first(y, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    """Where window y begins along an axis, and which of its K places is the first inside."""
    begin = y * S - P
    return begin, tl.minimum((tl.maximum(-begin, 0) + (D - 1)) // D, K - 1)


@triton.jit
def _better(
    best,
    offset,
    k,
    x_ptr,
    d,
    h,
    w,
    c,
    there,
    C,
    size,
    K,
    D,
):
    """The maximum and its offset after place k of the windows that begin at d, h, w."""
    d += k // (K[1] * K[2]) * D[0]
    h += k // K[2] % K[1] * D[1]
    w += k % K[2] * D[2]
    there &= (d >= 0) & (d < size[0]) & (h >= 0) & (h < size[1]) & (w >= 0) & (w < size[2])
    place = ((d * size[1] + h) * size[2] + w) * C + c
    x = tl.load(x_ptr + place, there, other=float("-inf")).to(tl.float32)
    better = (x > best) | (x != x)  # as torch: the first of equals wins, and any NaN
    return tl.where(better, x, best), tl.where(better, k, offset)


@quick
@triton.jit
def _forward_kernel(
    x_ptr,  # [slabs, ID, IH, IW, C], as memory has it
    y_ptr,  # [slabs, OD, OH, OW, C]
    codes_ptr,  # [BITS * groups], or a byte an element
    slabs,
    step,  # slabs of as many codes as there are groups
    groups,
    C,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PD: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,  # a word has the same place of eight slabs; the tile is one of words
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    slab, d, h, w, c = _tile(C, OD, OH, OW, LARGE, ROWS, COLUMNS, CHANNELS)
    place = ((d * OH + h) * OW + w) * C + c
    here = (h < OH) & (w < OW) & (c < C)
    xd, kd = _first(d, SD, PD, DD, KD)
    xh, kh = _first(h, SH, PH, DH, KH)
    xw, kw = _first(w, SW, PW, DW, KW)
    first = (kd * KH + kh) * KW + kw + tl.zeros([ROWS, COLUMNS, CHANNELS], tl.int32)
    first = first.to(tl.int32)
    out_size = tl.full([], OD, tl.int64) * OH * OW * C
    in_size = tl.full([], ID, tl.int64) * IH * IW * C
    word = tl.zeros([ROWS, COLUMNS, CHANNELS], tl.int32 if BITS <= 4 else tl.int64)
    size, K, D = (ID, IH, IW), (KD, KH, KW), (DD, DH, DW)
    for j in range(8 if WORDS else 1):
        image = (slab + j * step).to(tl.int64)
        there = here & (image < slabs)
        best = tl.full([ROWS, COLUMNS, CHANNELS], float("-inf"), tl.float32)
        offset = first  # of a window of -inf
        image_ptr = x_ptr + image * in_size
        if KD * KH * KW <= UNROLLED:
            for k in tl.static_range(KD * KH * KW):
                best, offset = _better(
                    best, offset, k, image_ptr, xd, xh, xw, c, there, C, size, K, D
                )
        else:
            for k in range(KD * KH * KW):
                best, offset = _better(
                    best, offset, k, image_ptr, xd, xh, xw, c, there, C, size, K, D
                )
        y = best.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + image * out_size + place, y, there)
        word |= offset.to(word.dtype) << (j * BITS)
    codes_ptr += slab.to(tl.int64) * out_size
    if WORDS:
        store_word(codes_ptr, word, place, groups, here, BITS)
    else:
        tl.store(codes_ptr + place, word.to(tl.uint8), here)


@triton.jit
def _window(x, i, size, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr):
    """Of the windows that span x along an axis the i-th from the end: which it is, which of its
    places x is, and whether it is one."""
    y = (x + P) // S - i
    distance = x + P - y * S
    k = distance // D
    return y, k, (y >= 0) & (y < size) & (k < K) & (k * D == distance)


@triton.jit
def _share(
    i,
    dy_ptr,
    codes_ptr,
    slab,
    element,
    here,
    step,
    groups,
    C,
    geometry,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dy of the i-th window that spans an element, where the element was its maximum."""
    d, h, w, c = element
    size, K, S, P, D, A = geometry
    yd, kd, in_d = _window(d, i // (A[1] * A[2]), size[0], K[0], S[0], P[0], D[0])
    yh, kh, in_h = _window(h, i // A[2] % A[1], size[1], K[1], S[1], P[1], D[1])
    yw, kw, in_w = _window(w, i % A[2], size[2], K[2], S[2], P[2], D[2])
    there = in_d & in_h & in_w & here
    place = ((yd * size[1] + yh) * size[2] + yw) * C + c
    start = (tl.full([], size[0], tl.int64) * size[1] * size[2] * C) * slab
    # Not masked by the code, so that a thread reads its neighbouring channels at once.
    dy = tl.load(dy_ptr + start + place, there, other=0.0)
    if WHOLE:
        lane = slab // step
        bit = lane * BITS
        code_ptr = codes_ptr + (start + ((bit >> 3) - lane) * groups) + place
        shift = bit & 7
        code = tl.load(code_ptr, there, other=0).to(tl.int32)
        if 8 % BITS != 0:
            high = tl.load(code_ptr + groups, there & (shift + BITS > 8), other=0).to(tl.int32)
            code |= high << 8
        code = (code >> shift) & ((1 << BITS) - 1)
    else:
        code = code_at(codes_ptr, start + place, groups, there, BITS)
    k = ((kd * K[1] + kh) * K[2] + kw).to(tl.int32)
    return tl.where(code == k, dy.to(tl.float32), 0.0)


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # [slabs, OD, OH, OW, C], as memory has it
    codes_ptr,  # [BITS * groups]
    dx_ptr,  # [slabs, ID, IH, IW, C]
    step,  # slabs of as many codes as there are groups
    groups,
    C,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SD: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PD: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DD: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    AD: tl.constexpr,  # windows that span an element along each axis, at most
    AH: tl.constexpr,
    AW: tl.constexpr,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,  # all codes of a slab are in the same place of their words
    LARGE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    slab, d, h, w, c = _tile(C, ID, IH, IW, LARGE, ROWS, COLUMNS, CHANNELS)
    groups = tl.full([], groups, tl.int64)
    here = (h < IH) & (w < IW) & (c < C)
    total = tl.zeros([ROWS, COLUMNS, CHANNELS], tl.float32)
    K, S, P, D, A = (KD, KH, KW), (SD, SH, SW), (PD, PH, PW), (DD, DH, DW), (AD, AH, AW)
    geometry = ((OD, OH, OW), K, S, P, D, A)
    element = (d, h, w, c)
    if AD * AH * AW <= UNROLLED:
        for i in tl.static_range(AD * AH * AW):
            total += _share(
                i, dy_ptr, codes_ptr, slab, element, here, step, groups, C, geometry, BITS, WHOLE
            )
    else:
        for i in range(AD * AH * AW):
            total += _share(
                i, dy_ptr, codes_ptr, slab, element, here, step, groups, C, geometry, BITS, WHOLE
            )
    dx_ptr += (tl.full([], ID, tl.int64) * IH * IW * C) * slab
    place = ((d * IH + h) * IW + w) * C + c
    tl.store(dx_ptr + place, total.to(dx_ptr.dtype.element_ty), here)


def _three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return (fill,) * (3 - len(values)) + tuple(values)


def _geometry(
    input_size: Sequence[int],
    output_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    layout: torch.memory_format,
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The kernels' scalars from C to OW, and their constants from KD to DW."""
    axes = len(kernel)
    channels = 1 if layout is torch.contiguous_format else input_size[1]
    sizes = (*_three(input_size[-axes:], 1), *_three(output_size[-axes:], 1))
    window = zip("KSPD", (kernel, stride, padding, dilation), (1, 1, 0, 1), strict=True)
    constants = {
        name + axis: value
        for name, values, fill in window
        for axis, value in zip("DHW", _three(values, fill), strict=True)
    }
    return (channels, *sizes), constants


def _spanning(window: dict[str, int]) -> dict[str, int]:
    """How many windows span an element along each axis, at most."""
    return {
        "A" + axis: triton.cdiv(
            window["D" + axis] * (window["K" + axis] - 1) + 1, window["S" + axis]
        )
        for axis in "DHW"
    }


class _Tiling(NamedTuple):
    programs: int  # a slab
    constants: dict[str, int]
    warps: int


def _tiling(channels: int, size: Sequence[int], bytes_each: int) -> _Tiling:
    """Tiles of a slab [*size, channels], as wide as may be along the innermost axis."""
    depth, height, width = size
    each = (16 if channels > 1 else 8) // bytes_each  # gathered one by one along an image
    room = WARPS * 32 * each
    most = min(CHANNELS, triton.next_power_of_2(channels))
    columns = min(room // most, triton.next_power_of_2(width))
    rows = min(room // (most * columns), triton.next_power_of_2(height))
    programs = depth * triton.cdiv(height, rows) * triton.cdiv(width, columns)
    return _Tiling(
        programs * triton.cdiv(channels, most),
        {"ROWS": rows, "COLUMNS": columns, "CHANNELS": most},
        max(1, rows * columns * most // (32 * each)),
    )


@functools.lru_cache(LAUNCHES)
def _output_size(
    input_size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    ceil_mode: bool,
) -> tuple[int, ...]:
    x = torch.empty(input_size, device="meta")
    return reference.output_shape(x, kernel, stride, padding, dilation, ceil_mode)


@functools.lru_cache(LAUNCHES)
def _forward_launch(
    input_size: tuple[int, ...],
    output_size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    layout: torch.memory_format,
    itemsize: int,
    short: int,
) -> tuple[Launch, bool]:
    """The launch, and whether it makes words."""
    sizes, constants = _geometry(input_size, output_size, kernel, stride, padding, dilation, layout)
    channels, size = sizes[0], sizes[4:]
    n, slab = math.prod(output_size), channels * math.prod(size)
    groups, slabs = lanes(n), n // slab
    words = groups % slab == 0
    tiling = _tiling(channels, size, itemsize)
    launch = _forward_kernel.prepare(
        (tiling.programs * (groups // slab if words else slabs),),
        slabs,
        groups // slab,
        groups,
        *sizes,
        **constants,
        BITS=reference.offset_bits(kernel),
        WORDS=words,
        LARGE=max(math.prod(input_size), n) // slabs >= short,
        **tiling.constants,
        num_warps=tiling.warps,
    )
    return launch, words


def max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    bits = reference.offset_bits(kernel)
    if bits > 8:  # one word cannot hold eight such offsets; windows over 256 elements are rare
        return reference.max_pool(x, kernel, stride, padding, dilation, ceil_mode)
    layout = reference.memory_format(x, len(kernel))
    x = x.contiguous(memory_format=layout)
    window = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    size = _output_size(x.shape, *window, ceil_mode)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    n = y.numel()
    if n == 0:
        return y, x.new_empty(0, dtype=torch.uint8)
    launch, words = _forward_launch(x.shape, size, *window, layout, x.element_size(), SHORT)
    # Where words are not whole, one kernel more packs the offsets: batches of other than 8 k.
    codes = x.new_empty(packed_bytes(n, bits) if words else n, dtype=torch.uint8)
    launch(x, y, codes)
    return y, codes if words else packing.pack(codes, bits)


# The layout of an output of these sizes and strides.
_layout = functools.lru_cache(LAUNCHES)(reference.output_format)


@functools.lru_cache(LAUNCHES)
def _backward_launch(
    input_size: tuple[int, ...],
    output_size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    layout: torch.memory_format,
    itemsize: int,
    short: int,
) -> Launch:
    sizes, constants = _geometry(input_size, output_size, kernel, stride, padding, dilation, layout)
    channels, size = sizes[0], sizes[1:4]
    n, count = math.prod(input_size), math.prod(output_size)
    groups, slabs = lanes(count), n // (channels * math.prod(size))
    slab = channels * math.prod(sizes[4:])
    tiling = _tiling(channels, size, itemsize)
    return _backward_kernel.prepare(
        (tiling.programs * slabs,),
        groups // slab,
        groups,
        *sizes,
        **constants,
        **_spanning(constants),
        BITS=reference.offset_bits(kernel),
        WHOLE=groups % slab == 0,
        LARGE=max(n, count) // slabs >= short,
        **tiling.constants,
        num_warps=tiling.warps,
    )


def max_pool_backward(
    grad_output: Tensor,
    codes: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_size: Sequence[int],
    output_stride: Sequence[int],
) -> Tensor:
    if reference.offset_bits(kernel) > 8:
        return reference.max_pool_backward(
            grad_output, codes, kernel, stride, padding, dilation, input_size, output_stride
        )
    input_size, output_stride = tuple(input_size), tuple(output_stride)
    layout = _layout(grad_output.shape, output_stride, len(kernel))
    grad_input = torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
    )
    if grad_input.numel():
        window = (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
        sizes = (input_size, grad_output.shape)
        launch = _backward_launch(*sizes, *window, layout, grad_input.element_size(), SHORT)
        launch(laid_out(grad_output, output_stride), codes, grad_input)
    return grad_input

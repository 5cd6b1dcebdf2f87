"""Max pooling that keeps window offsets: one forward and one backward kernel for 1 to 3 dimensions.

Both number elements in memory order, contiguous or channels-last. The backward gathers: every input
element asks the windows that cover it whether it was their maximum. No atomics, so the result does
not depend on timing.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import quick
from packlight.fewbit import pooling_reference as reference
from packlight.packing.kernels import empty_word, store_word
from packlight.packing.layout import lanes, memory_order

BLOCK = 256


@triton.jit
def _split(p, C, D, H, W, CHANNELS_LAST: tl.constexpr):
    """Memory position -> (batch or plane, channel, d, h, w); without channels-last channel is 0."""
    if CHANNELS_LAST:
        channel = p % C
        p = p // C
    else:
        channel = p * 0
    w = p % W
    p = p // W
    h = p % H
    p = p // H
    return p // D, channel, p % D, h, w


@triton.jit
def _join(outer, channel, d, h, w, C, D, H, W, CHANNELS_LAST: tl.constexpr):
    """The inverse of `_split`."""
    p = ((outer * D + d) * H + h) * W + w
    if CHANNELS_LAST:
        p = p * C + channel
    return p


@quick
@triton.jit
def _forward_kernel(
    x_ptr,  # input, in memory order
    y_ptr,  # [n]
    codes_ptr,  # [BITS * groups]
    n,
    groups,
    C,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    KH,
    KW,
    SD,
    SH,
    SW,
    PD,
    PH,
    PW,
    DD,
    DH,
    DW,
    WINDOW: tl.constexpr,  # KD * KH * KW
    CHANNELS_LAST: tl.constexpr,
    LARGE: tl.constexpr,  # positions need 64 bits
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = empty_word(BLOCK, BITS)
    for j in tl.static_range(8):
        p = j * groups.to(tl.int64) + lane
        inside = (lane < groups) & (p < n)
        if not LARGE:
            p = p.to(tl.int32)
        outer, channel, d, h, w = _split(p, C, OD, OH, OW, CHANNELS_LAST)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        offset = tl.full([BLOCK], -1, tl.int32)
        for k in range(WINDOW):
            xd = d * SD - PD + (k // (KH * KW)) * DD
            xh = h * SH - PH + (k // KW % KH) * DH
            xw = w * SW - PW + (k % KW) * DW
            valid = (xd >= 0) & (xd < ID) & (xh >= 0) & (xh < IH) & (xw >= 0) & (xw < IW) & inside
            q = _join(outer, channel, xd, xh, xw, C, ID, IH, IW, CHANNELS_LAST)
            x = tl.load(x_ptr + q, valid, other=float("-inf")).to(tl.float32)
            # As torch: the first of equals wins, any NaN wins, and a window of -inf has an offset.
            better = valid & ((x > best) | (x != x) | (offset < 0))
            best = tl.where(better, x, best)
            offset = tl.where(better, k, offset)
        tl.store(y_ptr + p, best.to(y_ptr.dtype.element_ty), inside)
        word |= tl.maximum(offset, 0).to(word.dtype) << (j * BITS)
    store_word(codes_ptr, word, lane, groups, lane < groups, BITS)


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # in the memory order of y
    codes_ptr,  # [BITS * groups]
    dx_ptr,  # [n]
    n,
    groups,
    C,
    ID,
    IH,
    IW,
    OD,
    OH,
    OW,
    KH,
    KW,
    SD,
    SH,
    SW,
    PD,
    PH,
    PW,
    DD,
    DH,
    DW,
    WINDOW: tl.constexpr,  # KD * KH * KW
    CHANNELS_LAST: tl.constexpr,
    LARGE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = p < n
    if not LARGE:
        p = p.to(tl.int32)
    outer, channel, d, h, w = _split(p, C, ID, IH, IW, CHANNELS_LAST)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(WINDOW):
        # Position k of output window t / S, if that is whole, lies on this element.
        td = d + PD - (k // (KH * KW)) * DD
        th = h + PH - (k // KW % KH) * DH
        tw = w + PW - (k % KW) * DW
        yd, yh, yw = td // SD, th // SH, tw // SW
        valid = (td >= 0) & (th >= 0) & (tw >= 0) & (yd < OD) & (yh < OH) & (yw < OW) & inside
        valid = valid & (yd * SD == td) & (yh * SH == th) & (yw * SW == tw)
        q = _join(outer, channel, yd, yh, yw, C, OD, OH, OW, CHANNELS_LAST)
        row = q // groups
        bit = row * BITS
        code_ptr = codes_ptr + (bit >> 3).to(tl.int64) * groups + (q - row * groups)
        shift = (bit & 7).to(tl.int32)
        code = tl.load(code_ptr, valid, other=0).to(tl.int32)
        high = tl.load(code_ptr + groups, valid & (shift + BITS > 8), other=0).to(tl.int32)
        code = ((code | (high << 8)) >> shift) & ((1 << BITS) - 1)
        total += tl.load(dy_ptr + q, valid & (code == k), other=0.0).to(tl.float32)
    tl.store(dx_ptr + p, total.to(dx_ptr.dtype.element_ty), inside)


def _three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return (fill,) * (3 - len(values)) + tuple(values)


def _geometry(
    input_size: Sequence[int],
    output_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, ...]:
    """The kernels' scalars from C to DW."""
    axes = len(kernel)
    channels = input_size[-axes - 1] if len(input_size) > axes else 1
    return (
        channels,
        *_three(input_size[-axes:], 1),
        *_three(output_size[-axes:], 1),
        *_three(kernel, 1)[1:],
        *_three(stride, 1),
        *_three(padding, 0),
        *_three(dilation, 1),
    )


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
    axes = len(kernel)
    layout = reference.memory_format(x, axes)
    x = x.contiguous(memory_format=layout)
    size = reference.output_shape(x, kernel, stride, padding, dilation, ceil_mode)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    n, groups = y.numel(), lanes(y.numel())
    codes = x.new_empty(bits * groups, dtype=torch.uint8)
    if n:
        _forward_kernel[(triton.cdiv(groups, BLOCK),)](
            x,
            y,
            codes,
            n,
            groups,
            *_geometry(x.shape, size, kernel, stride, padding, dilation),
            WINDOW=math.prod(kernel),
            CHANNELS_LAST=layout is not torch.contiguous_format,
            LARGE=max(x.numel(), n) >= 2**30,
            BITS=bits,
            BLOCK=BLOCK,
        )
    return y, codes


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
    bits = reference.offset_bits(kernel)
    if bits > 8:
        return reference.max_pool_backward(
            grad_output, codes, kernel, stride, padding, dilation, input_size, output_stride
        )
    layout = reference.output_format(grad_output.shape, output_stride, len(kernel))
    grad_input = torch.empty(
        tuple(input_size), dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
    )
    if grad_input.numel():
        _backward_kernel[(triton.cdiv(grad_input.numel(), BLOCK),)](
            memory_order(grad_output, output_stride),
            codes,
            grad_input,
            grad_input.numel(),
            lanes(grad_output.numel()),
            *_geometry(input_size, grad_output.shape, kernel, stride, padding, dilation),
            WINDOW=math.prod(kernel),
            CHANNELS_LAST=layout is not torch.contiguous_format,
            LARGE=max(grad_input.numel(), grad_output.numel()) >= 2**30,
            BITS=bits,
            BLOCK=BLOCK,
        )
    return grad_input

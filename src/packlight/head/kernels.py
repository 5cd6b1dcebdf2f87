"""The operators of heads as Triton kernels: each reads a chunk of logits once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import quick
from packlight.elementwise.kernels import _tanh

# Columns a program handles at a time, and its warps.
_BLOCK = 2048
_WARPS = 8

# As exact as float32: logits of a softcap lie close together.
_DIGITS = tl.constexpr(24)

# Below every number that is no infinity: the maximum of no elements.
_LEAST = tl.constexpr(-3.0e38)


@triton.jit
def _bent(z, scale, cap, CAPPED: tl.constexpr):
    """u of a block of logits, in float32."""
    u = z.to(tl.float32) * scale
    if CAPPED:
        u = _tanh(u, 0.0, 0.0, _DIGITS) * cap
    return u


@quick
@triton.jit(do_not_specialize=["scale", "cap"])
def _row_sums_kernel(
    logits_ptr,  # [n, width], a row each `stride` elements
    logsumexp_ptr,  # [n]
    total_ptr,  # [n]
    stride,
    width,
    scale,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. Each lane has a maximum and a sum of its own until the end."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], _LEAST, tl.float32)
    powers = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = lane < width - start
        u = _bent(tl.load(logits_ptr + start + lane, mask=inside, other=0.0), scale, cap, CAPPED)
        total += tl.where(inside, u, 0.0)
        u = tl.where(inside, u, float("-inf"))
        higher = tl.maximum(highest, u)
        powers = powers * tl.exp(highest - higher) + tl.exp(u - higher)
        highest = higher
    most = tl.max(highest, 0)
    power = tl.sum(powers * tl.exp(highest - most), 0)
    tl.store(logsumexp_ptr + row, most + tl.log(power))
    tl.store(total_ptr + row, tl.sum(total, 0))


@quick
@triton.jit(do_not_specialize=["start", "scale", "cap"])
def _gradient_kernel(
    logits_ptr,  # [n, width], a row each `stride` elements
    logsumexp_ptr,  # [n]
    targets_ptr,  # [n]
    on_softmax_ptr,  # [n]
    on_target_ptr,  # [n]
    on_all_ptr,  # [n]
    stride,
    width,
    start,
    scale,
    cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = logits_ptr + row * stride + column
    u = _bent(tl.load(place, mask=inside, other=0.0), scale, cap, CAPPED)
    target = tl.load(targets_ptr + row) - start
    g = tl.exp(u - tl.load(logsumexp_ptr + row)) * tl.load(on_softmax_ptr + row)
    g += tl.load(on_all_ptr + row)
    g = tl.where(column == target, g + tl.load(on_target_ptr + row), g)
    if CAPPED:
        g *= cap - u * (u / cap)
    tl.store(place, g * scale, mask=inside)


def row_sums(logits: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """See `reference.row_sums`."""
    rows, width = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    sums = logits.new_empty(2, rows, dtype=torch.float32)
    logsumexp, total = sums[0], sums[1]
    if rows:
        _row_sums_kernel[(rows,)](
            logits, logsumexp, total, logits.stride(0), width, scale, cap,
            CAPPED=bool(cap), BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return logsumexp, total


def gradient_(
    logits: Tensor,
    logsumexp: Tensor,
    targets: Tensor,
    on_softmax: Tensor,
    on_target: Tensor,
    on_all: Tensor,
    start: int,
    scale: float,
    cap: float,
) -> None:
    """See `reference.gradient_`."""
    rows, width = logits.shape
    if rows and width:
        _gradient_kernel[(rows, triton.cdiv(width, _BLOCK))](
            logits, logsumexp, targets, on_softmax, on_target, on_all,
            logits.stride(0), width, start, scale, cap,
            CAPPED=bool(cap), BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip

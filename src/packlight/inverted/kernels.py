"""Triton kernels of the inverted activations: one forward and one backward for all of them.

A program handles BLOCK words of 8 branch bits (layout in `packing/layout.py`), that is eight rows
of neighbouring elements. The forward computes output and bit in one pass; monotone functions keep
no bits and need no forward of their own. The backward reads dy, y and the bit, and writes dx: which
function it is comes in as a compile-time constant, and so do the constants of its fit.

At the bandwidth of an H100 about 39 instructions an element go by in 16 bits and twice as many in
float32. Hence fits of f' itself, short ones in 16 bits, without a division and with one square
root.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packlight._launch import LAUNCHES, Launch, quick
from packlight.elementwise.kernels import DIGITS, FORWARD, PTX, expm1, log2
from packlight.inverted.inverses import INVERSES, fit_of, representable
from packlight.packing.kernels import (
    code_of,
    empty_word,
    load_rows,
    load_word,
    store_row,
    store_word,
)
from packlight.packing.layout import (
    dense_stride,
    laid_out,
    lanes,
    packed_bytes,
    write_back,
)

# --- Derivatives: f'(f^-1(y)) in fp32. `left` is the branch, a and b the function's parameters, FIT
# the constants of `_constants`. Formulas and their reasons are those of reference.py.


@triton.jit
def _celu(y, left, alpha, _, FIT: tl.constexpr, DIGITS: tl.constexpr):
    return tl.where(y > 0, 1.0, tl.fma(y, 1.0 / alpha, 1.0))


@triton.jit
def _elu(y, left, alpha, _, FIT: tl.constexpr, DIGITS: tl.constexpr):
    return tl.where(y > 0, 1.0, y + alpha)


@triton.jit
def _hardsigmoid(y, left, _a, _b, FIT: tl.constexpr, DIGITS: tl.constexpr):
    return tl.where((y > 0) & (y < 1), 1.0 / 6.0, 0.0)


@triton.jit
def _hardswish(y, left, _a, _b, FIT: tl.constexpr, DIGITS: tl.constexpr):
    above = (y + 0.375) + 1.0 / 2 ** (DIGITS + 4)
    root = tl.sqrt(tl.maximum(above, 0.0, propagate_nan=tl.PropagateNan.ALL) * (2.0 / 3.0))
    on_left = tl.where(y < 0, -root, 0.0)
    return tl.where(left, on_left, tl.where(y >= 3, 1.0, root))


@triton.jit
def _hardtanh(y, left, low, high, FIT: tl.constexpr, DIGITS: tl.constexpr):
    return tl.where((y <= low) | (y >= high), 0.0, 1.0)


@triton.jit
def _leaky_relu(y, left, slope, _, FIT: tl.constexpr, DIGITS: tl.constexpr):
    return tl.where(y > 0, 1.0, slope)


@triton.jit
def _logsigmoid(y, left, _a, _b, FIT: tl.constexpr, DIGITS: tl.constexpr):
    return -expm1(y, DIGITS)


@triton.jit
def _selu(y, left, _a, _b, FIT: tl.constexpr, DIGITS: tl.constexpr):
    return tl.where(y > 0, 1.0507009873554805, y + 1.7580993408473766)


@triton.jit
def _softplus(y, left, beta, threshold, FIT: tl.constexpr, DIGITS: tl.constexpr):
    z = beta * y
    return tl.where(z > threshold, 1.0, -expm1(-z, DIGITS))


@triton.jit
def _softsign(y, left, _a, _b, FIT: tl.constexpr, DIGITS: tl.constexpr):
    rest = 1.0 - tl.abs(y)
    return rest * rest


@triton.jit
def _polynomial(v, FIRST: tl.constexpr, LAST: tl.constexpr, FIT: tl.constexpr):
    """FIT[FIRST] + FIT[FIRST + 1] v + ... + FIT[LAST] v^(LAST - FIRST), by Horner's scheme."""
    result = tl.fma(v, FIT[LAST], FIT[LAST - 1])
    for i in tl.static_range(LAST - FIRST - 1):
        result = tl.fma(v, result, FIT[LAST - 2 - i])
    return result


@triton.jit
def _saturated(x, y, z):
    """min(max(x y + z, 0), 1), where NaN may become 0; one instruction."""
    if PTX:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, $2, $3;",
            "=f,f,f,f",
            [x, y, z],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.minimum(tl.maximum(tl.fma(x, y, z), 0.0), 1.0)


@triton.jit
def _cube_root_fit(y, left, _a, _b, FIT: tl.constexpr, DIGITS: tl.constexpr):
    v = tl.exp2(tl.fma(log2(tl.abs(y)), 2.0 / 3.0, FIT[2]))
    v = tl.minimum(v, 1.0, propagate_nan=tl.PropagateNan.ALL)
    w = v
    if FIT[3] != 0:
        w = v - FIT[3]
    return v * _polynomial(w, 7, len(FIT) - 1, FIT)


@triton.jit
def _square_root_fit(y, left, _a, _b, FIT: tl.constexpr, DIGITS: tl.constexpr):
    if DIGITS == 24:
        above = (y - FIT[0]) - FIT[1]
        factor = tl.where(left, tl.fma(log2(tl.abs(y)), FIT[4], FIT[5]), FIT[2])
        square = _saturated(above, factor, 0.0)
    else:
        square = _saturated(y, FIT[2], -FIT[0] * FIT[2])
    v = tl.sqrt(square)
    if FIT[3] != 0:
        v -= FIT[3]
    RIGHT: tl.constexpr = 7
    LEFT: tl.constexpr = 7 + FIT[6]
    on_right = _polynomial(v, RIGHT, LEFT - 1, FIT)
    on_left = _polynomial(v, LEFT, len(FIT) - 1, FIT)
    if DIGITS == 24:
        on_left *= y
    # NaN passes, and infinity becomes NaN, which torch's derivative is there.
    return tl.fma(y, 0.0, tl.where(left, on_left, on_right))


DERIVATIVES = {
    "celu": _celu,
    "elu": _elu,
    "gelu": _square_root_fit,
    "gelu_tanh": _square_root_fit,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "hardtanh": _hardtanh,
    "leaky_relu": _leaky_relu,
    "logsigmoid": _logsigmoid,
    "mish": _square_root_fit,
    "quick_gelu": _square_root_fit,
    "relu6": _hardtanh,
    "selu": _selu,
    "silu": _square_root_fit,
    "softplus": _softplus,
    "softsign": _softsign,
    "tanhshrink": _cube_root_fit,
}
FITTED = (_square_root_fit, _cube_root_fit)


def _constants(name: str, digits: int) -> tuple[float, ...]:
    """FIT: y0 in two parts, 1 / span, center, the logarithm's two, the length of `right`, then

    `right` and `left`. For tanhshrink the third is log2(1 / span) * 2 / 3.
    """
    if DERIVATIVES[name] not in FITTED:
        return ()
    fit = fit_of(name, digits)
    high = torch.tensor(fit.floor, dtype=torch.float32, device="cpu").item()
    scale = -math.log2(fit.span) * 2 / 3 if name == "tanhshrink" else 1 / fit.span
    a, b = fit.logarithm or (0.0, 0.0)
    head = (high, fit.floor - high, scale, fit.center, a, b, len(fit.right))
    return (*head, *fit.right, *fit.left)


CONSTANTS = {
    (name, digits): _constants(name, digits) for name in DERIVATIVES for digits in DIGITS.values()
}


# --- The two kernels.


@quick
@triton.jit
def _forward_kernel(
    x_ptr,  # [n]
    y_ptr,  # [n], may be x_ptr
    bits_ptr,  # [groups]
    n,
    groups,
    MINIMUM: tl.constexpr,
    FORWARD: tl.constexpr,
    DIGITS: tl.constexpr,
    FULL: tl.constexpr,  # every program has BLOCK whole groups, so nothing is masked
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)  # Triton passes 1 as a constant, which has no `to`
    lane = tl.arange(0, BLOCK)
    x_ptr += start
    y_ptr += start
    bits_ptr += start

    # All loads come first: the stores below may alias them, so the compiler would not move them up.
    xs = load_rows(x_ptr, start, lane, n, groups, FULL)
    word = empty_word(BLOCK, 1)
    for j in tl.static_range(8):
        x = xs[j].to(tl.float32)
        store_row(y_ptr, FORWARD(x, 0.0, 0.0, DIGITS), j, start, lane, n, groups, FULL)
        word |= tl.where(x < MINIMUM, 1 << j, 0)
    if FULL:
        store_word(bits_ptr, word, lane, groups, None, 1)
    else:
        store_word(bits_ptr, word, lane, groups, lane < groups - start, 1)


@quick
@triton.jit
def _backward_kernel(
    dy_ptr,  # [n]
    y_ptr,  # [n]
    bits_ptr,  # [groups], not read unless BRANCH
    dx_ptr,  # [n]
    n,
    groups,
    a,
    b,
    DERIVATIVE: tl.constexpr,
    FIT: tl.constexpr,
    BRANCH: tl.constexpr,  # the function has a minimum
    SELECT: tl.constexpr,  # f' = 0 gives 0 whatever dy
    DIGITS: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    groups = groups.to(tl.int64)
    n = tl.full([], n, tl.int64)
    lane = tl.arange(0, BLOCK)
    dy_ptr += start
    y_ptr += start
    dx_ptr += start
    bits_ptr += start

    ys = load_rows(y_ptr, start, lane, n, groups, FULL)
    dys = load_rows(dy_ptr, start, lane, n, groups, FULL)
    word = empty_word(BLOCK, 1)
    if BRANCH:
        if FULL:
            word = load_word(bits_ptr, lane, groups, None, BLOCK, 1)
        else:
            word = load_word(bits_ptr, lane, groups, lane < groups - start, BLOCK, 1)

    for j in tl.static_range(8):
        left = code_of(word, j, 1) != 0
        slope = DERIVATIVE(ys[j].to(tl.float32), left, a, b, FIT, DIGITS)
        dx = dys[j].to(tl.float32) * slope
        if SELECT:
            dx = tl.where(slope == 0, 0.0, dx)
        store_row(dx_ptr, dx, j, start, lane, n, groups, FULL)


# --- Launchers, with the signatures of reference.py.

# Words a program. The backward holds two tensors in registers.
BLOCK = 512
BACKWARD_BLOCK = {torch.float32: 256, torch.bfloat16: 512, torch.float16: 512}


def forward_constants(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants of the forward kernel, but for the size."""
    return {
        "MINIMUM": INVERSES[name].minimum,
        "FORWARD": FORWARD[name],
        "DIGITS": DIGITS[dtype],
        "BLOCK": BLOCK,
    }


@functools.lru_cache(LAUNCHES)
def _forward_launch(n: int, name: str, dtype: torch.dtype) -> Launch:
    groups = lanes(n)
    return _forward_kernel.prepare(
        (triton.cdiv(groups, BLOCK),),
        n,
        groups,
        **forward_constants(name, dtype),
        FULL=n == 8 * groups and groups % BLOCK == 0,
        num_warps=4,
    )


def _launch_forward(x: Tensor, y: Tensor, name: str) -> Tensor:
    """Runs over `x` into `y`, which may be `x`, both in one order, and returns the bits."""
    n = x.numel()
    bits = x.new_empty(packed_bytes(n, 1), dtype=torch.uint8)
    if n:
        _forward_launch(n, name, x.dtype)(x, y, bits)
    return bits


def activation(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x)
    return y, _launch_forward(laid_out(x, y.stride()), y, name)


def activation_(x: Tensor, name: str) -> Tensor:
    dense = laid_out(x, dense_stride(x))
    bits = _launch_forward(dense, dense, name)
    write_back(x, dense)
    return bits


def backward_constants(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants of the backward kernel, but for the size."""
    return {
        "DERIVATIVE": DERIVATIVES[name],
        "FIT": CONSTANTS[name, DIGITS[dtype]],
        "BRANCH": INVERSES[name].minimum is not None,
        "SELECT": INVERSES[name].select,
        "DIGITS": DIGITS[dtype],
        "BLOCK": BACKWARD_BLOCK[dtype],
    }


@functools.lru_cache(LAUNCHES)
def _backward_launch(
    n: int, name: str, dtype: torch.dtype, parameters: tuple[float, ...]
) -> Launch:
    groups = lanes(n)
    if name in ("hardtanh", "relu6"):
        bounds = parameters if name == "hardtanh" else (0.0, 6.0)
        parameters = representable(bounds, dtype)
    a, b = map(float, (*parameters, 0.0, 0.0)[:2])
    constants = backward_constants(name, dtype)
    block = constants["BLOCK"]
    return _backward_kernel.prepare(
        (triton.cdiv(groups, block),),
        n,
        groups,
        a,
        b,
        **constants,
        FULL=n == 8 * groups and groups % block == 0,
        num_warps=4,
    )


def backward(
    grad_output: Tensor, y: Tensor, bits: Tensor | None, name: str, parameters: Sequence[float]
) -> Tensor:
    stride = dense_stride(y)
    grad_input = grad_output.new_empty_strided(grad_output.shape, stride)
    n = grad_output.numel()
    if n:
        _backward_launch(n, name, y.dtype, tuple(parameters))(
            laid_out(grad_output, stride),
            laid_out(y, stride),
            y if bits is None else bits,
            grad_input,
        )
    return grad_input

"""Elementwise mathematics of Triton kernels, in fp32: activations and the functions they need.

DIGITS is the number of significand bits of the tensor's dtype: 24, 11 (fp16) or 8 (bf16). With
fewer digits a cheaper form is still exact to the rounding of the result.
"""

import os

import torch
import triton
import triton.language as tl

DIGITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693145751953125)  # ln 2 in two parts: n * LN2_HIGH is exact
LN2_LOW = tl.constexpr(1.428606820309417e-6)
# Single instructions of NVIDIA's where Triton has no name for them; the interpreter has neither.
PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and subtracting it rounds to an integer


@triton.jit
def clamp(x, low, high):
    """min(max(x, low), high), passing NaN as torch does."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """`x` in float32, rounded to `dtype`: a cast there and back the compiler leaves out."""
    if PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{.reg .b16 l, h; mov.b16 l, 0; cvt.rn.bf16.f32 h, $1; mov.b32 $0, {l, h};}",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    elif PTX and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "{.reg .b16 half; cvt.rn.f16.f32 half, $1; cvt.f32.f16 $0, half;}",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit
def reduced_exp(x):
    """n and e^r - 1 where x = n ln 2 + r, |r| <= 0.347: Taylor to r^7 / 7!, relative error 5e-9."""
    n = (x * LOG2E + ROUND) - ROUND
    r = tl.fma(n, -LN2_HIGH, x)
    r = tl.fma(n, -LN2_LOW, r)
    p = tl.fma(r, 1.0 / 5040.0, 1.0 / 720.0)
    p = tl.fma(r, p, 1.0 / 120.0)
    p = tl.fma(r, p, 1.0 / 24.0)
    p = tl.fma(r, p, 1.0 / 6.0)
    p = tl.fma(r, p, 0.5)
    return n, tl.fma(r * r, p, r)


@triton.jit
def exp(x, DIGITS: tl.constexpr):
    """e^x. One hardware exponential loses up to 7 bits to the rounding of x log2(e)."""
    if DIGITS < 24:
        return tl.exp2(x * LOG2E)
    else:
        # 0 and inf come out, while inf - inf and inf * 0 stay out.
        n, p = reduced_exp(clamp(x, -126.0, 88.8))
        half = tl.exp2(n - 1.0)  # 2^128 overflows where 2^128 (1 + p) need not
        return tl.fma(half, p, half) * 2.0


@triton.jit
def divide(x, y, DIGITS: tl.constexpr):
    """x / y for y >= 1. In 16 bits a y past 2^126 counts as infinite."""
    if DIGITS == 24:
        return tl.div_rn(x, y)
    elif PTX:
        # Triton's division guards against overflow of 1 / y, at five more instructions.
        return x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x / y


@triton.jit
def expm1(x, DIGITS: tl.constexpr):
    """e^x - 1 for x <= 0, accurate relative to the result."""
    if DIGITS < 24:
        # Taylor to x^4 / 4! on [-1/4, 0]: relative error 4e-5.
        p = tl.fma(x, 1.0 / 24.0, 1.0 / 6.0)
        p = tl.fma(x, p, 0.5)
        p = tl.fma(x, p, 1.0)
        return tl.where(x > -0.25, x * p, tl.exp2(x * LOG2E) - 1.0)
    else:
        # 2^n (e^r - 1) + (2^n - 1)
        n, p = reduced_exp(tl.maximum(x, -126.0, propagate_nan=tl.PropagateNan.ALL))
        scale = tl.exp2(n)
        return tl.fma(scale, p, scale - 1.0)


@triton.jit
def log2(x):
    """log2 of x >= 1, absolute error 2^-22."""
    if PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def log1p(z, DIGITS: tl.constexpr):
    """log(1 + z) for 0 <= z <= 1, accurate relative to the result."""
    if DIGITS < 24:
        # The logarithm is accurate absolutely; the series to z^4 serves where that is too little.
        p = tl.fma(z, -1.0 / 4.0, 1.0 / 3.0)
        p = tl.fma(z, p, -1.0 / 2.0)
        p = tl.fma(z, p, 1.0)
        return tl.where(z < 0.125, z * p, log2(1.0 + z) * 0.6931471805599453)
    else:
        # 2 atanh(s) with s = z / (2 + z): the series to s^15, where s^2 <= 1/9.
        s = divide(z, 2.0 + z, DIGITS)
        q = s * s
        p = tl.fma(q, 2.0 / 15.0, 2.0 / 13.0)
        p = tl.fma(q, p, 2.0 / 11.0)
        p = tl.fma(q, p, 2.0 / 9.0)
        p = tl.fma(q, p, 2.0 / 7.0)
        p = tl.fma(q, p, 2.0 / 5.0)
        p = tl.fma(q, p, 2.0 / 3.0)
        return tl.fma(q * s, p, 2.0 * s)


# --- Activations: f(x) in fp32 with up to two scalar parameters.


@triton.jit
def _celu(x, alpha, _, DIGITS: tl.constexpr):
    return tl.where(x > 0, x, alpha * expm1(tl.where(x > 0, 0.0, x) * (1.0 / alpha), DIGITS))


@triton.jit
def _elu(x, alpha, _, DIGITS: tl.constexpr):
    return tl.where(x > 0, x, alpha * expm1(tl.where(x > 0, 0.0, x), DIGITS))


@triton.jit
def _selu(x, _a, _b, DIGITS: tl.constexpr):
    negative = 1.7580993408473766 * expm1(tl.where(x > 0, 0.0, x), DIGITS)
    return tl.where(x > 0, 1.0507009873554805 * x, negative)


# log2 Phi(-t) is smooth in t, so Phi(-t) = 2^P(t) with a short polynomial P, fitted on t <= 6 by
# tools/fit_gelu.py to a relative error of 3.7e-4 (degree 5) and 3.6e-6 (degree 7). Past 6 both fall
# to -inf, where |y| < 6e-9 and torch's own 1 + erf has no digit left.
P5_0 = tl.constexpr(-1.00053181)
P5_1 = tl.constexpr(-1.14439976)
P5_2 = tl.constexpr(-0.472785579)
P5_3 = tl.constexpr(-0.0428327899)
P5_4 = tl.constexpr(0.00446761807)
P5_5 = tl.constexpr(-0.000201685274)
P7_0 = tl.constexpr(-0.999995302)
P7_1 = tl.constexpr(-1.15125087)
P7_2 = tl.constexpr(-0.458464982)
P7_3 = tl.constexpr(-0.0539593956)
P7_4 = tl.constexpr(0.00850755137)
P7_5 = tl.constexpr(-0.000930440269)
P7_6 = tl.constexpr(6.15880355e-05)
P7_7 = tl.constexpr(-1.83432689e-06)


@triton.jit
def _gelu(x, _a, _b, DIGITS: tl.constexpr):
    if DIGITS == 24:
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        t = tl.abs(x)
        if DIGITS == 8:
            p = tl.fma(t, P5_5, P5_4)
            p = tl.fma(t, p, P5_3)
            p = tl.fma(t, p, P5_2)
            p = tl.fma(t, p, P5_1)
            q = tl.exp2(tl.fma(t, p, P5_0))
        else:
            p = tl.fma(t, P7_7, P7_6)
            p = tl.fma(t, p, P7_5)
            p = tl.fma(t, p, P7_4)
            p = tl.fma(t, p, P7_3)
            p = tl.fma(t, p, P7_2)
            p = tl.fma(t, p, P7_1)
            q = tl.exp2(tl.fma(t, p, P7_0))
        return x * tl.where(x > 0, 1.0 - q, q)


@triton.jit
def _gelu_tanh(x, _a, _b, DIGITS: tl.constexpr):
    # (1 + tanh z) / 2 = 1 / (1 + e^-2z), which keeps its digits where 1 + tanh z loses them.
    z = x * tl.fma(x * x, -2.0 * 0.7978845608028654 * 0.044715, -2.0 * 0.7978845608028654)
    return divide(x, 1.0 + exp(z, DIGITS), DIGITS)


@triton.jit
def _hardswish(x, _a, _b, DIGITS: tl.constexpr):
    return x * clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def _logsigmoid(x, _a, _b, DIGITS: tl.constexpr):
    return tl.where(x > 0, 0.0, x) - log1p(exp(-tl.abs(x), DIGITS), DIGITS)


@triton.jit
def _mish(x, _a, _b, DIGITS: tl.constexpr):
    # tanh(log(1 + w)) = (w^2 + 2 w) / (w^2 + 2 w + 2) at w = e^x, written in e^-|x|.
    e = exp(-tl.abs(x), DIGITS)
    numerator = tl.where(x > 0, tl.fma(2.0, e, 1.0), e * (e + 2.0))
    rest = tl.where(x > 0, 2.0 * e * e, 2.0)
    return x * divide(numerator, numerator + rest, DIGITS)


@triton.jit
def _quick_gelu(x, _a, _b, DIGITS: tl.constexpr):
    return divide(x, 1.0 + exp(-1.702 * x, DIGITS), DIGITS)


@triton.jit
def _relu_squared(x, _a, _b, DIGITS: tl.constexpr):
    r = tl.where(x <= 0, 0.0, x)
    return r * r


@triton.jit
def _sigmoid(x, _a, _b, DIGITS: tl.constexpr):
    return divide(1.0, 1.0 + exp(-x, DIGITS), DIGITS)


@triton.jit
def _silu(x, _a, _b, DIGITS: tl.constexpr):
    return divide(x, 1.0 + exp(-x, DIGITS), DIGITS)


@triton.jit
def _softplus(x, beta, threshold, DIGITS: tl.constexpr):
    z = beta * x
    y = tl.where(z > 0, z, 0.0) + log1p(exp(-tl.abs(z), DIGITS), DIGITS)
    return tl.where(z > threshold, x, y * (1.0 / beta))


@triton.jit
def _softsign(x, _a, _b, DIGITS: tl.constexpr):
    if DIGITS < 24:
        return x / (tl.abs(x) + 1.0)  # at any |x|, so guarded against overflow of 1 / y
    else:
        return tl.div_rn(x, tl.abs(x) + 1.0)


@triton.jit
def _tanh(x, _a, _b, DIGITS: tl.constexpr):
    if DIGITS == 8 and PTX:
        return tl.inline_asm_elementwise(  # relative error 2^-11
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        m = expm1(-2.0 * tl.abs(x), DIGITS)
        y = divide(m, m + 2.0, DIGITS)
        return tl.where(x > 0, -y, y)


@triton.jit
def _tanhshrink(x, _a, _b, DIGITS: tl.constexpr):
    # Near 0 the difference has no digits, the series has: x^3 / 3 - 2 x^5 / 15 + ...
    s = x * x
    p = tl.fma(s, 1382.0 / 155925.0, -62.0 / 2835.0)
    p = tl.fma(s, p, 17.0 / 315.0)
    p = tl.fma(s, p, -2.0 / 15.0)
    p = tl.fma(s, p, 1.0 / 3.0)
    return tl.where(tl.abs(x) < 0.25, x * s * p, x - _tanh(x, _a, _b, DIGITS))


@triton.jit
def _abs(x, _a, _b, DIGITS: tl.constexpr):
    return tl.abs(x)


@triton.jit
def _hardshrink(x, lambd, _, DIGITS: tl.constexpr):
    return tl.where((x >= -lambd) & (x <= lambd), 0.0, x)


@triton.jit
def _hardsigmoid(x, _a, _b, DIGITS: tl.constexpr):
    return clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def _hardtanh(x, low, high, DIGITS: tl.constexpr):
    return clamp(x, low, high)


@triton.jit
def _leaky_relu(x, slope, _, DIGITS: tl.constexpr):
    return tl.where(x > 0, x, x * slope)


@triton.jit
def _relu(x, _a, _b, DIGITS: tl.constexpr):
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def _relu6(x, _a, _b, DIGITS: tl.constexpr):
    return clamp(x, 0.0, 6.0)


@triton.jit
def _softshrink(x, lambd, _, DIGITS: tl.constexpr):
    # x * 0 keeps NaN in the band.
    return tl.where(x > lambd, x - lambd, tl.where(x < -lambd, x + lambd, x * 0.0))


@triton.jit
def _threshold(x, threshold, value, DIGITS: tl.constexpr):
    return tl.where(x <= threshold, value, x)


FORWARD = {
    "abs": _abs,
    "celu": _celu,
    "clamp": _hardtanh,
    "elu": _elu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hardshrink": _hardshrink,
    "hardsigmoid": _hardsigmoid,
    "hardswish": _hardswish,
    "hardtanh": _hardtanh,
    "leaky_relu": _leaky_relu,
    "logsigmoid": _logsigmoid,
    "mish": _mish,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu6": _relu6,
    "relu_squared": _relu_squared,
    "selu": _selu,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "softplus": _softplus,
    "softshrink": _softshrink,
    "softsign": _softsign,
    "tanh": _tanh,
    "tanhshrink": _tanhshrink,
    "threshold": _threshold,
}

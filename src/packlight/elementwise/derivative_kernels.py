"""Derivatives of activations for Triton kernels, in fp32.

f'(x, a, b) for an x that is itself approximate, so the cheap forms serve every dtype: absolute
error below 1e-4, NaN and infinity as torch has them.
"""

import triton
import triton.language as tl

from packlight.elementwise.kernels import (
    P7_0,
    P7_1,
    P7_2,
    P7_3,
    P7_4,
    P7_5,
    P7_6,
    P7_7,
    divide,
    exp,
)

CHEAP = tl.constexpr(11)  # the digits for which the mathematics below is asked


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return divide(1.0, 1.0 + exp(-x, CHEAP), CHEAP)


@triton.jit
def _celu(x, alpha, _):
    return tl.where(x > 0, 1.0, exp(tl.where(x > 0, 0.0, x) * (1.0 / alpha), CHEAP)) + x * 0.0


@triton.jit
def _elu(x, alpha, _):
    return tl.where(x > 0, 1.0, alpha * exp(tl.where(x > 0, 0.0, x), CHEAP)) + x * 0.0


@triton.jit
def _selu(x, _a, _b):
    negative = 1.7580993408473766 * exp(tl.where(x > 0, 0.0, x), CHEAP)
    return tl.where(x > 0, 1.0507009873554805, negative) + x * 0.0


@triton.jit
def _gelu(x, _a, _b):
    # Phi(x) + x phi(x), with Phi(-t) = 2^P(t) as in the forward.
    t = tl.abs(x)
    p = tl.fma(t, P7_7, P7_6)
    p = tl.fma(t, p, P7_5)
    p = tl.fma(t, p, P7_4)
    p = tl.fma(t, p, P7_3)
    p = tl.fma(t, p, P7_2)
    p = tl.fma(t, p, P7_1)
    q = tl.exp2(tl.fma(t, p, P7_0))
    phi = 0.3989422804014327 * exp(-0.5 * x * x, CHEAP)
    return tl.fma(x, phi, tl.where(x > 0, 1.0 - q, q))


@triton.jit
def _gelu_tanh(x, _a, _b):
    # y = x s(2 u), u = c (x + k x^3): y' = s + x s (1 - s) 2 u'
    square = x * x
    s = sigmoid(x * tl.fma(square, 2.0 * 0.7978845608028654 * 0.044715, 2.0 * 0.7978845608028654))
    slope = tl.fma(square, 6.0 * 0.7978845608028654 * 0.044715, 2.0 * 0.7978845608028654)
    return tl.fma(x * s * (1.0 - s), slope, s)


@triton.jit
def _hardswish(x, _a, _b):
    inner = tl.fma(x, 1.0 / 3.0, 0.5)
    return tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 1.0, inner))


@triton.jit
def _logsigmoid(x, _a, _b):
    return sigmoid(-x)


@triton.jit
def _mish(x, _a, _b):
    # y' = t + x s (1 - t^2), and t = tanh(log(1 + w)) = 1 - 2 / ((1 + w)^2 + 1) at w = e^x.
    w = exp(tl.minimum(x, 30.0, propagate_nan=tl.PropagateNan.ALL), CHEAP) + 1.0
    t = 1.0 - divide(2.0, tl.fma(w, w, 1.0), CHEAP)
    return tl.fma(x * sigmoid(x), 1.0 - t * t, t)


@triton.jit
def _quick_gelu(x, _a, _b):
    s = sigmoid(1.702 * x)
    return tl.fma(x, 1.702 * s * (1.0 - s), s)  # 1.702 x may overflow, which times 0 is NaN


@triton.jit
def _relu(x, _a, _b):
    return tl.where(x <= 0, 0.0, 1.0) + x * 0.0


@triton.jit
def _relu_squared(x, _a, _b):
    return 2.0 * tl.where(x <= 0, 0.0, x)


@triton.jit
def _sigmoid(x, _a, _b):
    s = sigmoid(x)
    return s * (1.0 - s)


@triton.jit
def _silu(x, _a, _b):
    s = sigmoid(x)
    return tl.fma(x * s, 1.0 - s, s)


@triton.jit
def _softplus(x, beta, threshold):
    return tl.where(beta * x > threshold, 1.0, sigmoid(beta * x))


@triton.jit
def _softsign(x, _a, _b):
    r = divide(1.0, 1.0 + tl.abs(x), CHEAP)
    return r * r


@triton.jit
def _tanh(x, _a, _b):
    s = sigmoid(2.0 * x)
    return 4.0 * s * (1.0 - s)


@triton.jit
def _tanhshrink(x, _a, _b):
    s = sigmoid(2.0 * x)
    t = 2.0 * s - 1.0
    return t * t


DERIVATIVE = {
    "celu": _celu,
    "elu": _elu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hardswish": _hardswish,
    "logsigmoid": _logsigmoid,
    "mish": _mish,
    "quick_gelu": _quick_gelu,
    "relu": _relu,
    "relu_squared": _relu_squared,
    "selu": _selu,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "softplus": _softplus,
    "softsign": _softsign,
    "tanh": _tanh,
    "tanhshrink": _tanhshrink,
}

"""The inverted activations in plain PyTorch: what is true, on every device.

f'(f^-1(y)) comes from closed forms where there are any, else from the fits of `inverses.py` for y
of up to 24 digits. In float64 f is inverted: a table gives the neighbourhood, Newton's method the
digits.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.inverted.inverses import (
    INVERSES,
    fit_of,
    representable,
    significand_digits,
)
from packlight.packing import reference as packing
from packlight.packing.layout import compute_dtype, dense_stride, from_memory_order, memory_order

SELU_SCALE = 1.0507009873554805
SELU_SCALE_ALPHA = 1.7580993408473766
# torch multiplies by this float32 number, in float64 too.
ONE_SIXTH = 0.1666666716337204


def activation(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """y = f(x), bit-equal to torch's, and the packed bits "x is left of the minimum"."""
    row = INVERSES[name]
    assert row.minimum is not None, f"{name} is monotone and keeps no bits"
    y = row.function(x)
    flat = memory_order(x, y.stride())
    left = flat.to(compute_dtype(flat)) < row.minimum
    return y, packing.pack(left.to(torch.uint8), 1)


def activation_(x: Tensor, name: str) -> Tensor:
    """As `activation`, with the output written over `x`."""
    y, bits = activation(x, name)
    x.copy_(y)
    return bits


def backward(
    grad_output: Tensor, y: Tensor, bits: Tensor | None, name: str, parameters: Sequence[float]
) -> Tensor:
    """dx = dy * f'(f^-1(y, bit)), laid out as y."""
    stride = dense_stride(y)
    flat, flat_y = memory_order(grad_output, stride), memory_order(y, stride)
    left = None if bits is None else packing.unpack(bits, 1, flat.numel()).bool()
    slope = derivative(flat_y, left, name, parameters)
    product = flat.to(slope.dtype) * slope
    if INVERSES[name].select:
        product = torch.where(slope == 0, 0.0, product)
    return from_memory_order(product, grad_output.shape, stride, grad_output.dtype)


def derivative(y: Tensor, left: Tensor | None, name: str, parameters: Sequence[float]) -> Tensor:
    """f'(f^-1(y)) in the dtype of computation; `left` is the branch where there are two."""
    digits = significand_digits(y.dtype)
    if name in ("hardtanh", "relu6"):
        bounds = tuple(parameters) if name == "hardtanh" else (0.0, 6.0)
        parameters = representable(bounds, y.dtype)
    y = y.to(compute_dtype(y))
    if name in CLOSED:
        return CLOSED[name](y, *parameters)
    if name == "hardswish":
        assert left is not None
        return _hardswish(y, left, digits)
    if digits > 24:
        return _solved(y, left, name)
    if name == "tanhshrink":
        return _cube_root_fit(y, name, digits)
    assert left is not None
    return _square_root_fit(y, left, name, digits)


# --- Closed forms.


def _band(y: Tensor, low: float, high: float) -> Tensor:
    return (~((y <= low) | (y >= high))).to(y.dtype)


def _softplus(y: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(beta * y > threshold, 1.0, -torch.expm1(-beta * y))


CLOSED: dict[str, Callable[..., Tensor]] = {
    "celu": lambda y, alpha: torch.where(y > 0, 1.0, y / alpha + 1),
    "elu": lambda y, alpha: torch.where(y > 0, 1.0, y + alpha),
    "hardsigmoid": lambda y: ((y > 0) & (y < 1)).to(y.dtype) * ONE_SIXTH,
    "hardtanh": _band,
    "leaky_relu": lambda y, slope: torch.where(y > 0, torch.ones_like(y), slope),
    "logsigmoid": lambda y: -torch.expm1(y),
    "relu6": _band,
    "selu": lambda y: torch.where(y > 0, SELU_SCALE, y + SELU_SCALE_ALPHA),
    "softplus": _softplus,
    "softsign": lambda y: (1 - y.abs()).square(),
}


def _hardswish(y: Tensor, left: Tensor, digits: int) -> Tensor:
    """+-sqrt(2 (y + 3/8) / 3) where -3 < x < 3; 0 left of it, where y = 0, and 1 from 3 on.

    An eighth of a unit of y is added, so that the answer next to the minimum is the middle of what
    it can be, as in `inverses.py`. NaN on the left is from x = -inf, where torch's derivative is 0.
    """
    above = (y + 0.375) + 2.0 ** -(digits + 4)
    root = torch.sqrt(above.clamp(min=0) * (2 / 3))
    on_left = torch.where(y < 0, -root, 0.0)
    return torch.where(left, on_left, torch.where(y >= 3, 1.0, root))


# --- Fits.


def _polynomial(v: Tensor, coefficients: Sequence[float]) -> Tensor:
    result = torch.full_like(v, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = result * v + coefficient
    return result


def _square_root_fit(y: Tensor, left: Tensor, name: str, digits: int) -> Tensor:
    fit = fit_of(name, digits)
    high = torch.tensor(fit.floor, dtype=torch.float32, device="cpu").item()
    above = (y - high) - (fit.floor - high)
    square = above / fit.span
    if fit.logarithm is not None:
        a, b = fit.logarithm
        square = torch.where(left, above * (a * torch.log2(y.abs()) + b), square)
    v = torch.sqrt(square.clamp(0, 1)) - fit.center
    on_left = _polynomial(v, fit.left)
    if fit.logarithm is not None:
        on_left = on_left * y
    # Infinity becomes NaN, which torch's derivative is there.
    return torch.where(left, on_left, _polynomial(v, fit.right)) + y * 0


def _cube_root_fit(y: Tensor, name: str, digits: int) -> Tensor:
    fit = fit_of(name, digits)
    v = torch.exp2(torch.log2(y.abs() / fit.span) * (2 / 3)).clamp(max=1)
    return v * _polynomial(v - fit.center, fit.right)


# --- Newton's method, in float64.


class _Table(NamedTuple):
    """x and y of one branch, in the order of rising y, from the flat point outwards."""

    x: Tensor
    y: Tensor


END = 40.0  # past it f' is 1, or f is 0 to every digit


@functools.cache
def _table(name: str, left: bool) -> _Table:
    """Steps of 1% of the distance to the flat point near it, and of 0.01 further away."""
    start = INVERSES[name].minimum or 0.0
    near = torch.logspace(-9, 0, 2000, dtype=torch.float64, device="cpu")
    far = torch.linspace(1.0, END, 3900, dtype=torch.float64, device="cpu")[1:]
    distance = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), near, far])
    x = start - distance if left else start + distance
    # Where f is flat to its last digit the table is too; it only gives a neighbourhood.
    return _Table(x, _function(name, x).cummax(0).values)


GELU_TANH_SCALE = math.sqrt(8 / math.pi)


def _function(name: str, x: Tensor) -> Tensor:
    """f(x) with all its digits, where torch's formula loses some to cancellation."""
    if name == "gelu":
        tail: Tensor = torch.special.erfc(-x * math.sqrt(0.5))
        return x * tail / 2
    if name == "gelu_tanh":
        return x * torch.sigmoid(GELU_TANH_SCALE * (x + 0.044715 * x.pow(3)))
    if name == "tanhshrink":
        s = x.square()
        series = x * s * (1 / 3 - s * (2 / 15 - s * (17 / 315 - s * (62 / 2835))))
        return torch.where(x.abs() < 0.01, series, x - torch.tanh(x))
    return INVERSES[name].function(x)


def _slope(name: str, x: Tensor) -> Tensor:
    """f'(x)."""
    if name == "gelu":
        phi: Tensor = torch.special.ndtr(x)
        return phi + x * torch.exp(x.square() / -2) / math.sqrt(2 * math.pi)
    if name == "tanhshrink":
        return torch.tanh(x).square()
    if name == "mish":
        t = torch.tanh(F.softplus(x))
        return t + x * torch.sigmoid(x) * (1 - t.square())
    # x sigmoid(z(x))
    if name == "gelu_tanh":
        s = torch.sigmoid(GELU_TANH_SCALE * (x + 0.044715 * x.pow(3)))
        inner = GELU_TANH_SCALE * (1 + 3 * 0.044715 * x.square())
    else:
        rate = 1.702 if name == "quick_gelu" else 1.0
        s, inner = torch.sigmoid(rate * x), torch.full_like(x, rate)
    return s + x * s * (1 - s) * inner


def _solved(y: Tensor, left: Tensor | None, name: str) -> Tensor:
    """f' at the solution of f(x) = y, on the branch that `left` says."""
    if left is None:  # tanhshrink: f is odd and f' even
        return torch.where(y.isnan(), y, _solved_branch(y.abs(), name, False))
    return torch.where(left, _solved_branch(y, name, True), _solved_branch(y, name, False)) + y * 0


def _solved_branch(y: Tensor, name: str, left: bool) -> Tensor:
    """Newton's method for f(x* +- w^(1/m)) = y in w, in which f is nearly linear next to x*.

    m is the order of the flat point. The start, by interpolation, is good to 1e-4.
    """
    order = 3 if name == "tanhshrink" else 2
    table = _Table(*(tensor.to(y.device) for tensor in _table(name, left)))
    y = y.clamp(table.y[0], table.y[-1]).contiguous()
    above = torch.searchsorted(table.y, y).clamp(1, len(table.y) - 1)
    low, high = table.y[above - 1], table.y[above]
    part = ((y - low) / (high - low)).nan_to_num(0.0)
    start, sign = table.x[0], -1.0 if left else 1.0
    x = torch.lerp(table.x[above - 1], table.x[above], part)
    distance = (sign * (x - start)).clamp(min=1e-9)
    for _ in range(4):
        x = start + sign * distance
        miss = _function(name, x) - y
        step = miss * order * distance.pow(order - 1) / (sign * _slope(name, x))
        w = distance.pow(order) - step.nan_to_num(0.0, 0.0, 0.0)
        distance = w.clamp(min=1e-27).pow(1 / order)
    return _slope(name, start + sign * distance)

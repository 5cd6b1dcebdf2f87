"""Inverted activations as functions: torch.nn.functional's names and arguments.

Each computes what torch's function computes. What differs is what is kept for the backward pass:
the output y, the very tensor that is returned and that a following Linear or Conv keeps too, in
place of the input. The gradient is

    dx = dy * f'(f^-1(y)).

- **Monotone** functions (`elu`, `softplus`, `tanhshrink`, ...) keep nothing else.
- **Functions with one minimum** (`gelu`, `silu`, `mish`, ...) keep 1 bit an element besides: on
  which side of the minimum x lay.

Exact but for the rounding of y. Next to a minimum, where f' grows like a square root, half a unit
of y is worth up to 0.012 of f' in bfloat16, 0.005 in float16 and 6e-5 in float32: nobody who knows
y and the bit alone can do better in the worst case, and these stay within 1.5 times of it in 16
bits and below 1e-4 in float32. An output that is itself off by more than its rounding tells less:
2e-4 in float32, where torch's own forward is off by a unit or two.

The output must stay as it is until the backward pass: modified in place, it makes the backward
raise, as any saved tensor does. With `inplace=True` the output overwrites the input.

Where no gradient is asked for nothing is kept and the plain torch function runs. A second
derivative raises `DoubleBackwardError`. A non-finite input gives a NaN gradient where torch's is
not finite.

Errors: `InputError` for tensors that are not float32, bfloat16, float16 or float64, and for
parameters with which the output does not tell the derivative. Source: Novikov and Oseledets 2024,
arXiv 2407.15545.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import (
    autocast,
    check_inplace,
    check_numbers,
    check_tensor,
    needs_gradient,
    refuse_second_derivative,
)
from packlight.errors import InputError
from packlight.inverted import ops
from packlight.inverted.inverses import INVERSES

# log(1 + e^z) and z differ by less than e^-z, and so do their derivatives where y is the same.
SMALLEST_THRESHOLD = 10.0


class _InvertedActivation(torch.autograd.Function):
    """y = f(x) for a named activation; keeps y, and the bits of the branch where there are two."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, name: str, parameters: tuple[float, ...], inplace: bool
    ) -> Tensor:
        bits = None
        if INVERSES[name].minimum is None:
            y = _plain(x, name, parameters, inplace)
        elif inplace:
            bits = ops.activation_(x, name)
        else:
            y, bits = ops.activation(x, name)
        if inplace:
            ctx.mark_dirty(x)
            y = x  # by name: the compiler does not know that torch returned it
        ctx.save_for_backward(y, bits)
        ctx.function = (name, parameters)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative("its output")
        y, bits = ctx.saved_tensors
        return ops.backward(grad_output, y, bits, *ctx.function), None, None, None


# A typed name: torch leaves `apply` without annotations.
_activate: Callable[..., Tensor] = _torch.applied(_InvertedActivation)


def _plain(x: Tensor, name: str, parameters: tuple[float, ...], inplace: bool) -> Tensor:
    function = INVERSES[name].function
    return function(x, *parameters, inplace=True) if inplace else function(x, *parameters)


def _inverted(
    x: Tensor, name: str, parameters: tuple[float, ...] = (), inplace: bool = False
) -> Tensor:
    check_tensor(x, name)
    if not needs_gradient(x):
        return _plain(x, name, parameters, inplace)
    if inplace:
        check_inplace(x)
    else:
        x = autocast(x, name, lambda empty: _plain(empty, name, parameters, False))
    return _activate(x, name, parameters, inplace)


def _refuse(name: str, parameter: str, value: float, reason: str) -> None:
    raise InputError(
        f"{name}: with {parameter}={value} {reason}, so the output does not tell the derivative;"
        f" use packlight.fewbit.{name} or torch's own function"
    )


# --- Functions with one minimum: y and 1 bit an element.


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), or its tanh approximation. Keeps the output and 1 bit; exact to rounding.

    Raises `InputError` when `approximate` is neither "none" nor "tanh".
    """
    if approximate not in ("none", "tanh"):
        raise InputError(f'approximate={approximate!r} is neither "none" nor "tanh"')
    return _inverted(input, "gelu" if approximate == "none" else "gelu_tanh")


def hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6. Keeps the output and 1 bit an element; exact to rounding.

    At x = -3, where the derivative jumps, the gradient is 0, as to the left of it.
    """
    return _inverted(input, "hardswish", (), inplace)


def mish(input: Tensor, inplace: bool = False) -> Tensor:
    """x tanh(log(1 + e^x)). Keeps the output and 1 bit an element; exact to rounding."""
    return _inverted(input, "mish", (), inplace)


def quick_gelu(input: Tensor) -> Tensor:
    """x sigmoid(1.702 x), as in CLIP. Keeps the output and 1 bit an element; exact to rounding."""
    return _inverted(input, "quick_gelu")


def silu(input: Tensor, inplace: bool = False) -> Tensor:
    """x sigmoid(x), or swish. Keeps the output and 1 bit an element; exact to rounding."""
    return _inverted(input, "silu", (), inplace)


# --- Monotone functions: y alone.


def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1)). Keeps the output alone; exact to rounding."""
    check_numbers("celu", alpha=alpha)
    return _inverted(input, "celu", (alpha,), inplace)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x for x > 0, else alpha (e^x - 1). Keeps the output alone; exact to rounding.

    Raises `InputError` when alpha < 0: then two x give the same output.
    """
    check_numbers("elu", alpha=alpha)
    if alpha < 0:
        _refuse("elu", "alpha", alpha, "outputs left and right of 0 coincide")
    return _inverted(input, "elu", (alpha,), inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x + 3, 0), 6) / 6. Keeps the output alone; exact.

    Where rounding makes the output 0 or 1 within the last digit of +-3, the gradient is 0.
    """
    return _inverted(input, "hardsigmoid", (), inplace)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """min(max(x, min_val), max_val). Keeps the output alone; exact.

    An input equal to a bound as the dtype holds it counts as clipped, whichever way it was rounded.
    """
    check_numbers("hardtanh", min_val=min_val, max_val=max_val)
    if min_val > max_val:
        raise InputError(f"min_val={min_val} is above max_val={max_val}")
    return _inverted(input, "hardtanh", (min_val, max_val), inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x for x > 0, else negative_slope x. Keeps the output alone; exact.

    Raises `InputError` when negative_slope < 0: then two x give the same output.
    """
    check_numbers("leaky_relu", negative_slope=negative_slope)
    if negative_slope < 0:
        reason = "outputs left and right of 0 coincide"
        _refuse("leaky_relu", "negative_slope", negative_slope, reason)
    return _inverted(input, "leaky_relu", (negative_slope,), inplace)


def logsigmoid(input: Tensor) -> Tensor:
    """log(1 / (1 + e^-x)). Keeps the output alone; exact to rounding."""
    return _inverted(input, "logsigmoid")


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0). This is torch's own, which keeps the output alone; exact."""
    check_tensor(input, "relu")
    return F.relu(input, inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x, 0), 6). Keeps the output alone; exact."""
    return _inverted(input, "relu6", (), inplace)


def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """Self-normalising ELU (Klambauer et al., 2017). Keeps the output alone; exact to rounding."""
    return _inverted(input, "selu", (), inplace)


def sigmoid(input: Tensor) -> Tensor:
    """1 / (1 + e^-x). This is torch's own, which keeps the output alone; exact to rounding."""
    check_tensor(input, "sigmoid")
    return torch.sigmoid(input)


def softplus(input: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + e^(beta x)) / beta, and x where beta x > threshold. Keeps the output alone.

    Exact to rounding but within e^-threshold of the threshold, where outputs of the two pieces
    coincide and the gradient is off by up to e^-threshold. Raises `InputError` when that is much
    (threshold < 10) and when beta is 0.
    """
    check_numbers("softplus", beta=beta, threshold=threshold)
    if beta == 0:
        raise InputError("softplus: beta=0 gives an infinite output; take another beta")
    if threshold < SMALLEST_THRESHOLD:
        _refuse("softplus", "threshold", threshold, "outputs of the two pieces coincide")
    return _inverted(input, "softplus", (beta, threshold))


def softsign(input: Tensor) -> Tensor:
    """x / (1 + |x|). Keeps the output alone; exact to rounding."""
    return _inverted(input, "softsign")


def tanh(input: Tensor) -> Tensor:
    """Hyperbolic tangent. This is torch's own, which keeps the output alone; exact to rounding."""
    check_tensor(input, "tanh")
    return torch.tanh(input)


def tanhshrink(input: Tensor) -> Tensor:
    """x - tanh(x). Keeps the output alone; exact to rounding.

    Near 0 the difference has few digits left, in 16 bits a last digit of x: there f' < 0.02 is
    known to 0.004 only in bfloat16.
    """
    return _inverted(input, "tanhshrink")

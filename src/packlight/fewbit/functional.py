"""Few-bit activations as functions: torch.nn.functional's names and arguments, plus `bits`.

Each computes what torch's function computes. What differs is what is kept for the backward pass:
the packed k-bit code of the derivative, in place of the input's 16 or 32 bits an element. The
gradient is

    dx = dy * level[code(x)].

- **Continuous** activations (`gelu`, `silu`, ...) take `bits` (1 to 8) or a `codebook`, which sets
  the bits. Keeps `bits` bits an element. Biased: |dx - dy f'(x)| <= |dy| |f'(x) - level|, where the
  levels are the best `bits`-bit step function to f' (`fit_codebook`).
- **Exact** activations (`relu`, `hardtanh`, ...) have a step function for a derivative. They keep 1
  bit an element (`abs`: 2, since torch's gradient at 0 is 0) and return torch's gradient.

Where no gradient is asked for (`torch.no_grad`, an input that needs none) nothing is packed and the
plain torch function runs. A second derivative raises `DoubleBackwardError`. In `inplace=True` the
output overwrites the input, which nothing needs any more. A non-finite input at which torch's
derivative is not finite makes the whole gradient of that call NaN.

Errors: `InputError` for tensors that are not float32, bfloat16, float16 or float64, for `bits`
outside 1 to 8. Source: Novikov et al., ICML 2023, arXiv 2202.00441.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
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
from packlight._torch import constant_while_traced
from packlight._torch.hooks import unseen_by_hooks
from packlight.errors import InputError
from packlight.fewbit import ops
from packlight.fewbit.activations import (
    CONTINUOUS,
    EXACT,
    NAN,
    nonfinite_derivative,
)
from packlight.fewbit.codebook import (
    Codebook,
    Weighted,
    check_bits,
    check_codebook,
    default_codebook,
    why_of_another,
)
from packlight.packing.layout import dense_stride

DEFAULT_BITS = 3


class _Coding(NamedTuple):
    """What encodes and decodes one call: a codebook or the steps of an exact activation."""

    bits: int
    borders: tuple[float, ...]
    levels: tuple[float, ...]
    parity: str
    center: float
    poison: int
    mask: bool


@constant_while_traced
def _continuous_coding(
    name: str, parameters: tuple[float, ...], bits: int, codebook: Codebook | Weighted | None
) -> tuple[Any, ...]:
    return _look_up(name, parameters, bits, codebook)


@functools.lru_cache(maxsize=4096)  # on the path of every call
def _look_up(
    name: str, parameters: tuple[float, ...], bits: int, codebook: Codebook | Weighted | None
) -> tuple[Any, ...]:
    """As a plain tuple, which older versions of torch.compile can take as a constant."""
    # What autograd keeps while a book is solved is no business of hooks around the call.
    with unseen_by_hooks():
        if not isinstance(codebook, Codebook):
            codebook = default_codebook(name, bits, parameters, codebook)
        elif reason := of_another(codebook, name, parameters):
            raise InputError(f"the codebook is not of {name}: {reason}")
        return tuple(_of_codebook(codebook, _poison(name, parameters)))


def of_another(codebook: Codebook, name: str, parameters: tuple[float, ...]) -> str | None:
    """Why the codebook cannot be one of this function; None if it can be."""
    function = CONTINUOUS[name].function
    with _torch.with_values():
        return why_of_another(codebook, lambda x: function(x, *parameters))


def _poison(name: str, parameters: tuple[float, ...]) -> int:
    """At which inputs the derivative is not finite, with these parameters. NaN always counts."""
    row = CONTINUOUS[name]
    if parameters == tuple(row.parameters.values()):
        return row.poison
    with _torch.with_values():
        return NAN | nonfinite_derivative(lambda x: row.function(x, *parameters))


def _of_codebook(codebook: Codebook, poison: int) -> _Coding:
    symmetry = codebook.parity, codebook.center
    return _Coding(codebook.bits, codebook.short_borders, codebook.levels, *symmetry, poison, False)


def _exact_coding(name: str, parameters: tuple[float, ...]) -> _Coding:
    exact = EXACT[name]
    return _Coding(exact.bits, (), exact.levels(*parameters), "none", 0.0, 0, exact.mask)


class _Activation(torch.autograd.Function):
    """y = f(x) for a named activation; keeps the codes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        name: str,
        parameters: tuple[float, ...],
        inplace: bool,
        coding: tuple[Any, ...],
    ) -> Tensor:
        bits, borders, levels, parity, center, poison, mask = coding
        how = (bits, borders, parity, center, poison)
        ctx.is_relu = name == "relu"
        if inplace:
            codes = ops.activation_(x, name, parameters, *how)
            y = x
            ctx.mark_dirty(x)
            ctx.stride = dense_stride(x)
        else:
            y, codes = ops.activation(x, name, parameters, *how)
            ctx.stride = y.stride()
        ctx.save_for_backward(codes)
        ctx.decoding = (bits, levels, mask)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative()
        (codes,) = ctx.saved_tensors
        return ops.decode_backward(grad_output, codes, *ctx.decoding, ctx.stride), *[None] * 4


# Typed names: torch leaves `apply` without annotations.
_activate: Callable[..., Tensor] = _torch.applied(_Activation)


class _Custom(torch.autograd.Function):
    """y = f(x) for any elementwise callable; keeps the codes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], coding: tuple[Any, ...]
    ) -> Tensor:
        bits, borders, levels, parity, center, poison, mask = coding
        y = function(x)
        if y.shape != x.shape:
            raise InputError(
                f"the function turned shape {tuple(x.shape)} into {tuple(y.shape)};"
                " few-bit codes need an elementwise function"
            )
        ctx.stride = dense_stride(x)
        codes = ops.encode(x, bits, borders, parity, center, poison, ctx.stride)
        ctx.save_for_backward(codes)
        ctx.decoding = (bits, levels, mask)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative()
        (codes,) = ctx.saved_tensors
        return ops.decode_backward(grad_output, codes, *ctx.decoding, ctx.stride), None, None


_activate_custom: Callable[..., Tensor] = _torch.applied(_Custom)


def _plain(
    x: Tensor, function: Callable[..., Tensor], parameters: tuple[float, ...], inplace: bool
) -> Tensor:
    return function(x, *parameters, inplace=True) if inplace else function(x, *parameters)


def _continuous(
    x: Tensor,
    name: str,
    bits: int,
    codebook: Codebook | Weighted | None,
    parameters: tuple[float, ...] = (),
    inplace: bool = False,
) -> Tensor:
    check_tensor(x, name)
    check_numbers(name, **dict(zip(CONTINUOUS[name].parameters, parameters, strict=True)))
    if codebook is None or isinstance(codebook, Weighted):
        check_bits(bits)
    else:
        check_codebook(codebook)
    function = CONTINUOUS[name].function
    if not needs_gradient(x):
        return _plain(x, function, parameters, inplace)
    if inplace:
        check_inplace(x)
    if _torch.is_traced():
        # A float that took two values is a symbol to the compiler; hashed, it is a number again.
        parameters = tuple(next(iter({value})) for value in parameters)
    coding = _continuous_coding(name, parameters, bits, codebook)
    x = autocast(x, name, lambda empty: function(empty, *parameters))
    return _activate(x, name, parameters, inplace, coding)


def _exact(
    x: Tensor, name: str, parameters: tuple[float, ...] = (), inplace: bool = False
) -> Tensor:
    check_tensor(x, name)
    check_numbers(name, **{f"parameter {i + 1}": value for i, value in enumerate(parameters)})
    if not needs_gradient(x):
        return _plain(x, EXACT[name].function, parameters, inplace)
    if inplace:
        check_inplace(x)
    return _activate(x, name, parameters, inplace, tuple(_exact_coding(name, parameters)))


# --- Continuous activations.


def celu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    bits: int = DEFAULT_BITS,
    codebook: Codebook | None = None,
) -> Tensor:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1)). Keeps `bits` bits an element; biased."""
    return _continuous(input, "celu", bits, codebook, (alpha,), inplace)


def elu(
    input: Tensor,
    alpha: float = 1.0,
    inplace: bool = False,
    *,
    bits: int = DEFAULT_BITS,
    codebook: Codebook | None = None,
) -> Tensor:
    """x for x > 0, else alpha (e^x - 1). Keeps `bits` bits an element; biased."""
    return _continuous(input, "elu", bits, codebook, (alpha,), inplace)


def gelu(
    input: Tensor,
    approximate: str = "none",
    *,
    bits: int = DEFAULT_BITS,
    codebook: Codebook | None = None,
) -> Tensor:
    """x Phi(x), or its tanh approximation. Keeps `bits` bits an element; biased.

    Raises `InputError` when `approximate` is neither "none" nor "tanh".
    """
    if approximate not in ("none", "tanh"):
        raise InputError(f'approximate={approximate!r} is neither "none" nor "tanh"')
    return _continuous(input, "gelu" if approximate == "none" else "gelu_tanh", bits, codebook)


def hardswish(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = DEFAULT_BITS,
    codebook: Codebook | None = None,
) -> Tensor:
    """x min(max(x + 3, 0), 6) / 6. Keeps `bits` bits an element; biased."""
    return _continuous(input, "hardswish", bits, codebook, (), inplace)


def logsigmoid(
    input: Tensor, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None
) -> Tensor:
    """log(1 / (1 + e^-x)). Keeps `bits` bits an element; biased."""
    return _continuous(input, "logsigmoid", bits, codebook)


def mish(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = DEFAULT_BITS,
    codebook: Codebook | None = None,
) -> Tensor:
    """x tanh(log(1 + e^x)). Keeps `bits` bits an element; biased."""
    return _continuous(input, "mish", bits, codebook, (), inplace)


def quick_gelu(
    input: Tensor, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None
) -> Tensor:
    """x sigmoid(1.702 x), as in CLIP. Keeps `bits` bits an element; biased."""
    return _continuous(input, "quick_gelu", bits, codebook)


def relu_squared(
    input: Tensor, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None
) -> Tensor:
    """max(x, 0)^2, from Primer. Keeps `bits` bits an element; biased.

    Its derivative 2 max(x, 0) has no bound: past the codebook's domain (10 by default) the gradient
    stays at the last level. Fit a codebook to your own pre-activations if they go further.
    """
    return _continuous(input, "relu_squared", bits, codebook)


def selu(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = DEFAULT_BITS,
    codebook: Codebook | None = None,
) -> Tensor:
    """Self-normalising ELU (Klambauer et al., 2017). Keeps `bits` bits an element; biased."""
    return _continuous(input, "selu", bits, codebook, (), inplace)


def sigmoid(input: Tensor, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None) -> Tensor:
    """1 / (1 + e^-x). Keeps `bits` bits an element, where torch keeps the output; biased."""
    return _continuous(input, "sigmoid", bits, codebook)


def silu(
    input: Tensor,
    inplace: bool = False,
    *,
    bits: int = DEFAULT_BITS,
    codebook: Codebook | None = None,
) -> Tensor:
    """x sigmoid(x), also called swish. Keeps `bits` bits an element; biased."""
    return _continuous(input, "silu", bits, codebook, (), inplace)


def softplus(
    input: Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
    *,
    bits: int = DEFAULT_BITS,
    codebook: Codebook | None = None,
) -> Tensor:
    """log(1 + e^(beta x)) / beta, and x where beta x > threshold. Keeps `bits` bits; biased."""
    return _continuous(input, "softplus", bits, codebook, (beta, threshold))


def softsign(
    input: Tensor, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None
) -> Tensor:
    """x / (1 + |x|). Keeps `bits` bits an element; biased."""
    return _continuous(input, "softsign", bits, codebook)


def tanh(input: Tensor, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None) -> Tensor:
    """Hyperbolic tangent. Keeps `bits` bits an element, where torch keeps the output; biased."""
    return _continuous(input, "tanh", bits, codebook)


def tanhshrink(
    input: Tensor, *, bits: int = DEFAULT_BITS, codebook: Codebook | None = None
) -> Tensor:
    """x - tanh(x). Keeps `bits` bits an element; biased."""
    return _continuous(input, "tanhshrink", bits, codebook)


@dataclasses.dataclass(frozen=True)
class _CustomActivation:
    function: Callable[[Tensor], Tensor]
    coding: _Coding

    def __call__(self, input: Tensor) -> Tensor:
        check_tensor(input, "activation")
        if not needs_gradient(input):
            return self.function(input)
        x = autocast(input, None, self.function)
        return _activate_custom(x, self.function, tuple(self.coding))


def activation(f: Callable[[Tensor], Tensor], codebook: Codebook) -> Callable[[Tensor], Tensor]:
    """A function of one tensor that computes `f` and keeps codes of f' in place of what f keeps.

    `f` is any elementwise torch callable; `codebook` comes from `fit_codebook(f, bits)`. Keeps
    `codebook.bits` bits an element; biased. The forward runs `f` itself, the backward the few-bit
    kernel. `f` must have no parameters that need gradients: only its input gets one.
    """
    check_codebook(codebook)
    return _CustomActivation(f, _of_codebook(codebook, nonfinite_derivative(f)))


# --- Exact activations.


def abs(input: Tensor) -> Tensor:
    """|x|. Keeps 2 bits an element; exact, with torch's gradient 0 at 0."""
    return _exact(input, "abs")


def clamp(input: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """min(max(x, min), max), of which one bound may be None. Keeps 1 bit an element; exact.

    Bounds that are tensors or NaN are left to torch.
    """
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    known = all(isinstance(bound, (int, float)) and bound == bound for bound in (low, high))
    if not known or (min is None and max is None):
        return torch.clamp(input, min, max)
    return _exact(input, "clamp", (float(low), float(high)))


def clamp_min(input: Tensor, min: Any) -> Tensor:
    """max(x, min); see `clamp`."""
    return clamp(input, min=min)


def clamp_max(input: Tensor, max: Any) -> Tensor:
    """min(x, max); see `clamp`."""
    return clamp(input, max=max)


def hardshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """x where |x| > lambd, else 0. Keeps 1 bit an element; exact."""
    return _exact(input, "hardshrink", (lambd,))


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x + 3, 0), 6) / 6. Keeps 1 bit an element; exact."""
    return _exact(input, "hardsigmoid", (), inplace)


def hardtanh(
    input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    """min(max(x, min_val), max_val). Keeps 1 bit an element; exact."""
    check_numbers("hardtanh", min_val=min_val, max_val=max_val)
    if min_val > max_val:
        raise InputError(f"min_val={min_val} is above max_val={max_val}")
    return _exact(input, "hardtanh", (min_val, max_val), inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x for x > 0, else negative_slope x. Keeps 1 bit an element; exact."""
    return _exact(input, "leaky_relu", (negative_slope,), inplace)


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0). Keeps 1 bit an element, where torch keeps the output; exact."""
    return _exact(input, "relu", (), inplace)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """min(max(x, 0), 6). Keeps 1 bit an element; exact."""
    return _exact(input, "relu6", (), inplace)


def softshrink(input: Tensor, lambd: float = 0.5) -> Tensor:
    """x - lambd for x > lambd, x + lambd for x < -lambd, else 0. Keeps 1 bit; exact."""
    check_numbers("softshrink", lambd=lambd)
    if lambd < 0:
        raise InputError(f"lambd={lambd} is negative")
    return _exact(input, "softshrink", (lambd,))


def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """x for x > threshold, else value. Keeps 1 bit an element; exact."""
    return _exact(input, "threshold", (threshold, value), inplace)

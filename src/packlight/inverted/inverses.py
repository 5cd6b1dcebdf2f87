"""The table of inverted activations, and how f'(x) is found from y = f(x).

**Monotone functions** keep y alone. Most have a closed form: f' = 1 - e^(-beta y) for softplus. Of
tanhshrink, f' = tanh(x)^2 is smooth in v = (|y| / span)^(2/3), and f' / v is fitted by a
polynomial.

**Functions with one minimum (x*, y*)** keep one more bit, "x is left of x*". There f' grows like
the square root of y - y*, so that f' is smooth in

    v = sqrt(clamp((y - y0) / span, 0, 1))

on each branch, and is fitted by a polynomial on either. Towards infinity f' tends to 1, and counts
as 1 beyond y0 + span. y0 is y* but for a fraction of a rounding step: the values of x that round to
one y next to the minimum have a range of f', and y0 is where the square root comes nearest to the
middles of these ranges. The clamp catches y that rounding has put below y*, and a forward of
another library whose last digit differs: an unclamped root would be NaN there.

**Far left** y and f' vanish together, and f' = y (x + ...) with x ~ -sqrt(2 log(1 / -y)) for GELU
and x ~ log(-y) for the functions of sigmoid's kind: not smooth in v where y = 0. In 16 bits the
error of the polynomial there is below that of the rounding. In float32 the left branch takes
another variable, smooth at both ends,

    v = sqrt(kappa (y - y*) (c - log(y / y*))),

in which the quotient f' / y is fitted, so that small gradients keep their digits. kappa makes v = 1
at y = -1e-12, below which the quotient stays what it is.

All fits are minimax, by tools/fit_inverses.py, which writes fits.json; tests say how near they come
to what the rounding of y allows. In float64, `reference.py` inverts f by Newton's method.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.elementwise.functions import gelu_tanh, quick_gelu


@dataclasses.dataclass(frozen=True)
class Inverse:
    """An activation whose derivative is found from its output.

    `function` is torch's, called as `function(x, *parameters)`. `minimum` is x*, None for monotone
    functions. `select` says that torch's backward selects rather than multiplies: where f' is 0
    the gradient is 0 even if dy is infinite.
    """

    function: Callable[..., Tensor]
    minimum: float | None = None
    select: bool = False


INVERSES: dict[str, Inverse] = {
    "celu": Inverse(F.celu),
    "elu": Inverse(F.elu),
    "gelu": Inverse(F.gelu, minimum=-0.751791524693564),
    "gelu_tanh": Inverse(gelu_tanh, minimum=-0.752461422071016),
    "hardsigmoid": Inverse(F.hardsigmoid, select=True),
    # Flat at y = 0 below -3, so y = 0 on the left branch means f' = 0.
    "hardswish": Inverse(F.hardswish, minimum=-1.5),
    "hardtanh": Inverse(F.hardtanh, select=True),
    "leaky_relu": Inverse(F.leaky_relu),
    "logsigmoid": Inverse(F.logsigmoid),
    "mish": Inverse(F.mish, minimum=-1.192431214515495),
    "quick_gelu": Inverse(quick_gelu, minimum=-0.751154255441289),
    "relu6": Inverse(F.relu6, select=True),
    "selu": Inverse(F.selu),
    "silu": Inverse(F.silu, minimum=-1.278464542761074),
    "softplus": Inverse(F.softplus),
    "softsign": Inverse(F.softsign),
    "tanhshrink": Inverse(F.tanhshrink),
}


class Fit(NamedTuple):
    """Constants of one function at one precision; polynomials in v - center, from the constant up.

    With `logarithm` = (a, b), v^2 = (y - floor) (a log2(-y) + b) on the left, where the polynomial
    is that of f' / y. For tanhshrink `right` is the polynomial of f' / v.
    """

    floor: float
    span: float
    center: float
    logarithm: tuple[float, float] | None
    right: tuple[float, ...]
    left: tuple[float, ...]


def significand_digits(dtype: torch.dtype) -> int:
    """Significand bits of a floating dtype: 8, 11, 24 or 53."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


@functools.cache
def fit_of(name: str, digits: int) -> Fit:
    """The shipped constants of a fitted function, for y of 8, 11 or 24 significand bits."""
    row = _fits()[name][str(digits)]
    logarithm = (row["log"][0], row["log"][1]) if "log" in row else None
    shape = (row["floor"], row["span"], row["center"], logarithm)
    return Fit(*shape, tuple(row["right"]), tuple(row["left"]))


@functools.cache
def _fits() -> dict[str, dict[str, dict[str, Any]]]:
    file = importlib.resources.files("packlight.inverted") / "fits.json"
    fits: dict[str, dict[str, dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8"))
    return fits


def representable(values: tuple[float, ...], dtype: torch.dtype) -> list[float]:
    """Values as a tensor of `dtype` holds them: an output clipped at 0.6 is not 0.6 in bfloat16."""
    return torch.tensor(values, dtype=dtype, device="cpu").tolist()

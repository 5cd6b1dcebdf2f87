"""The table of activation functions: what each computes, and what its derivative asks to be kept.

Every function here is the plain torch operation, `function(x, *parameters)`; it is the truth that
references return and kernels are compared with. Two kinds:

- `Continuous`: the derivative takes a continuum of values; k-bit codes of it need a codebook.
- `Exact`: the derivative is a step function; the code of the step is all the gradient needs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from packlight.elementwise.functions import gelu_tanh, quick_gelu, relu_squared

# Inputs at which a derivative is not finite in torch. Codes cannot carry them, so a call that meets
# one raises a flag instead; see `functional.py`.
NAN = 1
NEGATIVE_INFINITY = 2
POSITIVE_INFINITY = 4
NON_FINITE = NAN | NEGATIVE_INFINITY | POSITIVE_INFINITY


def nonfinite_derivative(function: Callable[[Tensor], Tensor]) -> int:
    """At which of NaN, -inf and inf torch's derivative of `function` is not finite, as a mask."""
    values = [math.nan, -math.inf, math.inf]
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.tensor(values, dtype=torch.float64, device="cpu", requires_grad=True)
        (derivative,) = torch.autograd.grad(function(x).sum(), x)
    kinds = (NAN, NEGATIVE_INFINITY, POSITIVE_INFINITY)
    finite = derivative.isfinite().tolist()
    return sum(kind for kind, fine in zip(kinds, finite, strict=True) if not fine)


@dataclasses.dataclass(frozen=True)
class Continuous:
    """An activation whose derivative is coded with a codebook.

    `poison` says at which non-finite inputs torch's derivative is not finite.
    """

    function: Callable[..., Tensor]
    parameters: dict[str, float] = dataclasses.field(default_factory=dict)
    poison: int = NAN


@dataclasses.dataclass(frozen=True)
class Exact:
    """An activation whose derivative is `levels(*parameters)[code(x, *parameters)]`, exactly.

    `code` repeats the comparison that torch's own backward makes, so that ties and NaN fall on the
    same side. `mask` says that torch's backward selects rather than multiplies: where the level is
    0 the gradient is 0 even if dy is infinite. `rounds` names the devices on which torch rounds the
    parameters to the tensor's dtype before it compares.
    """

    function: Callable[..., Tensor]
    bits: int
    code: Callable[..., Tensor]
    levels: Callable[..., tuple[float, ...]]
    mask: bool = True
    rounds: tuple[str, ...] = ()

    def compared(self, parameters: Sequence[float], x: Tensor) -> list[float]:
        """The parameters as torch compares `x` with them."""
        if x.device.type not in self.rounds:
            return list(parameters)
        return [torch.tensor(value, dtype=x.dtype, device="cpu").item() for value in parameters]


CONTINUOUS: dict[str, Continuous] = {
    "celu": Continuous(F.celu, {"alpha": 1.0}),
    "elu": Continuous(F.elu, {"alpha": 1.0}),
    "gelu": Continuous(F.gelu, poison=NON_FINITE),
    "gelu_tanh": Continuous(gelu_tanh, poison=NON_FINITE),
    "hardswish": Continuous(F.hardswish),
    "logsigmoid": Continuous(F.logsigmoid),
    "mish": Continuous(F.mish, poison=NON_FINITE),
    "quick_gelu": Continuous(quick_gelu, poison=NON_FINITE),
    "relu_squared": Continuous(relu_squared, poison=NAN | POSITIVE_INFINITY),
    "selu": Continuous(F.selu),
    "sigmoid": Continuous(torch.sigmoid),
    "silu": Continuous(F.silu, poison=NON_FINITE),
    "softplus": Continuous(F.softplus, {"beta": 1.0, "threshold": 20.0}),
    "softsign": Continuous(F.softsign, poison=NON_FINITE),
    "tanh": Continuous(torch.tanh),
    "tanhshrink": Continuous(F.tanhshrink),
}


EVERYWHERE = ("cpu", "cuda")

# torch multiplies by this float32 number, in float64 too.
ONE_SIXTH = float(np.float32(1 / 6))


def _band(x: Tensor, low: float, high: float) -> Tensor:
    return (x >= low) & (x <= high)


def _zero_one(*parameters: float) -> tuple[float, ...]:
    return (0.0, 1.0)


EXACT: dict[str, Exact] = {
    # torch's gradient of |x| at 0 is 0: three values, so two bits.
    "abs": Exact(
        torch.abs,
        2,
        lambda x: torch.sign(x).nan_to_num() + 1,
        lambda: (-1.0, 0.0, 1.0),
        mask=False,
    ),
    # Unlike hardtanh's, the derivative is 1 at the bounds themselves.
    "clamp": Exact(torch.clamp, 1, _band, _zero_one, rounds=EVERYWHERE),
    "hardshrink": Exact(
        F.hardshrink, 1, lambda x, lambd: ~_band(x, -lambd, lambd), _zero_one, rounds=EVERYWHERE
    ),
    "hardsigmoid": Exact(F.hardsigmoid, 1, lambda x: (x > -3) & (x < 3), lambda: (0.0, ONE_SIXTH)),
    "hardtanh": Exact(F.hardtanh, 1, lambda x, low, high: ~((x <= low) | (x >= high)), _zero_one),
    "leaky_relu": Exact(
        F.leaky_relu, 1, lambda x, slope: x > 0, lambda slope: (slope, 1.0), mask=False
    ),
    "relu": Exact(F.relu, 1, lambda x: ~(x <= 0), _zero_one),
    "relu6": Exact(F.relu6, 1, lambda x: ~((x <= 0) | (x >= 6)), _zero_one),
    "softshrink": Exact(
        F.softshrink, 1, lambda x, lambd: ~_band(x, -lambd, lambd), _zero_one, rounds=EVERYWHERE
    ),
    "threshold": Exact(
        F.threshold, 1, lambda x, threshold, value: ~(x <= threshold), _zero_one, rounds=("cuda",)
    ),
}

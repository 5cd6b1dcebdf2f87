"""Which values a pack holds in place of those far off, so that these spoil no neighbour in a group.

The step of a group is as wide as its values lie apart: one mask of -3e38 would leave nothing of the
others. An activation does not tell what lies beyond a limit from the limit, so its pack holds that.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The greatest bfloat16 number. Scales are of that dtype, and values may come back in it.
GREATEST = 255 * 2.0**120

# Where an exponential is below 1e-5: no gradient of a packed value is as good as that.
_FAR = 12.0


class Limits(NamedTuple):
    """The range of a pack, and what it holds for values at infinity.

    `below` stands for what is at most -edge, `above` for what is at least edge: NaN, which spoils
    the group, where torch's derivative is not finite either. Where they lie within the range, the
    derivative is that at infinity and the function is not, which the pack says of the group.
    """

    lowest: float
    highest: float
    below: float = math.nan
    above: float = math.nan
    edge: float = math.inf


class _Side(NamedTuple):
    """One side of an activation: the limit of finite values, and what stands for infinity.

    From `constant` on the derivative is constant, also where the function is not.
    """

    limit: float = math.inf
    infinite: float = math.nan
    constant: float = math.inf


def _flat(limit: float) -> _Side:
    """Function and derivative are constant beyond."""
    return _Side(limit, limit, limit)


def _straight(infinite: float) -> _Side:
    """The derivative is constant beyond, the function is not: a finite value may be asked for."""
    return _Side(math.inf, infinite, infinite)


def _gate(limit: float) -> tuple[_Side, _Side]:
    """0 on one side and the identity on the other; torch's derivative at infinity is NaN."""
    return _Side(limit, constant=limit), _Side(constant=limit)


# torch's derivative at infinity is NaN.
_NAN = _Side()


def _elu(alpha: float) -> tuple[_Side, _Side]:
    return _flat(_FAR + math.log(max(alpha, 1.0))), _straight(8.0)


def _celu(alpha: float) -> tuple[_Side, _Side]:
    return (_flat(_FAR * alpha), _straight(8.0)) if alpha > 0 else (_NAN, _NAN)


def _softplus(beta: float, threshold: float) -> tuple[_Side, _Side]:
    if beta <= 0:
        return _NAN, _NAN
    return _flat(max(_FAR, -threshold) / beta), _straight(_FAR / beta)


# The side of negative values, by their magnitudes, and that of positive ones.
_SIDES: dict[str, Callable[..., tuple[_Side, _Side]]] = {
    "celu": _celu,
    "elu": _elu,
    "erf": lambda: (_flat(4.5), _flat(4.5)),
    "gelu": lambda: _gate(5.0),
    "gelu_tanh": lambda: _gate(5.0),
    "hardswish": lambda: (_Side(3.25, 3.125, 3.25), _straight(8.0)),  # itself NaN at -inf
    "logsigmoid": lambda: (_straight(_FAR), _flat(_FAR)),
    "mish": lambda: _gate(14.5),
    "quick_gelu": lambda: _gate(8.5),
    "relu": lambda: (_flat(0.0), _straight(1.0)),
    "relu_squared": lambda: (_flat(0.0), _NAN),
    "selu": lambda: (_flat(13.0), _straight(8.0)),
    "sigmoid": lambda: (_flat(_FAR), _flat(_FAR)),
    "silu": lambda: _gate(14.5),
    "softplus": _softplus,
    "softsign": lambda: (_Side(256.0), _Side(256.0)),  # 1 / 257 from 1
    "tanh": lambda: (_flat(6.5), _flat(6.5)),
    "tanhshrink": lambda: (_straight(6.5), _straight(6.5)),
}


# Of codes of up to 4 bits, whose steps are wider than what is left of f' beyond: .012 at -3. The
# weight gradient behind a GELU of normal inputs errs by a tenth less for it.
_COARSE = {"gelu": -3.0, "gelu_tanh": -3.0}
_COARSE_BITS = 4


def pack_limits(
    dtype: torch.dtype, name: str = "", parameters: Sequence[float] = (), bits: int = 8
) -> Limits:
    """`limits`, and a nearer one where codes are too few to tell it from them."""
    return _coarse(limits(dtype, name, parameters), name, bits)


def _coarse(within: Limits, name: str, bits: int) -> Limits:
    if name in _COARSE and bits <= _COARSE_BITS:
        return within._replace(lowest=_COARSE[name])
    return within


def limits(dtype: torch.dtype, name: str = "", parameters: Sequence[float] = ()) -> Limits:
    """Those of tensors of this dtype, or of what an activation reads by its name.

    What lies between the greatest bfloat16 number and the greatest float32 or float64 number comes
    back as the former. In float16 the scales hold -65280 for the least number, -65504.
    """
    lowest, highest = -GREATEST, GREATEST
    if dtype == torch.float16:
        lowest, highest = -65280.0, 65504.0
    if not name:
        return Limits(lowest, highest)
    negative, positive = _SIDES[name](*parameters)
    edge = math.inf
    if name == "gelu_tanh" and dtype != torch.float16:
        # Where x^2 overflows torch's derivative is NaN.
        edge = math.sqrt(torch.finfo(torch.promote_types(dtype, torch.float32)).max)
    # Subtracted, which makes no -0 of 0.
    lowest, below = max(lowest, 0.0 - negative.limit), 0.0 - negative.infinite
    return Limits(lowest, min(highest, positive.limit), below, positive.infinite, edge)


def unmarked_limits(
    dtype: torch.dtype, name: str, parameters: Sequence[float] = (), bits: int = 8
) -> Limits:
    """As `pack_limits`, for a pack that cannot say of a group that its function is not finite.

    It holds NaN at infinity, unless the function is flat there.
    """
    given = pack_limits(dtype, name, parameters, bits)
    below = given.below if given.below == given.lowest else math.nan
    above = given.above if given.above == given.highest else math.nan
    return given._replace(below=below, above=above)


def derivative_limits(
    dtype: torch.dtype, name: str, parameters: Sequence[float] = (), bits: int = 8
) -> Limits:
    """Those of tensors of which an activation's derivative is all that is read.

    A finite value is never taken for infinite: where x^2 overflows torch's derivative of the tanh
    GELU is NaN, and that of the limit is right.
    """
    lowest, highest, *_ = limits(dtype)
    negative, positive = _SIDES[name](*parameters)
    within = Limits(
        max(lowest, 0.0 - negative.constant),
        min(highest, positive.constant),
        0.0 - negative.infinite,
        positive.infinite,
    )
    return _coarse(within, name, bits)


def within(x: Tensor, limits: Limits) -> Tensor:
    """`x` in this range, with what the limits hold for values at infinity."""
    y = x.clamp(limits.lowest, limits.highest)
    if limits.below != limits.lowest:
        y.masked_fill_(x <= -limits.edge, limits.below)
    if limits.above != limits.highest:
        y.masked_fill_(x >= limits.edge, limits.above)
    return y

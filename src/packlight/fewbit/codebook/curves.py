"""Functions of a NumPy array: f', by autograd or as a user gives it."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from packlight.errors import InputError

Array: TypeAlias = npt.NDArray[np.float64]
Curve: TypeAlias = Callable[[Array], Array]


def _tensor(x: Array) -> torch.Tensor:
    # A copy, since f may write in place; from_numpy, since torch.tensor follows a default device.
    return torch.from_numpy(np.array(x, dtype=np.float64).reshape(-1))


def values_of(f: Callable[[torch.Tensor], torch.Tensor], x: Array) -> Array:
    with torch.no_grad():
        return np.asarray(f(_tensor(x)).numpy(), dtype=np.float64).reshape(np.shape(x))


def by_autograd(f: Callable[[torch.Tensor], torch.Tensor]) -> Curve:
    def slope(x: Array) -> Array:
        # A layer may be built, and its book solved, under inference_mode or no_grad.
        with torch.inference_mode(False), torch.enable_grad():
            leaf = _tensor(x).requires_grad_()
            value = f(leaf)
            if value.shape != leaf.shape:
                raise InputError(
                    f"{f!r} turned shape {tuple(leaf.shape)} into {tuple(value.shape)}; few-bit"
                    " codes need an elementwise function"
                )
            if not value.requires_grad:
                raise InputError(f"autograd finds no derivative of {f!r}: pass `derivative`")
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return np.asarray(gradient.numpy()).reshape(np.shape(x))

    return slope


def on_arrays(derivative: Callable[[Any], Any]) -> Curve:
    """A NumPy function of a user's derivative, which may be one of tensors."""

    def slope(x: Array) -> Array:
        flat = np.array(x, dtype=np.float64).reshape(-1)
        try:
            value = derivative(flat)
        except (TypeError, AttributeError):
            value = derivative(_tensor(flat))
        # A constant derivative may come back as one number.
        return np.broadcast_to(array(value), flat.shape).reshape(np.shape(x)).copy()

    return slope


def checked_slope(slope: Curve) -> Curve:
    def checked(x: Array) -> Array:
        value = slope(x)
        if not np.isfinite(value).all():
            where = x[~np.isfinite(value)][0]
            raise InputError(
                f"the derivative is {value[~np.isfinite(value)][0]} at x = {where:g}; it must be "
                "finite on the whole domain: choose a domain that leaves this point out"
            )
        return value

    return checked


def shifted(curve: Curve, center: float) -> Curve:
    """The curve as a function of t = x - c."""
    return (lambda t: curve(center + t)) if center else curve


def array(values: Any) -> Array:
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    return np.asarray(values, dtype=np.float64)

"""The weight w(x) of the error, as `fit_codebook` takes it."""

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from packlight.errors import InputError
from packlight.fewbit.codebook.curves import Array, Curve, array
from packlight.fewbit.codebook.table import check_choice

Weight: TypeAlias = str | tuple[Any, Any] | Curve | npt.ArrayLike | torch.Tensor


def weight_of(weight: Weight, domain: tuple[float, float] | None) -> tuple[Curve, Array]:
    """w as a checked function, and the points at which it jumps."""
    nowhere = np.empty(0)
    if isinstance(weight, str):
        check_choice("weight", weight, ("uniform",))
        return np.ones_like, nowhere
    if callable(weight):
        return _checked_weight(weight), nowhere
    if isinstance(weight, tuple) and len(weight) == 2:
        if isinstance(weight[0], str):
            return _normal(*weight), nowhere
        return _histogram(array(weight[0]), array(weight[1]))
    return _histogram(*_binned(array(weight), domain))


def plain_weight(weight: Weight) -> str | tuple[Any, Any]:
    """The weight as texts and numbers alone, which compare and can be written; samples as counts.

    Raises `InputError` for a function, which cannot, and for what `weight_of` refuses.
    """
    if callable(weight):
        raise InputError(
            f"weight={weight!r} is a function, and a method has plain values alone: give a "
            "histogram or samples, or codebook=fit_codebook(f, bits, weight=...)"
        )
    weight_of(weight, None)
    if isinstance(weight, str):
        return weight
    if not (isinstance(weight, tuple) and len(weight) == 2):
        weight = _binned(array(weight), None)
    elif isinstance(weight[0], str):
        return weight[0], float(weight[1])
    counts, edges = (tuple(array(values).tolist()) for values in weight)
    return counts, edges


def _checked_weight(weight: Curve) -> Curve:
    def checked(x: Array) -> Array:
        value = np.broadcast_to(np.asarray(weight(x), dtype=np.float64), np.shape(x))
        if bad := x[~(np.isfinite(value) & (value >= 0))].tolist():
            raise InputError(
                f"weight(x) is negative or not finite at x = {bad[0]:g}; w is a density: clip or "
                "mask it there"
            )
        return value

    return checked


def _normal(name: str, sigma: Any) -> Curve:
    check_choice("weight", name, ("normal",))
    if not (isinstance(sigma, int | float) and 0 < sigma < math.inf):
        raise InputError(f"weight=('normal', {sigma!r}): expected a positive standard deviation")
    return lambda x: np.exp(-0.5 * (x / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def _binned(samples: Array, domain: tuple[float, float] | None) -> tuple[Array, Array]:
    """A histogram whose bins hold equally many samples: fine where they crowd, and outliers cost
    one bin rather than the resolution of all."""
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise InputError(
            f"weight: samples of shape {samples.shape}; expected a 1-D array of finite numbers: "
            "flatten it and drop what is not finite"
        )
    if domain is not None:
        samples = samples[(samples >= domain[0]) & (samples <= domain[1])]
    if len(np.unique(samples)) < 2:
        raise InputError(
            "weight: fewer than two distinct samples inside the domain: pass more, or widen it"
        )
    bins = min(256, math.isqrt(len(samples)))
    counts, edges = np.histogram(
        samples, np.unique(np.quantile(samples, np.linspace(0, 1, bins + 1)))
    )
    return counts.astype(np.float64), edges


def _histogram(counts: Array, edges: Array) -> tuple[Curve, Array]:
    if counts.ndim != 1 or edges.shape != (len(counts) + 1,) or not len(counts):
        raise InputError(
            f"weight: counts of shape {counts.shape} with edges of shape {edges.shape}; expected n "
            "counts and n + 1 edges, as numpy.histogram returns"
        )
    if not (np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
        raise InputError("weight: histogram edges must be finite and increasing: sort them")
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise InputError(
            "weight: histogram counts must be finite, not negative, and not all zero: recount"
        )
    density = np.concatenate(([0.0], counts / counts.sum() / np.diff(edges), [0.0]))
    return lambda x: density[np.searchsorted(edges, x, side="right")], edges


def fold(density: Curve) -> Curve:
    return lambda x: density(x) + density(-x)

"""Operations whose backward pass needs a side, a sign or a shape, and not the values.

Each gets numbers in place of the saved tensor for which its backward pass computes the very same,
at no bit, one or two an element. A quantised tensor would give it values on the wrong side: near 0
its error is larger than the value, and the gradient of a ReLU flips there.

What needs the values on one side of 0 only (PReLU, an ELU with a jump) gets a pack of that side,
and a bit.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node

from packlight.saving import graph
from packlight.saving.kept import Exact, Holder, Kept, Mask, OneSided, Side, Sign, Zeros

_aten = torch.ops.aten


def operation_of(node: str) -> str:
    """The operation that a node is named after: "ReluBackward0" is "Relu"."""
    stem, found, _ = node.rpartition("Backward")
    return stem if found else node


def node_of(function: str) -> str:
    """The node that is named after a torch function: "leaky_relu_" gives "LeakyReluBackward0"."""
    parts = function.strip("_").split("_")
    return "".join(part.capitalize() for part in parts) + "Backward0"


def is_known_by_name(node: str) -> bool:
    """Whether what an operation needs can be told without its node, which has its limits."""
    operation = operation_of(node)
    if operation in ("Prelu", "Elu") or compares(operation):
        return False
    return operation not in _SIDES or operation in ("Relu", "LeakyRelu")


# ---- one side of a threshold: x, node -> mask, number where it is set, number elsewhere ----------


def _flows(derivative: Tensor) -> Tensor:
    """Where a gradient of 1 comes through; torch's own backward says, in its own arithmetic."""
    return derivative != 0


def _relu(x: Tensor, node: Node | None) -> tuple[Tensor, float, float]:
    return x <= 0, 0.0, 1.0  # a NaN is not


def _above_zero(x: Tensor, node: Node | None) -> tuple[Tensor, float, float]:
    return x > 0, 1.0, -1.0


def _threshold(x: Tensor, node: Node | None) -> tuple[Tensor, float, float]:
    limit = graph.saved_number(node, "threshold")
    flows = _flows(_aten.threshold_backward(x.new_ones(()).expand_as(x), x, limit))
    return flows, math.inf, -math.inf


def _hardtanh(x: Tensor, node: Node | None) -> tuple[Tensor, float, float]:
    low, high = graph.saved_number(node, "min_val"), graph.saved_number(node, "max_val")
    flows = _flows(_aten.hardtanh_backward(x.new_ones(()).expand_as(x), x, low, high))
    return flows, (low + high) / 2, math.inf


def _hardsigmoid(x: Tensor, node: Node | None) -> tuple[Tensor, float, float]:
    return _flows(_aten.hardsigmoid_backward(x.new_ones(()).expand_as(x), x)), 0.0, math.inf


def _hardshrink(x: Tensor, node: Node | None) -> tuple[Tensor, float, float]:
    width = graph.saved_number(node, "lambd")
    flows = _flows(_aten.hardshrink_backward(x.new_ones(()).expand_as(x), x, width))
    return flows, math.inf, 0.0


def _softshrink(x: Tensor, node: Node | None) -> tuple[Tensor, float, float]:
    width = graph.saved_number(node, "lambd")
    flows = _flows(_aten.softshrink_backward(x.new_ones(()).expand_as(x), x, width))
    return flows, math.inf, 0.0


def _clamp(x: Tensor, node: Node | None) -> tuple[Tensor, float, float]:
    low, high = graph.saved_number(node, "min"), graph.saved_number(node, "max")
    if low is None:
        return x <= high, -math.inf, math.inf
    if high is None:
        return x >= low, math.inf, -math.inf
    return (x >= low) & (x <= high), (low + high) / 2, math.inf


def _finite(x: Tensor, node: Node | None) -> tuple[Tensor, float, float]:
    return x.isfinite(), 0.0, math.inf


_SIDES: dict[str, Callable[[Tensor, Node | None], tuple[Tensor, float, float]]] = {
    "Relu": _relu,
    "LeakyRelu": _above_zero,
    "RreluWithNoise": _above_zero,
    "RreluWithNoiseFunctional": _above_zero,
    "Threshold": _threshold,
    "Hardtanh": _hardtanh,  # and ReLU6
    "Hardsigmoid": _hardsigmoid,
    "Hardshrink": _hardshrink,
    "Softshrink": _softshrink,
    "Clamp": _clamp,
    "ClampMin": _clamp,
    "ClampMax": _clamp,
    "NanToNum": _finite,
}
_SIDED_SLOTS = ("self", "result")  # the random slopes of an RReLU are a further one

# Their backward pass looks at the shape of its input alone: indices say the rest.
_SHAPE_ONLY = frozenset(
    [
        *(f"{kind}Pool{dims}D" for kind in ("Avg", "AdaptiveAvg") for dims in (2, 3)),
        *(f"{kind}MaxPool{dims}D" for kind in ("Adaptive", "Fractional") for dims in (2, 3)),
        *(f"MaxPool{dims}DWithIndices" for dims in (2, 3)),
        *(f"{kind}Pad{dims}D" for kind in ("Reflection", "Replication") for dims in (1, 2, 3)),
        *("Cummax", "Cummin", "Gather", "MaskedSelect", "Take"),
    ]
)


def without_values(operation: str, slot: str, x: Tensor, node: Node | None) -> Kept | None:
    """What stands for a saved tensor of which no value is needed; None where values are."""
    if operation in _SHAPE_ONLY and slot == "self":
        return Zeros.like(x)
    if operation == "Abs":
        return Sign(Mask.of(x > 0), Mask.of(x < 0), x.dtype)
    side = _SIDES.get(operation)
    if side is None or slot not in _SIDED_SLOTS:
        return None
    mask, where, elsewhere = side(x, node)
    return Side(Mask.of(mask), where, elsewhere, x.dtype)


# ---- values of one side --------------------------------------------------------------------------


def needs_one_side(operation: str, slot: str, node: Node | None) -> bool:
    """Whether the values at and below 0 are needed, and that a value is above 0."""
    if slot not in _SIDED_SLOTS:
        return False
    if operation == "PreluKernel":
        return True
    # An ELU whose derivative jumps at 0, as that of a SELU does.
    scales = [graph.saved_number(node, name) for name in ("alpha", "input_scale")]
    return operation == "Elu" and None not in scales and math.prod(scales) != 1


def one_side(x: Tensor, pack: Callable[[Tensor], Kept | None]) -> Kept | None:
    """What stands for a tensor of which one side is needed; None if `pack` packs it not."""
    values = pack(x.clamp(max=0))
    return None if values is None else OneSided(values, Mask.of(x <= 0), 0.0, 1.0)


# ---- comparisons of two saved tensors ------------------------------------------------------------

_LARGER = ("Maximum", "Minimum")  # of self and other, elementwise
_EXTREME = ("Amax", "Amin", "Max", "Min", "Median", "Nanmedian")  # elements that equal the result


def compares(operation: str) -> bool:
    """Whether the backward pass compares two tensors that it saved."""
    return operation in (*_LARGER, *_EXTREME)


def comparison(node: Node, held: Mapping[str, Holder]) -> dict[str, Kept]:
    """What stands for the two tensors, by slot; empty where they are to stay as they are.

    One of them becomes zeros, and the other what compares with zeros alike.
    """
    operation = operation_of(node.name())
    slots = ("self", "other") if operation in _LARGER else ("self", "result")
    kept = [held[slot].kept for slot in slots if slot in held]
    exact = [one for one in kept if isinstance(one, Exact) and one.is_unchanged()]
    if len(exact) < 2:
        return {}
    x, y = (one.tensor for one in exact)
    stand_in: Kept
    if operation in _LARGER:
        if torch.broadcast_shapes(x.shape, y.shape) not in (x.shape, y.shape):
            return {}  # signs of all pairs may be more than the two tensors
        stand_in = Sign(Mask.of(x > y), Mask.of(x < y), x.dtype)
    else:
        if not graph.saved_number(node, "keepdim"):
            for dim in sorted(dim % x.dim() for dim in graph.saved_dims(node)):
                y = y.unsqueeze(dim)
        stand_in = Side(Mask.of(x == y), 0.0, 1.0, x.dtype)
    return {slots[0]: stand_in, slots[1]: Zeros.like(exact[1].tensor)}

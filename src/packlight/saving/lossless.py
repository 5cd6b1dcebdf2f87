"""Operations whose backward pass needs a side, a sign or a shape, and not the values.

Each gets other numbers in place of the saved tensor, with which its backward pass computes the same
result. They take no bit, one bit or two bits an element. A quantised tensor would have values on
the wrong side: near 0 its error is larger than the value, and there the gradient of a ReLU flips.

An operation that needs the values on one side of 0 only (PReLU, an ELU with a jump) gets a pack of
that side, and a bit.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import Node

from packlight._torch import graph
from packlight.saving.kept import Exact, Holder, Kept, Mask, OneSided, Side, Sign, Zeros


def operation_of(node: str) -> str:
    """The operation of a node, by the name of the node: "ReluBackward0" gives "Relu"."""
    stem, found, _ = node.rpartition("Backward")
    return stem if found else node


def node_of(function: str) -> str:
    """The name of the node of a torch function: "leaky_relu_" gives "LeakyReluBackward0"."""
    parts = function.strip("_").split("_")
    return "".join(part.capitalize() for part in parts) + "Backward0"


def is_known_by_name(node: str) -> bool:
    """Whether the needs of an operation follow from its name; limits stand in the node alone."""
    operation = operation_of(node)
    return operation not in (*_AT_LIMITS, *_LARGER, *_EXTREME, "Prelu", "Elu")


# ---- one side of a threshold ---------------------------------------------------------------------

# A mask, the number where it is set, and the number elsewhere.
_Sides = tuple[Tensor, float, float]


def _relu(x: Tensor) -> _Sides:
    return x <= 0, 0.0, 1.0  # a NaN is not


def _leaky(x: Tensor) -> _Sides:
    return x > 0, 1.0, -1.0


_AT_ZERO = {
    "Relu": _relu,
    "LeakyRelu": _leaky,
    "RreluWithNoise": _leaky,
    "RreluWithNoiseFunctional": _leaky,
}


def _clamp(node: Node) -> tuple[float, float]:
    low, high = graph.saved_number(node, "min"), graph.saved_number(node, "max")
    if low is None or high is None:
        return (math.inf, -math.inf) if high is None else (-math.inf, math.inf)
    return (low + high) / 2, math.inf


def _hardtanh(node: Node) -> tuple[float, float]:
    low, high = graph.saved_number(node, "min_val"), graph.saved_number(node, "max_val")
    return (low + high) / 2, math.inf


# A number for which the gradient passes, and a number for which it does not.
_AT_LIMITS: dict[str, Callable[[Node], tuple[float, float]]] = {
    "Threshold": lambda node: (math.inf, -math.inf),
    "Hardtanh": _hardtanh,  # and ReLU6
    "Hardsigmoid": lambda node: (0.0, math.inf),
    "Hardshrink": lambda node: (math.inf, 0.0),
    "Softshrink": lambda node: (math.inf, 0.0),
    "Clamp": _clamp,
    "ClampMin": _clamp,
    "ClampMax": _clamp,
    "NanToNum": lambda node: (0.0, math.inf),
}


def _sides(operation: str, x: Tensor, node: Node | None) -> _Sides | None:
    if operation in _AT_ZERO:
        return _AT_ZERO[operation](x)
    # The node itself says where a gradient passes: how limits are rounded differs by operation,
    # dtype and release.
    gradient = None if node is None else graph.gradient(node, x.new_ones(()).expand_as(x))
    if node is None or gradient is None:
        return None
    return gradient != 0, *_AT_LIMITS[operation](node)


_SIDED_SLOTS = ("self", "result")  # the random slopes of an RReLU have another name

# Operations whose backward pass needs only the shape of the input: indices say the rest.
_SHAPE_ONLY = frozenset(
    [
        *(f"{kind}Pool{dims}D" for kind in ("Avg", "AdaptiveAvg") for dims in (2, 3)),
        *(f"{kind}MaxPool{dims}D" for kind in ("Adaptive", "Fractional") for dims in (2, 3)),
        *(f"MaxPool{dims}DWithIndices" for dims in (2, 3)),
        *(f"{kind}Pad{dims}D" for kind in ("Reflection", "Replication") for dims in (1, 2, 3)),
        *("Cummax", "Cummin", "Gather", "MaskedSelect", "Take"),
    ]
)


def needs_no_values(operation: str, slot: str, node: Node | None) -> bool:
    """Whether the backward pass needs no values of the tensor that a node saves as `slot`."""
    if operation in _SHAPE_ONLY or operation == "Abs":
        return slot == "self"
    limits_are_numbers = not any(graph.saves_tensor(node, limit) for limit in ("min", "max"))
    sided = operation in _AT_ZERO or (operation in _AT_LIMITS and limits_are_numbers)
    return sided and slot in _SIDED_SLOTS


def without_values(operation: str, x: Tensor, node: Node | None) -> Kept | None:
    """What stands for a tensor whose values are not needed; None if torch does not say."""
    if operation in _SHAPE_ONLY:
        return Zeros.like(x)
    if operation == "Abs":
        return Sign(Mask.of(x > 0), Mask.of(x < 0), x.dtype)
    sides = _sides(operation, x, node)
    if sides is None:
        return None
    mask, where, elsewhere = sides
    return Side(Mask.of(mask), where, elsewhere, x.dtype)


# ---- values of one side --------------------------------------------------------------------------


def needs_one_side(operation: str, slot: str, node: Node | None) -> bool:
    """Whether the backward pass needs values at and below 0, and of others that they are above."""
    if slot not in _SIDED_SLOTS:
        return False
    if operation == "PreluKernel":
        return True
    # An ELU whose derivative jumps at 0, as the derivative of a SELU does.
    scales = [graph.saved_number(node, name) for name in ("alpha", "input_scale")]
    return operation == "Elu" and None not in scales and math.prod(scales) != 1


def one_side(x: Tensor, pack: Callable[[Tensor], Kept | None]) -> Kept | None:
    """What stands for a tensor of which one side is needed; None if `pack` returns None."""
    values = pack(x.clamp(max=0))
    not_positive = (x > 0).logical_not_()  # True for a NaN, which comes back as NaN
    return None if values is None else OneSided(values, Mask.of(not_positive), 0.0, 1.0)


# ---- comparisons of two saved tensors ------------------------------------------------------------

_LARGER = ("Maximum", "Minimum")  # of self and other, elementwise
_EXTREME = ("Amax", "Amin", "Max", "Min", "Median", "Nanmedian")  # elements that equal the result


COMPARED = (*_LARGER, *_EXTREME)


def compares(operation: str) -> bool:
    """Whether the backward pass compares two tensors that it saved."""
    return operation in COMPARED


def comparison(node: Node, held: Mapping[str, Holder]) -> dict[str, Kept]:
    """What stands for the two tensors, by slot; empty if they stay as they are.

    One becomes zeros; the other becomes numbers that compare with zeros in the same way.
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
            return {}  # the signs of all pairs may take more memory than the two tensors
        stand_in = Sign(Mask.of(x > y), Mask.of(x < y), x.dtype)
    else:
        if not graph.saved_number(node, "keepdim"):
            for dim in sorted(dim % x.dim() for dim in graph.saved_dims(node)):
                y = y.unsqueeze(dim)
        stand_in = Side(Mask.of(x == y), 0.0, 1.0, x.dtype)
    return {slots[0]: stand_in, slots[1]: Zeros.like(exact[1].tensor)}

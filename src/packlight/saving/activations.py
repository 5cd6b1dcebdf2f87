"""Inputs of activations, which are clamped before they are packed.

The derivative is constant beyond limits, so values beyond them are clamped: a mask of -3e38 would
leave its neighbours in a group no step (`elementwise/limits.py`). Such a pack serves no other
reader, and a pack that another reader made is not clamped.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import Node

from packlight._torch import graph
from packlight.elementwise.limits import derivative_limits, within

Parameters = tuple[float, ...]


def _elu(node: Node) -> tuple[str, Parameters]:
    names = ("alpha", "scale", "input_scale")
    alpha, scale, within = (graph.saved_number(node, name) for name in names)
    # The table has exponentials of x itself; no function of torch scales x.
    return ("elu", (alpha * scale,)) if within == 1 else ("", ())


def _gelu(node: Node) -> tuple[str, Parameters]:
    return ("gelu_tanh" if graph.saved_number(node, "approximate") == "tanh" else "gelu"), ()


def _softplus(node: Node) -> tuple[str, Parameters]:
    beta, threshold = (graph.saved_number(node, name) for name in ("beta", "threshold"))
    return "softplus", (beta, threshold)


# The activation of `limits.py` whose derivative a node computes from its input.
_ACTIVATIONS: dict[str, Callable[[Node], tuple[str, Parameters]]] = {
    "Celu": lambda node: ("celu", (graph.saved_number(node, "alpha"),)),
    "Elu": _elu,
    "Erf": lambda node: ("erf", ()),
    "Erfc": lambda node: ("erf", ()),
    "Gelu": _gelu,
    "Glu": lambda node: ("sigmoid", ()),
    "Hardswish": lambda node: ("hardswish", ()),
    "LogSigmoid": lambda node: ("logsigmoid", ()),
    "Mish": lambda node: ("mish", ()),
    "Silu": lambda node: ("silu", ()),
    "Softplus": _softplus,
}


def within_limits(
    operation: str, slot: str, node: Node | None, bits: int
) -> Callable[[Tensor], Tensor] | None:
    """A function that clamps the input of an activation and keeps its derivative, to so many bits.

    None for other tensors.
    """
    if node is not None and slot == "result" and operation in ("Elu", "Celu"):
        # In place. For results above 0 the derivative is constant, and there is no jump at 0.
        alpha = graph.saved_number(node, "alpha")
        return None if not alpha or alpha < 0 else lambda x: x.clamp(max=alpha)
    if node is None or slot != "self" or operation not in _ACTIVATIONS:
        return None
    name, parameters = _ACTIVATIONS[operation](node)
    if not name or None in parameters:
        return None
    if operation != "Glu":
        return lambda x: _limited(x, name, parameters, bits)
    (dim,) = graph.saved_dims(node)

    def halves(x: Tensor) -> Tensor:
        if x.shape[dim] % 2:
            return x  # repeated elements are there only once
        linear, gate = x.chunk(2, dim)
        return torch.cat([linear, _limited(gate, name, parameters, bits)], dim)

    return halves


def _limited(x: Tensor, name: str, parameters: Parameters, bits: int) -> Tensor:
    return within(x, derivative_limits(x.dtype, name, parameters, bits))

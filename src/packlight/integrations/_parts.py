"""Known layers whose parts run as one function: where they may.

Each part must be what a conversion has made of it, in training, and a call of it must be a call of
its forward alone. Everywhere else the layer's own code runs, part by part.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from packlight._checks import is_taken
from packlight.calls import is_bare
from packlight.groupquant import modules
from packlight.groupquant.modules import Linear
from packlight.integrations._activations import GroupQuantActivation
from packlight.layers.activations import gelu_name
from packlight.quantiser import Quantiser, worth_packing


def parameters_of(
    parts: Sequence[nn.Module], method: Quantiser
) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weight [out, in] and bias of each part; None unless all are linear and train by this method.

    The weight of a layer that `is_transposed_linear` is a view.
    """
    found: list[tuple[Tensor, Tensor | None]] = []
    if not torch.is_grad_enabled():
        return None
    for part in parts:
        transposed = getattr(type(part), "is_transposed_linear", False)
        if not (transposed or isinstance(part, Linear)) or not part.training or not is_bare(part):
            return None
        weight: Any = part.weight
        if not weight.requires_grad or part.method != method:
            return None
        found.append((weight.t() if transposed else weight, cast("Tensor | None", part.bias)))
    return found


def function_of_part(part: nn.Module, method: Quantiser) -> str | None:
    """What an activation computes; None unless it is one of ours that trains by this method."""
    if isinstance(part, modules.GELU):
        function = gelu_name(part.approximate)
    elif isinstance(part, GroupQuantActivation):
        function = part.packed_function
    else:
        return None
    return function if part.training and is_bare(part) and part.method == method else None


def takes(x: Tensor, method: Quantiser) -> bool:
    """Whether functions of several layers take the input: rows that are worth a pack."""
    return x.dim() > 1 and is_taken(x) and worth_packing(x, method)


def are_idle(*modules: nn.Module | None) -> bool:
    """Whether modules hand on what they are given, as those that a setting left out do."""
    for module in modules:
        if type(module) is nn.Identity:
            continue
        if not isinstance(module, nn.Dropout) or (module.p and module.training):
            return False
    return is_bare(*modules)  # type: ignore[arg-type]

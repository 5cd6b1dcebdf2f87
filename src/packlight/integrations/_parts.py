"""Known layers whose parts run as one function: where they may.

Each part must be what a conversion has made of it, in training, and a call of it must be a call of
its forward alone. Everywhere else the layer's own code runs, part by part.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from packlight._checks import is_taken, needs_gradient
from packlight.calls import is_bare
from packlight.groupquant.modules import Linear
from packlight.quantiser import Quantiser, worth_packing


def parameters_of(
    parts: Sequence[nn.Module], method: Quantiser
) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weight and bias of each part; None unless all are Linears that train by this method."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for part in parts:
        if not isinstance(part, Linear) or not part.training or not is_bare(part):
            return None
        weight = part.weight
        if not needs_gradient(weight) or part.method != method:
            return None
        found.append((weight, part.bias))
    return found


def takes(x: Tensor, method: Quantiser) -> bool:
    """Whether functions of several layers take the input: rows that are worth a pack."""
    return x.dim() > 1 and is_taken(x) and worth_packing(x, method)

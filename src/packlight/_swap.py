"""What a conversion does to one module: another class and some attributes, and how to undo it.

What is needed to undo it stays on the module as a plain attribute, so it is copied, pickled and
saved with the module, and is in no `state_dict`.
"""

import dataclasses
from typing import Any

from torch import nn

from packlight.method import Method, Swap

_ATTRIBUTE = "_packlight_former"


@dataclasses.dataclass
class Former:
    """What a module was, and what it became."""

    kind: type[nn.Module]
    values: dict[str, Any]  # of the attributes that the swap replaced or removed
    swap: Swap
    methods: tuple[Method, ...]


def former(module: nn.Module) -> Former | None:
    """What the module was before a conversion; None for one that is not converted."""
    found: Former | None = vars(module).get(_ATTRIBUTE)
    return found


def convert(module: nn.Module, swap: Swap, *methods: Method) -> bool:
    """Gives a module its other class, from what it was; whether it changed."""
    was = former(module)
    put_back = any(name in vars(module) for name in swap.removed)
    if was is not None and (was.swap, was.methods) == (swap, methods) and not put_back:
        return False  # what the layer has learnt of its weights stays
    restore(module)
    present = vars(module)
    named = (*swap.attributes, *swap.removed)
    values = {name: present.pop(name) for name in named if name in present}
    present.update(swap.attributes)
    present[_ATTRIBUTE] = Former(type(module), values, swap, methods)
    module.__class__ = swap.kind
    return True


def restore(module: nn.Module) -> bool:
    """Gives a module back what it was; whether it was converted."""
    was = former(module)
    if was is None:
        return False
    present = vars(module)
    for name in (*was.swap.attributes, _ATTRIBUTE):
        present.pop(name, None)
    present.update(was.values)
    module.__class__ = was.kind
    return True


def plain(module: nn.Module) -> nn.Module:
    """The module as it was before a conversion, sharing all that it holds: to look at, only."""
    was = former(module)
    if was is None:
        return module
    view = object.__new__(type(module))
    vars(view).update(vars(module))
    restore(view)
    return view

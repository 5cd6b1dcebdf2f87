"""What a conversion does to one module: another class and some attributes, and how to undo it.

What is needed to undo it stays on the module as a plain attribute, so it is copied, pickled and
saved with the module, and is in no `state_dict`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import nn

from packlight._torch.attributes import slots
from packlight.method import Method, Swap, the_one

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


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a conversion has put on a module; nothing if its class was changed since."""
    was, present = former(module), vars(module)
    if was is None or type(module) is not was.swap.kind:
        return {}
    names = (*was.swap.attributes, _ATTRIBUTE)
    return {name: present[name] for name in names if name in present}


def copied(
    made: Any, ours: dict[str, Any], derived: Callable[[type[nn.Module], type[nn.Module]], Any]
) -> Any:
    """A copy of a converted module, converted too, with the `attributes` of that module.

    The code of its class has made it, as an instance of the plain class, perhaps of one that was
    made for this copy alone. `derived(kind, plain)` is the class as which such a copy is converted.
    """
    was: Former = ours[_ATTRIBUTE]
    kind = type(made)
    if kind is not was.swap.kind:
        if (kind.__module__, kind.__qualname__) != (was.kind.__module__, was.kind.__qualname__):
            return made  # something else, as its class will have it
        swap = was.swap._replace(kind=derived(was.swap.kind, kind))
        was = dataclasses.replace(was, kind=kind, swap=swap)
    vars(made).update({**ours, _ATTRIBUTE: was})
    made.__class__ = was.swap.kind
    return made


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
    present.update({name: the_one(value) for name, value in swap.attributes.items()})
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
    for slot, value in slots(module):
        slot.__set__(view, value)
    restore(view)
    return view

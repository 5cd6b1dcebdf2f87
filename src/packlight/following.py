"""What comes into a converted model later: adapters, and forwards of Liger's.

Adapters of PEFT that are put into a converted model are converted as the model was. A forward that
Liger-Kernel puts on a converted layer runs in place of ours, and is warned of.
"""

import sys
import warnings
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from packlight import _swap, integrations
from packlight.assignment import Assignment, first_few
from packlight.head.modules import Head, heads_of
from packlight.quantiser import before_first_pack
from packlight.recompute.modules import Tiled
from packlight.report.names import condensed
from packlight.saving.rest import Rest
from packlight.selectors import Layer, Methods, Selector, layers_of


class _Given(NamedTuple):
    """How a module's model was converted."""

    methods: Methods
    functional: bool
    rest: Rest | None
    names: tuple[str, ...]
    selector: Selector | None
    adapts: bool  # whether it is an adapter, or part of one


# Not on the modules: methods may be given by functions, which neither copy nor pickle.
_followed: "weakref.WeakKeyDictionary[nn.Module, _Given]" = weakref.WeakKeyDictionary()
_following: list[Any] = []  # the handle of our hook, once there is one


def follow(
    layers: list[Layer],
    assignment: Assignment,
    methods: Methods,
    functional: bool,
    rest: Rest | None,
) -> None:
    """Remembers how modules were converted, for the adapters that come into them."""
    adapters = tuple(f"{layer.names[0]}." for layer in layers if _adapts(layer.module))
    for layer in layers:
        if layer.module in assignment.in_tiles or isinstance(layer.module, Tiled):
            continue  # adapters in there stay as they are too
        name = layer.names[0]
        inside = _adapts(layer.module) or name.startswith(adapters)
        inside = inside and "base_layer" not in name.split(".")
        given = (layer.names, assignment.selected.get(layer.module), inside)
        _followed[layer.module] = _Given(methods, functional, rest, *given)
    if _warn_of_patches not in before_first_pack:
        before_first_pack.append(_warn_of_patches)
    if not _following:
        _following.append(register_module_module_registration_hook(_on_registration))


def _adapts(module: nn.Module) -> bool:
    """Whether this is a layer of PEFT around another layer."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def _on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Converts an adapter that is put into a converted model, or a further one into an adapter."""
    if torch.compiler.is_compiling():
        return  # code that sets a module is traced, and would be guarded by all that is followed
    given = _followed.get(parent)
    if given is None or module is None or module in _followed:
        return
    if not (given.adapts or _adapts(module)):
        return
    integrations.load()
    adapted = _followed.get(parent._modules.get(name) or parent)
    selector = given.selector if adapted is None else adapted.selector
    layers = [
        layer._replace(
            names=tuple(_joined(first, name, last) for first in given.names for last in layer.names)
        )
        for layer in layers_of(module)
        if layer.module not in _followed  # the adapted layer, which stays as it is
    ]
    assignment = Assignment(given.methods)
    for layer in layers:
        assignment.add(layer, selector)
    if given.functional or given.rest is not None:
        assignment.cover_calls(layers, given.functional, given.rest, None)
    assignment.carry_out()
    follow(layers, assignment, given.methods, given.functional, given.rest)


def is_patched(module: nn.Module) -> bool:
    """Whether a converted module has been given a forward of Liger's since, which runs instead.

    Or a model whose head is converted: no head is where Liger's forward passes it by.
    """
    forward = vars(module).get("forward")
    if not (getattr(forward, "__module__", None) or "").startswith("liger_kernel."):
        return False
    return _swap.former(module) is not None or any(
        isinstance(head, Head) for head in heads_of(module)
    )


def _warn_of_patches() -> None:
    """Says which converted layers keep what Liger's keep."""
    patched = (given.names[0] for module, given in _followed.items() if is_patched(module))
    names = list(dict.fromkeys(patched))  # those of models before that are not collected yet once
    if names:
        warnings.warn(
            f"Liger-Kernel was applied to {len(names)} layers after packlight.convert"
            f" ({first_few(condensed(names))}): they run Liger's code and keep what it keeps; move"
            " packlight.convert(model, ...) behind the line that applies Liger-Kernel to the model",
            stacklevel=2,
        )


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


def forget(model: nn.Module) -> None:
    """What comes into the model from here on stays as it is."""
    for module in model.modules():
        _followed.pop(module, None)

"""Known layers whose parts run as one function: where they may.

Each part must be what a conversion has made of it, in training, and a call of it must be a call of
its forward alone. Everywhere else the layer's own code runs, part by part.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch, _tracer
from packlight._checks import is_taken
from packlight._checks import takes as is_traced_taken
from packlight.calls import are_bare, is_bare
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
    if not torch.is_grad_enabled():
        return None
    if torch.compiler.is_dynamo_compiling():  # one question: there are many things to look at
        transposed: Sequence[bool] | None = _torch.ask("are_linear", None, method, *parts)
        if transposed is not None:
            pairs = zip(parts, transposed, strict=False)
            return [_parameters(part, turned) for part, turned in pairs] or None
    found: list[tuple[Tensor, Tensor | None]] = []
    for part in parts:
        kind = type(part)
        if not _is_linear(kind) or not part.training or not is_bare(part):
            return None
        weight, bias = _parameters(part, _is_transposed(kind))
        own: Any = part.method
        if not weight.requires_grad or (own is not method and own != method):
            return None
        found.append((weight, bias))
    return found or None


def _parameters(part: nn.Module, is_transposed: bool) -> tuple[Tensor, Tensor | None]:
    weight = parameter_of(part, "weight")
    return weight.t() if is_transposed else weight, parameter_of(part, "bias")


def parameter_of(part: nn.Module, name: str) -> Any:
    """`getattr(part, name)`: torch looks for a parameter when it has looked everywhere else."""
    if torch.compiler.is_dynamo_compiling():
        return getattr(part, name)
    own = part._parameters
    return own[name] if name in own else getattr(part, name)


def _is_transposed(kind: type) -> bool:
    return getattr(kind, "is_transposed_linear", False)


def _is_linear(kind: type) -> bool:
    return issubclass(kind, Linear) or _is_transposed(kind)


@_torch.question
def are_linear(tracer: Any, method: Any, *parts: Any) -> tuple[bool, ...] | None:
    """Whether the weight of each part is transposed, nothing unless all train by this method.

    None where that is not known.
    """
    wanted = _torch.value_of(tracer, method)
    for part in parts:
        if not _is_linear(type(part.value)):
            return ()
        own = _torch.own_constant(tracer, part, "method")
        if own is _torch.UNKNOWN or wanted is None:
            return None
        if not _trains(tracer, part):
            return ()
        weight = _torch.attribute_of(tracer, part, "weight")
        if not _tracer.fake_of(weight.realize()).requires_grad:
            return ()
        if own != wanted:
            return ()
    return tuple(_is_transposed(type(part.value)) for part in parts)


def _trains(tracer: Any, part: Any) -> bool:
    """Whether a traced module trains, and a call of it is one of its forward."""
    return _torch.flag_of(tracer, part, "training") and are_bare(tracer, part)


def function_of_part(part: nn.Module, method: Quantiser) -> str | None:
    """What an activation computes; None unless it is one of ours that trains by this method."""
    function: str | None = None
    if torch.compiler.is_dynamo_compiling():
        function = _torch.ask("known_function", None, method, part)
        if function is not None:
            return function or None
    if isinstance(part, modules.GELU):
        function = gelu_name(part.approximate)
    elif isinstance(part, GroupQuantActivation):
        function = part.packed_function
    else:
        return None
    return function if part.training and is_bare(part) and part.method == method else None


@_torch.question
def known_function(tracer: Any, method: Any, part: Any) -> str | None:
    """`function_of_part` of what is traced, "" for none; None where that is not known."""
    kind = type(part.value)
    if not issubclass(kind, (modules.GELU, GroupQuantActivation)):
        return ""
    wanted, own = _torch.value_of(tracer, method), _torch.own_constant(tracer, part, "method")
    if own is _torch.UNKNOWN or wanted is None:
        return None
    if own != wanted or not _trains(tracer, part):
        return ""
    of_torch = issubclass(kind, modules.GELU)
    name = _torch.attribute_of(tracer, part, "approximate" if of_torch else "packed_function")
    found: str = name.as_python_constant()
    return gelu_name(found) if of_torch else found


def takes(x: Tensor, method: Quantiser) -> bool:
    """Whether functions of several layers take the input: rows that are worth a pack."""
    found: bool | None = None
    if torch.compiler.is_dynamo_compiling():
        found = _torch.ask("takes_rows", None, x, method)
    return x.dim() > 1 and is_taken(x) and worth_packing(x, method) if found is None else found


@_torch.question
def takes_rows(tracer: Any, x: Any, method: Any) -> bool | None:
    """`takes` of what is traced; None where that is not known."""
    own, fake = _torch.value_of(tracer, method), _tracer.fake_of(x)
    if own is None:
        return None
    return bool(fake.dim() > 1 and is_traced_taken(tracer, x) and worth_packing(fake, own))


def are_idle(*modules: nn.Module | None) -> bool:
    """Whether modules hand on what they are given, as those that a setting left out do."""
    for module in modules:
        if type(module) is nn.Identity:
            continue
        if not isinstance(module, nn.Dropout) or (module.p and module.training):
            return False
    return is_bare(*modules)  # type: ignore[arg-type]

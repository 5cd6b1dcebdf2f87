"""What the tracer of torch.compile knows of a tensor, as constants of the compiled code."""

from typing import Any

import torch
from torch import Tensor

from packlight._library import constant_while_traced

# Of the graph that is traced: by node, the tensor that it was computed of, and how.
_SOURCES = "_packlight_sources"

# What it told when it was asked last, while a region is traced.
told: dict[str, Any] = {}


def traceable(func: Any) -> Any:
    """A torch function that a traced `TorchFunctionMode` was given, such that it can call it."""
    # The method calls `super()`, which the tracer of 2.13 cannot follow from within a mode.
    return torch.unflatten if func is Tensor.unflatten else func


@constant_while_traced
def fact(name: str) -> Any:
    """What the tracer told, as a constant of the compiled code."""
    return told[name]


def version(tensor: Tensor) -> int:
    """How often the traced tensor was modified in place."""
    _ask(tensor)
    found: int = fact("version")
    return found


def takes_notes(tensor: Tensor) -> bool:
    """Whether the tracer follows the attributes of the traced tensor."""
    _ask(tensor)
    found: bool = fact("takes_notes")
    return found


def may_be_detached(tensor: Tensor) -> bool:
    """Whether the traced tensor, a result of this region and no view, can lose its history."""
    _ask(tensor)
    found: bool = fact("may_be_detached")
    return found


def are_one(a: Tensor, b: Tensor) -> bool:
    """Whether two traced tensors are one variable of the compiled code."""
    from torch._dynamo.comptime import comptime

    comptime(_compare)
    found: bool = fact("are_one")
    return found


def apart(tensor: Tensor, *others: Tensor) -> Tensor:
    """The traced tensor, and where it is one of the others an alias.

    A Function takes no tensor twice: the tracer of 2.13 refuses it, that of 2.11 loses a gradient.
    """
    for other in others:
        if are_one(tensor, other):
            return tensor.view_as(tensor)
    return tensor


def note_source(tensor: Tensor, source: Tensor, how: str) -> None:
    """Has the tracer know that the traced tensor was computed of `source` alone, and how."""
    from torch._dynamo.comptime import comptime

    comptime(_keep_source)


def source_of(tensor: Tensor, how: str, other: Tensor) -> Tensor | None:
    """The source noted of the traced tensor, if it was computed so and nothing has read either.

    What is computed of the source in place of the tensor leaves the compiled code nothing that uses
    the tensor, which is not computed then. The source may not be `other`.
    """
    from torch._dynamo.comptime import comptime

    source = None
    comptime(_find_source)
    return source


def _compare(context: Any) -> None:
    a, b = (context.get_local(name).as_proxy().node for name in ("a", "b"))
    told["are_one"] = a is b


def _sources(context: Any) -> dict[Any, Any]:
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    found: dict[Any, Any] = vars(tracer.output).setdefault(_SOURCES, {})
    return found


def _keep_source(context: Any) -> None:
    tensor, source = context.get_local("tensor"), context.get_local("source")
    tracker = source._i_will_not_complain_if_bc_breaks_VariableTracker()
    how = context.get_local("how").as_python_constant()
    versions = tensor.as_fake()._version, source.as_fake()._version
    _sources(context)[tensor.as_proxy().node] = tracker, how, versions


def _find_source(context: Any) -> None:
    """Puts the source of the local `tensor` into the local `source`."""
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    tensor, how = context.get_local("tensor"), context.get_local("how").as_python_constant()
    node = tensor.as_proxy().node
    tracker, noted, versions = _sources(context).get(node, (None, None, None))
    # In the body of a checkpoint, what is outside is an input.
    if tracker is None or noted != how or node.graph is not tracer.output.current_tracer.graph:
        return
    source = tracker.as_proxy().node
    now = tensor.as_fake()._version, source.meta["example_value"]._version
    read = _readers(node) or _readers(source) - {node.args[0]}  # one of the results of a function
    if versions == now and not read and context.get_local("other").as_proxy().node is not source:
        tracer.symbolic_locals["source"] = tracker


def _readers(node: Any) -> set[Any]:
    """What uses the node, but for aliases that carry notes."""
    return {user for user in node.users if user.target != "detach"}


def _ask(tensor: Tensor) -> None:
    from torch._dynamo.comptime import comptime  # an import of a second, so only here

    comptime(_answer)


def _answer(context: Any) -> None:
    from torch._dynamo.variables.base import is_side_effect_safe

    variable = context.get_local("tensor")
    fake, is_input = variable.as_fake(), variable.as_proxy().node.op == "placeholder"
    # The tracer follows attributes of some tensors only: not those of one of several outputs, nor,
    # in the body of a checkpoint, those of a tensor from outside.
    mutation = variable._i_will_not_complain_if_bc_breaks_VariableTracker().mutation_type
    told["version"] = fake._version
    told["takes_notes"] = not is_input and mutation is not None and is_side_effect_safe(mutation)
    told["may_be_detached"] = not is_input and not fake._is_view()

"""What the tracer of torch.compile knows of a tensor, as constants of the compiled code."""

from typing import Any

from torch import Tensor

from packlight._library import constant_while_traced

_SOURCE = "packlight_source"  # in what the tracer knows of a node of its graph

# What it told of the tensor that was asked for last, while a region is traced.
_told: dict[str, Any] = {}


def version(tensor: Tensor) -> int:
    """How often the traced tensor was modified in place."""
    _ask(tensor)
    found: int = _fact("version")
    return found


def takes_notes(tensor: Tensor) -> bool:
    """Whether the tracer follows the attributes of the traced tensor."""
    _ask(tensor)
    found: bool = _fact("takes_notes")
    return found


def may_be_detached(tensor: Tensor) -> bool:
    """Whether the traced tensor, a result of this region and no view, can lose its history."""
    _ask(tensor)
    found: bool = _fact("may_be_detached")
    return found


def note_source(tensor: Tensor, source: Tensor) -> None:
    """Has the tracer know that the traced tensor was computed of `source` alone."""
    from torch._dynamo.comptime import comptime  # an import of a second, so only here

    comptime(_keep_source)


def source_of(tensor: Tensor) -> Tensor | None:
    """The source noted of the traced tensor, where neither was modified since.

    It can be had although nothing keeps it: the compiled code computes it if it is used, and if the
    tensor itself is not used then, it is not computed.
    """
    from torch._dynamo.comptime import comptime

    source = None
    comptime(_find_source)
    return source


def _keep_source(context: Any) -> None:
    tensor, source = context.get_local("tensor"), context.get_local("source")
    versions = tensor.as_fake()._version, source.as_fake()._version
    tracker = source._i_will_not_complain_if_bc_breaks_VariableTracker()
    tensor.as_proxy().node.meta[_SOURCE] = tracker, versions


def _find_source(context: Any) -> None:
    """Puts the source of the local `tensor` into the local `source`."""
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    tensor = context.get_local("tensor")
    node = tensor.as_proxy().node
    found = node.meta.get(_SOURCE)
    if found is None or node.graph is not tracer.output.current_tracer.graph:
        return  # in the body of a checkpoint, what is outside is an input
    tracker, versions = found
    now = tensor.as_fake()._version, tracker.as_proxy().node.meta["example_value"]._version
    if versions == now:
        tracer.symbolic_locals["source"] = tracker


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
    _told["version"] = fake._version
    _told["takes_notes"] = not is_input and mutation is not None and is_side_effect_safe(mutation)
    _told["may_be_detached"] = not is_input and not fake._is_view()


@constant_while_traced
def _fact(name: str) -> Any:
    return _told[name]

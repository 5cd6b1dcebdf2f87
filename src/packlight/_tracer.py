"""What the tracer of torch.compile knows of a tensor, as constants of the compiled code."""

from typing import Any

from torch import Tensor

from packlight._library import constant_while_traced

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

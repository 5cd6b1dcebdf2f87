"""What the tracer of torch.compile knows of a tensor: questions that traced code asks.

Each function below is called in code that is traced, and asks a question by its name; the answer is
a constant or a variable of the compiled code. Where the tracer cannot be asked, the answer is the
one that costs memory and never a gradient (`_torch.ask`).
"""

from typing import Any

import torch
from torch import Tensor

from packlight import _torch
from packlight._torch import question

# Of the graph that is traced: by node, the tensor that it was computed of, and how.
_SOURCES = "_packlight_sources"


def may_be_detached(tensor: Tensor) -> bool:
    """Whether the traced tensor, a result of this region and no view, can lose its history."""
    answer: bool = _torch.ask("is_result_and_no_view", False, tensor)
    return answer


def are_one(a: Tensor, b: Tensor) -> bool:
    """Whether two traced tensors may be one variable of the compiled code."""
    answer: bool = _torch.ask("is_one_node", True, a, b)
    return answer


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
    _torch.ask("keep_source", None, tensor, source, how)


def source_of(tensor: Tensor, how: str, other: Tensor) -> Tensor | None:
    """The source noted of the traced tensor, if it was computed so and nothing has read either.

    What is computed of the source in place of the tensor leaves the compiled code nothing that uses
    the tensor, which is not computed then. The source may not be `other`.
    """
    source: Tensor | None = _torch.ask("find_source", None, tensor, how, other)
    return source


# ---- questions -----------------------------------------------------------------------------------


def node_of(variable: Any) -> Any:
    """The node of the graph that computes a traced tensor."""
    return variable.as_proxy().node


def fake_of(variable: Any) -> Any:
    """The tensor without values that the tracer has for a traced one."""
    return node_of(variable).meta["example_value"]


def graph_facts(tracer: Any, name: str) -> dict[Any, Any]:
    """A dictionary of ours that lives as long as the graph that is traced."""
    found: dict[Any, Any] = vars(tracer.output).setdefault(name, {})
    return found


# Functions and methods that make masks of positions: none draws, none writes to what it reads.
_PURE = {
    "__and__", "__eq__", "__or__", "add", "and_", "arange", "bool", "cumsum", "diff", "eq",
    "expand", "float", "ge", "getitem", "gt", "int", "invert", "le", "long", "lt", "mul", "ne",
    "new_ones", "ones", "or_", "reshape", "sub", "to", "unsqueeze", "view",
}  # fmt: skip


def constant_of(node: Any) -> Tensor | None:
    """The values of a node that depends on no input, on the CPU; None where they are not known."""
    known: dict[Any, Any] = {}

    def value(part: Any) -> Any:
        if isinstance(part, torch.fx.Node):
            if part not in known:
                known[part] = computed(part)
            return known[part]
        if isinstance(part, (tuple, list)):
            return type(part)(map(value, part))
        if isinstance(part, slice):
            return slice(value(part.start), value(part.stop), value(part.step))
        return torch.device("cpu") if isinstance(part, torch.device) else part

    def computed(part: Any) -> Any:
        method = part.op == "call_method"
        name = part.target if method else getattr(part.target, "__name__", None)
        fake = part.meta.get("example_value")
        if part.op not in ("call_function", "call_method") or name not in _PURE:
            raise _NotConstantError
        if not isinstance(fake, Tensor) or fake._version:  # written to since
            raise _NotConstantError
        args = [value(argument) for argument in part.args]
        kwargs = {key: value(argument) for key, argument in part.kwargs.items()}
        function = getattr(Tensor, name) if method else part.target
        return function(*args, **kwargs)

    try:
        with _torch.with_values():
            found: Tensor = value(node)
            return found
    except _NotConstantError:
        return None


class _NotConstantError(Exception):
    """A node depends on an input, or on something that is not known."""


@question
def is_result_and_no_view(tracer: Any, tensor: Any) -> bool:
    return node_of(tensor).op != "placeholder" and not fake_of(tensor)._is_view()


@question
def is_one_node(tracer: Any, a: Any, b: Any) -> bool:
    # A cast to the dtype that is there makes a node, and no tensor.
    return node_of(a) is node_of(b) or fake_of(a) is fake_of(b)


@question
def keep_source(tracer: Any, tensor: Any, source: Any, how: Any) -> None:
    versions = fake_of(tensor)._version, fake_of(source)._version
    facts = source, how.as_python_constant(), versions
    graph_facts(tracer, _SOURCES)[node_of(tensor)] = facts


@question
def find_source(tracer: Any, tensor: Any, how: Any, other: Any) -> Any:
    node = node_of(tensor)
    facts = graph_facts(tracer, _SOURCES).get(node)
    # In the body of a checkpoint, what is outside is an input.
    if facts is None or node.graph is not tracer.output.current_tracer.graph:
        return None
    source, noted, versions = facts
    of = node_of(source)
    now = fake_of(tensor)._version, fake_of(source)._version
    read = node.users or set(of.users) - {node.args[0]}  # one of the results of a function
    alike = noted == how.as_python_constant() and versions == now
    return source if alike and not read and node_of(other) is not of else None

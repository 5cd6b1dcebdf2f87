"""What the tracer of torch.compile knows of a tensor: questions that traced code asks.

Each function below is called in code that is traced, and asks a question by its name; the answer is
a constant or a variable of the compiled code. Where the tracer cannot be asked, the answer is the
one that costs memory and never a gradient (`_torch.ask`).
"""

from typing import Any

import torch
from torch import Tensor

from packlight import _torch
from packlight._torch import SAID, graph_facts, question


def source_of(tensor: Tensor, how: str, other: Tensor) -> Tensor | None:
    """What the traced tensor was computed of, if so as `how` says and nothing has read either.

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
def find_source(tracer: Any, tensor: Any, how: Any, other: Any) -> Any:
    node = node_of(tensor)
    what, source = graph_facts(tracer, SAID).get(node, (None, None))
    # In the body of a checkpoint, what is outside is an input.
    if what != how.as_python_constant() or node.graph is not tracer.output.current_tracer.graph:
        return None
    of = node_of(source)
    read = node.users or set(of.users) - {node}
    written = fake_of(tensor)._version or fake_of(source)._version
    return source if not read and not written and node_of(other) is not of else None

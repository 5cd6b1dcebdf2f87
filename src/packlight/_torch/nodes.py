"""Functions of autograd as one node each of the graph that torch.compile traces.

The tracer follows the forward and the backward pass of a Function through their Python, which takes
half of its time. What comes behind it, which makes the graphs of both passes, runs what a node of
the graph calls, and sees all operations of it again. So in traced code a call of a Function of ours
becomes a node that calls the Function; the tracer runs it once, on tensors without values.

Arguments are tensors, numbers that the compiler may have as symbols, plain constants, methods, and
dataclasses made of those. With any other argument the tracer follows the Function as it always can.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from packlight._torch.capabilities import GRAPH_NODES
from packlight._torch.tracer import ask, question, running_a_node

# The functions that become nodes, by the numbers under which traced code asks for them.
_functions: list[Callable[..., Any]] = []


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, without its looks at transforms of torch.func, which layers have had.

    In traced code one node of the graph.
    """
    plain: Callable[..., Any] = function.apply
    base: Any = super(torch.autograd.Function, function)
    direct: Callable[..., Any] = base.apply
    number = len(_functions)
    _functions.append(plain)

    def apply(*args: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return direct(*args)
        results = ask("call_as_node", None, number, *args)
        return plain(*args) if results is None else results

    return apply


# ---- the node ------------------------------------------------------------------------------------


@question
def call_as_node(tracer: Any, number: Any, *values: Any) -> Any:
    """The results of a new node; None where it cannot be made."""
    if GRAPH_NODES.values is None:
        return None
    function = _functions[number.as_python_constant()]
    wrap, unsupported, *_ = GRAPH_NODES.values
    proxies: list[Any] = []
    try:
        arguments = [_argument(tracer, value, proxies) for value in values]
    except (_NotKnownError, NotImplementedError, unsupported):
        return None

    def call(*operands: Any) -> Any:
        with running_a_node():
            return function(*(_filled(argument, operands) for argument in arguments))

    owner: Any = getattr(function, "__self__", function)
    call.__name__ = call.__qualname__ = f"apply_{owner.__name__.strip('_')}"
    call.__module__ = owner.__module__
    return wrap(tracer, tracer.output.create_proxy("call_function", call, tuple(proxies), {}))


class _NotKnownError(Exception):
    """An argument is of another kind."""


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An argument that the node takes from the graph."""

    place: int


@dataclasses.dataclass(frozen=True)
class _Made:
    """An object or a tuple that traced code made of arguments."""

    make: Callable[[Sequence[Any]], Any]
    parts: tuple[Any, ...]


def _filled(argument: Any, operands: Sequence[Any]) -> Any:
    if type(argument) is _Operand:
        return operands[argument.place]
    if type(argument) is _Made:
        return argument.make([_filled(part, operands) for part in argument.parts])
    return argument


def _argument(tracer: Any, value: Any, proxies: list[Any]) -> Any:
    """What stands for a variable of the tracer; what the graph computes goes to `proxies`."""
    assert GRAPH_NODES.values is not None
    computed: Any = GRAPH_NODES.values[2:]
    value = value.realize()
    if isinstance(value, computed):  # a tensor or a symbol
        proxies.append(value.as_proxy())
        return _Operand(len(proxies) - 1)
    try:
        return value.as_python_constant()
    except NotImplementedError:
        pass  # it is not made of constants alone
    kind: Any = value.python_type()
    if issubclass(kind, (tuple, list)):
        make = getattr(kind, "_make", kind)
        return _of_parts(tracer, make, value.unpack_var_sequence(tracer), proxies)
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
        get = getattr(value, "var_getattr", None)
        if get is None:  # torch 2.14: the tracer follows the Function
            raise _NotKnownError(value)
        fields = [get(tracer, name) for name in names]
        if value.source is None:
            return _of_parts(tracer, functools.partial(_object, kind, names), fields, proxies)
        computed_fields: list[Any] = []
        _of_parts(tracer, tuple, fields, computed_fields)  # looked at, they are guarded
        if not computed_fields:
            return value.value
    raise _NotKnownError(value)


def _of_parts(
    tracer: Any, make: Callable[[Sequence[Any]], Any], parts: Sequence[Any], proxies: list[Any]
) -> _Made:
    return _Made(make, tuple(_argument(tracer, part, proxies) for part in parts))


def _object(kind: Any, names: Sequence[str], parts: Sequence[Any]) -> Any:
    return kind(**dict(zip(names, parts, strict=True)))

"""Layers as one node each of the graph that torch.compile traces.

The tracer follows Python instruction by instruction, and what comes behind it, which makes the
graphs of both passes, runs what a node of its graph calls and sees all operations of it. So in
traced code a call of a layer becomes a node: the tracer sees a call of which it knows what it
takes and gives, and behind it the layer runs as it does uncompiled, with notes on the tensors that
are there (`sharing.py`). Between two nodes a pack goes by way of such a note.

Arguments are tensors, numbers that the compiler may have as symbols, plain constants, methods,
modules without modules inside, and tuples, dictionaries and dataclasses made of those. With any
other argument the tracer follows the layer.
"""

import dataclasses
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from packlight._torch.capabilities import GRAPH_NODES
from packlight._torch.tracer import (
    SEEDS_AT_ONCE,
    ask,
    asked_for_seeds,
    is_frozen,
    question,
    running_a_node,
    said,
    unread_constant,
)

_F = TypeVar("_F", bound=Callable[..., Any])

_FOLLOWED = "_packlight_followed"


def followed(function: _F) -> _F:
    """Has the tracer follow the function, which asks it questions, where it would be a node."""
    setattr(function, _FOLLOWED, True)
    return function


def one_node(function: _F) -> _F:
    """The function, of which a call in traced code is one node. It does not return None."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            results = ask("call_as_node", None, function, args, kwargs)
            if results is not None:
                return results
        return function(*args, **kwargs)

    return cast("_F", call)


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, without its looks at transforms of torch.func, which layers have had.

    In traced code one node of the graph.
    """
    plain: Callable[..., Any] = function.apply
    base: Any = super(torch.autograd.Function, function)
    direct: Callable[..., Any] = base.apply

    def run(*args: Any) -> Any:
        return plain(*args)

    run.__module__, run.__qualname__ = function.__module__, function.__qualname__

    def apply(*args: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return direct(*args)
        results = ask("call_as_node", None, run, args, {})
        if results is not None:
            return results
        again = ask("given_before", (), *args)
        return plain(*[x.view_as(x) if i in again else x for i, x in enumerate(args)])

    return apply


# ---- the node ------------------------------------------------------------------------------------


@question
def call_as_node(tracer: Any, function: Any, args: Any, kwargs: Any) -> Any:
    """What a new node gives that calls the function; None where there can be none."""
    positional, named = args.unpack_var_sequence(tracer), variables_of(tracer, kwargs)
    return make_node(tracer, function.as_python_constant(), positional, named)


def make_node(
    tracer: Any,
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    constants: dict[str, Any] | None = None,
) -> Any:
    """The results of a new node that calls the function with variables and constants.

    None where it cannot be made.
    """
    followed = getattr(function, _FOLLOWED, False)
    if followed or GRAPH_NODES.values is None or tracer.output.export:
        return None
    wrap, unsupported, *_ = GRAPH_NODES.values
    tensors: list[Any] = []
    constants = constants or {}
    try:
        given = (
            _of_parts(tracer, tuple, args, tensors),
            _of_parts(
                tracer, functools.partial(_dictionary, [*kwargs]), [*kwargs.values()], tensors
            ),
        )
    except (_NotKnownError, NotImplementedError, unsupported):
        return None
    scopes, facts = _scopes(tracer), graph_facts(tracer, _PLACES)
    first, count = facts.get("next", 0), len(tensors)
    places = itertools.count(first)

    def call(*operands: Any) -> Any:
        nonlocal places
        places = itertools.count(first)
        seeds = (operands[-1], first // SEEDS_AT_ONCE) if len(operands) > count else None
        with running_a_node(scopes, places, seeds):
            positional, named = (_filled(argument, operands) for argument in given)
            return function(*positional, **named, **constants)

    name = function.__qualname__.rpartition(".")[2].strip("_")
    call.__name__ = call.__qualname__ = f"apply_{name}"
    call.__module__ = function.__module__
    operands = [value.as_proxy() for value in tensors]
    seeds = _seeds(tracer, operands, first) if function in _wanting else None
    asked_for_seeds(), said()  # by whatever ran before
    after = first
    while True:
        given_seeds = () if seeds is None else (seeds,)
        proxy = tracer.output.create_proxy("call_function", call, (*operands, *given_seeds), {})
        results = wrap(tracer, proxy)
        # A second run may find the notes of the first, and ask for less than the graph will.
        after = max(after, next(places))
        if not asked_for_seeds() or seeds is not None:
            break
        _wanting.add(function)
        seeds = _seeds(tracer, operands, first)
        if seeds is None:
            break
        tracer.output.remove_node(proxy.node)
    facts["next"] = after
    what = said()
    if what is not None:
        graph_facts(tracer, SAID)[proxy.node] = what, tensors[0]
    return results


# Of the graph that is traced: the next place of a seed.
_PLACES = "_packlight_places"

# Functions that are known to ask for seeds.
_wanting: set[Callable[..., Any]] = set()


def _seeds(tracer: Any, operands: Sequence[Any], place: int) -> Any:
    """The node that draws the seeds for a place on the device of the operands."""
    assert GRAPH_NODES.values is not None
    examples = (operand.node.meta["example_value"] for operand in operands)
    device = next((x.device for x in examples if isinstance(x, torch.Tensor)), None)
    if device is None:
        return None
    known, number = graph_facts(tracer, "_packlight_seeds"), place // SEEDS_AT_ONCE
    graph = tracer.output.current_tracer
    while graph is not None:  # what is within a graph takes what is around it as an input
        if (graph, device, number) in known:
            return known[graph, device, number]
        graph = graph.parent
    draw = torch.ops.packlight.rounding_seeds.default
    proxy = tracer.output.create_proxy("call_function", draw, (device, number), {})
    seeds = GRAPH_NODES.values[0](tracer, proxy).as_proxy()
    known[tracer.output.current_tracer, device, number] = seeds
    return seeds


def call_traced(
    tracer: Any, function: Any, args: Sequence[Any], kwargs: dict[str, Any], options: Any
) -> Any:
    """The results of a function that is followed; of variables, `options` that of a dictionary."""
    given = {**kwargs, **variables_of(tracer, options)}
    return function.call_function(tracer, list(args), given)


def guard_absent(value: Any, name: str) -> bool:
    """Has the traced code made anew where an object comes to have an attribute of its own.

    False where the tracer cannot.
    """
    if GRAPH_NODES.values is None or value.source is None:
        return False
    *_, install_guard, guards, _, _ = GRAPH_NODES.values
    absent = functools.partial(guards.NOT_PRESENT_IN_GENERIC_DICT, attr=name)
    install_guard(value.source.make_guard(absent))
    return True


def item_of(tracer: Any, dictionary: Any, key: Any) -> Any:
    """The variable of a dictionary's value, guarded."""
    return dictionary.call_method(tracer, "__getitem__", [key], {})


@question
def given_before(tracer: Any, *values: Any) -> tuple[int, ...]:
    """The places of tensors that stand at an earlier place too.

    A Function takes no tensor twice: the tracer of 2.13 refuses it, that of 2.11 loses a gradient.
    """
    fakes = [
        value.as_proxy().node.meta["example_value"] if issubclass(kind, torch.Tensor) else None
        for value in values
        for kind in (value.python_type(),)
    ]
    # A cast to the dtype that is there makes a node, and no tensor.
    return tuple(
        place
        for place, fake in enumerate(fakes)
        if fake is not None and any(fake is before for before in fakes[:place])
    )


# Of the graph that is traced: what nodes have said, and the first tensor that they take.
SAID = "_packlight_said"


def graph_facts(tracer: Any, name: str) -> dict[Any, Any]:
    """A dictionary of ours that lives as long as the graph that is traced."""
    found: dict[Any, Any] = vars(tracer.output).setdefault(name, {})
    return found


@question
def fresh_number(tracer: Any) -> int:
    """A number that no other question of this graph got."""
    output = vars(tracer.output)
    output["_packlight_numbers"] = number = output.get("_packlight_numbers", 0) + 1
    return int(number)


_scope_numbers = itertools.count(1)
_CHECKPOINT = "tag_activation_checkpoint"


def _scopes(tracer: Any) -> tuple[int, ...]:
    """Numbers of the graph that is traced and of those around it, of which notes hold in it.

    What is within the body of a checkpoint may read what is outside, and not the other way around;
    any other body is a function of its inputs.
    """
    graph, found = tracer.output.current_tracer, []
    while graph is not None:
        facts = vars(graph)
        if "_packlight_scope" not in facts:
            facts["_packlight_scope"] = next(_scope_numbers)
        found.append(facts["_packlight_scope"])
        graph = graph.parent if str(graph.source_target) == _CHECKPOINT else None
    return tuple(found)


class _NotKnownError(Exception):
    """An argument is of another kind."""


@dataclasses.dataclass(frozen=True)
class _Operand:
    """An argument that the node takes from the graph."""

    place: int


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """An operand that is a parameter: behind the tracer its tensor does not say so."""

    place: int


@dataclasses.dataclass(frozen=True)
class _Made:
    """An object or a tuple that traced code made of arguments."""

    make: Callable[[Sequence[Any]], Any]
    parts: tuple[Any, ...]


def _filled(argument: Any, operands: Sequence[Any]) -> Any:
    kind = type(argument)
    if kind is _Operand:
        return operands[argument.place]
    if kind is _Made:
        return argument.make([_filled(part, operands) for part in argument.parts])
    if kind is _Parameter:
        parameter = operands[argument.place]
        if not isinstance(parameter, nn.Parameter):
            parameter._is_param = True  # which is what torch's own subclasses of tensors have
        return parameter
    return argument


def _argument(tracer: Any, value: Any, tensors: list[Any]) -> Any:
    """What stands for a variable of the tracer; what the graph computes goes to `tensors`."""
    assert GRAPH_NODES.values is not None
    _, _, tensor, symbol, install_guard, guards, _, guard_scalar = GRAPH_NODES.values
    if (constant := unread_constant(value)) is not None:
        install_guard(value.source.make_guard(guards.ID_MATCH))
        return constant
    value = value.realize()
    if isinstance(value, symbol) and issubclass(value.python_type(), float):
        return guard_scalar(value.sym_num)  # operators take numbers
    if isinstance(value, (tensor, symbol)):
        tensors.append(value)
        place = len(tensors) - 1
        is_parameter = issubclass(value.python_type(), nn.Parameter)
        return _Parameter(place) if is_parameter else _Operand(place)
    try:
        return value.as_python_constant()
    except NotImplementedError:
        pass  # it is not made of constants alone
    kind: Any = value.python_type()
    if issubclass(kind, (tuple, list)):
        make = getattr(kind, "_make", kind)
        return _of_parts(tracer, make, value.unpack_var_sequence(tracer), tensors)
    if kind is dict:
        found = variables_of(tracer, value)
        make = functools.partial(_dictionary, [*found])
        return _of_parts(tracer, make, [*found.values()], tensors)
    if issubclass(kind, nn.Module):
        return _module(tracer, value, tensors)
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
        if value.source is None:
            fields = [attribute_of(tracer, value, name) for name in names]
            return _of_parts(tracer, functools.partial(_object, kind, names), fields, tensors)
        if is_frozen(type(value.value)):
            # One guard: methods that are equal are one object (`method.the_one`).
            install_guard(value.source.make_guard(guards.ID_MATCH))
            return value.value
    raise _NotKnownError(value)


class _Unknown:
    """Stands for what is not known of traced code."""


UNKNOWN = _Unknown()


def own_constant(tracer: Any, module: Any, name: str) -> Any:
    """A constant that a module has as an attribute of its own, guarded; else `UNKNOWN`.

    As a variable of the tracer it would cost a thousand calls of functions. Each module's method
    would also be guarded to be the first one's, by an expression of Python that runs whenever
    compiled code is looked up.
    """
    if GRAPH_NODES.values is None or module.source is None:
        return UNKNOWN
    found = vars(module.value).get(name, UNKNOWN)
    kind = type(found)
    is_plain = kind in _PLAIN or (kind is tuple and all(type(part) is int for part in found))
    if not is_plain and not is_frozen(kind):
        return UNKNOWN
    shadowed = hasattr(getattr(type(module.value), name, None), "__set__")  # by a property
    if shadowed or tracer.output.side_effects.has_pending_mutation(module):
        return UNKNOWN
    *_, install_guard, guards, attribute, _ = GRAPH_NODES.values
    match = guards.CONSTANT_MATCH if is_plain else guards.ID_MATCH
    install_guard(attribute(module.source, name).make_guard(match))
    return found


# Numbers may become symbols.
_PLAIN = (bool, str, type(None))


def flag_of(tracer: Any, module: Any, name: str) -> bool:
    """An attribute of a module that is true or false, as `training`."""
    found = own_constant(tracer, module, name)
    if found is UNKNOWN:
        found = attribute_of(tracer, module, name).as_python_constant()
    return bool(found)


def value_of(tracer: Any, variable: Any) -> Any:
    """A value of which the traced code is made for this one alone; None for any other."""
    try:
        found = _argument(tracer, variable, [])
    except (_NotKnownError, NotImplementedError):
        return None
    return None if isinstance(found, (_Operand, _Parameter, _Made)) else found


def _constant(tracer: Any, value: Any) -> Any:
    from torch._dynamo.variables.base import VariableTracker

    return VariableTracker.build(tracer, value)


def variables_of(tracer: Any, dictionary: Any) -> dict[str, Any]:
    """The variables of a dictionary's values, by its keys."""
    keys = dictionary.unpack_var_sequence(tracer)
    return {key.as_python_constant(): dictionary.getitem_const(tracer, key) for key in keys}


def class_of_self(tracer: Any) -> type:
    """The class of the local `self` of the code that is traced; that of None where it has none."""
    variable = tracer.symbolic_locals.get("self")
    try:
        kind: type = type(None) if variable is None else variable.realize().python_type()
    except NotImplementedError:
        return type(None)
    return kind


def attribute_of(tracer: Any, value: Any, name: str) -> Any:
    """The variable of an attribute, guarded."""
    get = getattr(value, "var_getattr", None)
    if get is not None:
        return get(tracer, name)
    return _constant(tracer, getattr).call_function(  # torch 2.14
        tracer, [value, _constant(tracer, name)], {}
    )


def _of_parts(
    tracer: Any, make: Callable[[Sequence[Any]], Any], parts: Sequence[Any], tensors: list[Any]
) -> _Made:
    return _Made(make, tuple(_argument(tracer, part, tensors) for part in parts))


def _object(kind: Any, names: Sequence[str], parts: Sequence[Any]) -> Any:
    return kind(**dict(zip(names, parts, strict=True)))


def _dictionary(names: Sequence[str], parts: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names, parts, strict=True))


# ---- modules -------------------------------------------------------------------------------------


def _module(tracer: Any, value: Any, tensors: list[Any]) -> _Made:
    """A module as its class, what the graph computes of its tensors, and what its forward reads."""
    module = getattr(value, "value", None)
    if not isinstance(module, nn.Module) or module._modules or value.source is None:
        raise _NotKnownError(value)
    kind: Any = type(module)
    read = _names_read(kind)
    read = read - _MADE
    groups = (vars(module), module._parameters, module._buffers)
    names = [[name for name in group if name in read] for group in groups]
    make = functools.partial(_stand_in, kind, names)

    def part(name: str) -> Any:
        constant = own_constant(tracer, value, name)
        if constant is not UNKNOWN:
            return constant
        return _argument(tracer, attribute_of(tracer, value, name), tensors)

    return _Made(make, tuple([part(name) for group in names for name in group]))


# What `_stand_in` makes.
_MADE = {"_parameters", "_buffers", "_modules"}


@functools.cache
def _names_read(kind: type[nn.Module]) -> frozenset[str]:
    """Every name in the code of the class's forward and of what that calls in the class."""
    classes = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    pending: list[Any] = [vars(base).get("forward") for base in classes]
    names: set[str] = set()
    seen: set[Any] = set()
    while pending:
        function = pending.pop()
        function = getattr(function, "fget", getattr(function, "__func__", function))
        if not isinstance(function, types.FunctionType) or function in seen:
            continue
        seen.add(function)
        pending.append(getattr(function, "__wrapped__", None))
        pending.extend(cell.cell_contents for cell in function.__closure__ or ())
        for name in _names_in(function.__code__):
            names.add(name)
            pending.extend(vars(base).get(name) for base in classes)
    return frozenset(names)


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):  # of `getattr`
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _stand_in(kind: type[nn.Module], names: Sequence[Sequence[str]], parts: Sequence[Any]) -> Any:
    """A module of this class with these attributes, parameters and buffers."""
    module: Any = kind.__new__(kind)
    left = iter(parts)
    own, parameters, buffers = ({name: next(left) for name in group} for group in names)
    vars(module).update(own, _parameters=parameters, _buffers=buffers, _modules={})
    return module

"""Questions to the tracer of torch.compile, and what it runs.

Nothing here imports the tracer, which takes a second, before it is used.
"""

import contextlib
import functools
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch

from packlight._torch.capabilities import TRACER, TRACING
from packlight._torch.code import code_of

_F = TypeVar("_F", bound=Callable[..., Any])
_P = ParamSpec("_P")
_T = TypeVar("_T")

# What the tracer can be asked: by name, a function of the tracer and its variables, which returns a
# variable or a constant.
_questions: dict[str, Callable[..., Any]] = {}


def constant_while_traced(function: _F) -> _F:
    """`torch.compiler.assume_constant_result`, whose import of the tracer takes a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def question(function: _F) -> _F:
    """Registers the decorated function as a question to the tracer, under its name."""
    _questions[function.__name__] = function
    return function


def ask(question: str, default: Any, *values: Any) -> Any:
    """What a question to the tracer gives for traced values, `default` where it cannot be asked.

    Only in code that is traced. Constants become constants of the compiled code.
    """
    answer = default
    if can_ask():
        from torch._dynamo.comptime import comptime  # an import of a second, so only here

        comptime(_answer)
    return answer


@question
def is_exported(tracer: Any) -> bool:
    return bool(tracer.output.export)


@constant_while_traced
def can_ask() -> bool:
    """Whether questions to the tracer are answered."""
    return bool(TRACER)


def _answer(context: Any) -> None:
    """Puts the answer into the local `answer` of `ask`."""
    assert TRACER.values is not None
    variable = TRACER.values[-1]
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    local = tracer.symbolic_locals
    name = local["question"].as_python_constant()
    try:
        found = _questions[name](tracer, *(value.realize() for value in local["values"].items))
    except (AttributeError, ImportError) as error:
        # A name of the tracer's inside has gone: the default stands.
        warnings.warn(
            f"torch {torch.__version__}: the tracer of torch.compile does not say {name!r}"
            f" ({error}); compiled layers may keep more",
            stacklevel=2,
        )
        return
    local["answer"] = found if isinstance(found, variable) else variable.build(tracer, found)


# ---- what torch.compile runs ----


class _Nodes(threading.local):
    """The node of a compiled graph that runs on this thread (`nodes.py`), if one does."""

    run = False
    scopes: tuple[int, ...] = (0,)  # that of code between nodes, and of what is not compiled
    places: Iterator[int] = itertools.count(1 << 32)  # of code between nodes
    seeds: tuple[torch.Tensor, int] | None = None  # and which of the graph's they are
    asked = False  # for seeds
    said: str | None = None


_nodes = _Nodes()


@contextlib.contextmanager
def running_a_node(
    scopes: tuple[int, ...], places: Iterator[int], seeds: tuple[torch.Tensor, int] | None
) -> Iterator[None]:
    """What runs is part of a compiled graph, also where a graph runs as it was traced."""
    before = _nodes.run, _nodes.scopes, _nodes.places, _nodes.seeds
    _nodes.run, _nodes.scopes, _nodes.places, _nodes.seeds = True, scopes, places, seeds
    try:
        yield
    finally:
        _nodes.run, _nodes.scopes, _nodes.places, _nodes.seeds = before


# How many seeds a graph draws by one operator.
SEEDS_AT_ONCE = 256


def seeds_of_graph(place: int) -> tuple[torch.Tensor, int] | None:
    """Seeds that the graph draws, and where among them is that of a place; None if it is not there.

    The tracer is told that the node wants them.
    """
    if torch.compiler.is_dynamo_compiling():
        return None
    _nodes.asked = True
    number, within = divmod(place, SEEDS_AT_ONCE)
    if _nodes.seeds is None or _nodes.seeds[1] != number:
        return None
    return _nodes.seeds[0], 2 * within


def asked_for_seeds() -> bool:
    """Whether a node has, since this was last asked."""
    found, _nodes.asked = _nodes.asked, False
    return found


def scopes() -> tuple[int, ...]:
    """The graph that the code that runs is part of, and those of which notes hold in it."""
    return _nodes.scopes


def say(what: str) -> None:
    """Has the tracer know what the layer that runs as a node computes of its first tensor."""
    _nodes.said = what


def said() -> str | None:
    """What has been said since this was last asked."""
    found, _nodes.said = _nodes.said, None
    return found


def next_place() -> int:
    """A number that no other call in the graph that is traced gets, the same for each run of it."""
    if torch.compiler.is_dynamo_compiling():
        number: int = ask("fresh_number", 0)
        return -number  # those of nodes are not negative
    return next(_nodes.places)


def is_traced() -> bool:
    """Whether what runs becomes compiled code: the tracer follows it, or what comes behind it."""
    if torch.compiler.is_dynamo_compiling() or _nodes.run:
        return True
    if TRACING.values is None:
        return False
    # As `TracingContext.try_get` asks: a step asks hundreds of times.
    return getattr(TRACING.values[0], "tracing_context", None) is not None


def is_traced_or_between() -> bool:
    """Whether a region is traced, or runs between two graphs where tracing gave up."""
    if torch.compiler.is_compiling():
        return True
    if "torch._dynamo" not in sys.modules:
        return False
    frames = getattr(torch._C._dynamo, "eval_frame", None)
    get = getattr(frames, "get_eval_frame_callback", None)
    callback = None if get is None else get()
    return callback is not None and callback is not False


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """The function, out of reach of `torch.compile`, which would else compile it where it runs."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled yet, and the import takes a second
        return function
    disabled: Callable[_P, _T] = torch.compiler.disable(function)
    return disabled


def always_untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """`untraced` for a function that is there before anything is compiled."""
    disabled: Callable[_P, _T] | None = None

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        nonlocal disabled
        if disabled is None and "torch._dynamo" in sys.modules:
            disabled = torch.compiler.disable(function)
        return function(*args, **kwargs) if disabled is None else disabled(*args, **kwargs)

    return call


def run_as_written(function: Callable[..., Any]) -> None:
    """Has `torch.compile` leave the frames of the function alone, but not what it calls.

    Where tracing gives up, frames that run in between are compiled one by one; without `skip_code`
    that takes time, and changes nothing else.
    """
    if "torch._dynamo" in sys.modules:
        skip_code = getattr(sys.modules.get("torch._dynamo.decorators"), "skip_code", None)
        if skip_code is not None:
            skip_code(code_of(function))

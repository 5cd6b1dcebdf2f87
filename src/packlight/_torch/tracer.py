"""Questions to the tracer of torch.compile, and what it runs.

Nothing here imports the tracer, which takes a second, before it is used.
"""

import contextlib
import functools
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from packlight._torch.capabilities import FRAME_CALLBACK, FRAMES, MODE_VARIABLE, TRACER, TRACING
from packlight._torch.code import code_of
from packlight._torch.modes import put_on, take_off

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
        _comptime(_answer)
    return answer


_comptime: Any = None  # torch's, once something is traced: its import takes a second


@question
def is_exported(tracer: Any) -> bool:
    return bool(tracer.output.export)


@constant_while_traced
def can_ask() -> bool:
    """Whether questions to the tracer are answered."""
    global _comptime
    if TRACER.values is not None:
        _comptime = TRACER.values[0]
    return bool(TRACER)


def _answer(context: Any) -> None:
    """Puts the answer into the local `answer` of `ask`."""
    assert TRACER.values is not None
    variable = TRACER.values[-1]
    tracer = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    local = tracer.symbolic_locals
    name = local["question"].as_python_constant()
    for kind in _off:
        _run_graph_without(tracer, kind)
    try:
        values = [_realized(value) for value in local["values"].items]
        found = _questions[name](tracer, *values)
    except (AttributeError, ImportError) as error:
        # A name of the tracer's inside has gone: the default stands.
        warnings.warn(
            f"torch {torch.__version__}: the tracer of torch.compile does not say {name!r}"
            f" ({error}); compiled layers may keep more",
            stacklevel=2,
        )
        return
    local["answer"] = found if isinstance(found, variable) else variable.build(tracer, found)


def is_frozen(kind: type) -> bool:
    """Whether objects of the class are constants, like methods: those of a frozen dataclass."""
    parameters: Any = vars(kind).get("__dataclass_params__")
    return parameters is not None and parameters.frozen


def unread_constant(value: Any) -> Any:
    """The frozen object of a variable at which no traced code has looked; None for any other.

    A look would guard that it is the object that was read first, where it was so in the trace, by
    an expression of Python that runs whenever compiled code is looked up.
    """
    if getattr(value, "is_realized", lambda: True)():
        return None
    found = value.peek_value()
    return found if is_frozen(type(found)) else None


def _realized(value: Any) -> Any:
    return value.realize() if unread_constant(value) is None else value


# ---- function modes ----


def without_mode(
    kind: type[TorchFunctionMode], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls the function with the innermost function mode off, if it is of this very kind."""
    if torch.compiler.is_dynamo_compiling():
        return _traced_without(kind, function, *args, **kwargs)
    mode = take_off(kind)
    if mode is None:
        return function(*args, **kwargs)
    try:
        return function(*args, **kwargs)
    finally:
        put_on(mode)


def _traced_without(
    kind: type[TorchFunctionMode], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The same where a region is traced, if no other mode is on: no one mode can be taken off.

    The tracer would inline the mode's handler at each attribute of a tensor.
    """
    if not ask("is_only_mode", False, kind):
        return function(*args, **kwargs)
    with torch._C.DisableTorchFunction():
        return function(*args, **kwargs)


@question
def is_only_mode(tracer: Any, kind: Any) -> bool:
    """Whether function modes are on in traced code, and all are of this very kind."""
    kinds = {mode.python_type() for mode in modes_of(tracer)}
    return kinds == {kind.as_python_constant()}


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
    # As `TracingContext.try_get` asks, but for a missing attribute, which takes two microseconds: a
    # step asks a thousand times.
    return _tracing is not None and _tracing.__dict__.get("tracing_context") is not None


_tracing: Any = (TRACING.values or (None,))[0]


def is_traced_or_between() -> bool:
    """Whether a region is traced, or runs between two graphs where tracing gave up."""
    return torch.compiler.is_compiling() or compiles_frames()


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


# What is asked for a call in traced code that goes to a function mode: given variables of the mode,
# of the function and of its arguments, and the tracer, it gives the variable of the results.
Handle = Callable[[Any, Any, Any, Sequence[Any], dict[str, Any]], Any]


def handle_here(tracer: Any, handle: Handle) -> None:
    """Has the tracer ask `handle` about calls that go to the mode whose handler it follows.

    It follows the handler where the answer is None. The handler is a hundred instructions a call.
    """
    if MODE_VARIABLE.values is None:
        return
    mode = tracer.symbolic_torch_function_state.cur_mode
    if mode is None:  # torch's own code calls the handler, as that of `Module.to` does
        return
    mode = mode.realize()
    if type(mode) is MODE_VARIABLE.values[0]:
        mode.__class__ = _handled_by(handle)


@functools.cache
def _handled_by(handle: Handle) -> type:
    assert MODE_VARIABLE.values is not None
    kind: Any = MODE_VARIABLE.values[0]

    def call_torch_function(
        self: Any, tx: Any, fn: Any, types: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        args = list(args)
        results = handle(self, tx, fn, args, kwargs)
        if results is None:
            return kind.call_torch_function(self, tx, fn, types, args, kwargs)
        return results

    return type(kind.__name__, (kind,), {"call_torch_function": call_torch_function})


def modes_of(tracer: Any) -> list[Any]:
    """The variables of the function modes that are on in traced code, the innermost last."""
    return [mode.realize() for mode in tracer.symbolic_torch_function_state.mode_stack]


def run_as_written(*functions: Callable[..., Any], with_all_within: bool = False) -> None:
    """Has `torch.compile` leave frames of the functions alone, where they would be compiled apart.

    What they call is compiled still, but `with_all_within`. Frames that are traced as part of a
    region around them are traced as ever. Without the capability they are compiled.
    """
    if FRAMES.values is None:
        return
    give, strategy, action = FRAMES.values
    within = action.SKIP if with_all_within else action.DEFAULT
    for function in functions:
        give(code_of(function), strategy(action.SKIP, within))


def compiles_frames() -> bool:
    """Whether `torch.compile` looks at each frame that begins, which is none of a region's."""
    callback = None if _frame_callback is None else _frame_callback()
    return callback is not None and callback is not False


_frame_callback: Callable[[], Any] | None = (FRAME_CALLBACK.values or (None,))[0]
run_as_written(compiles_frames)


def run_graphs_without(kind: type[TorchFunctionMode]) -> None:
    """Has graphs run with a function mode off that is on while they are traced.

    What the mode does to the calls in them is part of the graphs, and each call of compiled code
    would go to it. Graphs in which no question is asked have nothing of ours, and are left alone.
    """
    _off.append(kind)


_off: list[type[TorchFunctionMode]] = []


def _run_graph_without(tracer: Any, kind: type[TorchFunctionMode]) -> None:
    output = tracer.output
    compiler = output.compiler_fn
    if hasattr(compiler, _RUNS_WITHOUT) or all(
        type(mode) is not kind for mode in output.torch_function_mode_stack
    ):
        return

    @functools.wraps(compiler)
    def compile_graph(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return functools.partial(without_mode, kind, compiler(*args, **kwargs))

    setattr(compile_graph, _RUNS_WITHOUT, True)
    output.compiler_fn = compile_graph


_RUNS_WITHOUT = "_packlight_runs_without"

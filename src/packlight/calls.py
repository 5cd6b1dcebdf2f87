"""Calls of torch functions inside a model's own code: they keep by a method as layers do.

A module that is to be covered becomes an instance of a subclass made for its class. The subclass
runs the class's own forward within a `TorchFunctionMode`, torch's mechanism for this purpose: a
mode sees every call of a torch function, also in a region that `torch.compile` traces. The mode is
on only while a forward runs, whether or not the forward raises, so nothing is global. Each module
of the model's own code enters the mode, so a checkpoint that runs a module again enters it again.

Each module decides for its own code: a module in eval(), or one that the user excludes, covers
nothing, whatever the module around it does. In training, calls are covered without gradients too,
so that a pass without gradients and the pass with gradients run the same functions: both passes of
a re-entrant checkpoint draw the same random numbers.

Calls by the layers of torch.nn are left to the rules for layers, but those of subclasses, which
have no rules, count as the model's. The layers of packlight run with
the mode off: they read attributes of tensors a hundred times a block, and the mode would see each.
"""

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from packlight import _torch
from packlight._checks import is_plain, is_sharded, is_taken, takes
from packlight._classes import derivation, origin
from packlight.method import Call, Calls, Swap

_ATTRIBUTE = "_packlight_calls"
_ATTENTION = F.scaled_dot_product_attention

# Dictionaries of hooks that a module has.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Modules whose frames lie between the mode and the code that calls a torch function.
_BETWEEN = ("torch.overrides", "torch.nn.functional", "torch._tensor", "torch._jit_internal")
# Modules whose calls are not covered.
_LAYERS = ("torch.nn.", "packlight.")
# What calls `keep` and `restore` of any method.
_QUANTISER = "packlight.quantiser"
# Layers of torch's without a rule, whose code is calls of functions, or of layers and functions.
_CALLS = (
    nn.MultiheadAttention,
    nn.Softmax,
    nn.TransformerDecoderLayer,
    nn.TransformerEncoderLayer,
)


class _Covering(TorchFunctionMode):
    """The mode: runs our functions in place of torch's."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.hooks = None if torch.compiler.is_compiling() else _torch.saved_tensor_hooks()

    def holds(self) -> bool:
        """Whether no saved-tensor hooks were entered since the mode was.

        The hooks of a checkpoint of a function run the function again with the mode off. A compiled
        checkpoint is part of the graph in both passes.
        """
        if torch.compiler.is_dynamo_compiling():
            return True
        return self.hooks == _torch.saved_tensor_hooks() or torch.compiler.is_compiling()

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        listed: bool | None = None
        if torch.compiler.is_dynamo_compiling():
            listed = _torch.ask("is_listed", None, self.calls, func)
        if listed is None:
            listed = func in self.calls.table
        if not listed:
            # As a method it calls `super()`, which the tracer of 2.13 cannot follow in a mode.
            if func is Tensor.unflatten:
                func = torch.unflatten
            return func(*args, **(kwargs or {}))
        if func is _ATTENTION and func is not F.scaled_dot_product_attention:
            # What stands in its place calls it, as torch's `context_parallel` does.
            return func(*args, **(kwargs or {}))
        call, kwargs = self.calls.table[func], kwargs or {}
        if kwargs and "out" in kwargs and kwargs["out"] is None:
            kwargs = {name: value for name, value in kwargs.items() if name != "out"}
        if (
            not self.holds()
            or _called_by_a_layer()
            or not _is_covered(self.calls, call, args, kwargs)
        ):
            return func(*args, **kwargs)
        kwargs = {**kwargs, **call.options}
        if torch.compiler.is_dynamo_compiling():
            results = _torch.ask("call_as_node", None, call.function, args, kwargs)
            if results is not None:
                return results
        return call.function(*args, **kwargs)


_torch.run_graphs_without(_Covering)


def _is_covered(calls: Calls, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether our function takes this call: plain tensors, and no argument that only torch has."""
    if torch.compiler.is_dynamo_compiling():
        found: bool | None = _torch.ask(
            "is_for_us", None, calls, call.places, call.names, args, kwargs
        )
        if found is not None:
            return found
    if len(args) > call.places:
        return False
    for name in kwargs:  # no generators: this runs at every covered call
        if name not in call.names:
            return False
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and not is_plain(value):
            return False
    place = call.subject
    x = args[place] if len(args) > place else kwargs.get(call.names[place])
    if isinstance(x, (tuple, list)) and x:  # as `einsum` has its operands
        x = x[0]
    return isinstance(x, Tensor) and is_taken(x)


@_torch.question
def is_listed(tracer: Any, calls: Any, function: Any) -> bool | None:
    """Whether the table has a traced function: the tracer of 2.13 cannot hash each.

    Further calls are handled where the tracer is (`_handle`). None where the table is not known.
    """
    covered = _torch.value_of(tracer, calls)
    if covered is None:
        return None
    _torch.handle_here(tracer, _handler(covered))
    try:
        return function.realize().as_python_constant() in covered.table
    except NotImplementedError:  # it stands for no function of torch's
        return False


@_torch.question
def is_for_us(tracer: Any, calls: Any, places: Any, names: Any, args: Any, kwargs: Any) -> bool:
    """`_is_covered` of what is traced."""
    positional, named = args.unpack_var_sequence(tracer), _torch.variables_of(tracer, kwargs)
    most, own = places.as_python_constant(), names.as_python_constant()
    return _takes(tracer, most, own, positional, named)


def _takes(
    tracer: Any,
    places: int,
    names: tuple[str, ...],
    args: Sequence[Any],
    kwargs: dict[str, Any],
) -> bool:
    """Whether our function takes variables of the tracer."""
    if len(args) > places or not names or not set(kwargs) <= set(names):
        return False
    for value in (*args, *kwargs.values()):
        kind = value.python_type()
        if issubclass(kind, Tensor) and kind not in (Tensor, nn.Parameter):
            return False
    x = args[0] if args else kwargs.get(names[0])
    return x is not None and takes(tracer, x.realize())


@functools.cache
def _handler(calls: Calls) -> Callable[..., Any]:
    return functools.partial(_handle, calls)


def _handle(
    calls: Calls, mode: Any, tracer: Any, function: Any, args: Any, kwargs: dict[str, Any]
) -> Any:
    """What the mode's handler does, of variables of the tracer; None where it is to be followed."""
    try:
        function = function.realize()
        torchs = function.as_python_constant()
    except NotImplementedError:
        return None
    if torchs is Tensor.unflatten:  # see the handler
        return None
    # What a mode within another leaves, the other leaves as well if the handler makes the call.
    if any(m is not mode and m.python_type() is _Covering for m in _torch.modes_of(tracer)):
        return None
    call = calls.table.get(torchs)
    if call is None:
        return function.call_function(tracer, args, kwargs)
    if "out" in kwargs and kwargs["out"].is_constant_match(None):
        kwargs = {name: value for name, value in kwargs.items() if name != "out"}
    if (
        _is_of_a_layer(tracer)
        or (torchs is _ATTENTION and torchs is not F.scaled_dot_product_attention)
        or not _takes(tracer, call.places, call.names, args, kwargs)
    ):
        return function.call_function(tracer, args, kwargs)
    results = _torch.make_node(tracer, call.function, args, kwargs, call.options)
    if results is not None:
        return results
    table = _torch.attribute_of(tracer, _torch.attribute_of(tracer, mode, "calls"), "table")
    found = _torch.item_of(tracer, table, function)
    ours, options = (_torch.attribute_of(tracer, found, name) for name in ("function", "options"))
    return _torch.call_traced(tracer, ours, args, kwargs, options)


# ---- who calls -----------------------------------------------------------------------------------


def _called_by_a_layer() -> bool:
    """Whether a layer, or packlight itself, calls the torch function."""
    if torch.compiler.is_dynamo_compiling():
        by_a_layer: bool = _torch.ask("by_a_layer", True)
        return by_a_layer
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        name: str = frame.f_globals.get("__name__", "")
        if name not in _BETWEEN:
            return name.startswith(_LAYERS) and not _is_of_a_model(frame)
        frame = frame.f_back
    return False


def _is_of_a_model(frame: types.FrameType) -> bool:
    """Whether code of torch's layers runs for a class of the model's.

    As that of a subclass which calls `super().forward`, or has no forward of its own, and of a
    parametrized layer: there are no rules for such classes.
    """
    return _is_a_models(type(frame.f_locals.get("self")))


def _is_a_models(kind: type) -> bool:
    if kind in _CALLS:  # one that a forward makes, as `nn.Softmax(-1)(x)`
        return True
    if not issubclass(kind, nn.Module):
        return False
    return getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind or (
        not kind.__module__.startswith(_LAYERS)
    )


# The compiler would make one frame of it for all functions, which it does not tell apart, and one
# of each function of ours, where a plain model calls functions of torch between its frames.
_torch.run_as_written(_Covering.__torch_function__, with_all_within=True)


@_torch.question
def by_a_layer(tracer: Any) -> bool:
    handler = _torch.code_of(_Covering.__torch_function__)
    while tracer is not None and tracer.f_code is not handler:
        tracer = getattr(tracer, "parent", None)
    # No handler: a frame behind a break, of which the callers are not traced.
    return tracer is None or _is_of_a_layer(getattr(tracer, "parent", None))


def _is_of_a_layer(tracer: Any) -> bool:
    """Whether a layer, or packlight itself, calls a torch function in the code that is traced."""
    callers = []
    while tracer is not None:
        name = tracer.f_globals.get("__name__", "")
        if name == _QUANTISER:  # code of the user's, and no part of a model
            return True
        if name not in _BETWEEN:
            callers.append((name, tracer))
        tracer = getattr(tracer, "parent", None)
    if not callers or not callers[0][0].startswith(_LAYERS):
        return False
    kind = _torch.class_of_self(callers[0][1])
    # The mode may be on around a layer of ours, and what that runs is not the model's.
    is_ours = getattr(kind, "forward", kind).__module__.startswith("packlight.")
    return is_ours or not _is_a_models(kind)


# ---- layers of ours ------------------------------------------------------------------------------


def uncovered(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function with the mode off. Traced below another mode, `by_a_layer` says so."""
    return _torch.without_mode(_Covering, function, *args)


def alone(owner: type[nn.Module], forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of one of our classes of layers, which runs with the mode off.

    A tensor that our functions do not take goes through the plain layer of torch.
    """

    def either(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            if type(x) is not Tensor and is_sharded(x):
                from packlight import sharded  # which needs quantisers, and they this file

                plain = super(owner, type(self)).forward
                return sharded.run(forward, plain, self, *args, **kwargs)
            # Of a layer with modules inside, around which the mode is on: it would see each look.
            if not (uncovered(is_taken, x) if self._modules else is_taken(x)):
                return super(owner, self).forward(*args, **kwargs)
        return forward(self, *args, **kwargs)

    either.__module__, either.__qualname__ = owner.__module__, owner.__qualname__
    if not getattr(owner, "is_one_node", True):
        _torch.followed(either)

    def made(name: str, between: Callable[[Any], Callable[..., Any]] | None = None) -> Any:
        @functools.wraps(forward)
        def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_dynamo_compiling():
                results = _torch.ask("call_alone", None, either, self, args, kwargs)
                if results is not None:
                    return results
            elif between is not None and _torch.compiles_frames():
                return between(self)(self, *args, **kwargs)
            # A module inside may be the user's, and its calls are covered like those of any module.
            if self._modules:
                return either(self, *args, **kwargs)
            if torch.compiler.is_dynamo_compiling():
                return _torch.without_mode(_Covering, either, self, *args, **kwargs)
            mode = _torch.take_off(_Covering)
            try:
                return either(self, *args, **kwargs)
            finally:
                if mode is not None:
                    _torch.put_on(mode)

        _torch.give_own_code(alone, f"{name}_{owner.__module__}.{owner.__qualname__}")
        return alone

    launched, compiled = made("launched"), made("compiled")

    def between(self: Any) -> Any:
        """What runs where torch.compile looks at each frame, as it does around a graph break.

        A layer of torch's is no frame of its own there. One that is compiled itself is.
        """
        return compiled if self._modules or _is_compiled_itself() else launched

    found: Callable[..., Any] = made("alone", between)
    _torch.run_as_written(launched, between, with_all_within=True)
    _torch.run_as_written(found)
    return found


def _is_compiled_itself() -> bool:
    """Whether what called the layer's forward is torch.compile, by way of the module's hooks."""
    frame: types.FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_globals.get("__name__") == nn.Module.__module__:
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame"


@_torch.question
def call_alone(tracer: Any, either: Any, module: Any, args: Any, kwargs: Any) -> Any:
    """What a node gives that calls the layer in training; None where there can be none."""
    if not _torch.flag_of(tracer, module, "training"):
        return None
    given = [module, *args.unpack_var_sequence(tracer)]
    named = _torch.variables_of(tracer, kwargs)
    return _torch.make_node(tracer, either.as_python_constant(), given, named)


def all_may_have_hooks() -> bool:
    """Whether torch has hooks for all modules, which run outside a module's forward."""
    hooks = _torch.MODULE_HOOKS.values
    return hooks is None or any(hooks)


def is_bare(*modules: nn.Module) -> bool:
    """Whether a call of each module runs its class's forward and nothing else, as hooks are.

    So that a layer around them may do their work. Hooks of `profile` only look on. Nor may they be
    parametrized: a weight is then made anew by each that reads it, also by one that leaves it.
    Compiled code is not made anew for hooks that come later, as torch makes none.
    """
    if torch.compiler.is_dynamo_compiling():
        bare: bool = _torch.ask("are_bare", False, *modules)
        return bare
    if all_may_have_hooks():
        return False
    for module in modules:
        own = module.__dict__
        if (  # of `HOOKS`, without a loop: a step asks a hundred times
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
        ):
            hooks = (hook for name in HOOKS for hook in own[name].values())
            if not all(getattr(hook, "only_looks_on", False) for hook in hooks):
                return False
        if "forward" in own or "parametrizations" in own["_modules"]:
            return False
        if "_compiled_call_impl" in own and own["_compiled_call_impl"] is not None:
            return False
    return True


@_torch.question
def are_bare(tracer: Any, *modules: Any) -> bool:
    # A forward of a module's own may be assigned later; torch makes its code anew for that.
    for module in modules:
        if "forward" in vars(module.value) or not _torch.guard_absent(module, "forward"):
            return False
    return is_bare(*[module.value for module in modules])


# ---- which modules -------------------------------------------------------------------------------


def swap_for_calls(
    module: nn.Module,
    kind: type[nn.Module],
    calls: Calls,
    swap: Swap | None = None,
    of_torch: bool = False,
) -> Swap | None:
    """How the calls in a module's own code are covered; None if it has no code of its own.

    `kind` is the module's class before any conversion, `swap` what else a conversion makes of the
    module. With `Calls` of nothing its calls stay torch's, whatever the module around it covers.
    `of_torch` says that the code of torch's own layers counts as the module's.
    """
    code = kind if swap is None or _may_run(swap.kind) else _owner_of_forward(swap.kind)
    own = of_torch or code in _CALLS or not f"{code.__module__}.".startswith(_LAYERS)
    own = own and kind.forward is not nn.Module.forward
    if not own or "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule):
        return None
    if swap is None:
        return Swap(covered(kind), {_ATTRIBUTE: calls})
    return Swap(covered(swap.kind), {**swap.attributes, _ATTRIBUTE: calls})


def without_calls(swap: Swap) -> Swap:
    """What a conversion makes of a module beside covering its calls."""
    if _ATTRIBUTE not in swap.attributes:
        return swap
    found = origin(swap.kind)
    assert found is not None
    attributes = {name: value for name, value in swap.attributes.items() if name != _ATTRIBUTE}
    return Swap(found[1][-1], attributes)


def _may_run(kind: type[nn.Module]) -> bool:
    """Whether a class of ours runs the plain class's own code where its own way is not open."""
    return getattr(kind, "may_run_plain_code", False)


def _owner_of_forward(kind: type[nn.Module]) -> type:
    return next(base for base in kind.__mro__ if "forward" in vars(base))


# ---- the classes ---------------------------------------------------------------------------------


@derivation
def covered(kind: type[nn.Module]) -> dict[str, Any]:
    """The subclass of a module class whose forward runs with the calls of its code covered."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _covers(self):
            return kind.forward(self, *args, **kwargs)
        calls = _calls_of(self)
        # Where code breaks its graph, the tracer begins anew for each frame around it. So in what
        # follows no function stands in between, and this one is left alone.
        if torch.compiler.is_dynamo_compiling():  # a mode within one that is off would be off too
            with _Covering(calls):
                return kind.forward(self, *args, **kwargs)
        if _torch.compiles_frames():
            with _Alone(calls):
                return kind.forward(self, *args, **kwargs)
        return _torch.without_mode(_Covering, _cover, calls, kind.forward, self, *args, **kwargs)

    _torch.give_own_code(forward, f"covered_{kind.__module__}.{kind.__qualname__}")
    if not f"{kind.forward.__module__}.".startswith("torch."):  # of torch's no frames are compiled
        _torch.run_as_written(forward)
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return {**names, "forward": forward}


_NONE = Calls.of(())


def _calls_of(module: Any) -> Calls:
    """The calls that are to be covered in a module's code."""
    # A module that is made of the class later was not converted: nothing says what to cover.
    calls: Calls = getattr(module, _ATTRIBUTE, _NONE)
    return calls if module.training else calls.untouched or calls


def _covered_now() -> Calls:
    """The calls that are covered at present."""
    mode = _torch.innermost(_Covering)
    return mode.calls if isinstance(mode, _Covering) and mode.holds() else _NONE


def _covers(module: Any) -> bool:
    """Whether the calls of a module's code are covered already, and no others."""
    if torch.compiler.is_dynamo_compiling():
        found: bool | None = _torch.ask("covers", None, module)
        if found is not None:
            return found
    return _are_alike(_covered_now(), _calls_of(module))


def _are_alike(now: Calls, calls: Calls) -> bool:
    return now is calls or (now is _NONE and calls.untouched is None)


@_torch.question
def covers(tracer: Any, module: Any) -> bool | None:
    """`_covers` of what is traced; None where that is not known."""
    own: Any = _torch.own_constant(tracer, module, _ATTRIBUTE)
    now: Any = _NONE
    if own is _torch.UNKNOWN:
        return None
    if not _torch.flag_of(tracer, module, "training"):
        own = own.untouched or own
    for mode in reversed(_torch.modes_of(tracer)):
        if mode.python_type() is _Covering:
            now = _torch.value_of(tracer, _torch.attribute_of(tracer, mode, "calls"))
            break
    return None if now is None else _are_alike(now, own)


def covered_call(function: Callable[..., Any]) -> Call | None:
    """What a call of a torch function becomes in the code that runs; None if it stays torch's."""
    return _covered_now().table.get(function)


def covers_now() -> bool:
    """Whether calls of the code that runs are covered."""
    return bool(_covered_now().table)


def _cover(calls: Calls, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a forward with these calls covered and no others."""
    if _covered_now() is calls:
        return forward(*args, **kwargs)
    if calls.rest is None or torch.compiler.is_compiling():
        with _Covering(calls):
            return forward(*args, **kwargs)
    return calls.rest.run(args[0], _cover_within, calls, forward, *args, **kwargs)


class _Alone:
    """A context in which these calls are covered and no others, between compiled frames."""

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    def __enter__(self) -> None:
        self.outer = _torch.take_off(_Covering)
        _torch.put_on(_Covering(self.calls))

    def __exit__(self, *_: object) -> None:
        _torch.take_off(_Covering)
        if self.outer is not None:
            _torch.put_on(self.outer)


_torch.run_as_written(
    _covers,
    _calls_of,
    _Alone.__init__,
    _Alone.__enter__,
    _Alone.__exit__,
    with_all_within=True,
)


def _cover_within(calls: Calls, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _Covering(calls):
        return forward(*args, **kwargs)

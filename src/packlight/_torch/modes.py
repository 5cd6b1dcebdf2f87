"""Function modes, and the transforms of torch.func."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from packlight._torch.capabilities import (
    DISPATCH,
    MODE_STACK,
    MODES,
    MODES_OFF,
    TRANSFORMS,
    look_up,
)


def take_off(kind: type[TorchFunctionMode]) -> TorchFunctionMode | None:
    """Takes the innermost function mode off, if it is of this very kind; `put_on` ends that.

    For code that is not traced.
    """
    if MODES.values is None:
        return None
    depth, at, pop, _ = MODES.values
    last = depth() - 1
    if last < 0 or type(at(last)) is not kind:
        return None
    mode: TorchFunctionMode = pop()
    return mode


# What torch pushes a mode with, itself: a function of Python around it would be called each time.
put_on: Callable[[Any], None] = look_up("torch._C:_push_on_torch_function_stack")


def innermost(kind: type[TorchFunctionMode]) -> TorchFunctionMode | None:
    """The innermost function mode that is on and of this kind."""
    # In this order: the tracer cannot follow the first look at a capability.
    if torch.compiler.is_dynamo_compiling() or MODES.values is None:
        for mode in reversed(function_modes()):
            if isinstance(mode, kind):
                return mode
        return None
    depth, at, *_ = MODES.values
    for place in range(depth() - 1, -1, -1):  # without the list
        found: TorchFunctionMode = at(place)
        if isinstance(found, kind):
            return found
    return None


# Looked up here, since the tracer of torch.compile follows it under its own name only.
_mode_stack: Callable[[], list[TorchFunctionMode]] = (
    list if MODE_STACK.values is None else MODE_STACK.values[0]
)


def function_modes() -> list[TorchFunctionMode]:
    """The function modes that are on, the innermost last; none where torch does not say."""
    return _mode_stack()


def without_torch_functions() -> contextlib.AbstractContextManager[Any]:
    """A context in which calls go past the `__torch_function__` of subclasses, not of modes."""
    context: contextlib.AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context


DispatchMode: Any = look_up("torch.utils._python_dispatch:TorchDispatchMode")


def with_operators(
    function: Callable[..., Any], *args: Any
) -> tuple[Any, list[tuple[Any, tuple[Any, ...]]]] | None:
    """What the function returns, and which operators it calls with which arguments.

    None where torch has no mode of the dispatcher.
    """
    if DispatchMode is None:
        return None
    called: list[tuple[Any, tuple[Any, ...]]] = []

    class Noting(DispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            called.append((func, args))
            return func(*args, **(kwargs or {}))

    with Noting():
        return function(*args), called


def is_watched() -> bool:
    """Whether something wants to see the operators: a mode of the dispatcher, or a profiler."""
    if DISPATCH.values is None:
        return True
    modes, profiler = DISPATCH.values
    return bool(modes() or profiler())


def unseen_by_modes() -> contextlib.AbstractContextManager[Any]:
    """A context whose operators no mode of the dispatcher sees, if torch can do that."""
    off = MODES_OFF.values
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    return context if off is None else off[0]()


def in_transform() -> bool:
    """Whether a transform of torch.func or forward-mode derivatives are on, if torch says so."""
    if TRANSFORMS.values is None:
        return False
    level: int = torch.autograd.forward_ad._current_level
    return level >= 0 or bool(TRANSFORMS.values[0]())

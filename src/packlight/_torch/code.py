"""Code objects and variables of frames, by which functions and their callers are known."""

import types
from typing import Any


def code_of(function: Any) -> types.CodeType | None:
    """The code of a function in Python, None for any other callable."""
    code: types.CodeType | None = getattr(function, "__code__", None)
    return code


def give_own_code(function: Any, name: str) -> None:
    """Gives a function that is made for each class a code object that no other class has.

    torch.compile counts recompilations by code object, up to eight, and remembers by its name which
    sizes vary.
    """
    function.__code__ = function.__code__.replace(co_name=name)


def variable_of(frame: types.FrameType, name: str) -> Any:
    """A variable of a frame by its name, None where there is none."""
    return frame.f_locals.get(name)

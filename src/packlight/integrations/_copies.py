"""What classes of other packages are: packages copy their layers.

transformers has more than a hundred RMS norms with the code of Llama's, each a class of its own.
What is ours in such a layer stands once, as a mixin; the class that a converted module takes is the
mixin joined with the module's own class (`packlight._classes.joined`).
"""

import dis
import functools
import types
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from torch import nn

from packlight import _torch

_T = TypeVar("_T")

_CONSTANTS = (str, int, float, tuple, list)  # of names: a package may state them in two files


def once_a_class(look: Callable[[type[nn.Module]], _T]) -> Callable[[type[nn.Module]], _T]:
    """A function of a class that remembers its answers, each as long as the forward is that one."""
    answers: dict[tuple[type[nn.Module], object], _T] = {}

    @functools.wraps(look)
    def remembered(kind: type[nn.Module]) -> _T:
        key = kind, getattr(kind, "forward", None)
        if key not in answers:
            answers[key] = look(kind)
        return answers[key]

    return remembered


def is_copy(function: object, known: Callable[..., Any], own: Collection[str] = ()) -> bool:
    """Whether a function has the code of a known one, whatever the variables are called.

    Instructions, constants and the names of attributes agree, globals are the same objects, or
    equal constants, and neither has variables of a surrounding function, as a decorated one would.
    Of globals in `own` each module may have its own.
    """
    code = _torch.code_of(function)
    if code is None or code.co_freevars:
        return False
    ours: Any = _torch.code_of(known)
    return _instructions(code, function, own) == _instructions(ours, known, own)


def _instructions(
    code: types.CodeType, function: Any, own: Collection[str]
) -> list[tuple[str, object]]:
    """Of the code of a function, or of a function within it."""
    names = {name: f"variable {index}" for index, name in enumerate(code.co_varnames)}

    def meant(instruction: dis.Instruction) -> object:
        value = instruction.argval
        if isinstance(value, types.CodeType):
            return _instructions(value, function, own)
        if instruction.opname == "LOAD_GLOBAL":  # None for what is built in
            found = None if value in own else function.__globals__.get(value)
            return value, repr(found) if isinstance(found, _CONSTANTS) else id(found)
        if "FAST" not in instruction.opname:
            return repr(value)
        parts = value if isinstance(value, tuple) else (value,)  # two at once since Python 3.13
        return [names.get(part, part) for part in parts]

    return [(each.opname, meant(each)) for each in dis.get_instructions(code)]

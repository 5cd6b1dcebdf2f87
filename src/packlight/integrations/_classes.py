"""Classes for the modules of other packages: a subclass of each, made when it is met.

Packages copy their layers: transformers has more than a hundred RMS norms with the code of Llama's,
each a class of its own. What is ours in such a layer stands once, as a mixin; the class that a
converted module takes is the mixin before the module's own class, so that `isinstance` holds, and
`super().forward` is the plain layer.
"""

import copyreg
import dis
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

_T = TypeVar("_T")


class _Joined(type):
    """The type of the classes that `joined` makes. They pickle as the two that they are made of."""


_made: dict[tuple[type, ...], Any] = {}


def joined(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `mixin` and `kind`, under the name of `kind`: code asks modules for it."""
    if (mixin, kind) not in _made:
        body = {"__module__": mixin.__module__, "__doc__": mixin.__doc__}
        _made[mixin, kind] = _Joined(kind.__name__, (mixin, kind), body)
    made: type[nn.Module] = _made[mixin, kind]
    return made


def _parts(made: _Joined) -> tuple[Callable[..., Any], tuple[type, ...]] | str:
    if _made.get(made.__bases__) is made:
        return joined, made.__bases__
    return made.__qualname__  # a subclass that someone else has made, by its name as ever


copyreg.pickle(_Joined, _parts)


def once_a_class(look: Callable[[type[nn.Module]], _T]) -> Callable[[type[nn.Module]], _T]:
    """A function of a class that remembers its answers."""
    answers: dict[type[nn.Module], _T] = {}

    @functools.wraps(look)
    def remembered(kind: type[nn.Module]) -> _T:
        if kind not in answers:
            answers[kind] = look(kind)
        return answers[kind]

    return remembered


def is_copy(function: object, known: Callable[..., Any]) -> bool:
    """Whether a function has the code of a known one, whatever the variables are called.

    Instructions, constants and the names of attributes agree, globals are the same objects, and
    neither has variables of a surrounding function, as a decorated one would.
    """
    code = getattr(function, "__code__", None)
    if code is None or code.co_freevars or code.co_cellvars:
        return False
    return _instructions(function) == _instructions(known)


def _instructions(function: Any) -> list[tuple[str, object]]:
    names = {name: f"variable {index}" for index, name in enumerate(function.__code__.co_varnames)}

    def meant(instruction: dis.Instruction) -> object:
        value = instruction.argval
        if instruction.opname == "LOAD_GLOBAL":  # None for what is built in
            return value, id(function.__globals__.get(value))
        if "FAST" not in instruction.opname:
            return repr(value)
        parts = value if isinstance(value, tuple) else (value,)  # two at once since Python 3.13
        return [names.get(part, part) for part in parts]

    return [(each.opname, meant(each)) for each in dis.get_instructions(function)]

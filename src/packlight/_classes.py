"""Classes for converted modules: each is derived from the module's own class when that is met.

So `isinstance` holds, and `super()` is the plain layer. A derived class has the name of the
module's own: trainers write it into their files, and code asks modules for it. It pickles as how it
was derived, and is derived anew where it is unpickled.

A derived class is the module's own under another forward, so nobody hears of it: neither
`__init_subclass__` of the user's runs, which may register classes or want keywords, nor `__new__`
and `__init__` of a metaclass of the user's.
"""

import abc
import copy
import copyreg
import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from packlight import _swap
from packlight.errors import CannotConvertError

_RECIPE = "_packlight_recipe"

_Derive = Callable[..., type[nn.Module]]

_derived: dict[tuple[Any, ...], type[nn.Module]] = {}


def derivation(body: Callable[..., dict[str, Any]]) -> _Derive:
    """The decorated function gives the body of a class; it becomes what derives the class.

    Its arguments are the bases, the module's class last. The same bases give the same class. Raises
    `CannotConvertError` for a class from which none can be derived.
    """

    @functools.wraps(body)
    def derive(*bases: type[nn.Module]) -> type[nn.Module]:
        key = (derive, *bases)
        if key not in _derived:
            own = {**body(*bases), **_copying(bases[-1]), _RECIPE: (derive, bases)}
            _derived[key] = _made(bases, own)
        return _derived[key]

    return derive


def origin(made: type[nn.Module]) -> tuple[_Derive, tuple[type[nn.Module], ...]] | None:
    """What derived a class, and from what; None for a class of someone else's."""
    found: tuple[_Derive, tuple[type[nn.Module], ...]] | None = vars(made).get(_RECIPE)
    return found


def _made(bases: tuple[type[nn.Module], ...], own: dict[str, Any]) -> type[nn.Module]:
    kind = bases[-1]
    name = f"{kind.__module__}.{kind.__qualname__}"
    if found := [key for key, value in vars(kind).items() if _never_ends(key, value)]:
        raise CannotConvertError(
            f"{found[0]} of {name} calls super() of self.__class__, which is without end in any"
            " subclass, and so in the class of a conversion; write super() without arguments"
        )
    # Only where it is needed, as some classes look for themselves among the bases.
    told = next(base for base in kind.__mro__ if "__init_subclass__" in vars(base))
    if told is not object and not issubclass(kind, _Unheard):
        bases = (*bases[:-1], _Unheard, kind)
    try:
        meta = _type_for(bases)
        make: Any = (abc.ABCMeta if issubclass(meta, abc.ABCMeta) else type).__new__
        made: type[nn.Module] = make(meta, kind.__name__, bases, own)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CannotConvertError(f"no class can be derived from {name}: {reason}") from error
    _checkpoint_in(made)
    return made


def _checkpoint_in(made: type[nn.Module]) -> None:
    """Has a layer of transformers go on checkpointing itself, in a class that nobody is told of.

    Newer releases wrap the forward of each subclass as it is announced, and of all wrappers the one
    of the module's own class checkpoints. Older ones do so in `__call__`.
    """
    layers: Any = sys.modules.get("transformers.modeling_layers")
    base = getattr(layers, "GradientCheckpointingLayer", None)
    if base is not None and issubclass(made, base):
        wrap: Any = vars(base).get("__init_subclass__")
        if wrap is not None:
            wrap.__func__(made)


def _never_ends(name: str, value: object) -> bool:
    """Whether a method calls `super(self.__class__, self)` or `super(type(self), self)`."""
    own = inspect.unwrap(value) if isinstance(value, types.FunctionType) else value
    if name == "__init__" or not isinstance(own, types.FunctionType):  # the former has run
        return False
    # Names of loads differ between releases behind these letters.
    steps = [(step.opname[:9], step.argval) for step in dis.get_instructions(own)]
    steps = [step for step in steps if step[0] != "PUSH_NULL"]
    return any(
        step == ("LOAD_GLOB", "super")
        and (first == ("LOAD_GLOB", "type") or (first[0], second[1]) == ("LOAD_FAST", "__class__"))
        for step, first, second in zip(steps, steps[1:], steps[2:], strict=False)
    )


class _Unheard(nn.Module):
    """Stands before the module's class, whose `__init_subclass__` is not told of derived classes.

    It is told of subclasses that someone makes of a derived class.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if _RECIPE not in vars(cls):
            super().__init_subclass__(**kwargs)


class _Derived(type):
    """The type of derived classes."""


@functools.cache
def _type_beside(other: type[type]) -> type[type]:
    """A type of derived classes for bases with a metaclass of their own."""
    made = type.__new__(type, _Derived.__name__, (_Derived, other), {})
    copyreg.pickle(made, _reduced)
    return made


def _type_for(bases: tuple[type, ...]) -> type[type]:
    for base in bases:
        if issubclass(type(base), _Derived):
            return type(base)
    others = [type(base) for base in bases if type(base) is not type]
    return _type_beside(others[0]) if others else _Derived


def _reduced(made: type) -> tuple[_Derive, tuple[type, ...]] | str:
    # A subclass that someone else has made pickles by its name as ever.
    return origin(made) or made.__qualname__


copyreg.pickle(_Derived, _reduced)  # type: ignore[arg-type]


@derivation
def joined(mixin: type[nn.Module], kind: type[nn.Module]) -> dict[str, Any]:
    """The subclass of `mixin`, which is ours, and of `kind`."""
    return {"__module__": mixin.__module__, "__doc__": mixin.__doc__}


# ---- copies of modules whose classes make copies in their own way --------------------------------


def _copying(kind: type[nn.Module]) -> dict[str, Any]:
    """Methods by which a copy is converted as the module is, where the class may lose that."""
    if origin(kind) is not None:
        return {}  # inherited
    makers = {"__reduce_ex__": _reduce_ex, "__copy__": _copy, "__deepcopy__": _deepcopy}
    found = {name: make for name, make in makers.items() if _has_own(kind, name)}
    if any(_has_own(kind, name) for name in ("__reduce__", "__getstate__", "__setstate__")):
        found["__reduce_ex__"] = _reduce_ex
    if _has_own(kind, "__setstate__"):
        found["__setstate__"] = _setstate
    return {name: make(kind) for name, make in found.items()}


def _has_own(kind: type[nn.Module], name: str) -> bool:
    return getattr(kind, name, None) is not getattr(nn.Module, name, None)


def _reduce_ex(kind: Any) -> Callable[..., Any]:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        reduced = kind.__reduce_ex__(self, protocol)
        ours = _swap.attributes(self)
        if isinstance(reduced, str) or not ours:
            return reduced
        function, args, *rest = reduced
        return _again, (ours, function, args), *rest

    return __reduce_ex__


def _copy(kind: Any) -> Callable[..., Any]:
    def __copy__(self: nn.Module) -> Any:
        return _converted(kind.__copy__(self), _swap.attributes(self))

    return __copy__


def _deepcopy(kind: Any) -> Callable[..., Any]:
    def __deepcopy__(self: nn.Module, memo: Any) -> Any:
        made = kind.__deepcopy__(self, memo)
        return _converted(made, copy.deepcopy(_swap.attributes(self), memo))

    return __deepcopy__


def _setstate(kind: Any) -> Callable[..., None]:
    def __setstate__(self: nn.Module, state: Any) -> None:
        ours = _swap.attributes(self)
        kind.__setstate__(self, state)
        vars(self).update(ours)

    return __setstate__


def _again(ours: dict[str, Any], function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What an own `__reduce__` of a converted module's class makes."""
    return _converted(function(*args), ours)


def _converted(made: Any, ours: dict[str, Any]) -> Any:
    """A copy, converted as the module that it is of. A copy may have a class made for it alone."""
    return _swap.copied(made, ours, _derived_like) if ours else made


def _derived_like(made: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """The class that is derived from `kind` as `made` is from its own."""
    found = origin(made)
    if found is None:
        return kind
    derive, bases = found
    return derive(*bases[:-1], _derived_like(bases[-1], kind))

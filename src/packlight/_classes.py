"""Classes for converted modules: each is derived from the module's own class when that is met.

So `isinstance` holds, and `super()` is the plain layer. A derived class has the name of the
module's own: trainers write it into their files, and code asks modules for it. It pickles as how it
was derived, and is derived anew where it is unpickled.
"""

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

_RECIPE = "_packlight_recipe"

_Derive = Callable[..., type[nn.Module]]

_derived: dict[tuple[Any, ...], type[nn.Module]] = {}


def derivation(body: Callable[..., dict[str, Any]]) -> _Derive:
    """The decorated function gives the body of a class; it becomes what derives the class.

    Its arguments are the bases. The same bases give the same class.
    """

    @functools.wraps(body)
    def derive(*bases: type[nn.Module]) -> type[nn.Module]:
        key = (derive, *bases)
        if key not in _derived:
            own = {**body(*bases), _RECIPE: (derive, bases)}
            made: Any = _type_for(bases)(bases[-1].__name__, bases, own)
            _derived[key] = made
        return _derived[key]

    return derive


def bases_of(kind: type, derive: _Derive) -> tuple[type[nn.Module], ...] | None:
    """The bases that `derive` made the class of; None where something else made it."""
    recipe = vars(kind).get(_RECIPE)
    return recipe[1] if recipe is not None and recipe[0] is derive else None


class _Derived(type):
    """The type of derived classes."""


@functools.cache
def _type_beside(other: type[type]) -> type[type]:
    """A type of derived classes for bases with a metaclass of their own."""
    made = type(_Derived.__name__, (_Derived, other), {})
    copyreg.pickle(made, _reduced)
    return made


def _type_for(bases: tuple[type, ...]) -> type[type]:
    for base in bases:
        if issubclass(type(base), _Derived):
            return type(base)
    others = [type(base) for base in bases if type(base) is not type]
    return _type_beside(others[0]) if others else _Derived


def _reduced(made: type) -> tuple[_Derive, tuple[type, ...]] | str:
    recipe: tuple[_Derive, tuple[type, ...]] | None = vars(made).get(_RECIPE)
    # A subclass that someone else has made pickles by its name as ever.
    return made.__qualname__ if recipe is None else recipe


copyreg.pickle(_Derived, _reduced)  # type: ignore[arg-type]


@derivation
def joined(mixin: type[nn.Module], kind: type[nn.Module]) -> dict[str, Any]:
    """The subclass of `mixin`, which is ours, and of `kind`."""
    return {"__module__": mixin.__module__, "__doc__": mixin.__doc__}

"""What a user picks for a layer: a method, a frozen dataclass that is validated on construction.

A rule says what a method makes of modules of one type; `packlight.convert` applies the rules.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import nn

from packlight.errors import InputError


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of the methods (`FewBit`, ...). A method says how a layer keeps what its gradient needs.

    Methods are values: they compare, hash, print, and travel through `to_dict` and `from_dict`.
    """

    _kinds: ClassVar[dict[str, type["Method"]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Method._kinds[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the method's name under `"method"`, and its fields."""
        return {"method": type(self).__name__, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Method":
        """The inverse of `to_dict`. Raises `InputError` for an unknown method or field."""
        fields = dict(data)
        name = fields.pop("method", None)
        kind = Method._kinds.get(name) if isinstance(name, str) else None
        if kind is None:
            known = ", ".join(sorted(Method._kinds))
            raise InputError(f"unknown method {name!r}; known methods: {known}")
        expected = {field.name for field in dataclasses.fields(kind)}
        if unknown := sorted(set(fields) - expected):
            fields_are = ", ".join(sorted(expected))
            raise InputError(f"{name} has no field {', '.join(unknown)}; its fields: {fields_are}")
        return kind(**fields)


class Swap(NamedTuple):
    """What a module becomes: it stays the same object, with another class and some attributes.

    So parameters, buffers, hooks, flags, names, and every reference to the module stay as they are.
    `kind` reads the attributes that the module has, and those given here.
    """

    kind: type[nn.Module]
    attributes: dict[str, Any] = {}  # noqa: RUF012  never written to


# A rule looks at a module and never changes it. It raises `CannotConvertError` with the reason
# where this one module cannot take the method.
Rule = Callable[[Any, Any], Swap]

_rules: dict[tuple[type[Method], type[nn.Module]], Rule] = {}


def rule(method: type[Method], *modules: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Registers the decorated function as what `method` makes of modules of exactly these types."""

    def register(function: Rule) -> Rule:
        for module in modules:
            _rules[method, module] = function
        return function

    return register


def find_rule(method: Method, module: nn.Module) -> Rule | None:
    """The rule by which `method` converts `module`; subclasses of a known type have none."""
    return _rules.get((type(method), type(module)))

"""What a user picks for a layer: a method, a frozen dataclass that is validated on construction."""

import dataclasses
from typing import Any, ClassVar

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

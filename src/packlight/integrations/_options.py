"""What a line of an engine's configuration says, as arguments; read alike for every engine."""

import difflib
import importlib
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from packlight.errors import InputError, MissingDependencyError
from packlight.method_files import load_methods, parse_methods, parse_rest

# Options of a conversion, and those of a training around it, with the kinds of their values.
_OF_CONVERSIONS: dict[str, tuple[type, ...]] = {
    "methods": (str,),
    "rest": (str,),
    "functional": (bool,),
    "exact_ends": (bool,),
    "strict": (bool,),
}
_OF_TRAININGS: dict[str, tuple[type, ...]] = {
    "head": (bool, str),
    "memory": (str, int, float),
    "device": (str,),
    "revert_at_end": (bool,),
    "measure": (bool,),
    "report": (bool,),
    "batch": (),  # anything that a model is called with; from a program, not from a file
}
_NAMES = {str: "a text", bool: "true or false", int: "an integer", float: "a number"}


def read_options(given: object, engine: str, *, trains: bool = True) -> dict[str, Any]:
    """Arguments of `Converting`, or of `packlight.convert` unless the engine `trains`.

    `given` is a mapping of options, or a text alone, which is its `methods`, or None:

    | option | value |
    | --- | --- |
    | `methods` | a text, "GroupQuant(4), FewBit(3)", or the path of a file of methods, "m.toml" |
    | `rest` | a quantiser as a text, "None" or "auto" |
    | `head` | true, or a selector of heads, "lm_head" |
    | `functional`, `exact_ends`, `strict` | as for `packlight.convert` |
    | `memory`, `batch`, `device`, `revert_at_end`, `measure`, `report` | as for `Converting` |

    Raises `InputError`, naming the engine and the option, for one that is unknown or has a value
    that it does not take.
    """
    if given is None:
        given = {}
    if isinstance(given, str | os.PathLike):
        given = {"methods": os.fspath(given)}
    if not isinstance(given, Mapping):
        raise InputError(
            f"{engine}: the options of packlight are {given!r}; expected a mapping, such as"
            ' {"methods": "GroupQuant(4), FewBit(3)", "head": true}'
        )
    kinds = {**_OF_CONVERSIONS, **(_OF_TRAININGS if trains else {})}
    arguments = {}
    for name, value in given.items():
        if name not in kinds:
            raise InputError(f"{engine}: {_unknown(name, engine, kinds)}")
        if value is None:  # left out, in YAML
            continue
        if kinds[name] and type(value) not in kinds[name]:
            expected = " or ".join(_NAMES[kind] for kind in kinds[name])
            raise InputError(f"{engine}: option {name}={value!r} of packlight: expected {expected}")
        try:
            arguments[name] = _READ[name](value) if name in _READ else value
        except InputError as error:
            raise InputError(f"{engine}: option {name} of packlight: {error}") from error
    return arguments


def _unknown(name: object, engine: str, kinds: Mapping[str, object]) -> str:
    if name == "head":
        return f"packlight has no option head here: {engine} has losses of its own"
    if name in _OF_TRAININGS:
        return (
            f"packlight has no option {name} here, as {engine} converts a model before there are a"
            " batch and an optimiser; save what `packlight.plan` finds, plan.save('plan.toml'), and"
            ' give "methods": "plan.toml"'
        )
    near = difflib.get_close_matches(str(name), kinds, n=1)
    hint = f" (near: {near[0]})" if near else ""
    return f"packlight has no option {name!r}{hint}; its options: {', '.join(kinds)}"


def _methods(text: str) -> Any:
    return load_methods(text) if text.endswith(".toml") else parse_methods(text)


def _head(value: Any) -> Any:
    return {"true": True, "false": False}.get(str(value).lower(), value)


def _memory(value: Any) -> Any:
    """Of a command line a share is a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:  # "22GiB"
        return value


_READ: dict[str, Callable[[Any], Any]] = {
    "methods": _methods,
    "rest": parse_rest,
    "head": _head,
    "memory": _memory,
}


def imported(module: str) -> ModuleType:
    """A module of an engine. Raises `MissingDependencyError` where the engine has none such."""
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # what the engine itself lacks
        raise MissingDependencyError(
            f"packlight.integrations.{package} needs {module}, which is not there; install"
            f" {package}, or a newer release of it"
        ) from error

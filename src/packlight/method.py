"""What a user picks for a layer: a method, a frozen dataclass that is validated on construction.

A rule says what a method makes of modules of one type, or of calls of one torch function;
`packlight.convert` applies the rules.
"""

import copy
import dataclasses
import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import nn

from packlight.errors import InputError


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of the methods (`FewBit`, ...). A method says how a layer keeps what its gradient needs.

    Methods are values: they compare, hash, print, and travel through `to_dict` and `from_dict`.
    """

    # Whether a conversion by this method covers calls of torch functions, too.
    covers_calls: ClassVar[bool] = True

    _kinds: ClassVar[dict[str, type["Method"]]] = {}

    def __init_subclass__(cls, abstract: bool = False) -> None:
        super().__init_subclass__()
        if not abstract:
            Method._kinds[cls.__name__] = cls

    def __deepcopy__(self, memo: Any) -> "Method":
        """Itself: a copy of a model keeps by the very methods that compiled code was made for."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the method's name under `"method"`, and its fields, methods among them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {
            name: value.to_dict() if isinstance(value, Method) else copy.deepcopy(value)
            for name, value in values.items()
        }
        return {"method": type(self).__name__, **plain}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> "Method":
        """The inverse of `to_dict`. Raises `InputError` for an unknown method or field."""
        fields = dict(data)
        name = fields.pop("method", None)
        kind = method_kinds(name).get(name) if isinstance(name, str) else None
        if kind is None:
            known = ", ".join(sorted(method_kinds()))
            raise InputError(f"unknown method {name!r}; known methods: {known}. {ELSEWHERE}")
        expected = {field.name for field in dataclasses.fields(kind)}
        if unknown := sorted(set(fields) - expected):
            fields_are = ", ".join(sorted(expected))
            raise InputError(f"{name} has no field {', '.join(unknown)}; its fields: {fields_are}")
        for key, value in fields.items():
            if isinstance(value, dict) and "method" in value:
                fields[key] = Method.from_dict(value)
        return kind(**fields)


_known: dict[Method, Method] = {}


def the_one(value: Any) -> Any:
    """For a method the one object that stands for all its equals; any other value as it is.

    So one look at which object it is tells compiled code whether a layer keeps as it did.
    """
    return _known.setdefault(value, value) if isinstance(value, Method) else value


def check_is_value(method: Method) -> None:
    """Raises `InputError` for a method of a class that is no frozen dataclass of plain values."""
    kind = type(method)
    parameters = vars(kind).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise InputError(
            f"{kind.__name__} is no frozen dataclass, so that its methods would all be equal;"
            " write @dataclasses.dataclass(frozen=True) above the class"
        )
    try:
        hash(method)
    except TypeError as error:
        raise InputError(
            f"{method!r} has a field that is no plain value ({error}); numbers, texts and None are"
        ) from error


# Packages list their methods in this group of entry points, so that a text or a file finds them.
ENTRY_POINTS = "packlight.methods"
ELSEWHERE = (
    "One of another package is known once the package is imported, or installed with an entry"
    f" point in the group {ENTRY_POINTS}"
)


def method_kinds(name: str = "") -> dict[str, type[Method]]:
    """All methods by their names. Entry points are not read if `name` is known without them."""
    if name not in Method._kinds:
        _load_entry_points()
    return Method._kinds


@functools.cache
def _load_entry_points() -> None:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # noqa: BLE001  a broken package must not break the others
            warnings.warn(
                f"the method {entry.name} of {entry.value} cannot be loaded: {error!r}",
                stacklevel=2,
            )


class Swap(NamedTuple):
    """What a module becomes: the same object with another class and some attributes.

    So parameters, buffers, hooks, flags, names, and every reference to the module stay as they are.
    `kind` reads the attributes that the module has, and the attributes given here. Attributes that
    are `removed` would stand before the class's: a forward that was put on the instance.

    A class that keeps nothing itself, and runs what its parts were made into as one, names in
    `parts` those without which it runs as ever.
    """

    kind: type[nn.Module]
    attributes: dict[str, Any] = {}  # noqa: RUF012  never written to
    removed: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


# A rule looks at a module and never changes it. If this one module cannot take the method, the rule
# raises `CannotConvertError` or `NotConverted` with the reason.
Rule = Callable[[Any, Any], Swap]

_rules: dict[tuple[type[Method], type[nn.Module]], Rule] = {}


def rule(method: type[Method], *modules: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Registers the decorated rule of `method` for modules of exactly these types."""

    def register(function: Rule) -> Rule:
        for module in modules:
            _rules[method, module] = function
        return function

    return register


class NotConverted(Exception):
    """A rule raises it, with the reason, for a module that stays as it is; this is no mistake.

    `CannotConvertError` is for a reason that the user would want to know at once.
    """


# Looks for the rule of a type that has no registered rule, for instance by the type's code.
Finder = Callable[[type[Method], type[nn.Module]], Rule | None]

_finders: list[Finder] = []


def rule_finder(function: Finder) -> Finder:
    """Registers the decorated function, which may know rules for further types."""
    _finders.append(function)
    return function


def find_rule(method: Method, kind: type[nn.Module]) -> Rule | None:
    """The rule by which `method` converts modules of exactly this type, not of its subclasses.

    A method inherits the rules of its base classes.
    """
    found = registered_rule(type(method), kind)
    return found or next((rule for find in _finders if (rule := find(type(method), kind))), None)


def registered_rule(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    """The rule that `rule` registered for modules of exactly this type."""
    return next((_rules[base, kind] for base in method.__mro__ if (base, kind) in _rules), None)


# Looks for the rule of a module on which another package has put a forward of its own.
PatchFinder = Callable[[type[Method], Callable[..., Any]], Rule | None]

_patch_finders: list[PatchFinder] = []


def patch_finder(function: PatchFinder) -> PatchFinder:
    """Registers the decorated function, which may know forwards that stand on instances."""
    _patch_finders.append(function)
    return function


def find_patch_rule(method: Method, forward: Callable[..., Any]) -> Rule | None:
    """The rule by which `method` converts a module with this forward, whatever its class."""
    kind = type(method)
    return next((rule for find in _patch_finders if (rule := find(kind, forward))), None)


class Call(NamedTuple):
    """What a call of a torch function becomes: a function with the same arguments, and options."""

    function: Callable[..., Any]
    options: dict[str, Any]
    names: tuple[str, ...]  # of the arguments that both functions have
    places: int  # how many of the arguments may be positional
    subject: int = 0  # which argument says whether ours takes the call: `input`, or the first


_call_rules: dict[tuple[type[Method], Callable[..., Any]], Callable[[Any], Call]] = {}


def call_rule(
    method: type[Method],
    functions: Mapping[Callable[..., Any], Callable[..., Any]],
    options: Callable[[Any], dict[str, Any]] = lambda _: {},
) -> None:
    """Registers what calls of torch functions become; `options` turns the method into keywords.

    Functions are those of `torch.overrides`: `Tensor.tanh` and `torch.tanh` are two functions.
    Arguments that are not options have torch's names and order, so that a call by keyword is the
    same as a positional call. A call with any other argument stays torch's own.
    """

    def make(function: Callable[..., Any], method: Any) -> Call:
        given = options(method)
        by_place = inspect.Parameter.POSITIONAL_OR_KEYWORD
        kinds = {
            name: parameter.kind
            for name, parameter in inspect.signature(function).parameters.items()
            if name not in given and parameter.kind is not parameter.VAR_KEYWORD
        }
        places = sum(kind is by_place for kind in kinds.values())
        names = tuple(kinds)
        return Call(function, given, names, places, names.index("input") if "input" in kinds else 0)

    Calls._of.cache_clear()
    for theirs, ours in functions.items():
        _call_rules[method, theirs] = functools.partial(make, ours)


def rows(
    method: type[Method],
    table: Mapping[tuple[Any, ...], tuple[Any, ...]],
    settings: Callable[[Any], dict[str, Any]] = lambda _: {},
    check: Callable[[Any, nn.Module], None] = lambda *_: None,
) -> None:
    """Registers rules for layers and for calls of functions: what computes the same is a row.

    A row has a layer of torch's, functions of torch's, or both, and behind them what they become:
    our layer, our function, or both. `settings` turns the method into the attributes of our layer
    and the keywords of our function. `check` raises for a layer that cannot take the method.
    """
    layers: dict[type[nn.Module], type[nn.Module]] = {}
    functions: dict[Callable[..., Any], Callable[..., Any]] = {}
    for theirs, ours in table.items():
        for one in theirs:
            of: dict[Any, Any] = layers if isinstance(one, type) else functions
            (of[one],) = (own for own in ours if isinstance(own, type) == isinstance(one, type))

    @rule(method, *layers)
    def swap(method: Method, module: nn.Module) -> Swap:
        check(method, module)
        kind = next(kind for kind in type(module).__mro__ if kind in layers)
        return Swap(layers[kind], settings(method))

    call_rule(method, functions, settings)


class Keeping(Hashable, Protocol):
    """How code keeps what no rule is for, `saving.rest.Rest`; a value that can be hashed."""

    @property
    def exact(self) -> "Keeping":
        """The one of code that keeps all of that as torch does."""

    def run(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a module's forward, which keeps so."""


@dataclasses.dataclass(frozen=True, eq=False)
class Calls:
    """What calls of torch functions become under several methods; the first with a rule counts.

    `rest` says what becomes of whatever else the code saves; None where nothing is said of it.
    `untouched` are those of code that keeps what torch keeps, within a model that has these; None
    where these are such. The same arguments always give the same object.
    """

    methods: tuple[Method, ...]
    rest: Keeping | None
    untouched: "Calls | None"
    table: dict[Callable[..., Any], Call] = dataclasses.field(repr=False)

    @staticmethod
    def of(methods: tuple[Method, ...], rest: Keeping | None = None) -> "Calls":
        """The one of these arguments."""
        return Calls._of(methods, rest)

    @staticmethod
    @functools.cache
    def _of(methods: tuple[Method, ...], rest: Keeping | None) -> "Calls":
        table: dict[Callable[..., Any], Call] = {}
        for method in methods:
            for base in type(method).__mro__:
                for (kind, function), make in _call_rules.items():
                    if kind is base and function not in table:
                        table[function] = make(method)
        exact = None if rest is None else rest.exact
        changes = bool(methods) or rest != exact
        untouched = Calls.of((), exact) if changes else None
        return Calls(methods, rest, untouched, table)

    @property
    def does_nothing(self) -> bool:
        """Whether code runs with these as it would with none."""
        return not self.table and self.rest is None

    def __reduce__(self) -> Any:  # functions of torch cannot be pickled
        return Calls.of, (self.methods, self.rest)

"""Classes of converted modules: nobody is told of them, and copies are converted as the module."""

import abc
import copy
import pickle
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from packlight import GroupQuant, convert, groupquant, predict, profile, revert
from packlight._classes import joined
from packlight.errors import CannotConvertError
from packlight.method import Swap, _rules

METHOD = GroupQuant(bits=4)
X = torch.randn(32, 64)
registered = {}


class Base(nn.Module):
    """Code of the user's: calls are covered, the Linear is converted."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x):
        return F.gelu(self.fc(x))


# ---- classes that are told of their subclasses ---------------------------------------------------


class Keyword(Base):
    def __init_subclass__(cls, *, tag, **kwargs):
        super().__init_subclass__(**kwargs)
        registered[tag] = cls


class WithKeyword(Keyword, tag="keyword"):
    pass


class ByName(Base):
    def __init_subclass__(cls):
        super().__init_subclass__()
        if cls.__name__ in registered:
            raise TypeError(f"{cls.__name__} is there already")
        registered[cls.__name__] = cls


class Named(ByName):
    pass


class Final(Base):
    def __init_subclass__(cls):
        raise TypeError("final")


class Registry(type):
    def __new__(meta, name, bases, body, *, tag):
        return super().__new__(meta, name, bases, body)

    def __init__(cls, name, bases, body, *, tag):
        super().__init__(name, bases, body)
        registered[tag] = cls

    def tags(cls):
        return [tag for tag, kind in registered.items() if kind is cls]


class Metaclass(Base, metaclass=Registry, tag="metaclass"):
    pass


class FinalMeta(type):
    def __new__(meta, name, bases, body):
        if any(isinstance(base, FinalMeta) for base in bases):
            raise TypeError("final")
        return super().__new__(meta, name, bases, body)


class FinalByMetaclass(Base, metaclass=FinalMeta):
    pass


class Runs(typing.Protocol):
    def forward(self, x): ...


class OfProtocol(Base, Runs):
    pass


T = typing.TypeVar("T")


class OfGeneric(Base, typing.Generic[T]):
    pass


class Abstract(Base, abc.ABC):
    pass


class SubLinear(nn.Linear):
    def __init_subclass__(cls, *, tag):
        registered[tag] = cls


class OwnLinear(SubLinear, tag="linear"):
    def forward(self, x):
        return F.gelu(super().forward(x))


class ToldByFunction(Base):
    __init_subclass__ = staticmethod(lambda: registered.update(told=1))


HEARING = {
    "a function that is no class method": ToldByFunction,
    "a required keyword": WithKeyword,
    "a registry by name": Named,
    "final": Final,
    "a metaclass that registers": Metaclass,
    "final by its metaclass": FinalByMetaclass,
    "a protocol": OfProtocol,
    "generic": OfGeneric,
    "abstract": Abstract,
    "a subclass of Linear": lambda: OwnLinear(64, 64),
}


def copies(module):
    return copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("make", HEARING.values(), ids=HEARING)
@pytest.mark.parametrize("by", ["calls", "a rule"])
def test_no_class_hears_of_classes_that_a_conversion_derives(make, by, monkeypatch):
    module, before = make(), dict(registered)
    kind, plain = type(module), profile(module, X).by_operation()
    if by == "a rule":
        rule = lambda method, module: Swap(joined(_Mixin, type(module)), {"told": method})  # noqa: E731
        monkeypatch.setitem(_rules, (GroupQuant, kind), rule)
    convert(module, METHOD, functional=True)
    assert registered == before
    assert type(module) is not kind
    assert isinstance(module, kind)
    assert isinstance(type(module), type(kind))
    kept = profile(module, X).by_operation()
    assert kept != plain
    for found in copies(module):
        assert type(found) is type(module)
        assert profile(found, X).by_operation() == kept
    revert(module)
    assert type(module) is kind
    assert profile(module, X).by_operation() == plain
    assert registered == before


class _Mixin(nn.Module):
    """What a rule adds to a class."""


def test_subclasses_of_a_converted_class_are_heard_of():
    for module, keyword in ((WithKeyword(), {"tag": "later"}), (Metaclass(), {"tag": "meta"})):
        convert(module, METHOD, functional=True)
        later = type(type(module))("Later", (type(module),), {}, **keyword)
        assert registered.pop(keyword["tag"]) is later
    module = Named()
    convert(module, METHOD, functional=True)
    later = type("Later", (type(module),), {})
    assert registered.pop("Later") is later
    with pytest.raises(TypeError, match="there already"):
        type("Named", (type(module),), {})


def test_methods_of_a_metaclass_and_isinstance_hold():
    module = Metaclass()
    convert(module, METHOD, functional=True)
    assert type(module).tags() == []
    assert Metaclass.tags() == ["metaclass"]
    other, module = Abstract(), Abstract()
    convert(module, METHOD, functional=True)
    assert not isinstance(other, type(module))
    assert isinstance(module, type(module))
    Abstract.register(int)
    assert not issubclass(int, type(module))


class Behind(type):
    def __new__(meta, name, bases, body):
        registered.setdefault("behind", []).append(name)
        return super().__new__(meta, name, bases, body)


class Before(abc.ABCMeta, Behind):
    pass


def test_a_metaclass_behind_that_of_abstract_classes_does_hear():
    """What docs/convert.md says of it: `ABCMeta.__new__`, which has to run, calls the next."""
    kind = Before("Kind", (Base,), {})
    module = kind()
    convert(module, METHOD, functional=True)
    assert registered.pop("behind") == ["Kind", "Kind"]
    assert isinstance(module, kind)
    assert not isinstance(kind(), type(module))


class Refuses(type):
    def mro(cls):
        if len(cls.__bases__) != 1 or cls.__bases__[0] is not Base:
            raise TypeError("no subclasses, please")
        return super().mro()


class Refusing(Base, metaclass=Refuses):
    pass


def test_a_class_that_refuses_is_named_with_its_path_and_the_cause():
    model = nn.Sequential(Base(), Refusing())
    message = (
        r"layer '1' \(Refusing\): no class can be .*Refusing: TypeError: no subclasses, please"
    )
    with pytest.raises(CannotConvertError, match=message):
        convert(model, METHOD, functional=True)
    assert type(model[0]) is Base  # nothing has been changed
    assert type(model[0].fc) is nn.Linear
    conversion = convert(model, METHOD, functional=True, strict=False)
    assert conversion.functional == ("0",)
    assert [row.names for row in conversion.skipped] == [("1",)]
    assert "no subclasses, please" in conversion.skipped[0].reason
    assert type(model[1]) is Refusing
    assert type(model[1].fc) is groupquant.Linear


class BySelf(Base):
    def forward(self, x):
        return super(self.__class__, self).forward(x)


class ByType(Base):
    def train(self, mode=True):
        return super(type(self), self).train(mode)


class ByNoMeans(Base):
    def __init__(self):
        super(self.__class__, self).__init__()

    def forward(self, x):
        assert self.__class__.__name__ == type(self).__name__ != "super"
        assert super().extra_repr.__class__ is not type(super())
        return super().forward(x)

    def type(self, dtype):
        return super().type(dtype)


def test_super_of_what_the_module_is_would_not_end():
    model = nn.Sequential(BySelf(), nn.Sequential(ByType()), ByNoMeans())
    for message in (r"'0' \(BySelf\): forward of .*BySelf", r"'1.0' \(ByType\): train of .*ByType"):
        with pytest.raises(CannotConvertError, match=f"{message} calls super"):
            convert(model, METHOD, functional=True)
    conversion = convert(model, {"0": None, "1.0": None, "*": METHOD}, functional=True)
    assert conversion.functional == ("2",)
    reasons = {row.names[0]: row.reason for row in conversion.skipped}
    assert "calls super() of self.__class__" in reasons["0"]
    assert "calls that the module around it covers" in reasons["1.0"]
    model.train()(X)
    assert convert(model, METHOD, functional=True, strict=False).functional == ("2",)
    model.train()(X)


# ---- classes that make copies in their own way ---------------------------------------------------


class Reduced(Base):
    def __reduce__(self):
        return Reduced, (), self.__dict__


class ReducedInPart(Base):
    def __reduce_ex__(self, protocol):
        return ReducedInPart, (), {"_modules": self._modules, "training": self.training}


class OfItsOwnType(Base):
    def __reduce__(self):
        return type(self), (), self.__dict__


class StateInPart(Base):
    def __getstate__(self):
        return {name: vars(self)[name] for name in vars(nn.Module())}


class StateAlone(StateInPart):
    def __setstate__(self, state):
        self.__dict__ = dict(state)


class CopiedByItself(Base):
    def __deepcopy__(self, memo):
        made = CopiedByItself()
        made.fc = copy.deepcopy(self.fc, memo)
        return made

    def __copy__(self):
        made = CopiedByItself()
        made.__dict__.update(self.__dict__)
        return made


class OfItsDictionary(Base):
    def __deepcopy__(self, memo):
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class Cyclic(Reduced):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(self.hook)

    def hook(self, module, inputs, output):
        return None

    def __reduce__(self):
        return Cyclic, (), self.__dict__


OWN_COPIES = (
    Reduced, ReducedInPart, OfItsOwnType, StateInPart, StateAlone, CopiedByItself, OfItsDictionary,
    Cyclic,
)  # fmt: skip


@pytest.mark.parametrize("by", ["calls", "a rule"])
@pytest.mark.parametrize("kind", OWN_COPIES)
def test_a_copy_that_a_class_makes_itself_is_converted(kind, by, monkeypatch):
    if by == "a rule":
        rule = lambda method, module: Swap(joined(_Mixin, kind), {"told": method})  # noqa: E731
        monkeypatch.setitem(_rules, (GroupQuant, kind), rule)
    model = nn.Sequential(kind())
    plain = profile(model, X).by_operation()
    convert(model, METHOD, functional=True)
    kept = profile(model, X).by_operation()
    for found in (nn.Sequential(copy.copy(model[0])), *copies(model)[1:]):
        assert type(found[0]) is type(model[0])
        assert vars(found[0]).get("told") == vars(model[0]).get("told")
        assert profile(found, X).by_operation() == kept != plain
        if found[0].fc is not model[0].fc:  # a shallow copy shares it
            assert revert(found) == 2
            assert type(found[0]) is kind
            assert profile(found, X).by_operation() == plain
            convert(found, METHOD, functional=True)
            assert profile(found, X).by_operation() == kept
    assert profile(model, X).by_operation() == kept
    change = convert(model, METHOD, functional=True).bytes(X)
    assert change.after.activation_bytes == profile(model, X).activation_bytes
    assert change.before.activation_bytes > 2 * change.after.activation_bytes


class Rebuilt(Base):
    def __reduce__(self):
        return Rebuilt, (), self.state_dict()

    def __setstate__(self, state):
        self.load_state_dict(state)


def test_children_that_a_copy_builds_anew_are_as_it_builds_them():
    module = Rebuilt()
    convert(module, METHOD, functional=True)
    for found in copies(module):
        assert type(found) is type(module)
        assert type(found.fc) is nn.Linear
        assert torch.equal(found(X), module(X))
        assert revert(found) == 1
        assert type(found) is Rebuilt


class Exported(Base):
    def __reduce__(self):
        return nn.Linear, (64, 64)


def test_a_copy_that_is_something_else_stays_that():
    module = Exported()
    convert(module, METHOD, functional=True)
    assert type(copy.deepcopy(module)) is nn.Linear


class Alone(Base):
    def __reduce__(self):
        return "alone"


alone = Alone()


def test_a_module_that_copies_as_a_name_stays_the_one():
    convert(alone, METHOD, functional=True)
    assert pickle.loads(pickle.dumps(alone)) is alone
    assert copy.deepcopy(alone) is alone


@pytest.mark.parametrize("kind", [Reduced, StateInPart, OfItsDictionary])
def test_a_new_module_of_a_converted_class_copies_as_a_plain_one(kind):
    module = kind()
    convert(module, METHOD, functional=True)
    new = type(module)()
    for found in copies(new):
        assert isinstance(found, kind)
        assert vars(found).keys() == vars(new).keys()
        assert torch.equal(found(X), new(X))


def test_a_copy_of_a_graph_module_is_converted():
    """Each instance of one has a class of its own."""
    module = fx.symbolic_trace(Base())
    plain = profile(module, X).by_operation()
    convert(module, METHOD, functional=True)
    kept = profile(module, X).by_operation()
    found = copy.deepcopy(module)
    assert profile(found, X).by_operation() == kept != plain
    assert revert(found) == 2
    assert profile(found, X).by_operation() == plain


class Slotted(Base):
    __slots__ = ("factor", "unset")

    def __init__(self):
        super().__init__()
        self.factor = {"by": 3.0}

    def forward(self, x):
        return super().forward(x) * self.factor["by"]


def test_what_is_in_slots_is_there_in_a_prediction_and_a_rule(monkeypatch):
    """torch's copies of modules lack it."""

    def rule(method, module):
        assert module.factor == {"by": 3.0}
        return Swap(joined(_Mixin, Slotted))

    model = nn.Sequential(Slotted())
    with pytest.raises(AttributeError):
        _ = copy.deepcopy(model)[0].factor
    expected = profile(model, X).activation_bytes
    assert predict(model, X).activation_bytes == expected
    monkeypatch.setitem(_rules, (GroupQuant, Slotted), rule)
    for _ in range(2):  # the second time the rule sees a converted module as it was
        conversion = convert(model, METHOD, functional=True)
    change = conversion.bytes(X)
    assert change.before.activation_bytes == expected
    assert change.after.activation_bytes == profile(model, X).activation_bytes < expected
    assert model[0].factor == {"by": 3.0}
    assert revert(model) == 2


def test_a_slot_that_refuses_a_copy_is_shared_by_a_prediction():
    class Refuses:
        def __deepcopy__(self, memo):
            raise TypeError

    model = Slotted()
    model.unset = Refuses()
    assert predict(model, X).activation_bytes == profile(model, X).activation_bytes

"""`convert` and `revert`: which layers of a model keep by which method.

A converted module stays the same object and takes another class (`_swap.py`). So its parameters,
buffers, hooks, flags, names, optimizer state and every reference to it stay as they are.
"""

import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils import parametrize

import packlight.fewbit.rules
import packlight.groupquant.fixed_point.rules
import packlight.groupquant.rules
import packlight.inverted.rules
import packlight.sketch.rules  # noqa: F401
from packlight import _swap, graphs, integrations
from packlight._checks import is_supported
from packlight._seeds import start_rounding
from packlight.calls import swap_for_calls, without_calls
from packlight.conversion import Conversion, Replaced, Skipped, condensed
from packlight.errors import (
    CannotConvertError,
    InputError,
    NothingMatchedError,
    PacklightError,
)
from packlight.fewbit.method import FewBit
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.method import GroupQuant
from packlight.head.modules import head_kind, heads_of, why_no_head, without_head
from packlight.method import (
    Calls,
    Method,
    NotConverted,
    Swap,
    check_is_value,
    find_patch_rule,
    find_rule,
)
from packlight.quantiser import before_first_pack
from packlight.selectors import (
    Layer,
    Methods,
    Selector,
    inventory,
    kind_of,
    layers_of,
    near_misses,
    text_of,
)

__all__ = ["DEFAULT_METHODS", "convert", "revert"]

# Of the combinations that train like exact in our measurements, this one saves most: one 4-bit code
# for a batch norm, its ReLU and the convolutions behind; 4-bit packs that neighbours share; and
# exact bits for the rest: dropout, max pooling and piecewise linear activations.
DEFAULT_METHODS: tuple[Method, ...] = (FixedPoint(bits=4), GroupQuant(bits=4), FewBit(bits=3))


def convert(
    model: nn.Module,
    methods: Methods = DEFAULT_METHODS,
    *,
    strict: bool = True,
    functional: bool = False,
    head: bool | Selector = False,
) -> Conversion:
    """Have layers of a model keep less for the backward pass; `revert` undoes it.

    `methods` is one method, a sequence of methods, or an ordered mapping from selectors to methods.
    Of a sequence, the first method that can convert a layer converts it. Of a mapping, the first
    selector that matches a layer counts. A selector is

    - a module type, which matches modules of exactly this type,
    - a text: a pattern of names, as in `fnmatch`, `"encoder.*.fc2"` ("*" matches dots too), or the
      name of a type, `"GELU"` or `"torch.nn.GELU"`,
    - a predicate `(name, module) -> bool`.

    A mapping may give a sequence of methods in place of one method, and `None` to leave a layer as
    it is. A module that is used in several places has several names: a selector that matches one
    of the names matches the module, in all places.

    **What stays.** Each module is the same object as before, of another class. It has the same
    parameters, buffers, hooks, dtype, device, training mode, names and `state_dict` keys. Shared
    modules stay shared and tied parameters tied, optimizers go on, and checkpoints go both ways.
    The model can be copied, pickled and saved. Forward results are torch's, but for the random
    numbers of dropout.

    **What comes later.** Adapters of PEFT that are added to a converted model are converted as it
    was, by the selector that picks them or else by that of the layer that they adapt. What else is
    put into the model stays as it is until `convert` is called again.

    **What stays torch's**, and is reported with the reason: layers without a rule, subclasses of
    torch's layers (their forward may differ), parametrized and lazy modules.

    **Of a model that is converted already** the last call decides. A layer that it converts is
    converted anew from what it was, one that it gives None is torch's again, and calls are covered
    where this call covers them and nowhere else. A layer that no selector picks or no method has a
    rule for stays what an earlier call made of it.

    Everything is checked before anything is changed.

    Args:
        model: any module; also one that is converted already, compiled, or inside DDP.
        methods: a method, methods, or a mapping, as above. The default is explained in README.md.
        strict: False to leave alone and report what would raise `CannotConvertError`, and to accept
            patterns and predicates that match nothing.
        functional: whether calls of torch functions in the model's own code (`F.gelu(x)`,
            `F.scaled_dot_product_attention`, `act(gate) * up`) keep less as well, see
            docs/convert.md. Of the methods that a module's selector gives, the first that has a
            rule for the function counts; of all methods given, if no selector picks the module. The
            calls of a module whose selector gives None stay torch's.
        head: whether losses of heads are computed by chunks, without all logits: True for the
            output embeddings of models of transformers, or a selector of `torch.nn.Linear` layers.
            A head then gives `packlight.head.LazyLogits` in training. A cross-entropy of them
            computes and keeps no logits; whatever else is done with them computes them. The loss is
            exact, and so are gradients, but for a pack of the head's input where a quantiser
            converts the head. docs/convert.md says what it costs.

    Raises:
        NothingMatchedError: no layer would change, or a pattern or predicate matched no module; the
            message lists what there is.
        CannotConvertError: a layer cannot be converted though the method has a rule for it, for
            instance since its forward was replaced; or a selector picked only layers without a
            rule, or heads that are no Linear layers.
        InputError: arguments of the wrong kind.

    >>> import torch, packlight
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    >>> methods = {"2": None, torch.nn.Linear: packlight.GroupQuant(bits=4)}
    >>> conversion = packlight.convert(model, methods)
    >>> [row.names for row in conversion.replaced]
    [('0',)]
    """
    _check(model, methods)
    if not (isinstance(head, (bool, str)) or callable(head)):
        raise InputError(f"head={head!r} is neither True, False nor a selector, such as 'lm_head'")
    integrations.load()
    with graphs.set_aside(model):
        return _convert(model, methods, strict, functional, head)


def _convert(
    model: nn.Module, methods: Methods, strict: bool, functional: bool, head: bool | Selector
) -> Conversion:
    layers = layers_of(model)
    plan = _Plan(methods)
    for layer in layers:
        plan.add(layer)
    if functional:
        plan.cover_calls(layers)
    plan.undo(layers)
    if head is not False:
        plan.add_heads(model, layers, head)
    if strict:
        plan.check(layers)
    plan.check_not_empty(layers)
    if plan.carry_out():
        start_rounding()
    _follow(layers, plan, methods, functional)
    return plan.conversion(model)


def revert(model: nn.Module) -> int:
    """Make every converted module what it was, and return how many there were.

    A graphed model (`packlight.graphed`) is launched again.

    A model without converted modules stays as it is. Raises `CannotConvertError`, before anything
    is changed, if something else has changed a module's class since: a parametrization, or FSDP's
    `fully_shard`. Adapters that are added later stay as they are.

    >>> import torch, packlight
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    >>> conversion = packlight.convert(model, packlight.FewBit(bits=3))
    >>> packlight.revert(model), type(model[1])
    (1, <class 'torch.nn.modules.activation.GELU'>)
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected an nn.Module")
    graphs.launched(model)
    converted = [layer for layer in layers_of(model) if _swap.former(layer.module) is not None]
    for layer in converted:
        if reason := _class_changed(layer.module):
            raise CannotConvertError(f"{layer} cannot be reverted: {reason}")
    for module in model.modules():
        _followed.pop(module, None)
    return sum(_swap.restore(layer.module) for layer in converted)


def _check(model: object, methods: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected an nn.Module")
    if not isinstance(methods, Mapping):
        _check_choice(
            "methods",
            methods,
            "a method, such as FewBit(bits=3), a sequence of those,"
            " nor a mapping from selectors to methods, such as {nn.GELU: FewBit(bits=3)}",
        )
        return
    for selector, choice in methods.items():
        if isinstance(selector, nn.Module):
            kind = type(selector).__name__
            raise InputError(
                f"selector {selector!r} is a module; give its type, {kind}, or its name in the"
                " model, a text"
            )
        is_module_type = isinstance(selector, type) and issubclass(selector, nn.Module)
        is_predicate = callable(selector) and not isinstance(selector, type)
        if not (is_module_type or is_predicate or isinstance(selector, str)):
            raise InputError(
                f"selector {selector!r} is neither a module type, a pattern of names, nor a"
                " predicate (name, module) -> bool"
            )
        if choice is not None:
            what = f"methods[{text_of(selector)}]"
            _check_choice(what, choice, "a method nor None, nor a sequence of methods")


def _check_choice(what: str, choice: object, expected: str) -> None:
    """Raises `InputError` unless this is a method, or several."""
    is_sequence = isinstance(choice, Sequence) and not isinstance(choice, str)
    items = choice if is_sequence else [choice]
    assert isinstance(items, Sequence)
    if not items:
        raise InputError(
            f"{what}={choice!r} has no method; give one, such as FewBit(bits=3), or in a mapping"
            " None, which leaves a layer as it is"
        )
    wrong = [item for item in items if not isinstance(item, Method)]
    if wrong:
        hint = f"; did you mean {wrong[0].__name__}()?" if isinstance(wrong[0], type) else ""
        raise InputError(f"{what}={choice!r} is neither {expected}{hint}")
    for item in items:
        check_is_value(item)


# ---- what is to be done --------------------------------------------------------------------------


class _Change(NamedTuple):
    layer: Layer
    swap: Swap
    method: Method

    @property
    def applied(self) -> Method:
        """The method by which the layer keeps; a rule may have derived it from the given one."""
        found = (value for value in self.swap.attributes.values() if isinstance(value, Method))
        return next(found, self.method)


class _NoRule(Exception):
    """Why a method has no rule for a layer."""


class _Plan:
    """What each layer is to become, and the reasons against it. Changes nothing."""

    def __init__(self, methods: Methods) -> None:
        self.selectors = dict(methods) if isinstance(methods, Mapping) else None
        # For all layers alike, if there are no selectors.
        self.methods: tuple[Method, ...] = ()
        if isinstance(methods, Method):
            self.methods = (methods,)
        elif not isinstance(methods, Mapping):
            self.methods = tuple(methods)
        self.changes: list[_Change] = []
        # Modules whose calls are covered. If there are any, modules that are excluded are here too,
        # without methods.
        self.covered: list[tuple[Layer, Swap, tuple[Method, ...]]] = []
        # What earlier conversions made of other layers, where that ends, and what is left of it.
        self.undone: list[tuple[Layer, Swap | None, tuple[Method, ...]]] = []
        # Heads that no method converts, and the names of all heads.
        self.heads: list[tuple[Layer, Swap]] = []
        self.head_names: list[str] = []
        self.no_heads: PacklightError | None = None  # why there are none, though asked for
        self.skipped: dict[nn.Module, Skipped] = {}
        self.refused: list[str] = []  # layers that have a rule and cannot be converted
        self.matched: set[Selector] = set()
        self.selected: dict[nn.Module, Selector] = {}  # the selector that decides for a module
        self.obeyed: set[Selector] = set()  # selectors that convert a layer, or give None for one
        self.without_rule: dict[Selector, list[Skipped]] = {}  # picked layers without a rule

    def add(self, layer: Layer, otherwise: Selector | None = None) -> None:
        """Plans for a layer; where no selector matches, by one that is given."""
        if self.selectors is None:
            self._decide(layer, self.methods, None)
            return
        matching = [selector for selector in self.selectors if layer.matches(selector)]
        self.matched.update(matching)
        if not matching and otherwise is not None:
            matching = [otherwise]
        if not matching:
            self._skip(layer, "no selector picks it")
            return
        self.selected[layer.module] = matching[0]
        if methods := self._methods_of(matching[0]):
            self._decide(layer, methods, matching[0])
        else:
            self._skip(layer, "left alone, as asked")
            self.obeyed.add(matching[0])

    def _methods_of(self, selector: Selector) -> tuple[Method, ...]:
        """The methods that a selector gives, none for None."""
        choice = (self.selectors or {})[selector]
        return (choice,) if isinstance(choice, Method) else tuple(choice or ())

    def _decide(self, layer: Layer, methods: tuple[Method, ...], selector: Selector | None) -> None:
        try:
            self.changes.append(_change_for(layer, methods))
        except CannotConvertError as error:
            self._refuse(layer, error)
        except (_NoRule, NotConverted) as reason:
            skipped = self._skip(layer, str(reason), always=isinstance(reason, NotConverted))
            if selector is not None:
                self.without_rule.setdefault(selector, []).append(skipped)
            return
        if selector is not None:
            self.obeyed.add(selector)

    @property
    def all_methods(self) -> tuple[Method, ...]:
        """Each method once, in the order in which they were given."""
        found = list(self.methods)
        for selector in self.selectors or ():
            found += self._methods_of(selector)
        return tuple(dict.fromkeys(found))

    def cover_calls(self, layers: list[Layer]) -> None:
        """Plans to cover the calls in modules' own code, converted modules included."""
        changes = {change.layer.module: index for index, change in enumerate(self.changes)}
        for layer in layers:
            index = changes.get(layer.module)
            change = None if index is None else self.changes[index]
            selector = self.selected.get(layer.module)
            methods = self.all_methods if selector is None else self._methods_of(selector)
            before = self._left(layer) if change is None else change.swap
            try:
                swap = swap_for_calls(layer.module, layer.kind, methods, before)
            except CannotConvertError as error:
                if methods:
                    self._refuse(layer, error)
                else:
                    why = f"left alone, but for calls that the module around it covers: {error}"
                    self._skip(layer, why, always=True)
                continue
            if swap is None:
                continue
            if reason := _class_changed(layer.module):
                self._refuse(layer, reason)
                continue
            if change is not None and index is not None:
                self.changes[index] = change._replace(swap=swap)
                continue
            self.covered.append((layer, swap, methods))
            if selector is not None:
                self.obeyed.add(selector)
        if not any(methods for _, _, methods in self.covered):
            self.covered.clear()

    def undo(self, layers: list[Layer]) -> None:
        """Plans to end what earlier conversions did and this one does not: calls, exclusions."""
        planned = {layer.module for layer, *_ in (*self.changes, *self.covered)}
        for layer in layers:
            was = _swap.former(layer.module)
            if was is None or layer.module in planned or (left := self._left(layer)) == was.swap:
                continue
            if reason := _class_changed(layer.module):
                self._refuse(layer, reason)
            else:
                self.undone.append((layer, left, was.methods))

    def _left(self, layer: Layer) -> Swap | None:
        """What an earlier conversion made of the layer and this one does not end, calls apart."""
        was = _swap.former(layer.module)
        selector = self.selected.get(layer.module)
        if was is None or (selector is not None and not self._methods_of(selector)):
            return None
        swap = without_head(without_calls(was.swap))
        return swap if swap.attributes or swap.kind is not was.kind else None

    def _refuse(self, layer: Layer, reason: object) -> None:
        self._skip(layer, str(reason), always=True)
        self.refused.append(f"{layer}: {reason}")

    def add_heads(self, model: nn.Module, layers: list[Layer], head: bool | Selector) -> None:
        """Plans to have heads give lazy logits, converted ones included."""
        if isinstance(head, bool):
            found = {id(module) for module in heads_of(model)}
            heads = [layer for layer in layers if id(layer.module) in found]
        else:
            heads = [layer for layer in layers if layer.matches(head)]
        reasons = [why_no_head(layer.module) or _class_changed(layer.module) for layer in heads]
        if not heads:
            self.no_heads = NothingMatchedError(
                "head=True finds no output embeddings of a model of transformers; give a selector,"
                f" such as head='lm_head'. {inventory(layers)}"
                if head is True
                else f"head: {near_misses([head], layers)}. {inventory(layers)}"  # type: ignore[list-item]
            )
        elif all(reasons):
            told = [f"{layer}: {reason}" for layer, reason in zip(heads, reasons, strict=True)]
            self.no_heads = CannotConvertError(f"no head can be converted: {_first(told)}")
        changes = {change.layer.module: index for index, change in enumerate(self.changes)}
        for layer, reason in zip(heads, reasons, strict=True):
            if reason:
                continue
            self.head_names.append(layer.names[0])
            index = changes.get(layer.module)
            if index is None:
                self.heads.append((layer, Swap(head_kind(layer.kind))))
                continue
            change = self.changes[index]
            swap = change.swap._replace(kind=head_kind(change.swap.kind))
            self.changes[index] = change._replace(swap=swap)

    def carry_out(self) -> bool:
        """Changes the modules; whether there was anything to change."""
        for layer, left, methods in self.undone:
            if left is None:
                _swap.restore(layer.module)
            else:
                _swap.convert(layer.module, left, *methods)
        changed = [
            _swap.convert(layer.module, swap, method) for layer, swap, method in self.changes
        ]
        changed += [
            _swap.convert(layer.module, swap, *methods) for layer, swap, methods in self.covered
        ]
        changed += [_swap.convert(layer.module, swap) for layer, swap in self.heads]
        return any(changed)

    def _skip(self, layer: Layer, reason: str, always: bool = False) -> Skipped:
        """Records that the layer stays as it is; a container only if a rule says so."""
        if self._left(layer) is not None:
            reason += "; it stays what an earlier conversion made of it"
        skipped = Skipped(layer.names, layer.kind.__name__, reason)
        if always or not layer.is_container:
            self.skipped[layer.module] = skipped
        return skipped

    def unmatched(self) -> list[Selector]:
        """Selectors that match no module."""
        return [key for key in self.selectors or () if key not in self.matched]

    def check(self, layers: list[Layer]) -> None:
        """Raises for what is likely a mistake."""
        if self.no_heads is not None:
            raise self.no_heads
        if self.refused:
            raise CannotConvertError(
                f"{_first(self.refused)}. To leave such layers as they are, pick them with None at"
                " the head of the mapping, or pass strict=False"
            )
        mistaken = [selector for selector in self.unmatched() if not isinstance(selector, type)]
        if mistaken:
            raise NothingMatchedError(
                f"{near_misses(mistaken, layers)}. {inventory(layers)}; strict=False accepts"
                " selectors that match nothing"
            )
        for selector, rows in self.without_rule.items():
            if selector not in self.obeyed:
                reasons = dict.fromkeys(f"{row.names[0]!r}: {row.reason}" for row in rows)
                raise CannotConvertError(
                    f"{text_of(selector)} picks nothing that its method has a rule for"
                    f" ({_first(list(reasons))}); strict=False leaves all of it as it is"
                )

    def check_not_empty(self, layers: list[Layer]) -> None:
        if self.changes or self.covered or self.undone or self.heads:
            return
        parts = [f"no layer would be converted. {inventory(layers)}"]
        if unmatched := self.unmatched():
            parts.append(near_misses(unmatched, layers))
        reasons = dict.fromkeys(f"{row.kind}: {row.reason}" for row in self.skipped.values())
        parts.append(f"Reasons: {_first(list(reasons))}" if reasons else "It has no layers")
        raise NothingMatchedError(". ".join(parts))

    def conversion(self, model: nn.Module) -> Conversion:
        replaced = tuple(
            Replaced(
                change.layer.names,
                change.layer.kind.__name__,
                _public_name(change.swap.kind),
                change.applied,
            )
            for change in self.changes
        )
        unmatched = tuple(text_of(selector) for selector in self.unmatched())
        kind = kind_of(model).__name__
        covered = tuple(layer.names[0] for layer, _, methods in self.covered if methods)
        bits = _other_bits(self.all_methods) if covered else {}
        rows = self.skipped.values()
        skipped = tuple(row for row in rows if row.names[0] not in self.head_names)
        return Conversion(
            kind,
            replaced,
            skipped,
            unmatched,
            covered,
            bits,
            heads=tuple(self.head_names),
            converted=model,
        )


def _other_bits(methods: tuple[Method, ...]) -> dict[str, int]:
    """Torch functions whose calls keep a number of bits that none of the methods has."""
    given = {None, *(getattr(method, "bits", None) for method in methods)}
    found = {
        function.__name__: getattr(call.options.get("method"), "bits", None)
        for function, call in Calls.of(methods).table.items()
    }
    return {name: bits for name, bits in found.items() if bits is not None and bits not in given}


def _change_for(layer: Layer, methods: tuple[Method, ...]) -> _Change:
    """The change by the first method that can convert the layer. Raises the reason if none can."""
    plain = _swap.plain(layer.module)
    forward = vars(plain).get("forward")  # as patches put it there
    known: list[tuple[Any, Method]] = []
    if forward is not None:
        known = [(rule, method) for method in methods if (rule := find_patch_rule(method, forward))]
    rules = known or [
        (rule, method) for method in methods if (rule := find_rule(method, layer.kind))
    ]
    if not rules:
        raise _NoRule(_why_no_rule(layer, methods))
    if forward is not None and not known:
        raise CannotConvertError(
            "its forward was replaced on the instance (accelerate's hooks and patches do so), which"
            " another class would not change; convert before that"
        )
    if reason := _class_changed(layer.module):
        raise CannotConvertError(reason)
    if reason := _why_not_taken(plain):
        raise NotConverted(reason)
    refusals: list[Exception] = []
    reasons: list[Exception] = []
    for rule, method in rules:
        try:
            return _Change(layer, rule(method, plain), method)
        except CannotConvertError as error:
            refusals.append(error)
        except NotConverted as leave:
            reasons.append(leave)
    raise refusals[0] if refusals else reasons[0]


def _why_not_taken(module: nn.Module) -> str | None:
    """Why the layer stays torch's because of its parameters; None if it need not."""
    for name, parameter in module.named_parameters(recurse=False):
        if package := _quantises(type(parameter)):
            return _QUANTISED.format(package)
        if not is_supported(parameter):
            kind = parameter.dtype if parameter.layout is torch.strided else parameter.layout
            return f"its {name} is {kind}; layers of packlight take dense floating tensors"
    return None


# Packages whose layers, or whose tensors as weights, hold quantised numbers.
_QUANTISING = ("bitsandbytes", "torchao")
_QUANTISED = "its weights are quantised by {}: it stays as it is, and adapters keep packs around it"


def _quantises(kind: type) -> str | None:
    """The package that quantises, if it is of one."""
    package = kind.__module__.partition(".")[0]
    return package if package in _QUANTISING else None


def _why_no_rule(layer: Layer, methods: tuple[Method, ...]) -> str:
    kind = layer.kind
    if kind.__module__.startswith("packlight."):
        return "a layer of packlight already"
    if package := _quantises(kind):
        return _QUANTISED.format(package)
    if issubclass(kind, LazyModuleMixin):
        return "not initialised yet; run one forward pass first"
    if parametrize.is_parametrized(layer.module):
        return "parametrized, which makes a class of its own; convert first, parametrize afterwards"
    for base in kind.__mro__[1:]:
        if any(find_rule(method, base) for method in methods):
            return f"a subclass of {base.__name__}, whose forward may differ; rules match exactly"
    names = " or ".join(type(method).__name__ for method in methods)
    return f"no rule of {names}"


def _class_changed(module: nn.Module) -> str | None:
    """Why a converted module can neither be reverted nor converted anew; None if it can be."""
    was = _swap.former(module)
    if was is None or type(module) is was.swap.kind:
        return None
    return (
        f"its class has become {type(module).__name__} since it was converted (a parametrization or"
        " fully_shard?); undo that first"
    )


# ---- what comes later ----------------------------------------------------------------------------


class _Given(NamedTuple):
    """How a module's model was converted."""

    methods: Methods
    functional: bool
    names: tuple[str, ...]
    selector: Selector | None
    adapts: bool  # whether it is an adapter, or part of one


# Not on the modules: methods may be given by functions, which neither copy nor pickle.
_followed: "weakref.WeakKeyDictionary[nn.Module, _Given]" = weakref.WeakKeyDictionary()
_following: list[Any] = []  # the handle of our hook, once there is one


def _follow(layers: list[Layer], plan: _Plan, methods: Methods, functional: bool) -> None:
    """Remembers how modules were converted, for the adapters that come into them."""
    adapters = tuple(f"{layer.names[0]}." for layer in layers if _adapts(layer.module))
    for layer in layers:
        name = layer.names[0]
        inside = _adapts(layer.module) or name.startswith(adapters)
        inside = inside and "base_layer" not in name.split(".")
        given = (layer.names, plan.selected.get(layer.module), inside)
        _followed[layer.module] = _Given(methods, functional, *given)
    if _warn_of_patches not in before_first_pack:
        before_first_pack.append(_warn_of_patches)
    if not _following:
        _following.append(register_module_module_registration_hook(_on_registration))


def _adapts(module: nn.Module) -> bool:
    """Whether this is a layer of PEFT around another layer."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def _on_registration(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Converts an adapter that is put into a converted model, or a further one into an adapter."""
    if torch.compiler.is_compiling():
        return  # code that sets a module is traced, and would be guarded by all that is followed
    given = _followed.get(parent)
    if given is None or module is None or module in _followed:
        return
    if not (given.adapts or _adapts(module)):
        return
    integrations.load()
    adapted = _followed.get(parent._modules.get(name) or parent)
    selector = given.selector if adapted is None else adapted.selector
    layers = [
        layer._replace(
            names=tuple(_joined(first, name, last) for first in given.names for last in layer.names)
        )
        for layer in layers_of(module)
        if layer.module not in _followed  # the adapted layer, which stays as it is
    ]
    plan = _Plan(given.methods)
    for layer in layers:
        plan.add(layer, selector)
    if given.functional:
        plan.cover_calls(layers)
    plan.carry_out()
    _follow(layers, plan, given.methods, given.functional)


def is_patched(module: nn.Module) -> bool:
    """Whether a converted module has been given a forward of Liger's since, which runs instead."""
    forward = vars(module).get("forward")
    of_liger = (getattr(forward, "__module__", None) or "").startswith("liger_kernel.")
    return of_liger and _swap.former(module) is not None


def _warn_of_patches() -> None:
    """Says which converted layers keep what Liger's keep."""
    names = [given.names[0] for module, given in _followed.items() if is_patched(module)]
    if names:
        warnings.warn(
            f"Liger-Kernel was applied to {len(names)} layers after packlight.convert"
            f" ({_first(condensed(names))}): they run Liger's code and keep what it keeps; move"
            " packlight.convert(model, ...) behind the line that applies Liger-Kernel to the model",
            stacklevel=2,
        )


def _joined(*names: str) -> str:
    return ".".join(filter(None, names))


# ---- words ---------------------------------------------------------------------------------------

_SHOWN = 6


def _first(texts: list[str]) -> str:
    rest = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + rest


def _public_name(kind: type[nn.Module]) -> str:
    """Where users find the class: in the folder of its method, if the folder exports it."""
    folder = kind.__module__.rpartition(".")[0]
    public = getattr(sys.modules.get(folder), kind.__name__, None) is kind
    return f"{folder if public else kind.__module__}.{kind.__qualname__}"

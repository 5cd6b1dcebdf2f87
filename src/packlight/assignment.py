"""What each layer of a model is to become, and the reasons against it; nothing is changed yet."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from packlight import _swap
from packlight._checks import is_supported
from packlight.calls import swap_for_calls, without_calls
from packlight.conversion import Conversion, Replaced, Skipped
from packlight.errors import CannotConvertError, NothingMatchedError, PacklightError
from packlight.head.modules import head_kind, heads_of, passed_by, why_no_head, without_head
from packlight.method import Calls, Method, NotConverted, Swap, find_patch_rule, find_rule
from packlight.recompute.method import OfBlocks, Recompute, Tiles
from packlight.recompute.modules import ATTRIBUTE, Tiled
from packlight.recompute.rules import blocks_of, why_not_by_position
from packlight.saving.rest import Rest
from packlight.selectors import (
    EVERYTHING,
    Layer,
    Methods,
    Selector,
    inventory,
    kind_of,
    near_misses,
    text_of,
)


class _Change(NamedTuple):
    layer: Layer
    swap: Swap
    method: Method

    @property
    def applied(self) -> Method:
        """The method by which the layer keeps; a rule may have derived it from the given one."""
        found = (value for value in self.swap.attributes.values() if isinstance(value, Method))
        return next(found, self.method)


def _lacks(change: _Change, converted: set[nn.Module]) -> list[str]:
    """The parts that the layer needs, and that stay as they are."""
    parts = dict(change.layer.module.named_modules()) if change.swap.parts else {}
    return [name for name in change.swap.parts if parts.get(name) not in converted]


class _NoRule(Exception):
    """Why a method has no rule for a layer."""


class Assignment:
    """What each layer is to become, and the reasons against it. Changes nothing."""

    def __init__(self, methods: Methods, layers: Sequence[Layer] = ()) -> None:
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
        # Modules within one that runs in tiles, and within one that is checkpointed.
        self.in_tiles: set[nn.Module] = set()
        self.in_checkpoints: set[nn.Module] = set()
        self.blocks: set[nn.Module] = set()
        if any(isinstance(method, OfBlocks) for method in self.all_methods):
            self.blocks = blocks_of(layers)

    def add(self, layer: Layer, otherwise: Selector | None = None) -> None:
        """Plans for a layer; where no selector matches, by one that is given.

        A module comes before those within it.
        """
        if self.selectors is None:
            self._decide(layer, self.methods, None)
        else:
            self._select(layer, otherwise)
        decided = self.changes[-1] if self.changes else None
        changed = decided is not None and decided.layer.module is layer.module
        swap = decided.swap if decided is not None and changed else self._left(layer)
        if swap is not None and issubclass(swap.kind, Tiled):
            self.in_tiles.update(set(layer.module.modules()) - {layer.module})
        if swap is not None and is_checkpointed(swap):
            self.in_checkpoints.update(layer.module.modules())

    def _select(self, layer: Layer, otherwise: Selector | None) -> None:
        assert self.selectors is not None
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

    def _meant(
        self, layer: Layer, methods: tuple[Method, ...], selector: Selector | None
    ) -> tuple[Method, ...]:
        """The methods without those that recompute, where these are not for the layer.

        They are for what a selector picks, and else for blocks and MLPs; once around a layer.
        """

        def is_meant(method: Method) -> bool:
            if isinstance(method, OfBlocks):
                asked = selector not in (None, EVERYTHING) or layer.module in self.blocks
                return asked and layer.module not in self.in_checkpoints
            if isinstance(method, Tiles) and selector in (None, EVERYTHING):
                return why_not_by_position(_swap.plain(layer.module)) is None
            return True

        return tuple(method for method in methods if is_meant(method))

    def _decide(self, layer: Layer, methods: tuple[Method, ...], selector: Selector | None) -> None:
        if layer.module in self.in_tiles:
            self._skip(layer, "within a module that runs in tiles, which keeps nothing inside")
            return
        try:
            self.changes.append(_change_for(layer, self._meant(layer, methods, selector), methods))
        except CannotConvertError as error:
            self._refuse(layer, error)
        except (_NoRule, NotConverted) as reason:
            skipped = self._skip(layer, str(reason), always=isinstance(reason, NotConverted))
            if selector is not None:
                self.without_rule.setdefault(selector, []).append(skipped)

    def leave_idle(self, layers: Sequence[Layer]) -> None:
        """Leaves as they are modules that would run as ever, since parts of theirs are torch's.

        All layers have been added.
        """
        earlier = {layer.module for layer in layers if self._left(layer) is not None}
        while True:
            converted = earlier | {change.layer.module for change in self.changes}
            lacks = [_lacks(change, converted) for change in self.changes]
            if not any(lacks):
                break
            weighed = [*zip(self.changes, lacks, strict=True)]
            self.changes = [change for change, parts in weighed if not parts]
            for layer, parts in ((change.layer, parts) for change, parts in weighed if parts):
                why = f"it keeps nothing itself, and {' and '.join(parts)} within it stays torch's"
                skipped = self._skip(layer, why, always=True)
                if layer.module in self.selected:
                    self.without_rule.setdefault(self.selected[layer.module], []).append(skipped)
        chosen = (self.selected.get(change.layer.module) for change in self.changes)
        self.obeyed.update(selector for selector in chosen if selector is not None)

    @property
    def all_methods(self) -> tuple[Method, ...]:
        """Each method once, in the order in which they were given."""
        found = list(self.methods)
        for selector in self.selectors or ():
            found += self._methods_of(selector)
        return tuple(dict.fromkeys(found))

    def cover_calls(
        self, layers: list[Layer], functional: bool, rest: Rest | None, root: nn.Module | None
    ) -> None:
        """Plans to cover the calls in modules' own code, converted modules included.

        With a `rest` also where they call nothing that has a rule; and the root's, and those of
        modules that are left to torch, whether or not the code is their own.
        """
        changes = {change.layer.module: index for index, change in enumerate(self.changes)}
        for layer in layers:
            index = changes.get(layer.module)
            change = None if index is None else self.changes[index]
            if layer.module in self.in_tiles:
                continue
            selector = self.selected.get(layer.module)
            methods = self.all_methods if selector is None else self._methods_of(selector)
            calling = [method for method in methods if functional and method.covers_calls]
            calls = Calls.of(tuple(calling), rest)
            if methods and calls.does_nothing:
                continue
            of_torch = rest is not None and (not methods or layer.module is root)
            calls = calls if methods else calls.untouched or calls
            before = self._left(layer) if change is None else change.swap
            try:
                swap = swap_for_calls(layer.module, layer.kind, calls, before, of_torch)
            except CannotConvertError as error:
                if methods:
                    self._refuse(layer, error)
                else:
                    why = f"left alone, but for calls that the module around it covers: {error}"
                    self._skip(layer, why, always=True)
                continue
            if swap is None:
                continue
            if reason := class_changed(layer.module):
                self._refuse(layer, reason)
                continue
            if change is not None and index is not None:
                self.changes[index] = change._replace(swap=swap)
                continue
            self.covered.append((layer, swap, methods))
            if selector is not None:
                self.obeyed.add(selector)
        if rest is None and not any(methods for _, _, methods in self.covered):
            self.covered.clear()

    def undo(self, layers: list[Layer]) -> None:
        """Plans to end what earlier conversions did and this one does not: calls, exclusions."""
        planned = {layer.module for layer, *_ in (*self.changes, *self.covered)}
        for layer in layers:
            was = _swap.former(layer.module)
            if was is None or layer.module in planned or (left := self._left(layer)) == was.swap:
                continue
            if reason := class_changed(layer.module):
                self._refuse(layer, reason)
            else:
                self.undone.append((layer, left, was.methods))

    def _left(self, layer: Layer) -> Swap | None:
        """What an earlier conversion made of the layer and this one does not end, calls apart."""
        was = _swap.former(layer.module)
        selector = self.selected.get(layer.module)
        if layer.module in self.in_tiles:
            return None
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
        passed = passed_by(model)
        reasons = [
            why_no_head(layer.module) or class_changed(layer.module) or passed.get(layer.module)
            for layer in heads
        ]
        if not heads:
            self.no_heads = NothingMatchedError(
                "head=True finds no output embeddings of a model of transformers; give a selector,"
                f" such as head='lm_head'. {inventory(layers)}"
                if head is True
                else f"head: {near_misses([head], layers)}. {inventory(layers)}"  # type: ignore[list-item]
            )
        elif all(reasons):
            told = [f"{layer}: {reason}" for layer, reason in zip(heads, reasons, strict=True)]
            self.no_heads = CannotConvertError(f"no head can be converted: {first_few(told)}")
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
                f"{first_few(self.refused)}. To leave such layers as they are, pick them with None"
                " at the head of the mapping, or pass strict=False"
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
                    f" ({first_few(list(reasons))}); strict=False leaves all of it as it is"
                )

    def check_not_empty(self, layers: list[Layer]) -> None:
        if self.changes or self.covered or self.undone or self.heads:
            return
        parts = [f"no layer would be converted. {inventory(layers)}"]
        if unmatched := self.unmatched():
            parts.append(near_misses(unmatched, layers))
        reasons = dict.fromkeys(f"{row.kind}: {row.reason}" for row in self.skipped.values())
        parts.append(f"Reasons: {first_few(list(reasons))}" if reasons else "It has no layers")
        raise NothingMatchedError(". ".join(parts))

    def conversion(self, model: nn.Module, functional: bool, rest: Rest | None) -> Conversion:
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
        covered = covered if functional else ()
        bits = _other_bits(self.all_methods) if covered else {}
        rows = self.skipped.values()
        skipped = tuple(
            row
            for row in rows
            if row.names[0] not in self.head_names
            and not (row.names[0] in covered and row.reason.startswith(_NO_RULE))
        )
        return Conversion(
            kind,
            replaced,
            skipped,
            unmatched,
            covered,
            bits,
            heads=tuple(self.head_names),
            rest=None if rest is None else rest.method,
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


def _change_for(layer: Layer, methods: tuple[Method, ...], given: tuple[Method, ...]) -> _Change:
    """The change by the first method that can convert the layer. Raises the reason if none can.

    `given` are these methods and those that are not for this layer.
    """
    plain = _swap.plain(layer.module)
    forward = vars(plain).get("forward")  # as patches put it there
    known: list[tuple[Any, Method]] = []
    if forward is not None:
        known = [(rule, method) for method in methods if (rule := find_patch_rule(method, forward))]
    rules = known or [
        (rule, method) for method in methods if (rule := find_rule(method, layer.kind))
    ]
    if not rules:
        raise _NoRule(_why_no_rule(layer, given))
    if forward is not None and not known:
        raise CannotConvertError(
            "its forward was replaced on the instance (accelerate's hooks and patches do so), which"
            " another class would not change; convert before that"
        )
    if reason := class_changed(layer.module):
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


_NO_RULE = "no rule"


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
    by_type = [method for method in methods if not isinstance(method, Recompute)]
    for base in kind.__mro__[1:]:
        if any(find_rule(method, base) for method in by_type):
            return f"a subclass of {base.__name__}, whose forward may differ; rules match exactly"
    names = " or ".join(type(method).__name__ for method in methods)
    return f"{_NO_RULE} of {names}"


def is_checkpointed(swap: Swap) -> bool:
    """Whether the module is checkpointed by packlight."""
    return isinstance(swap.attributes.get(ATTRIBUTE), OfBlocks)


def class_changed(module: nn.Module) -> str | None:
    """Why a converted module can neither be reverted nor converted anew; None if it can be."""
    was = _swap.former(module)
    if was is None or type(module) is was.swap.kind:
        return None
    return (
        f"its class has become {type(module).__name__} since it was converted (a parametrization or"
        " fully_shard?); undo that first"
    )


# ---- words ---------------------------------------------------------------------------------------

_SHOWN = 6


def first_few(texts: list[str]) -> str:
    rest = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return "; ".join(texts[:_SHOWN]) + rest


def _public_name(kind: type[nn.Module]) -> str:
    """Where users find the class: in the folder of its method, if the folder exports it."""
    folder = kind.__module__.rpartition(".")[0]
    public = getattr(sys.modules.get(folder), kind.__name__, None) is kind
    return f"{folder if public else kind.__module__}.{kind.__qualname__}"

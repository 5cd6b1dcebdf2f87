"""`convert` and `revert`: which layers of a model keep by which method.

A converted module stays the same object and takes another class (`_swap.py`). So its parameters,
buffers, hooks, flags, names, optimizer state and every reference to it stay as they are.
"""

from collections.abc import Mapping, Sequence

from torch import nn

import packlight.fewbit.rules
import packlight.groupquant.fixed_point.rules
import packlight.groupquant.rules
import packlight.inverted.rules
import packlight.layers.rules
import packlight.sketch.rules  # noqa: F401
from packlight import _swap, graphs, integrations
from packlight._seeds import start_rounding
from packlight.assignment import Assignment, class_changed
from packlight.conversion import Conversion
from packlight.errors import CannotConvertError, InputError
from packlight.fewbit.method import FewBit
from packlight.following import follow, forget
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.method import GroupQuant
from packlight.method import Method, check_is_value
from packlight.planner.result import Plan
from packlight.quantiser import Quantiser
from packlight.saving.rest import Given, Rest, check_rest, is_possible
from packlight.selectors import (
    EVERYTHING,
    Methods,
    Selector,
    layers_of,
    text_of,
    with_exact_ends,
)

__all__ = ["DEFAULT_METHODS", "DEFAULT_REST", "convert", "revert"]

# Of the combinations that train like exact in our measurements, this one saves most: one 4-bit code
# for a batch norm, its ReLU and the convolutions behind; 4-bit packs that neighbours share; and
# exact bits for the rest: dropout, max pooling and piecewise linear activations.
DEFAULT_METHODS: tuple[Method, ...] = (FixedPoint(bits=4), GroupQuant(bits=4), FewBit(bits=3))

# What no rule is for.
DEFAULT_REST: Quantiser = GroupQuant(bits=4)


def convert(
    model: nn.Module,
    methods: Methods = DEFAULT_METHODS,
    *,
    strict: bool = True,
    functional: bool = True,
    rest: Given = "auto",
    head: bool | Selector = False,
    exact_ends: bool = False,
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
        methods: a method, methods, a mapping, as above, or a `Plan`, which says `functional`,
            `head` and `strict` itself. The default is explained in README.md.
        strict: False to leave alone and report what would raise `CannotConvertError`, and to accept
            patterns and predicates that match nothing.
        functional: whether calls of torch functions in the model's own code (`F.gelu(x)`,
            `F.scaled_dot_product_attention`, `act(gate) * up`) keep less as well, see
            docs/convert.md. Of the methods that a module's selector gives, the first that has a
            rule for the function counts; of all methods given, if no selector picks the module. The
            calls of a module whose selector gives None stay torch's. False: layers alone.
        rest: how forward passes of the model keep what no rule is for, as `packlight.saving(rest)`
            around them would: a quantiser, or None for what torch keeps. "auto" is what a file
            of methods says, and else `packlight.DEFAULT_REST` for the default methods, also where a
            sequence or the choice of "*" has more than those, and None for others. Modules whose
            selector gives None, and those in `eval()`, keep what torch keeps. So does code that
            `torch.compile` traces. docs/convert.md says what stays exact.
        head: whether losses of heads are computed by chunks, without all logits: True for the
            output embeddings of models of transformers, or a selector of `torch.nn.Linear` layers.
            A head then gives `packlight.head.LazyLogits` in training. A cross-entropy of them
            computes and keeps no logits; whatever else is done with them computes them. The loss is
            exact, and so are gradients, but for a pack of the head's input where a quantiser
            converts the head. docs/convert.md says what it costs.
        exact_ends: whether the first and the last Linear or convolution, in the order of
            `model.named_modules()`, stay torch's, as if a mapping began with None for both: what
            papers on quantised training call exact first and last layers.

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
    head = head or getattr(methods, "head", False)  # of a plan, or of a file
    if isinstance(methods, Plan):
        functional, strict = True, False
    _check(model, methods)
    check_rest(rest)
    if not (isinstance(head, (bool, str)) or callable(head)):
        raise InputError(f"head={head!r} is neither True, False nor a selector, such as 'lm_head'")
    integrations.load()
    with graphs.set_aside(model):
        return _convert(model, methods, strict, functional, _rest(rest, methods), head, exact_ends)


def _rest(given: Given, methods: Methods) -> Rest | None:
    """What the argument `rest` stands for."""
    if given == "auto":
        given = getattr(methods, "rest", given)  # of a file
    if given == "auto":
        choice = methods.get(EVERYTHING) if isinstance(methods, Mapping) else methods
        chosen = {choice} if isinstance(choice, Method) else set(choice or ())
        given = DEFAULT_REST if chosen.issuperset(DEFAULT_METHODS) and is_possible() else None
    return None if given is None else Rest(given)


def _convert(
    model: nn.Module,
    methods: Methods,
    strict: bool,
    functional: bool,
    rest: Rest | None,
    head: bool | Selector,
    exact_ends: bool,
) -> Conversion:
    layers = layers_of(model)
    if exact_ends:
        methods = with_exact_ends(methods, layers)
    assignment = Assignment(methods, layers)
    for layer in layers:
        assignment.add(layer)
    assignment.leave_idle(layers)
    if functional or rest is not None:
        assignment.cover_calls(layers, functional, rest, _entered(model))
    assignment.undo(layers)
    if head is not False:
        assignment.add_heads(model, layers, head)
    if strict:
        assignment.check(layers)
    if not isinstance(methods, Plan):  # a budget may be large enough for torch
        assignment.check_not_empty(layers)
    if assignment.carry_out():
        start_rounding()
    follow(layers, assignment, methods, functional, rest)
    return assignment.conversion(model, functional, rest)


def _entered(model: nn.Module) -> nn.Module:
    """The model within wrappers of torch's: `DataParallel`, FSDP, `torch.compile`."""
    inside = next(model.children(), None)
    wraps = type(model).__module__.startswith(_WRAPPERS)
    return _entered(inside) if wraps and inside is not None else model


_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.", "torch._dynamo.")


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
        if reason := class_changed(layer.module):
            raise CannotConvertError(f"{layer} cannot be reverted: {reason}")
    forget(model)
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

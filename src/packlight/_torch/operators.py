"""What an operator does when it is called, and what a compiler makes of it."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from packlight._torch.capabilities import LOWERINGS


def call_by(operator: Any, call: Callable[..., Any], dispatch: Callable[..., Any]) -> None:
    """Has `operator(...)` run `call`, as code of torch.compile calls it by its name.

    It stays the object that torch knows it by, of a class of its own. `dispatch(operator, ...)`,
    which is what its class does, takes keywords. Where torch's class takes no such change, calls
    go by the dispatcher as before.
    """

    def __call__(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return dispatch(self, *args, **kwargs) if kwargs else call(*args)

    kind = type(operator)
    try:
        operator.__class__ = type(kind.__name__, (kind,), {"__call__": __call__})
    except TypeError:
        return


_lowered: set[Any] = set()


def lower(operator: Any, made_of: Callable[..., Any]) -> None:
    """Has Inductor, if it is what compiles, write kernels for `operator` and not call it.

    `made_of(of, *args)` gives the result of the arguments, Inductor's tensors, by what it has for
    other operators, `of(operator)`. For code that is traced, which is lowered later: nothing here
    imports Inductor. Up to the lowering the operator is opaque, to partitioners as well.
    """
    if torch.compiler.is_dynamo_compiling():  # what comes behind the tracer asks again
        return
    if operator in _lowered or "torch._inductor.lowering" not in sys.modules:
        return
    if LOWERINGS.values is None:
        return
    register, lowerings = LOWERINGS.values
    register(operator, type_promotion_kind=None)(
        lambda *args: made_of(lowerings.__getitem__, *args)
    )
    _lowered.add(operator)

"""What all adapters share: each casts its input for itself, and all casts share a pack.

A layer of PEFT holds the layer that it adapts and matrices of its own, one set an adapter. They are
layers of torch.nn, which have torch's rules, or parameters, of which the files beside this one know
some. Of every other kind the casts alone are known.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from packlight import _torch
from packlight._classes import joined
from packlight.layers.casts import noted
from packlight.method import Method, Rule, Swap, rule_finder
from packlight.quantiser import Quantiser
from packlight.sketch.method import Sketch


class Adapter(nn.Module):
    """A layer of PEFT whose casts of its input are known as such."""

    method: Method

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        cast = super()._cast_input_dtype(x, dtype)  # type: ignore[misc]
        return noted(cast, x) if isinstance(x, Tensor) else cast


class ParameterAdapter(Adapter):
    """An adapter of a parameter, as of all experts of a mixture, which changes no value of it.

    PEFT makes the parameter a parametrized one for each forward pass, for which torch counts as if
    it were written to. Code that reads the adapted weight keeps its parts, the parameter among
    them, until the backward pass.
    """

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        wrapper: Any = super()
        adapted = wrapper._activate_lora(active_adapters)
        if torch.compiler.is_compiling():
            with adapted:
                yield
            return
        weight = self.get_param()  # type: ignore[operator]
        with _torch.unwritten(weight):
            adapted.__enter__()
        try:
            yield
        finally:
            with _torch.unwritten(weight):
                adapted.__exit__(*sys.exc_info())


# By the adapter's class: what it becomes, if it is known by more than its casts. The first that
# knows a class counts.
Known = Callable[[type[nn.Module]], type[nn.Module] | None]
_known: list[Known] = []


def knows(function: Known) -> Known:
    """Registers the decorated function, which may know what to make of a class for a quantiser."""
    _known.append(function)
    return function


@knows
def _of_parameter(kind: type[nn.Module]) -> type[nn.Module] | None:
    has = hasattr(kind, "_activate_lora") and hasattr(kind, "get_param")
    return ParameterAdapter if has and issubclass(kind, BaseTunerLayer) else None


@rule_finder
def _find(method: type[Method], kind: type[nn.Module]) -> Rule | None:
    if issubclass(method, Quantiser):
        for look in _known:
            mixin = look(kind)
            if mixin is not None:
                return _becomes(mixin)
    if issubclass(method, (Quantiser, Sketch)) and hasattr(kind, "_cast_input_dtype"):
        return _becomes(Adapter) if issubclass(kind, BaseTunerLayer) else None
    return None


def _becomes(mixin: type[nn.Module]) -> Rule:
    def swap(method: Method, module: nn.Module) -> Swap:
        return Swap(joined(mixin, type(module)), {"method": method})

    return swap


def trains(module: Any) -> bool:
    """Whether an adapter is at work in training, alone and apart from the layer that it adapts."""
    return bool(
        module.training
        and torch.is_grad_enabled()
        and not module.disable_adapters
        and not module.merged
    )

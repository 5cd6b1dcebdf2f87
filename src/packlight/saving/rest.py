"""`rest=` of `convert`: `saving` within the forward passes of a converted model.

The outermost module of the model that runs enters the context, for all that runs within it. So what
is called apart, by a trainer or by a re-entrant checkpoint, enters it by itself.

Hooks and a mode cost time at each call of a torch function. So a pass says whether they were worth
it, and where they were not, passes on no larger inputs go without, and so do the modules within,
whose notes about tensors would not be those of the layers around them.

What a step computes must not hang on the steps before it: a training that resumes in another
process knows nothing of them. So what a method would pack stays exact while all of it is not worth
it, in any pass alike, and a pass goes on with the hooks once it packed anything so. One that goes
without is, bit for bit, what it would be with them.

Hooks that are active already stay the ones that count: those of a checkpoint, which keeps nothing
inside, of `save_on_cpu`, and of a `saving` that stands around the model. Those of a measurement
only look on.
"""

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from packlight import _torch
from packlight._torch import graph
from packlight._torch.hooks import hooks_looked_through
from packlight.errors import InputError
from packlight.method import check_is_value
from packlight.quantiser import Quantiser
from packlight.saving.kept import unpack
from packlight.saving.rules import Rules
from packlight.saving.saver import Saver, hold_exactly
from packlight.saving.tensors import tensors_in

# What `convert` takes as `rest`.
Given: TypeAlias = Quantiser | Literal["auto"] | None

# Smaller tensors stay as they are. Models that step through time save many not much larger ones.
_MIN_BYTES = 1024

# The attribute of a pack hook of ours, by which it is known.
_OF_REST = "_packlight_rest"


@dataclasses.dataclass(frozen=True)
class Rest:
    """The method by which a model keeps what no rule is for; None for exactly."""

    method: Quantiser | None

    @property
    def exact(self) -> "Rest":
        """The one of a part of the model that is left to torch."""
        return Rest(None)

    def run(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a module's forward, which saves so unless hooks are active that count here."""
        if not torch.is_grad_enabled() or _torch.in_transform():
            return forward(*args, **kwargs)
        hooks = hooks_looked_through()
        around = Rest(None) if hooks is None else getattr(hooks[0], _OF_REST, self)
        if around == self or _passes.without == self:
            return forward(*args, **kwargs)
        if self.method is None:
            with saved_tensors_hooks(_exactly, unpack):
                return forward(*args, **kwargs)
        elements = sum(tensor.numel() for tensor in tensors_in((*args, *kwargs.values())))
        if 0 < elements <= _in_vain.get(module, {}).get(self, 0):
            outer, _passes.without = _passes.without, self
            try:
                return forward(*args, **kwargs)
            finally:
                _passes.without = outer
        saver = Saver(_rules(self.method), _MIN_BYTES, None, _WORTH)
        setattr(saver.hook, _OF_REST, self)
        with saver.active():
            result = forward(*args, **kwargs)
            saver.find((result,))  # the last operation may be a Function of Python code
        if not saver.has_packed and saver.replaced_bytes <= _WORTH * saver.seen_bytes:
            _in_vain.setdefault(module, {})[self] = elements
        return result


class _Passes(threading.local):
    without: Rest | None = None  # the one without which a module around runs


_passes = _Passes()

# The share of what a pass saves that has to be packed here, so that it is worth it: by a method, of
# what the pass has saved so far; without loss, as masks are, of all of it.
_WORTH = 0.02

# The most elements of the inputs of a module for which a pass was not worth it.
_in_vain: "weakref.WeakKeyDictionary[nn.Module, dict[Rest, int]]" = weakref.WeakKeyDictionary()


def is_of_rest(hook: Callable[..., Any]) -> bool:
    """Whether a pack hook is one by which a model keeps what no rule is for."""
    return hasattr(hook, _OF_REST)


def _exactly(tensor: Tensor) -> Any:
    return hold_exactly(tensor)


setattr(_exactly, _OF_REST, Rest(None))


@functools.cache
def _rules(method: Quantiser) -> Rules:
    return Rules(method, {})


def check_rest(rest: object) -> None:
    """Raises `InputError` for what is neither a quantiser, None, nor "auto"."""
    if rest is None or rest == "auto":
        return
    if not isinstance(rest, Quantiser):
        hint = f"; did you mean {rest.__name__}()?" if isinstance(rest, type) else ""
        raise InputError(
            f'rest={rest!r} is no quantiser, such as GroupQuant(bits=8), nor "auto" or None{hint}'
        )
    check_is_value(rest)
    if not is_possible():
        raise InputError(
            f"rest={rest!r} needs saved-tensor hooks and graph nodes as packlight knows them, which"
            f" torch {torch.__version__} has not; pass rest=None"
        )


def is_possible() -> bool:
    """Whether this torch shows which operation saves a tensor, and which hooks are active."""
    return graph.is_readable() and bool(_torch.HOOKS)

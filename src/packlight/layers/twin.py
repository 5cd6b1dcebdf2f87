"""`Twin`: a layer of torch.nn in all but what it keeps in training.

    class Mish(Quantised, nn.Mish):
        def training_forward(self, input: Tensor) -> Tensor:
            ...

`Quantised` is a twin with the arguments of one method, `nn.Mish` the plain layer. The constructor
takes the plain layer's arguments and after them the method's, by keyword. In `eval()` the plain
layer's forward runs, exact and twice differentiable; in training `training_forward` does. Converted
modules were made by the plain layer's constructor: a forward reads nothing that only a twin's sets,
but for the attributes of the conversion.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from packlight._torch import give_own_code
from packlight.calls import alone

_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Twin(nn.Module):
    """Base of the layers that keep by a method; stands before the plain layer among the bases."""

    training_forward: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        plain: Any = super()  # the classes behind this one, in the order of the class that is made
        # A subclass of a twin, and a mixin without a plain layer, have what they inherit.
        inherits = cls.forward is plain.forward and plain.forward is not nn.Module.forward
        if inherits and hasattr(cls, "training_forward"):
            cls.forward = _either(cls)
            if cls.__init__ is not plain.__init__:
                cls.__init__ = _constructor(cls)  # type: ignore[method-assign]
        if "forward" in vars(cls) and cls.__module__.startswith("packlight."):
            cls.forward = alone(cls, cls.forward)

    @property
    def options(self) -> dict[str, Any]:
        """How the layer keeps, as keyword arguments of a function."""
        return {}

    def _shown(self) -> dict[str, Any]:
        return self.options

    def extra_repr(self) -> str:
        own = [f"{name}={value}" for name, value in self._shown().items()]
        return ", ".join(filter(None, [super().extra_repr(), *own]))


def _either(cls: type[Twin]) -> Callable[..., Any]:
    """The forward of one class, under the name and the arguments of its `training_forward`."""

    @functools.wraps(cls.training_forward)
    def forward(self: Twin, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            return self.training_forward(*args, **kwargs)
        return super(Twin, self).forward(*args, **kwargs)

    forward.__name__, forward.__qualname__ = "forward", f"{cls.__qualname__}.forward"
    give_own_code(forward, f"forward_{cls.__module__}.{cls.__qualname__}")
    return forward


def _constructor(cls: type[Twin]) -> Callable[..., None]:
    """The constructor of one class; `inspect.signature` and `help` read its arguments."""

    def __init__(self: Twin, *args: Any, **kwargs: Any) -> None:
        super(cls, self).__init__(*args, **kwargs)

    __init__.__module__, __init__.__qualname__ = cls.__module__, f"{cls.__qualname__}.__init__"
    __init__.__signature__ = _signature(cls)  # type: ignore[attr-defined]
    return __init__


def _signature(cls: type[Twin]) -> inspect.Signature:
    """The plain constructor's arguments, then those of the classes before it, which pass on."""
    ours = cls.__mro__[: cls.__mro__.index(Twin)]
    plain: Any = super(Twin, cls)
    constructors = [vars(base)["__init__"] for base in ours if "__init__" in vars(base)]
    named = {
        parameter.name: parameter  # a default of ours stands in the place of the plain one
        for constructor in [plain.__init__, *reversed(constructors)]
        for parameter in inspect.signature(constructor).parameters.values()
        if parameter.kind not in _VARIABLE
    }
    return inspect.Signature(
        sorted(named.values(), key=lambda parameter: parameter.kind), return_annotation=None
    )


def start_batch(module: Any) -> dict[str, Any]:
    """Counts a batch of a batch norm that trains; the function's arguments but for the input."""
    momentum = 0.0 if module.momentum is None else module.momentum
    tracks = module.track_running_stats
    # Looked up once, as a module finds buffers by way of a function in Python.
    batches = module.num_batches_tracked if tracks else None
    if batches is not None:
        batches.add_(1)
        if module.momentum is None:  # a plain average of all batches
            momentum = 1.0 / float(batches)
    return {
        "running_mean": module.running_mean if tracks else None,
        "running_var": module.running_var if tracks else None,
        "weight": module.weight,
        "bias": module.bias,
        "training": True,
        "momentum": momentum,
        "eps": module.eps,
    }

"""Checks that every function of a layer makes before any work."""

import contextlib
import operator
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from packlight import _torch, _tracer
from packlight._imagined import as_imagined, device_kind, kind_of
from packlight.errors import DoubleBackwardError, InputError, ModifiedWeightError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STRIDED = torch.strided


def is_supported(x: Tensor) -> bool:
    """Whether it is a dense tensor of a floating dtype that the kernels know."""
    return x.dtype in _DTYPES and x.layout is _STRIDED and not x.is_nested


def is_plain(tensor: Tensor) -> bool:
    """Whether it is no instance of a tensor subclass, which may define torch functions itself."""
    return type(tensor) in (Tensor, nn.Parameter) or _torch.is_fake(tensor)


def is_sharded(x: object) -> bool:
    """Whether it is a DTensor. Nobody has one who has not imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_taken(x: Tensor) -> bool:
    """Whether layers take the tensor; any other is left to torch's own layer.

    Those that `check_tensor` refuses, and those of inference mode, which autograd cannot save.
    """
    if torch.compiler.is_dynamo_compiling():
        # One question: every layer asks, and the tracer is slow to follow.
        found: bool | None = _torch.ask("takes", None, x)
        return is_supported(x) and not is_transformed() if found is None else found
    if x.dtype not in _DTYPES or x.layout is not _STRIDED or x.is_nested:
        return False
    if torch.compiler.is_exporting() or _torch.in_transform():
        return False
    if type(x) is not Tensor and is_sharded(x):  # `packlight.sharded` gives layers their part of it
        return False
    return not (x.is_inference() and torch.is_grad_enabled())


@_torch.question
def takes(tracer: Any, x: Any) -> bool:
    """Whether layers take what is traced; False for what is no tensor."""
    if not issubclass(x.python_type(), Tensor):
        return False
    return is_supported(_tracer.fake_of(x)) and not tracer.output.export


def numbers(value: Any, axes: int, name: str) -> tuple[int, ...]:
    """`value`, one whole number or one an axis, as one an axis."""
    try:
        several = isinstance(value, (tuple, list, Sequence))  # the last is slow to ask
        found = tuple(map(operator.index, value if several else [value]))
    except TypeError:
        raise InputError(f"{name}={value!r} is neither a whole number nor several") from None
    if len(found) == 1:
        found = found * axes
    if len(found) != axes:
        raise InputError(f"{name}={value!r} has {len(found)} numbers; one or {axes} are expected")
    return found


def is_transformed() -> bool:
    """Whether a transform of torch.func or torch.export looks on: each needs torch's functions."""
    if torch.compiler.is_dynamo_compiling():
        # To the tracer of 2.11 `is_exporting` is always true.
        exported: bool = _torch.ask("is_exported", False)
        return exported
    return torch.compiler.is_exporting() or _torch.in_transform()


def check_tensor(x: object, function: str) -> None:
    """Raises `InputError` unless `x` is a tensor of a floating dtype that the kernels know."""
    if torch.compiler.is_dynamo_compiling() and _torch.ask("takes", False, x):
        return
    if not isinstance(x, Tensor):
        raise InputError(f"{function} takes a tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        raise InputError(
            f"{function} takes a dense tensor, got layout {x.layout}; densify it first"
        )
    if x.dtype not in _DTYPES:
        raise InputError(
            f"{function} takes float32, bfloat16, float16 or float64, got {x.dtype};"
            " convert it first, or use torch's own function"
        )
    if is_transformed() and torch.is_grad_enabled():
        raise InputError(
            f"{function} keeps packed bits, which torch.func and torch.export cannot differentiate;"
            " use torch's own function there, as a converted model does by itself"
        )


def check_numbers(function: str, **values: object) -> None:
    """Raises `InputError` unless every value is a number."""
    for name, value in values.items():
        if not isinstance(value, (int, float)):  # a tuple, for older versions of torch.compile
            raise InputError(f"{function}: {name}={value!r} is not a number")


def check_inplace(x: Tensor) -> None:
    """Raises what torch raises, before anything is written."""
    if torch.compiler.is_dynamo_compiling():
        return  # the compiler writes to nothing that it has not checked
    base = x._base if x._is_view() else x
    if base is not None and base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation."
        )


_autocast_dtypes: dict[tuple[object, ...], torch.dtype] = {}


def autocast(x: Tensor, name: Hashable | None, probe: Callable[[Tensor], Tensor]) -> Tensor:
    """`x` in the dtype in which autocast would run it; nothing keeps the cast copy.

    See `autocast_dtype` for the arguments.
    """
    dtype = autocast_dtype(x, name, probe)
    return x if x.dtype == dtype else x.to(dtype)


def autocast_dtype(
    x: Tensor,
    name: Hashable | None,
    probe: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
) -> torch.dtype:
    """The dtype of what torch's function returns for `x`, under autocast if it is on.

    `probe` runs torch's function on an empty tensor like `x`, so that torch's lists of functions
    are not repeated here. The answer is remembered for functions with a name. With `dtype` it is
    that for a tensor like `x` of this dtype.
    """
    kind = device_kind(x)
    dtype = x.dtype if dtype is None else dtype
    if not autocasts(kind):
        return dtype
    if name is None or torch.compiler.is_dynamo_compiling():
        return _probed(x, probe, dtype)
    key = (name, kind_of(x), dtype, torch.get_autocast_dtype(kind))
    found = _autocast_dtypes.get(key)
    if found is None:
        found = _autocast_dtypes[key] = _probed(x, probe, dtype)
    return found


def _probed(x: Tensor, probe: Callable[[Tensor], Tensor], dtype: torch.dtype) -> torch.dtype:
    # Without gradients: a checkpoint counts what is saved, and its passes must agree.
    with torch.no_grad(), as_imagined():
        return probe(x.detach().new_empty(0, dtype=dtype)).dtype


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a type of device; torch has none on meta."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> contextlib.AbstractContextManager[Any]:
    """A context for products whose dtypes are settled: autocast would round their operands."""
    return torch.autocast(kind, enabled=False) if autocasts(kind) else contextlib.nullcontext()


def needs_gradient(x: Tensor) -> bool:
    """Whether a backward pass may come, so that something must be kept."""
    return torch.is_grad_enabled() and x.requires_grad


def is_frozen(weight: Tensor) -> bool:
    """Whether this is a parameter that is not trained: nothing is kept for it, in any pass."""
    return isinstance(weight, nn.Parameter) and not weight.requires_grad


def refuse_second_derivative(keeps: str = "codes of its derivative") -> None:
    """Raises when a backward pass is itself being recorded (`create_graph=True`).

    `keeps` says what the layer keeps, for the message.
    """
    # Under torch.compile the tracer records with gradients on, and refuses double backward itself.
    if torch.is_grad_enabled() and not _torch.is_traced():
        raise DoubleBackwardError(
            f"this layer keeps {keeps} and cannot be differentiated twice; use the torch layer"
            " here (model.eval() does so too), or drop create_graph=True"
        )


def saved_with_weight(ctx: Any) -> tuple[Any, ...]:
    """The tensors that a layer saved, its weight among them.

    Under autocast torch's own layer saves a cast copy, which an optimizer's step leaves alone.
    """
    return _saved(
        ctx,
        "the weight of a converted layer was modified, as by an optimizer's step, between the"
        " layer's forward and its backward pass, which needs it as it was; step after the"
        " backward pass, or run the forward pass again after the step, or leave the layer to"
        " torch (None as its method), which under autocast keeps a cast copy",
    )


def saved_with_operands(ctx: Any) -> tuple[Any, ...]:
    """The tensors that a call saved, masks and weights among them that others are computed from.

    torch keeps no mask that it adds, so there one may be written to.
    """
    return _saved(
        ctx,
        "a mask, a bias or a weight was modified in place between the forward and the backward pass"
        " of code that reads it; scores or an adapted weight are computed from it once more, so it"
        " is needed as it was: write to a copy of it, or leave the module to torch (None as its"
        " method)",
    )


def _saved(ctx: Any, changed: str) -> tuple[Any, ...]:
    try:
        saved: tuple[Any, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise ModifiedWeightError(changed) from error
    return saved

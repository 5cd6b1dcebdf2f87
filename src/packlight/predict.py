"""`predict`: what a model would keep for its backward pass, without running it.

Model and inputs are copied onto fake tensors (`torch._subclasses.fake_tensor`), which have a shape,
a dtype and a device and no values, and the copy is profiled. So nothing is computed and no memory
used, and a model that does not fit can be looked at. Small tensors of whole numbers keep their
values: lengths, labels, and masks, of which models keep none that is all ones.
"""

import copy
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from packlight._swap import restore
from packlight.errors import InputError
from packlight.profile import _is_internal, _short_path, profile
from packlight.report import MemoryDifference, MemoryReport

__all__ = ["predict", "predict_change"]


def predict(
    model: nn.Module,
    /,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> MemoryReport:
    """What `packlight.profile(model, *inputs, loss=loss, **kwargs)` would report, without a run.

    Model and inputs may lie on any device, fake ones and "meta" among them, where a model of any
    size costs nothing: `with torch.device("meta"): model = Llama(config)`. `device` says where the
    run is imagined to be (None: where the tensors are, and the CPU for those on "meta"). What
    PyTorch keeps differs between devices: the mask of a dropout, for instance, is a byte an element
    on a GPU and a scaled copy on the CPU.

    Nothing is computed and nothing of the model changes. `allocated_bytes` and `peak_bytes` are
    None. Bytes are those of a run on the same device as far as PyTorch's fake kernels say truly
    what the real ones return: in tests within 3%, in most to the byte.

    Raises `InputError` for what is no module, for a device that is not there (autograd cannot do
    without it), and for a model whose forward pass depends on values (`.item()`, `nonzero`) of
    anything but small integer and bool inputs that are on the device, and constants: naming the
    operation and the line. Profile a run of that one.

    >>> import torch, packlight
    >>> with torch.device("meta"):
    ...     model = torch.nn.Sequential(torch.nn.Linear(4096, 16384), torch.nn.GELU())
    >>> packlight.predict(model, torch.empty(2048, 4096, device="meta")).activation_bytes
    134217728
    """
    (report,) = _predict(model, inputs, kwargs, loss, device, [lambda _: None])
    return report


def predict_change(
    model: nn.Module,
    /,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> MemoryDifference:
    """What a converted model would keep beside what it would keep as it was; see `predict`."""
    after, before = _predict(model, inputs, kwargs, loss, device, [lambda _: None, _restore_all])
    return before - after


def _restore_all(model: nn.Module) -> None:
    for module in model.modules():
        restore(module)


def _predict(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    loss: Callable[[Any], Tensor] | None,
    device: str | torch.device | None,
    changes: list[Callable[[nn.Module], None]],
) -> list[MemoryReport]:
    """One report after each of the changes, which are made to a fake copy of the model."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, of which no copy without values can be made; pass"
            " an nn.Module, or profile a run of it"
        )
    # Tensors that a loss brings along are real.
    mode = _Mode(allow_non_fake_inputs=True)
    with _Copying(mode, None if device is None else torch.device(device)):
        copied = copy.deepcopy((model, inputs, kwargs))
    fake, fake_inputs, fake_kwargs = copied
    reports = []
    for change in changes:
        change(fake)
        with _KnownValues(), mode:
            try:
                reports.append(profile(fake, *fake_inputs, loss=loss, **fake_kwargs))
            except _NEEDS_VALUES as error:
                raise InputError(_needs_values(error)) from error
    return reports


class _Mode(FakeTensorMode):
    """Knows of the grouped products of experts that they take any dtype, not bfloat16 alone."""

    def dispatch(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = {},
    ) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return super().dispatch(func, types, args, kwargs)
        with self:
            halves = [factor.to(torch.bfloat16) for factor in args[:2]]
        product: Any = super().dispatch(func, types, (*halves, *args[2:]), kwargs)
        with self:
            return product.to(args[0].dtype)


class _Copying(TorchFunctionMode):
    """Has `copy.deepcopy` give fake tensors in place of copies."""

    def __init__(self, mode: FakeTensorMode, device: torch.device | None) -> None:
        super().__init__()
        self.mode = mode
        self.device = device

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.clone:  # what `Parameter.__deepcopy__` calls
            return self.fake(args[0])
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                fake = self.fake(tensor)
                if isinstance(tensor, nn.Parameter):  # a fake one
                    fake = nn.Parameter(fake, tensor.requires_grad)
                memo[id(tensor)] = fake
            return memo[id(tensor)]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def fake(self, tensor: Tensor) -> Tensor:
        device = self.device
        if device is None:
            device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
        if device.type == "cuda" and not torch.cuda.is_available():
            raise InputError(
                f"device {device} is not there, and autograd does not work without it; predict for"
                " the CPU: device='cpu'"
            )
        if tensor.device == device and not isinstance(tensor, FakeTensor):
            if tensor.dtype in _WHOLE and tensor.numel() <= _MOST_KNOWN:
                with torch._C.DisableTorchFunctionSubclass():
                    return _known(tensor.clone())
            return self.mode.from_tensor(tensor, static_shapes=True)
        with torch._C.DisableTorchFunctionSubclass(), self.mode:
            return torch.empty_strided(
                tensor.shape,
                tensor.stride(),
                dtype=tensor.dtype,
                device=device,
                requires_grad=tensor.requires_grad,
            )


class _KnownValues(TorchFunctionMode):
    """Computes for real what depends on whole numbers only, while it is small.

    `layerdrop` tosses a coin; transformers counts positions and makes masks of ones, and looks
    whether these and those that it is given say anything.
    """

    def __torch_function__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        if tensors:
            # No more elements come of several tensors than each with each would give.
            is_known = (
                all(map(_is_known, tensors))
                and math.prod(tensor.numel() for tensor in tensors) <= _MOST_KNOWN
            )
        else:
            is_known = (func is torch.rand and args in (([],), ((),))) or (
                func in _MAKES_KNOWN and func(*args, **kwargs).numel() <= _MOST_KNOWN
            )
        if not is_known:
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                _known(tensor)
        return result


# Not `zeros`, into which models gather activations.
_MAKES_KNOWN = (torch.arange, torch.ones, torch.tensor)
_MOST_KNOWN = 2**20
_KNOWN = "_packlight_known"
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _known(tensor: Tensor) -> Tensor:
    setattr(tensor, _KNOWN, True)
    return tensor


def _is_known(tensor: Tensor) -> bool:
    """Whether it is one of those; what is real besides is a loss's own."""
    return not isinstance(tensor, FakeTensor) and (tensor.dim() == 0 or hasattr(tensor, _KNOWN))


_NEEDS_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)


def _needs_values(error: BaseException) -> str:
    operation = getattr(error, "func", error)
    lines = [
        f"{_short_path(frame.filename)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not _is_internal(frame.filename)
    ]
    where = f" at {lines[-1]}" if lines else ""
    module = failing_module(error)
    where += f" in {module}" if module else ""
    return (
        f"{operation}{where} needs the values of a tensor, and a prediction has none; use"
        " packlight.profile, which runs the model"
    )


def failing_module(error: BaseException) -> str:
    """The innermost module whose forward pass an error went through: "blocks.0.mlp (MLP)"."""
    running: list[nn.Module] = []
    frame = error.__traceback__
    while frame is not None:
        caller = frame.tb_frame.f_locals.get("self")
        if frame.tb_frame.f_code.co_name == "_call_impl" and isinstance(caller, nn.Module):
            running.append(caller)
        frame = frame.tb_next
    if not running:
        return ""
    names = {module: name for name, module in running[0].named_modules()}
    kind = type(running[-1]).__name__
    return f"{names.get(running[-1]) or 'the model itself'} ({kind})"

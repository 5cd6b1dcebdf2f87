"""One way to define an operator: schema, fake, reference for every device, Triton kernel for CUDA.

`reference` is plain PyTorch and defines what is true. `kernel` names a function with the same
signature in a `kernels` module, imported when the first CUDA tensor arrives, so that neither Triton
nor a GPU is needed to import packlight. Kernels compute in fp32: float64 takes the reference.
"""

import contextlib
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from packlight import _torch

_LIBRARY = torch.library.Library("packlight", "DEF")

# A plain global and not a context variable: backward of CUDA tensors runs on autograd's own
# threads, which inherit no context.
_reference_depth = 0


_PLAIN = (Tensor, torch.nn.Parameter)


@contextlib.contextmanager
def use_reference() -> Iterator[None]:
    """Within this context every operator of the process runs its plain-PyTorch reference.

    Settles in one line whether a doubt about a result is a doubt about a kernel. Forward and
    backward may run on different sides of it: both read the same packed form.
    """
    global _reference_depth
    _reference_depth += 1
    try:
        yield
    finally:
        _reference_depth -= 1


@functools.cache
def kernels_available() -> bool:
    """Whether Triton is installed, so that CUDA tensors take the kernels."""
    return importlib.util.find_spec("triton") is not None


def _is_too_old(x: Tensor) -> bool:
    """Whether the device lacks what kernels use: pairs of bfloat16, which came with 8.0."""
    device = x.device
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


def make_early(device: torch.device, make: Callable[[], Any]) -> None:
    """Has what operators keep on a device made while code is traced that will read it.

    The first run of the code may have the memory of CUDA graphs as its own, in which nothing may
    live on (`mode="reduce-overhead"`).
    """
    if device.type != "cuda" or torch.compiler.is_dynamo_compiling():
        return
    if torch.cuda.is_available() and kernels_available():
        with _torch.with_values():
            make()


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: str | None = None,
    tags: tuple[torch.Tag, ...] = (),
) -> Callable[..., Any]:
    """Registers `packlight::<schema>` and returns the callable operator.

    `kernel` is `"module:function"`, or None where plain PyTorch serves CUDA too. All operators are
    opaque to autograd: a `torch.autograd.Function` calls them, on tensors that need no gradient.
    Of the tags, `flexible_layout` says that a compiler may lay its inputs out as it likes; else it
    copies those that it has not written yet.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=tags)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"packlight::{name}", fake)

    operator: Callable[..., Any] = getattr(torch.ops.packlight, name).default
    places, written, dtypes, first = _places(schema)
    if first is None:  # nothing says on which device
        return operator
    on_cuda = reference if kernel is None else _launcher(kernel, reference, places, dtypes, first)
    if kernel is not None:
        _LIBRARY.impl(name, on_cuda, "CUDA")

    dispatch = type(operator).__call__

    def call(*args: Any) -> Any:
        """The operator, past the dispatcher where nothing looks on: that takes the CPU less."""
        if torch.compiler.is_dynamo_compiling():
            return operator(*args)
        tensor = args[first]
        if type(tensor) not in _PLAIN or not tensor.is_cuda or _torch.is_watched():
            return dispatch(operator, *args)
        if not written:
            return on_cuda(*args)
        changed = [args[place] for place in written if args[place] is not None]
        for tensor in changed:
            if tensor.is_inference():  # it has no version
                return dispatch(operator, *args)
        result = on_cuda(*args)
        torch.autograd.graph.increment_version(changed)  # as the dispatcher does
        return result

    _torch.call_by(operator, call, dispatch)
    return call


def _launcher(
    kernel: str,
    reference: Callable[..., Any],
    places: Sequence[int],
    dtypes: Sequence[int],
    first: int,
) -> Callable[..., Any]:
    """What launches the kernel for CUDA tensors, and runs the reference where it is to run."""
    module_name, _, function_name = kernel.partition(":")
    launch: Callable[..., Any] | None = None

    def on_cuda(*args: Any) -> Any:
        nonlocal launch
        for place in places:
            tensor = args[place]
            if tensor is not None and tensor.dtype is torch.float64:
                return reference(*args)
        for place in dtypes:  # of the result
            if args[place] is torch.float64:
                return reference(*args)
        if _reference_depth:
            return reference(*args)
        if launch is None:
            if not kernels_available() or _is_too_old(args[first]):
                return reference(*args)
            launch = getattr(importlib.import_module(module_name), function_name)
        tensor = args[first]
        if _torch.is_current_device(tensor):  # contexts cost more
            return launch(*args)
        with torch.cuda.device(tensor.device):  # Triton launches on the current device
            return launch(*args)

    return on_cuda


def _places(schema: str) -> tuple[list[int], list[int], list[int], int | None]:
    """Which arguments of a schema are tensors, or None, which of them are written to, which are
    dtypes, and the first tensor that is never None, if there is one.
    """
    arguments = re.split(r",\s*", schema[schema.index("(") + 1 : schema.rindex(") ->")])
    kinds = [re.sub(r"\(\w!\)", "", argument).split(" ")[0] for argument in arguments]
    tensors = [i for i, kind in enumerate(kinds) if kind in ("Tensor", "Tensor?")]
    written = [i for i in tensors if "!" in arguments[i]]
    dtypes = [i for i, kind in enumerate(kinds) if kind in ("ScalarType", "ScalarType?")]
    first = kinds.index("Tensor") if "Tensor" in kinds else None
    return tensors, written, dtypes, first

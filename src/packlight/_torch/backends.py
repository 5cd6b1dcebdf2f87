"""Tensors without values, layouts, and the backends: CUDA, attention, Triton."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from packlight._torch.capabilities import (
    CURRENT_DEVICE,
    CURRENT_STREAM,
    EMPTY,
    FAKES,
    FUSED_ATTENTION,
    HOLLOW,
    TESTED_TRITON,
    TRITON,
    look_up,
    warn_if_untested,
)

# ---- tensors without values ----------------------------------------------------------------------


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has a shape and no values."""
    return type(tensor) not in (Tensor, nn.Parameter) and (
        FAKES.values is not None and isinstance(tensor, FAKES.values[0])
    )


def with_values() -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors have values, also while a model without values is run."""
    if FAKES.values is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = FAKES.values[2]()
    return context


_Hollow = TypeVar("_Hollow", bound=Tensor)


def hollow(
    kind: type[_Hollow], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> _Hollow:
    """A tensor of a subclass that has a shape and no memory; needs `HOLLOW`."""
    assert HOLLOW.values is not None
    made: _Hollow = HOLLOW.values[0](kind, shape, dtype=dtype, device=device)
    return made


# ---- layouts, norms and pooling ------------------------------------------------------------------

_batch_norm = look_up("torch:_batch_norm_impl_index")
_adaptive_gradients = {
    axes: look_up(f"torch:ops.aten._adaptive_avg_pool{axes}d_backward") for axes in (2, 3)
}


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that torch's kernels read off the strides of `x`, dense or not.

    What `at::Tensor::suggest_memory_format` says, which Python cannot ask.
    """
    if x.dim() == 4:
        order: tuple[int, ...] = (1, 3, 2, 0)
        found = torch.channels_last
    elif x.dim() == 5:
        order, found = (1, 4, 3, 2, 0), torch.channels_last_3d
    else:
        return torch.contiguous_format
    if x.stride(1) == 0:
        return torch.contiguous_format
    least = 0
    for axis in order:
        size, stride = x.shape[axis], x.stride(axis)
        if size == 0 or stride < least or (axis == 0 and least == x.stride(1)):
            return torch.contiguous_format
        least = stride * size if size > 1 else stride
    return found


def batch_norm(*arguments: Any) -> tuple[Tensor, ...]:
    """Output, mean and rstd, first of its results, by the kernel that `F.batch_norm` takes.

    The last argument is whether cuDNN may be taken, which torch's public function does not do.
    """
    found: tuple[Tensor, ...]
    if _batch_norm is None:
        found = torch.native_batch_norm(*arguments[:-1])
    else:
        found = _batch_norm(*arguments)
    return found


def grouped_mm() -> tuple[Callable[..., Any], ...]:
    """What a mode sees of `torch.nn.functional.grouped_mm`; empty in releases without it."""
    seen = getattr(torch, "_grouped_mm", None)
    return () if seen is None or not hasattr(torch.nn.functional, "grouped_mm") else (seen,)


def adaptive_avg_pool_gradient(axes: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The gradient of an adaptive average pooling over two or three axes, by dy and the input.

    It reads the shape of the input and its memory format. None where torch does not name it.
    """
    gradient: Callable[[Tensor, Tensor], Tensor] | None = _adaptive_gradients[axes]
    return gradient


# ---- CUDA ----------------------------------------------------------------------------------------


def is_current_device(tensor: Tensor) -> bool:
    """Whether a CUDA tensor is on the current device; False where torch does not say.

    `torch.cuda.current_device` without its check that CUDA is there.
    """
    if CURRENT_DEVICE.values is None:
        return False
    return bool(tensor.get_device() == CURRENT_DEVICE.values[0]())


def empty(x: Tensor, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`x.new_empty_strided(shape, stride, dtype=dtype)` for `x` on the current device.

    As code of Inductor makes its tensors, past Python's arguments and the dispatcher: half the
    time. For kernels, which no mode looks into.
    """
    if EMPTY.values is None:
        return x.new_empty_strided(shape, stride, dtype=dtype)
    found: Tensor = EMPTY.values[0 if x.is_cuda else 1](shape, stride, dtype)
    return found


def current_stream(tensor: Tensor) -> int | None:
    """A number of the stream on which work on the tensor is queued, 0 on a CPU; None if unknown."""
    if not tensor.is_cuda:
        return 0
    if CURRENT_STREAM.values is None:
        return None
    stream: int = CURRENT_STREAM.values[0](tensor.get_device())
    return stream


# ---- attention -----------------------------------------------------------------------------------


def attention_backend(*arguments: Any, **options: Any) -> int:
    """Which of torch's attention kernels torch would take; its composition where it cannot say."""
    if FUSED_ATTENTION.values is None:
        return int(torch.nn.attention.SDPBackend.MATH.value)
    return int(FUSED_ATTENTION.values[0](*arguments, **options))


# ---- Triton --------------------------------------------------------------------------------------


def triton_version() -> str | None:
    """The release of Triton, None where it is not installed."""
    version: str | None = look_up("triton:__version__")
    return version


def own_launch(launcher: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """What a launcher of Triton calls for a kernel without scratch memory, and its settings.

    None where it is not known to do nothing else: its own call takes four functions of Python.
    """
    if (triton_version() or "").split(".")[:2] != ["3", "6"]:
        return None
    scratch = ("global_scratch_size", "profile_scratch_size")
    if any(getattr(launcher, name, None) != 0 for name in scratch):
        return None
    settings = (launcher.launch_cooperative_grid, launcher.launch_pdl, None, None)
    return launcher.launch, settings


@functools.cache
def launches_directly() -> bool:
    """Whether the launchers of this release of Triton take what `_launch.py` hands them."""
    version = triton_version()
    if version is None or not TRITON:
        return False
    warn_if_untested("Triton", version, TESTED_TRITON)
    release = torch.torch_version.TorchVersion(".".join(version.split(".")[:2]))
    return bool(TESTED_TRITON[0] <= release <= TESTED_TRITON[1])

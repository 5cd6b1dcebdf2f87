"""Who packed which tensor: a note on the tensor itself says what stands for it.

A layer that keeps something from which its output can be had again writes a note on that output,
and the layer that reads the output finds it there and keeps nothing of its own. The note is an
attribute of the tensor object: identity decides, nothing is looked up by address or by call order,
and the note goes when the tensor goes.

- **Version**: a note holds for the version of the tensor that it was written for. A tensor modified
  in place since has no note.
- **Views**: a reshape of a whole contiguous tensor is understood; any other view has no note.
- **torch.compile**: the tracer follows the attribute, so producer and consumer share within a
  compiled region. Versions are those of the tracer's example tensors. Inputs of the region get no
  note, which would outlive it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

_ATTRIBUTE = "_packlight_note"


class _Note(NamedTuple):
    version: int
    cast: Tensor


# What the tracer told of the tensor that was asked for last, during the tracing of a region.
_traced: dict[str, Any] = {}


def _ask_tracer(context: Any) -> None:
    variable = context.get_local("tensor")
    _traced["version"] = variable.as_fake()._version
    _traced["is_input"] = variable.as_proxy().node.op == "placeholder"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _told_version() -> int:
    version: int = _traced["version"]
    return version


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _told_is_input() -> bool:
    is_input: bool = _traced["is_input"]
    return is_input


def _version(tensor: Tensor) -> int:
    """How often the tensor was modified in place, as a constant where it is traced."""
    if torch.compiler.is_compiling():
        from torch._dynamo.comptime import comptime  # an import of a second, so only here

        comptime(_ask_tracer)
        version: int = _told_version()
        return version
    return tensor._version


def _is_compiled_input(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        from torch._dynamo.comptime import comptime

        comptime(_ask_tracer)
        is_input: bool = _told_is_input()
        return is_input
    return False


def note_cast(tensor: Tensor, cast: Tensor) -> None:
    """Notes on `tensor` that `cast` is the same result in another dtype, with its own gradient."""
    if not _is_compiled_input(tensor):
        setattr(tensor, _ATTRIBUTE, _Note(_version(tensor), cast))


def cast_of(tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The noted result of `tensor` in `dtype`, None where there is none that still holds."""
    owner = tensor
    note: _Note | None = getattr(tensor, _ATTRIBUTE, None)
    if note is None and not torch.compiler.is_compiling() and _is_reshape(tensor):
        owner = tensor._base  # type: ignore[assignment]
        note = getattr(owner, _ATTRIBUTE, None)
    if note is None or note.cast.dtype != dtype or note.version != _version(owner):
        return None
    # A hook on the tensor would not see a gradient that goes to the cast instead.
    if not torch.compiler.is_compiling() and (owner._backward_hooks or tensor._backward_hooks):
        return None
    return note.cast if owner is tensor else note.cast.view(tensor.shape)


def _is_reshape(tensor: Tensor) -> bool:
    """Whether the tensor is its base in another shape, all elements in the same order."""
    base = tensor._base
    return (
        base is not None
        and base.numel() == tensor.numel()
        and base.is_contiguous()
        and tensor.is_contiguous()
    )

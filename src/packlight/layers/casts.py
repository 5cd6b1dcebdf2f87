"""Casts, after which a reader shares what stands for the tensor that was cast.

They keep nothing, as torch's: a cast has the elements of its source, so a pack of either is a pack
of both (`sharing.note_copy`). Calls with further arguments stay torch's, and their results have
packs of their own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight import sharing


def noted(copy: Any, source: Tensor) -> Any:
    """The result of a cast of `source`, as which it is known from now on."""
    if isinstance(copy, Tensor) and copy.dtype != source.dtype:
        sharing.note_copy(copy, source)
    return copy


def to(input: Tensor, dtype: Any) -> Tensor:
    """`Tensor.to` with one argument, which may be a device or a tensor as well."""
    y: Tensor = noted(input.to(dtype), input)
    return y


def as_type(input: Tensor, dtype: Any = None) -> Any:
    """`Tensor.type`."""
    return noted(input.type() if dtype is None else input.type(dtype), input)


def type_as(input: Tensor, other: Tensor) -> Tensor:
    """`Tensor.type_as`."""
    y: Tensor = noted(input.type_as(other), input)
    return y


def float(input: Tensor) -> Tensor:
    """`Tensor.float`."""
    return to(input, torch.float32)


def half(input: Tensor) -> Tensor:
    """`Tensor.half`."""
    return to(input, torch.float16)


def bfloat16(input: Tensor) -> Tensor:
    """`Tensor.bfloat16`."""
    return to(input, torch.bfloat16)


def double(input: Tensor) -> Tensor:
    """`Tensor.double`."""
    return to(input, torch.float64)


# By what they become in a model's own code.
CASTS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.bfloat16: bfloat16,
    Tensor.double: double,
    Tensor.float: float,
    Tensor.half: half,
    Tensor.to: to,
    Tensor.type: as_type,
    Tensor.type_as: type_as,
}

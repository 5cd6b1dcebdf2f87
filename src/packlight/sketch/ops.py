"""The operators of sketches: schema, fake, reference, kernel.

x is [tokens, features], `seed` is [1] int64, and `rows` how many are kept; what is kept is one
tensor of bytes, `reference.Kept`.
"""

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.sketch import reference

_KERNELS = "packlight.sketch.kernels"


def _fake_keep(x: Tensor, seed: Tensor, kind: str, rows: int, dtype: torch.dtype) -> Tensor:
    size = reference.kept_bytes(kind, rows, x.shape[1], dtype.itemsize)
    return x.new_empty(size, dtype=torch.uint8)


keep = define_op(
    "sketch_keep(Tensor x, Tensor seed, str kind, SymInt rows, ScalarType dtype) -> Tensor",
    reference=reference.keep,
    fake=_fake_keep,
    kernel=f"{_KERNELS}:keep",
)


def _fake_weight_gradient(
    grad_output: Tensor,
    kept: Tensor,
    total: Tensor | None,
    kind: str,
    rows: int,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    return grad_output.new_empty((grad_output.shape[1], features))


weight_gradient = define_op(
    "sketch_weight_gradient(Tensor grad_output, Tensor kept, Tensor? total, str kind, SymInt rows,"
    " SymInt features, ScalarType dtype) -> Tensor",
    reference=reference.weight_gradient,
    fake=_fake_weight_gradient,
    kernel=f"{_KERNELS}:weight_gradient",
)

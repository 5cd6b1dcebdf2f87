"""The operators of fixed-point codes: schema, fake, reference, kernel.

`table` [6, channels] is what `reference.py` says.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.groupquant.fixed_point import reference
from packlight.packing.layout import compute_dtype, packed_bytes

_KERNELS = "packlight.groupquant.fixed_point.kernels"


def _fake_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
    width: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), *_fake_batch_norm_(x, bits)


def _fake_batch_norm_(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(packed_bytes(x.numel(), bits), dtype=torch.uint8)
    return codes, x.new_empty(reference.ROWS, x.shape[1], dtype=compute_dtype(x))


def _fake_batch_norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    table: Tensor,
    stride: Sequence[int],
    bits: int,
    relu: bool = False,
    signs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = grad_output.new_empty_strided(grad_output.shape, stride)
    return dx, table.new_empty(table.shape[1]), table.new_empty(table.shape[1])


batch_norm = define_op(
    "fixed_point_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, float momentum, float eps, int bits, float width)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.batch_norm,
    fake=_fake_batch_norm,
    kernel=f"{_KERNELS}:batch_norm",
)

batch_norm_ = define_op(
    "fixed_point_batch_norm_(Tensor(a!) x, Tensor? weight, Tensor? bias, Tensor(b!)? running_mean,"
    " Tensor(c!)? running_var, float momentum, float eps, int bits, float width, bool relu)"
    " -> (Tensor, Tensor)",
    reference=reference.batch_norm_,
    fake=lambda x, weight, bias, mean, var, momentum, eps, bits, width, relu: _fake_batch_norm_(
        x, bits
    ),
    kernel=f"{_KERNELS}:batch_norm_",
)

batch_norm_sum_ = define_op(
    "fixed_point_batch_norm_sum_(Tensor(a!) x, Tensor? weight, Tensor? bias,"
    " Tensor(b!)? running_mean, Tensor(c!)? running_var, float momentum, float eps, int bits,"
    " float width, Tensor other) -> (Tensor, Tensor, Tensor)",
    reference=reference.batch_norm_sum_,
    fake=lambda x, weight, bias, mean, var, momentum, eps, bits, width, other: (
        *_fake_batch_norm_(x, bits),
        x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8),
    ),
    kernel=f"{_KERNELS}:batch_norm_sum_",
)

batch_norm_backward = define_op(
    "fixed_point_batch_norm_backward(Tensor grad_output, Tensor codes, Tensor table,"
    " SymInt[] stride, int bits, bool relu, Tensor? signs)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.batch_norm_backward,
    fake=_fake_batch_norm_backward,
    kernel=f"{_KERNELS}:batch_norm_backward",
)

relu_backward = define_op(
    "fixed_point_relu_backward(Tensor grad_output, Tensor codes, Tensor table, SymInt[] stride,"
    " int bits) -> Tensor",
    reference=reference.relu_backward,
    fake=lambda grad_output, codes, table, stride, bits: grad_output.new_empty_strided(
        grad_output.shape, stride
    ),
    kernel=f"{_KERNELS}:relu_backward",
)

rebuild = define_op(
    "fixed_point_rebuild(Tensor codes, Tensor table, SymInt[] shape, SymInt[] stride, int bits,"
    " ScalarType dtype, bool relu) -> Tensor",
    reference=reference.rebuild,
    fake=lambda codes, table, shape, stride, bits, dtype, relu: codes.new_empty_strided(
        shape, stride, dtype=dtype
    ),
    kernel=f"{_KERNELS}:rebuild",
)

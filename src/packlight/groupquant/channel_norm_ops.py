"""Operators of batch norm and group norm that pack the normalised value.

Opaque to a compiler, since they write to running statistics. Plain PyTorch around the kernels of
`ops.quantize` and `ops.dequantize`, and torch's own kernels of the norms.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight._library import define_op
from packlight._seeds import from_operands
from packlight.groupquant.grouping import Grouping, Groups
from packlight.groupquant.method import GroupQuant
from packlight.layers import channel_norms
from packlight.packing.layout import compute_dtype


def batch_norm_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float, eps: float, groups: Groups,
    seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `packlight.layers.channel_norms.forward_batch`."""
    method = GroupQuant.of(groups)
    statistics = (running_mean, running_var, momentum)
    y, table, codes, scales = channel_norms.forward_batch(
        x, weight, bias, *statistics, eps, method, from_operands(seed, number)
    )
    return y, codes, scales, table


def batch_norm_backward_reference(
    grad_output: Tensor, codes: Tensor, scales: Tensor, table: Tensor, eps: float,
    stride: Sequence[int], groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `packlight.layers.channel_norms.backward_batch`."""
    kept, method = (table, codes, scales), GroupQuant.of(groups)
    return channel_norms.backward_batch(grad_output, kept, eps, tuple(stride), method)


def group_norm_reference(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    groups: Groups, seed: Tensor | None, number: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `packlight.layers.channel_norms.forward_group`."""
    method = GroupQuant.of(groups)
    y, table, rstd, codes, scales = channel_norms.forward_group(
        x, weight, bias, num_groups, eps, method, from_operands(seed, number)
    )
    return y, codes, scales, table, rstd


def group_norm_backward_reference(
    grad_output: Tensor, codes: Tensor, scales: Tensor, table: Tensor, rstd: Tensor, eps: float,
    stride: Sequence[int], groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `packlight.layers.channel_norms.backward_group`."""
    kept, method = (table, rstd, codes, scales), GroupQuant.of(groups)
    return channel_norms.backward_group(grad_output, kept, eps, tuple(stride), method)


# --- The operators.


def _fake_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float, eps: float, groups: Groups,
    seed: Tensor | None, number: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    table = x.new_empty(3, x.shape[1], dtype=compute_dtype(x))
    return torch.empty_like(x), *Grouping(1, x.numel(), *groups).empty_pack(x), table


def _fake_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float,
    groups: Groups, seed: Tensor | None, number: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    table = x.new_empty(2, x.shape[1], dtype=compute_dtype(x))
    rstd = table.new_empty(x.shape[0], num_groups)
    return torch.empty_like(x), *Grouping(1, x.numel(), *groups).empty_pack(x), table, rstd


def _fake_backward(
    grad_output: Tensor, codes: Tensor, scales: Tensor, table: Tensor, stride: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = grad_output.new_empty_strided(grad_output.shape, stride)
    return dx, table.new_empty(table.shape[1]), table.new_empty(table.shape[1])


batch_norm = define_op(
    "group_quant_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, float momentum, float eps, int[] groups, Tensor? seed, int number)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=batch_norm_reference,
    fake=_fake_batch_norm,
)

batch_norm_backward = define_op(
    "group_quant_batch_norm_backward(Tensor grad_output, Tensor codes, Tensor scales, Tensor table,"
    " float eps, SymInt[] stride, int[] groups) -> (Tensor, Tensor, Tensor)",
    reference=batch_norm_backward_reference,
    fake=lambda grad_output, codes, scales, table, eps, stride, groups: _fake_backward(
        grad_output, codes, scales, table, stride
    ),
)

group_norm = define_op(
    "group_quant_group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps,"
    " int[] groups, Tensor? seed, int number) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=group_norm_reference,
    fake=_fake_group_norm,
)

group_norm_backward = define_op(
    "group_quant_group_norm_backward(Tensor grad_output, Tensor codes, Tensor scales, Tensor table,"
    " Tensor rstd, float eps, SymInt[] stride, int[] groups) -> (Tensor, Tensor, Tensor)",
    reference=group_norm_backward_reference,
    fake=lambda grad_output, codes, scales, table, rstd, eps, stride, groups: _fake_backward(
        grad_output, codes, scales, table, stride
    ),
)

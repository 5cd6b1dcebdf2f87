"""The operators of the inverted norms: schema, fake, reference, kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.inverted import norm_reference as reference
from packlight.packing.layout import compute_dtype


def _fake_row_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    channels: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
    cast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = 1
    for size in x.shape[: x.dim() - len(normalized_shape)]:
        rows *= size
    y = x.new_empty(x.shape, dtype=dtype)
    narrow = y.new_empty(0) if cast is None else torch.empty_like(y, dtype=cast)
    exact = y.new_empty(0)
    if channels is not None:
        exact = y.new_empty((rows, channels.numel()), dtype=cast or dtype)
    return y, narrow, y.new_empty(rows, dtype=compute_dtype(y)), exact


def _fake_row_norm_backward(
    grad_output: Tensor,
    y: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    channels: Tensor | None,
    rstd: Tensor,
    exact: Tensor | None,
    centred: bool,
    dtype: torch.dtype,
    needs_input: bool,
    needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = y.new_empty(y.shape if needs_input else 0, dtype=dtype)
    return dx, *_fake_affine(y, weight, bias, needs_affine)


def _fake_affine(
    y: Tensor, weight: Tensor | None, bias: Tensor | None, needed: bool
) -> tuple[Tensor, Tensor]:
    none = y.new_empty(0)
    dgamma = torch.empty_like(weight) if needed and weight is not None else none
    dbeta = torch.empty_like(bias) if needed and bias is not None else y.new_empty(0)
    return dgamma, dbeta


row_norm = define_op(
    "inverted_row_norm(Tensor x, SymInt[] normalized_shape, Tensor? weight, Tensor? bias,"
    " Tensor? channels, float eps, bool centred, ScalarType dtype, ScalarType? cast)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.row_norm,
    fake=_fake_row_norm,
    kernel="packlight.inverted.norm_kernels:row_norm",
)

row_norm_backward = define_op(
    "inverted_row_norm_backward(Tensor grad_output, Tensor y, SymInt[] normalized_shape,"
    " Tensor? weight, Tensor? bias, Tensor? channels, Tensor rstd, Tensor? exact, bool centred,"
    " ScalarType dtype, bool needs_input, bool needs_affine) -> (Tensor, Tensor, Tensor)",
    reference=reference.row_norm_backward,
    fake=_fake_row_norm_backward,
    kernel="packlight.inverted.norm_kernels:row_norm_backward",
)


def _fake_channel_norm(
    x: Tensor,
    statistics: tuple[int, int],
    channels: Tensor | None,
    dtype: torch.dtype,
    kept: torch.dtype,
    layout: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout)
    rstd = x.new_empty(statistics, dtype=compute_dtype(y))
    exact = y.new_empty(0)
    if channels is not None:
        exact = y.new_empty((x.shape[0], channels.numel(), *x.shape[2:]), dtype=kept)
    return y, rstd, exact


def _fake_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    channels: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = reference.batch_norm_format(x)
    return _fake_channel_norm(x, (1, x.shape[1]), channels, dtype, kept, layout)


def _fake_group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channels: Tensor | None,
    groups: int,
    eps: float,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = reference.group_norm_format(x)
    return _fake_channel_norm(x, (x.shape[0], groups), channels, dtype, kept, layout)


def _fake_instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    channels: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
    kept: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = torch.contiguous_format
    return _fake_channel_norm(x, (x.shape[0], x.shape[1]), channels, dtype, kept, layout)


def _fake_channel_norm_backward(
    grad_output: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    channels: Tensor | None,
    rstd: Tensor,
    exact: Tensor | None,
    dtype: torch.dtype,
    needs_input: bool,
    needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = y.new_empty(0, dtype=dtype)
    if needs_input:
        layout = reference.batch_norm_format(y)
        dx = torch.empty(y.shape, dtype=dtype, device=y.device, memory_format=layout)
    return dx, *_fake_affine(y, weight, bias, needs_affine)


# Plain PyTorch serves the norms of channels on CUDA too: torch's own forward, and few operations
# in the backward.
batch_norm = define_op(
    "inverted_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor? channels, float momentum, float eps, ScalarType dtype,"
    " ScalarType kept) -> (Tensor, Tensor, Tensor)",
    reference=reference.batch_norm,
    fake=_fake_batch_norm,
)

group_norm = define_op(
    "inverted_group_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? channels, int groups,"
    " float eps, ScalarType dtype, ScalarType kept) -> (Tensor, Tensor, Tensor)",
    reference=reference.group_norm,
    fake=_fake_group_norm,
)

instance_norm = define_op(
    "inverted_instance_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, Tensor? channels, float momentum, float eps, ScalarType dtype,"
    " ScalarType kept) -> (Tensor, Tensor, Tensor)",
    reference=reference.instance_norm,
    fake=_fake_instance_norm,
)

channel_norm_backward = define_op(
    "inverted_channel_norm_backward(Tensor grad_output, Tensor y, Tensor? weight, Tensor? bias,"
    " Tensor? channels, Tensor rstd, Tensor? exact, ScalarType dtype, bool needs_input,"
    " bool needs_affine) -> (Tensor, Tensor, Tensor)",
    reference=reference.channel_norm_backward,
    fake=_fake_channel_norm_backward,
)

"""Operators of batch norm and group norm that pack the normalised value.

Plain PyTorch around the kernels of `ops.quantize` and `ops.dequantize`, and torch's own kernels of
the norms: the backward pass of a norm that is given x~ for its input, mean 0 and rstd 1 is that of
the packed one, but for the factor rstd. A group of values spans channels, so what is packed is
x_hat / d, d the `deviation` of x_hat, and torch's kernels are given d for rstd.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.groupquant import ops
from packlight.groupquant.fixed_point.reference import deviation
from packlight.groupquant.method import Grouping
from packlight.packing.layout import compute_dtype, dense_stride


def _dense(y: Tensor, stride: Sequence[int]) -> Tensor:
    if y.stride() == tuple(stride):
        return y
    return y.new_empty_strided(y.shape, tuple(stride)).copy_(y)


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """[channels] as it multiplies `x` [n, channels, ...]."""
    return values.view(-1, *[1] * (x.dim() - 2))


def batch_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    bits: int,
    group_size: int,
    seed: Tensor | None,
    number: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, codes and scales of x_hat / d, and [3, channels]: gamma d, beta, rstd."""
    y, mean, rstd = torch.native_batch_norm(
        x, weight, bias, running_mean, running_var, True, momentum, eps
    )
    stride, dtype = dense_stride(x), compute_dtype(x)
    mean, rstd = mean.to(dtype), rstd.to(dtype)
    d = deviation(rstd, eps)
    values = (x - along_channels(mean, x)) * along_channels(rstd / d, x)
    codes, scales = ops.quantize(values, stride, bits, group_size, seed, number)
    gamma = torch.ones_like(rstd) if weight is None else weight.to(dtype)
    beta = torch.zeros_like(rstd) if bias is None else bias.to(dtype)
    return _dense(y, stride), codes, scales, torch.stack([gamma * d, beta, rstd])


def batch_norm_backward_reference(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    eps: float,
    stride: Sequence[int],
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the memory order of `stride`, dgamma and dbeta [channels]."""
    x = _normalised(grad_output, codes, scales, stride, bits, group_size)
    gamma, _, rstd = table  # gamma d
    d = deviation(rstd, eps)
    dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        _dense(grad_output, stride), x, gamma * rstd / d.square(), None, None, torch.zeros_like(d),
        d, True, 0.0, [True, True, True],
    )  # fmt: skip
    return _dense(dx, stride), dgamma, dbeta


def _normalised(
    like: Tensor, codes: Tensor, scales: Tensor, stride: Sequence[int], bits: int, group_size: int
) -> Tensor:
    """The packed values in the shape and dtype of `like`."""
    layout = (like.shape, stride, like.numel(), bits, group_size)
    x: Tensor = ops.dequantize(codes, scales, *layout, like.dtype, "", (), None, None)
    return x


def group_norm_reference(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    bits: int,
    group_size: int,
    seed: Tensor | None,
    number: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, codes and scales of x_hat / d, [2, channels] gamma and beta, and rstd [n, groups]."""
    n, channels = x.shape[:2]
    stride, dtype = dense_stride(x), compute_dtype(x)
    size = x.numel() // (n * channels)
    y, mean, rstd = torch.native_group_norm(
        _regular(x), weight, bias, n, channels, size, groups, eps
    )
    mean, rstd = mean.to(dtype), rstd.to(dtype)
    values = (x - along_groups(mean, x)) * along_groups(rstd / deviation(rstd, eps), x)
    codes, scales = ops.quantize(values, stride, bits, group_size, seed, number)
    gamma = torch.ones(channels, dtype=dtype, device=x.device) if weight is None else weight
    beta = torch.zeros_like(gamma) if bias is None else bias
    return _dense(y, stride), codes, scales, torch.stack([gamma.to(dtype), beta.to(dtype)]), rstd


def _regular(x: Tensor) -> Tensor:
    """`x` in a memory format that torch's kernels of group norm take."""
    if x.device.type == "cpu":
        for layout in (torch.channels_last, torch.channels_last_3d):
            axes = 4 if layout == torch.channels_last else 5
            if x.dim() == axes and x.is_contiguous(memory_format=layout):
                return x
    return x.contiguous()


def along_groups(values: Tensor, x: Tensor) -> Tensor:
    """[n, groups] as it multiplies `x` [n, channels, ...]."""
    repeats = x.shape[1] // values.shape[1]
    return values.repeat_interleave(repeats, 1).view(*x.shape[:2], *[1] * (x.dim() - 2))


def group_norm_backward_reference(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    table: Tensor,
    rstd: Tensor,
    eps: float,
    stride: Sequence[int],
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx in the memory order of `stride`, dgamma and dbeta [channels]."""
    x = _normalised(grad_output, codes, scales, stride, bits, group_size)
    n, channels = x.shape[:2]
    size = x.numel() // (n * channels)
    d = deviation(rstd, eps)
    dx, dgamma, dbeta = torch.ops.aten.native_group_norm_backward(
        _regular(_dense(grad_output, stride)), _regular(x), torch.zeros_like(d), d, table[0], n,
        channels, size, rstd.shape[1], [True, True, True],
    )  # fmt: skip
    dx = (dx * along_groups(rstd / d, dx)).to(grad_output.dtype)
    return _dense(dx, stride), dgamma, dbeta


# --- The operators.


def _fake_pack(x: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    grouping = Grouping(1, x.numel(), bits, group_size)
    codes = x.new_empty(grouping.code_bytes, dtype=torch.uint8)
    return codes, x.new_empty(grouping.groups, dtype=torch.int32)


def _fake_batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, momentum: float, eps: float, bits: int, group_size: int,
    seed: Tensor | None, number: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    table = x.new_empty(3, x.shape[1], dtype=compute_dtype(x))
    return torch.empty_like(x), *_fake_pack(x, bits, group_size), table


def _fake_group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, bits: int,
    group_size: int, seed: Tensor | None, number: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    table = x.new_empty(2, x.shape[1], dtype=compute_dtype(x))
    rstd = table.new_empty(x.shape[0], groups)
    return torch.empty_like(x), *_fake_pack(x, bits, group_size), table, rstd


def _fake_backward(
    grad_output: Tensor, codes: Tensor, scales: Tensor, table: Tensor, stride: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dx = grad_output.new_empty_strided(grad_output.shape, stride)
    return dx, table.new_empty(table.shape[1]), table.new_empty(table.shape[1])


batch_norm = define_op(
    "group_quant_batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, float momentum, float eps, int bits, int group_size, Tensor? seed,"
    " int number) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=batch_norm_reference,
    fake=_fake_batch_norm,
)

batch_norm_backward = define_op(
    "group_quant_batch_norm_backward(Tensor grad_output, Tensor codes, Tensor scales, Tensor table,"
    " float eps, SymInt[] stride, int bits, int group_size) -> (Tensor, Tensor, Tensor)",
    reference=batch_norm_backward_reference,
    fake=lambda grad_output, codes, scales, table, eps, stride, bits, group_size: _fake_backward(
        grad_output, codes, scales, table, stride
    ),
)

group_norm = define_op(
    "group_quant_group_norm(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps,"
    " int bits, int group_size, Tensor? seed, int number)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=group_norm_reference,
    fake=_fake_group_norm,
)

group_norm_backward = define_op(
    "group_quant_group_norm_backward(Tensor grad_output, Tensor codes, Tensor scales, Tensor table,"
    " Tensor rstd, float eps, SymInt[] stride, int bits, int group_size)"
    " -> (Tensor, Tensor, Tensor)",
    reference=group_norm_backward_reference,
    fake=lambda grad_output, codes, scales, table, rstd, eps, stride, bits, group_size: (
        _fake_backward(grad_output, codes, scales, table, stride)
    ),
)

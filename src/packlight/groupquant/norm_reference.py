"""Layer and RMS norm that keep the group-quantised normalised value, in plain PyTorch.

The pack is of x_hat = (x - mean) rstd as rows of `width` elements, the normalised dimensions; RMS
norm has no mean.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from packlight._seeds import as_tensor
from packlight.groupquant.reference import dequantize_rows, quantize_rows
from packlight.packing.layout import compute_dtype


def normalise(x: Tensor, eps: float, center: bool) -> tuple[Tensor, Tensor]:
    """x_hat [rows, width] and rstd [rows, 1] in the dtype that torch computes in."""
    values = x.to(compute_dtype(x))
    if center:
        values = values - values.mean(-1, keepdim=True)
    rstd = (values.square().mean(-1, keepdim=True) + eps).rsqrt()
    return values * rstd, rstd


def norm(
    x: Tensor,
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    bits: int,
    group_size: int,
    seed: Tensor | None,
    number: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, bit-equal to torch's, codes and scales of x_hat, rstd [rows], copies of the parameters.

    `x` is [rows, width]. The copies are empty where there is no weight or bias.
    """
    if center:
        y = F.layer_norm(x, (width,), weight, bias, eps)
    else:
        y = F.rms_norm(x, (width,), weight, eps)
    x_hat, rstd = normalise(x, eps, center)
    key = as_tensor(seed, number, x.device)
    codes, scales = quantize_rows(x_hat.float().reshape(-1), width, bits, group_size, key)
    copies = (x.new_empty(0) if p is None else p.clone() for p in (weight, bias))
    weight_copy, bias_copy = copies
    return y, codes, scales, rstd.view(-1), weight_copy, bias_copy


def norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    center: bool,
    need_weight: bool,
    need_bias: bool,
    bits: int,
    group_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = rstd (g - mean g - x~ mean(g x~)), g = dy weight; dweight = sum dy x~, dbias = sum dy.

    `grad_output` is [..., width], of two dimensions or more. Sums that are not needed are empty.
    """
    *others, width = grad_output.shape
    x_hat = dequantize_rows(codes, scales, math.prod(others), width, bits, group_size)
    dtype = compute_dtype(grad_output)
    x_hat = x_hat.to(dtype).view(grad_output.shape)
    dy = grad_output.to(dtype)
    g = dy if weight is None else dy * weight.to(dtype)
    dx = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    if center:
        dx = dx - g.mean(-1, keepdim=True)
    dx = (dx * rstd.to(dtype).view(*others, 1)).to(grad_output.dtype)
    nothing = dy.new_empty(0)
    rows = tuple(range(len(others)))
    dweight = (dy * x_hat).sum(rows) if need_weight else nothing
    dbias = dy.sum(rows) if need_bias else nothing
    return dx, dweight, dbias

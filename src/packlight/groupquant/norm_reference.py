"""Layer and RMS norm that keep the group-quantised normalised value, in plain PyTorch.

The pack is of x_hat = (x - mean) rstd as rows of `width` elements, the normalised dimensions; RMS
norm has no mean. Behind them, a layer norm of a residual sum with the dropout before it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight._seeds import as_tensor
from packlight.fewbit import dropout_reference
from packlight.fewbit.reference import decode_backward
from packlight.groupquant.grouping import ROTATED, Grouping, Groups
from packlight.groupquant.reference import dequantize_rows, quantize_rows
from packlight.layers.norms import differentiate, normalise


def norm(
    x: Tensor,
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    groups: Groups,
    seed: Tensor | None,
    number: int,
    rounded_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, bit-equal to torch's, codes and scales of x_hat, rstd [rows], copies of the parameters.

    `x` is [..., width], contiguous. The copies are empty where there is no weight or bias. Of an
    RMS norm x_hat may be rounded to a dtype before it meets the weight, as transformers has it.
    """
    if center:
        y = F.layer_norm(x, (width,), weight, bias, eps)
    elif weight is None or rounded_to is None:
        y = F.rms_norm(x, (width,), weight, eps)
    else:
        y = weight * F.rms_norm(x, (width,), None, eps).to(rounded_to)
    x_hat, rstd = normalise(x, eps, center)
    key = as_tensor(seed, number, x.device)
    x_hat = x_hat.float()
    if x.dtype == torch.bfloat16 and Grouping(1, width, *groups).code == ROTATED:
        x_hat = x_hat.bfloat16()
    codes, scales = quantize_rows(x_hat.reshape(-1), width, groups, key)
    copies = (x.new_empty(0) if p is None else p.clone() for p in (weight, bias))
    weight_copy, bias_copy = copies
    return y, codes, scales, rstd.view(-1), weight_copy, bias_copy


def output_dtype(x: Tensor, weight: Tensor | None, rounded_to: torch.dtype | None) -> torch.dtype:
    """That of the output of `norm`."""
    if weight is None or rounded_to is None:
        return x.dtype
    return torch.promote_types(weight.dtype, rounded_to)


def norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    center: bool,
    need_weight: bool,
    need_bias: bool,
    groups: Groups,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `packlight.layers.norms.differentiate`; `added` is a tensor like dx."""
    *others, width = grad_output.shape
    x_hat = dequantize_rows(codes, scales, math.prod(others), width, groups)
    found = differentiate(grad_output, x_hat, rstd, weight, center, need_weight, need_bias)
    return found if added is None else (found[0] + added, *found[1:])


def post_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype,
    groups: Groups,
    mask_seed: Tensor | None,
    mask_number: int,
    seed: Tensor | None,
    number: int,
) -> tuple[Tensor, ...]:
    """What `norm` gives of dropout(x, p) + residual in `dtype`, and the mask of the dropout.

    Both terms are [..., width], contiguous, of two dimensions or more. The mask is that of
    `fewbit`'s dropout, empty where p is 0.
    """
    mask = x.new_empty(0, dtype=torch.uint8)
    if p:
        x, mask = dropout_reference.dropout(x, mask_seed, mask_number, p, True)
    total = (x + residual).to(dtype)
    return *norm(total, x.shape[-1], weight, bias, eps, True, groups, seed, number), mask


def post_norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    mask: Tensor,
    p: float,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    need_weight: bool,
    need_bias: bool,
    groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and of the residual, and one [sums, width] of those of weight and bias.

    x and the residual have these dtypes. The first is empty where it is the second: nothing was
    dropped and both have one dtype. Rows of sums that are not needed are not there.
    """
    total, dweight, dbias = norm_backward(
        grad_output, codes, scales, rstd, weight, True, need_weight, need_bias, groups
    )
    dx = total.to(dtype)
    if p:
        dx = decode_backward(dx, mask, 1, (0.0, 1 / (1 - p)), False, dx.stride())
    elif dtype == residual_dtype:
        dx = rstd.new_empty(0)
    sums = torch.cat((dweight, dbias)).view(need_weight + need_bias, grad_output.shape[-1])
    return dx, total.to(residual_dtype).view_as(grad_output), sums

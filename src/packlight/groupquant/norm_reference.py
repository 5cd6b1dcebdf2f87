"""Layer and RMS norm that keep the group-quantised normalised value, in plain PyTorch.

The pack is of x_hat = (x - mean) rstd as rows of `width` elements, the normalised dimensions; RMS
norm has no mean.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from packlight._seeds import as_tensor
from packlight.groupquant.grouping import Groups
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, bit-equal to torch's, codes and scales of x_hat, rstd [rows], copies of the parameters.

    `x` is [..., width], contiguous. The copies are empty where there is no weight or bias.
    """
    if center:
        y = F.layer_norm(x, (width,), weight, bias, eps)
    else:
        y = F.rms_norm(x, (width,), weight, eps)
    x_hat, rstd = normalise(x, eps, center)
    key = as_tensor(seed, number, x.device)
    codes, scales = quantize_rows(x_hat.float().reshape(-1), width, groups, key)
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
    groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `packlight.layers.norms.differentiate`."""
    *others, width = grad_output.shape
    x_hat = dequantize_rows(codes, scales, math.prod(others), width, groups)
    return differentiate(grad_output, x_hat, rstd, weight, center, need_weight, need_bias)

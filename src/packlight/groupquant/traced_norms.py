"""The operators of norms as operations that a compiler fuses with what is around them.

A norm stands between a sum, a dropout and a cast. To a compiler an operator of ours is opaque: it
must write the sum out for it, and read the output again for the cast; of operations it makes one
kernel. What remains opaque is the pack, which reads x_hat in the bits in which matmuls behind do.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight.groupquant import norm_reference, ops
from packlight.packing.layout import compute_dtype


def packed_dtype(x: Tensor, bits: int) -> torch.dtype:
    """The dtype in which x_hat is packed: under autocast that in which a matmul would read it.

    Codes of 8 bits are as fine as bfloat16, whose rounding would show.
    """
    kind = x.device.type
    if bits == 8:
        return compute_dtype(x)
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def operators(
    width: int, group_size: int, dtype: torch.dtype
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`ops.norm` and `ops.norm_backward`, or what stands for them in a compiled region.

    Rows with a ragged group are the operators' also there. `dtype` is `packed_dtype` of what is
    normalised.
    """
    if torch.compiler.is_compiling() and width % group_size == 0:
        return norm, functools.partial(norm_backward, dtype=dtype)
    return ops.norm, ops.norm_backward


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ops.norm` gives, with y to rounding, for a width of whole groups."""
    x_hat, rstd = norm_reference.normalise(x, eps, center)
    packed = x_hat.to(packed_dtype(x, bits))
    codes, scales = ops.quantize(packed, (width, 1), bits, group_size, seed)
    y = x_hat if weight is None else x_hat * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype), codes, scales, rstd.view(-1)


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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `ops.norm_backward` gives; `dtype` is the one in which x_hat was packed."""
    shape = tuple(grad_output.shape)
    layout = (shape, (shape[1], 1), grad_output.numel(), bits, group_size)
    x_hat = ops.dequantize(codes, scales, *layout, dtype, "", (), None, None)
    x_hat = x_hat.to(compute_dtype(grad_output))
    return norm_reference.gradients(
        grad_output, x_hat, rstd, weight, center, need_weight, need_bias
    )

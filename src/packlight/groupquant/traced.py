"""The operators of norms as operations that a compiler fuses with what is around them.

A norm stands between a sum, a dropout and a cast. To a compiler an operator of ours is opaque: it
must write the sum out for it, and read the output again for the cast; of operations it makes one
kernel. What remains opaque is the pack, which reads x_hat in the bits in which matmuls behind do,
and what its groups' codes stand for, of which the random numbers are forty operations. The rest of
the backward pass is the reference: a compiler reads the codes where it needs x_hat.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight import _torch
from packlight.groupquant import norm_reference, ops
from packlight.groupquant.grouping import OFFSET, Groups
from packlight.groupquant.minmax_reference import on_line
from packlight.groupquant.planes import from_bytes
from packlight.layers.norms import differentiate, normalise
from packlight.packing.layout import compute_dtype


def _packed_dtype(x: Tensor, bits: int) -> torch.dtype:
    """The dtype in which x_hat is packed: under autocast that in which a matmul would read it.

    Codes of 8 bits are as fine as bfloat16, whose rounding would show.
    """
    kind = x.device.type
    if bits == 8:
        return compute_dtype(x)
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x.dtype
    return torch.get_autocast_dtype(kind)


def operators(width: int, groups: Groups) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`ops.norm` and `ops.norm_backward`, or what stands for them in a compiled region.

    Rows with a ragged group are the operators' also there.
    """
    _, group_size, *_ = groups
    if _torch.is_traced() and width % group_size == 0:
        return norm, norm_backward
    return ops.norm, ops.norm_backward


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
    rounded_to: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `ops.norm` gives, with y to rounding, for a width of whole groups.

    There are no copies of the parameters: what a compiled region keeps is the region's own.
    """
    x_hat, rstd = normalise(x, eps, center)
    bits, *_ = groups
    packed = x_hat.to(_packed_dtype(x, bits))
    codes, scales = ops.quantize(packed, x.stride(), groups, seed, number)
    if weight is not None and rounded_to is not None:
        y = weight * x_hat.to(x.dtype).to(rounded_to)
        return y, codes, scales, rstd.view(-1)
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
    groups: Groups,
    added: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `ops.norm_backward` gives, to rounding, for a width of whole groups."""
    bits, group_size, code = groups
    needs = need_weight, need_bias
    if code != OFFSET:
        return norm_reference.norm_backward(
            grad_output, codes, scales, rstd, weight, center, *needs, groups, added
        )
    lines = [each.view(-1, 1) for each in ops.line(scales, bits)]
    x_hat = on_line(from_bytes(codes, bits, group_size), *lines).view(-1, grad_output.shape[-1])
    found = differentiate(grad_output, x_hat, rstd, weight, center, *needs)
    return found if added is None else (found[0] + added, *found[1:])

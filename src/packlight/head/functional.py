"""Losses of a head without its logits."""

import math
from typing import Any

import torch
from torch import Tensor

from packlight._checks import autocast_dtype, check_tensor
from packlight.errors import InputError
from packlight.head.rows import Curve, Shares, row_losses
from packlight.quantiser import Quantiser

_REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    method: Quantiser | None = None,
) -> Tensor:
    """`F.cross_entropy(bent(F.linear(input, linear_weight, linear_bias)), target, ...)`.

    Logits are computed chunk by chunk, forward and, for a head that is trained, again in the
    backward pass. Under autocast the products are in its dtype; sums and softmax are in float32, as
    is the loss (float64 for inputs of float64).

    Keeps, for a trained head, the input in the dtype of the product, or with `method` a pack of it
    as fine as `method.for_scores()` (8 bits an element for `GroupQuant`), which is shared with the
    norm that made the input if that one's pack is as fine; and 13 bytes a row. For a frozen head it
    keeps the finished gradient of the input, in the dtype of the product, and nothing of the head.

    Gradients are exact without a method. With one, logits of the backward pass are of the rebuilt
    input: gradients of input, weight and bias are biased by its rounding.

    Args:
        input: [..., width], of which each row has one target.
        linear_weight: [classes, width].
        target: class indices, int64, of the shape of `input` without its last dimension.
        linear_bias: [classes].
        weight: [classes]; a factor for each class, as in `F.cross_entropy`. Not with smoothing.
        reduction: "mean", "sum" or "none", as in `F.cross_entropy`.
        ignore_index: rows with this target have loss 0, and do not count in a mean.
        label_smoothing: share of the target that is spread over all classes, from 0 to 1.
        logit_scale: factor of the logits, before a cap (Cohere; Granite divides by its inverse).
        softcap: c, for c tanh(logits / c) in place of the scaled logits (Gemma).
        method: a quantiser, for the input of a trained head.

    Raises `InputError` for shapes and dtypes that do not fit.

    >>> import torch, torch.nn.functional as F, packlight
    >>> x, w = torch.randn(6, 8), torch.randn(50, 8, requires_grad=True)
    >>> target = torch.tensor([3, 1, 4, 1, 5, -100])
    >>> loss = packlight.head.linear_cross_entropy(x, w, target)
    >>> torch.testing.assert_close(loss, F.cross_entropy(x @ w.T, target))
    """
    name = "linear_cross_entropy"
    for tensor in (input, linear_weight, *(() if linear_bias is None else (linear_bias,))):
        check_tensor(tensor, name)
    classes = linear_weight.shape[0]
    if linear_weight.dim() != 2 or input.dim() < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise InputError(
            f"{name} takes input [..., width] and linear_weight [classes, width], got"
            f" {tuple(input.shape)} and {tuple(linear_weight.shape)}"
        )
    if linear_bias is not None and linear_bias.shape != (classes,):
        raise InputError(f"linear_bias has shape {tuple(linear_bias.shape)}; expected ({classes},)")
    if target.dtype != torch.int64 or target.shape != input.shape[:-1]:
        raise InputError(
            f"target is {target.dtype} of shape {tuple(target.shape)}; expected class indices,"
            f" int64 of shape {tuple(input.shape[:-1])}"
        )
    if weight is not None and (weight.shape != (classes,) or label_smoothing):
        raise InputError(
            f"weight needs shape ({classes},) and label_smoothing=0, got {tuple(weight.shape)} and"
            f" {label_smoothing}; use F.cross_entropy for smoothed and weighted classes"
        )
    if not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"label_smoothing={label_smoothing} is not from 0 to 1")
    if reduction not in _REDUCTIONS:
        raise InputError(f"reduction={reduction!r} is none of {', '.join(_REDUCTIONS)}")
    if softcap is not None and not (math.isfinite(softcap) and softcap):
        raise InputError(f"softcap={softcap} is no number other than 0; None is without a cap")
    dtype = autocast_dtype(input, name, lambda x: torch.nn.functional.linear(x[None], x[None]))
    for what, tensor in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if dtype == input.dtype and tensor is not None and tensor.dtype != dtype:
            raise InputError(
                f"{what} is {tensor.dtype} and input {dtype}; convert one, or use autocast"
            )
    curve = Curve(logit_scale) if softcap is None else Curve(logit_scale / softcap, softcap)
    loss = cross_entropy(
        input,
        linear_weight,
        linear_bias,
        target.reshape(-1),
        curve=curve,
        method=method,
        dtype=dtype,
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    return loss.view(target.shape) if reduction == "none" else loss


def cross_entropy(
    x: Tensor,
    head: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    **how: Any,
) -> Tensor:
    """The loss, once arguments are known to fit; `how` is for `row_losses`."""
    counts = target != ignore_index
    classes = torch.where(counts, target, 0)
    shares = Shares(1.0 - label_smoothing, label_smoothing / max(head.shape[0], 1))
    losses = row_losses(x, head, bias, classes, shares=shares, **how)
    factors = counts.to(losses.dtype) if weight is None else weight.to(losses.dtype)[classes]
    if weight is not None:
        factors = torch.where(counts, factors, 0.0)
    # Not by a product: the loss of a row that does not count may be infinite.
    losses = torch.where(counts, losses, 0.0)
    if weight is not None:
        losses = losses * factors
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / factors.sum()

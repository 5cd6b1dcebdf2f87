"""The loss of each row of logits, chunk by chunk: all logits are never there at once.

For rows x [N, width], a head W [V, width] and b [V], and targets t [N],

    z = x W^T + b,    u = scale z  or  cap tanh(scale z),
    loss_i = log sum_j e^(u_ij) - on_target u_i,t_i - on_all sum_j u_ij.

Cross-entropy is on_target = 1, on_all = 0; with label smoothing e it is 1 - e and e / V; without
either it is the logsumexp. Its gradient by u is softmax(u) - on_target onehot(t) - on_all.

**A head that is trained**: the forward pass goes over chunks of rows and keeps x, or a pack of it,
and one logsumexp a row. The backward pass goes over chunks of the vocabulary and computes their
logits again, which is one matrix product more than the three of plain training. A chunk then gives
its rows of the head's gradient at once, in one product that is rounded once, as plain training
rounds; and the gradient of x is added up in float32. So no gradient of the head exists before the
backward pass, and nothing of the head's size beside it. Torch's `linear_cross_entropy` (2.13 and
later) and Liger's make the head's gradient in the forward pass and hold it: V width values.

**A frozen head**: the gradient of x, up to a factor for each row, is made in the forward pass while
the logits are there, and is all that is kept, [N, width] in the dtype of the product. No product is
computed twice. This is what Liger does; torch's does it too.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from packlight import sharing
from packlight._checks import (
    refuse_second_derivative,
    saved_with_weight,
    without_autocast,
)
from packlight._gradients import column_sums, product
from packlight.head import ops
from packlight.packing.layout import compute_dtype
from packlight.quantiser import Quantiser, pack_input, worth_packing

# Logits in a chunk. On a GPU 64 Mi: 128 MiB in 16 bits, whose products keep all cores busy; half a
# thousand rows of a vocabulary of 128k would not, so a chunk has at least 1024 rows or columns. On
# a CPU 8 Mi: 32 MiB in float32; a quarter of it takes 1.4 times as long (1024 x 512 x 16384).
_ELEMENTS = {"cpu": 2**23}
_ELEMENTS_ELSEWHERE = 2**26
_LEAST = {"cpu": 128}
_LEAST_ELSEWHERE = 1024

# Lengths of chunks are multiples: tensor cores work on tiles of this size.
_TILE = 128


class Curve(NamedTuple):
    """What is done to logits before the softmax: scale z, or cap tanh(scale z) if cap is not 0."""

    scale: float = 1.0
    cap: float = 0.0


class Shares(NamedTuple):
    """What the loss of a row takes off its logsumexp: shares of u at the target, and of all u."""

    on_target: float = 1.0
    on_all: float = 0.0


def _chunks(length: int, other: int, device: torch.device) -> Iterator[slice]:
    """Chunks of about the same length along a dimension of a matrix of length x other."""
    elements = _ELEMENTS.get(device.type, _ELEMENTS_ELSEWHERE)
    most = max(elements // max(other, 1), _LEAST.get(device.type, _LEAST_ELSEWHERE))
    parts = max(-(-length // most), 1)
    step = max(-(-length // (parts * _TILE)) * _TILE, 1)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, width], in the dtype of the product
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        curve: Curve,
        shares: Shares,
        rebuild: Callable[..., Tensor] | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        is_frozen = not (needs_weight or needs_bias)
        wide = compute_dtype(x)
        logsumexp = x.new_empty(x.shape[0], dtype=wide)
        losses = torch.empty_like(logsumexp)
        dx = torch.empty_like(x) if is_frozen and needs_x else None
        one = logsumexp.new_ones(()).expand_as(logsumexp).contiguous() if dx is not None else None
        for rows in _chunks(x.shape[0], weight.shape[0], x.device):
            z = _product(x[rows], w, b)
            sums, total = ops.row_sums(z, *curve)
            logsumexp[rows] = losses[rows] = sums
            if shares.on_target:
                u = bent(z.gather(1, targets[rows, None])[:, 0].to(wide), curve)
                losses[rows].sub_(u, alpha=shares.on_target)
            if shares.on_all:
                losses[rows].sub_(total, alpha=shares.on_all)
            if dx is not None and one is not None:
                ops.gradient_(z, sums, targets[rows], one[rows], 0, *shares, *curve)
                torch.mm(z, w, out=dx[rows])
        ctx.is_frozen, ctx.curve, ctx.shares, ctx.rebuild = is_frozen, curve, shares, rebuild
        ctx.dtype, ctx.shape = x.dtype, x.shape
        if is_frozen:
            ctx.save_for_backward(dx)
        else:
            ctx.save_for_backward(weight, bias, logsumexp, targets, *tensors)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        refuse_second_derivative("no logits")
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rest = [None] * (len(ctx.needs_input_grad) - 3)
        if ctx.is_frozen:
            (dx,) = ctx.saved_tensors
            scaled = None if dx is None else (dx * gradient[:, None]).to(ctx.dtype)
            return scaled, None, None, *rest
        weight, bias, logsumexp, targets, *tensors = saved_with_weight(ctx)
        x = ctx.rebuild(ctx.dtype, *tensors).reshape(ctx.shape)
        gradient = gradient.contiguous()
        wide = compute_dtype(x)
        dx = x.new_zeros(x.shape, dtype=wide) if needs_x else None
        dweight = torch.empty_like(weight) if needs_weight else None
        dbias = torch.empty_like(bias) if needs_bias else None
        for columns in _chunks(weight.shape[0], x.shape[0], x.device):
            w = weight[columns].to(ctx.dtype)
            z = _product(x, w, None if bias is None else bias[columns].to(ctx.dtype))
            ops.gradient_(z, logsumexp, targets, gradient, columns.start, *ctx.shares, *ctx.curve)
            if dweight is not None:
                if dweight.dtype == z.dtype:
                    torch.mm(z.t(), x, out=dweight[columns])
                else:
                    dweight[columns] = product(z.t(), x, dweight.dtype)
            if dbias is not None:
                wider = torch.promote_types(z.dtype, dbias.dtype)
                dbias[columns] = column_sums(z, wider).to(dbias.dtype)
            if dx is not None and dx.dtype == z.dtype:
                dx.addmm_(z, w)
            elif dx is not None:
                dx += product(z, w, wide)
        return None if dx is None else dx.to(ctx.dtype), dweight, dbias, *rest


def bent(z: Tensor, curve: Curve) -> Tensor:
    """u of logits in float32 or float64; see `Curve`."""
    u = z * curve.scale
    return torch.tanh(u) * curve.cap if curve.cap else u


_apply: Callable[..., Tensor] = _RowLosses.apply


def row_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    curve: Curve,
    shares: Shares,
    method: Quantiser | None,
    dtype: torch.dtype,
) -> Tensor:
    """The losses [N] of rows x [..., width], in float32, or in float64 for a product of float64.

    `targets` [N] are all indices of the vocabulary. `dtype` is that of the product. What is kept:
    see the head of the file. With a method, a head that is trained keeps a pack of x as fine as
    the method's for scores, since logits are exponents of a softmax; it shares one that is there.
    """
    is_trained = torch.is_grad_enabled() and (
        weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    cast = x if x.dtype == dtype else sharing.cast_of(x, dtype)
    cast = x.to(dtype) if cast is None else cast
    rows = cast.reshape(-1, x.shape[-1])
    rebuild: Callable[..., Tensor] = _itself
    tensors: tuple[Tensor | None, ...] = (rows.detach(),)
    if is_trained and method is not None and worth_packing(x, method):
        kept = pack_input(x, method.for_scores())
        rebuild, tensors = kept.rebuild, kept.tensors
    with without_autocast(x.device.type):
        return _apply(rows, weight, bias, targets, curve, shares, rebuild, *tensors)


def _itself(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x

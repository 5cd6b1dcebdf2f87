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
from packlight._imagined import kind_of
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

# Elements. Kernels of Triton load wide words where rows are multiples of sixteen.
_ALIGNED = 16


class Curve(NamedTuple):
    """What is done to logits before the softmax: scale z, or cap tanh(scale z) if cap is not 0."""

    scale: float = 1.0
    cap: float = 0.0


class Shares(NamedTuple):
    """What the loss of a row takes off its logsumexp: shares of u at the target, and of all u."""

    on_target: float = 1.0
    on_all: float = 0.0


def _chunks(length: int, other: int, x: Tensor) -> Iterator[slice]:
    """Chunks of about the same length along a dimension of a matrix of length x other, as `x`."""
    kind = kind_of(x)
    elements = _ELEMENTS.get(kind, _ELEMENTS_ELSEWHERE)
    most = max(elements // max(other, 1), _LEAST.get(kind, _LEAST_ELSEWHERE))
    parts = max(-(-length // most), 1)
    step = max(-(-length // (parts * _TILE)) * _TILE, 1)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of some rows of x or of W: [N, V].

    Tensor cores want rows that begin at multiples of 16 bytes. Where V is odd, as GPT-2's 50257,
    cuBLAS takes ten times as long, so rows lie farther apart, and the last few columns are a
    product of their own.
    """
    count = weight.shape[0]
    whole = count // _ALIGNED * _ALIGNED
    if whole in (0, count):
        return x.mm(weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    z = x.new_empty(x.shape[0], whole + _ALIGNED)[:, :count]
    for columns in (slice(0, whole), slice(whole, count)):
        w = weight[columns].t()
        if bias is None:
            torch.mm(x, w, out=z[:, columns])
        else:
            torch.addmm(bias[columns], x, w, out=z[:, columns])
    return z


class _RowLosses(torch.autograd.Function):
    """The losses of rows, and with `keeps_sums` the logsumexp and the sum of each row beside."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, width], in the dtype of the product
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        curve: Curve,
        shares: Shares,
        keeps_sums: bool,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Any:
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # The gradient in the forward pass is of the losses alone.
        is_frozen = not (needs_weight or needs_bias or keeps_sums)
        wide = compute_dtype(x)
        logsumexp = x.new_empty(x.shape[0], dtype=wide)
        total, losses = torch.empty_like(logsumexp), torch.empty_like(logsumexp)
        dx = torch.empty_like(x) if is_frozen and needs_x else None
        ons = _coefficients(torch.ones_like(losses), None, None, shares)
        for rows in _chunks(x.shape[0], weight.shape[0], x):
            z = _logits(x[rows], w, b)
            logsumexp[rows], total[rows] = ops.row_sums(z, *curve)
            losses[rows] = logsumexp[rows]
            if shares.on_target:
                u = bent(z.gather(1, targets[rows, None])[:, 0].to(wide), curve)
                losses[rows].sub_(u, alpha=shares.on_target)
            if shares.on_all:
                losses[rows].sub_(total[rows], alpha=shares.on_all)
            if dx is not None:
                some = [on[rows] for on in ons]
                ops.gradient_(z, logsumexp[rows], targets[rows], *some, 0, *curve)
                torch.mm(z, w, out=dx[rows])
        ctx.is_frozen, ctx.curve, ctx.shares, ctx.rebuild = is_frozen, curve, shares, rebuild
        ctx.dtype, ctx.shape = x.dtype, x.shape
        ctx.set_materialize_grads(False)
        if is_frozen:
            ctx.save_for_backward(dx)
        else:
            ctx.save_for_backward(weight, bias, logsumexp, targets, *tensors)
        return (losses, logsumexp.clone(), total) if keeps_sums else losses

    @staticmethod
    def backward(
        ctx: Any,
        gradient: Tensor | None,
        of_logsumexp: Tensor | None = None,
        of_total: Tensor | None = None,
    ) -> Any:
        refuse_second_derivative("no logits")
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        rest = [None] * (len(ctx.needs_input_grad) - 3)
        given = [one for one in (gradient, of_logsumexp, of_total) if one is not None]
        if not given:
            return None, None, None, *rest
        if ctx.is_frozen:
            (dx,) = ctx.saved_tensors
            scaled = None if dx is None else (dx * given[0][:, None]).to(ctx.dtype)
            return scaled, None, None, *rest
        weight, bias, logsumexp, targets, *tensors = saved_with_weight(ctx)
        x = ctx.rebuild(ctx.dtype, *tensors).reshape(ctx.shape)
        gradient = torch.zeros_like(given[0]) if gradient is None else gradient
        ons = _coefficients(gradient, of_logsumexp, of_total, ctx.shares)
        wide = compute_dtype(x)
        dx = x.new_zeros(x.shape, dtype=wide) if needs_x else None
        dweight = torch.empty_like(weight) if needs_weight else None
        dbias = torch.empty_like(bias) if needs_bias else None
        for columns in _chunks(weight.shape[0], x.shape[0], x):
            w = weight[columns].to(ctx.dtype)
            z = _logits(x, w, None if bias is None else bias[columns].to(ctx.dtype))
            ops.gradient_(z, logsumexp, targets, *ons, columns.start, *ctx.curve)
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


def _coefficients(
    losses: Tensor, logsumexp: Tensor | None, total: Tensor | None, shares: Shares
) -> tuple[Tensor, Tensor, Tensor]:
    """What softmax, target and all u of a row are multiplied by, of the gradients of its sums."""
    on_softmax = losses.contiguous() if logsumexp is None else losses + logsumexp
    on_all = losses * -shares.on_all
    return on_softmax, losses * -shares.on_target, on_all if total is None else on_all + total


def bent(z: Tensor, curve: Curve) -> Tensor:
    """u of logits in float32 or float64; see `Curve`."""
    u = z * curve.scale
    return torch.tanh(u) * curve.cap if curve.cap else u


_apply: Callable[..., Any] = _RowLosses.apply


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
    losses: Tensor = _rows(False, x, weight, bias, targets, curve, shares, method, dtype)
    return losses


def row_losses_and_sums(*given: Any, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `row_losses`; beside the losses the logsumexp and the sum of u of each row.

    A frozen head keeps what a trained one does, and computes its logits again.
    """
    found: tuple[Tensor, Tensor, Tensor] = _rows(True, *given, **how)
    return found


def _rows(
    keeps_sums: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    curve: Curve,
    shares: Shares,
    method: Quantiser | None,
    dtype: torch.dtype,
) -> Any:
    is_trained = keeps_sums or _is_trained(weight, bias)
    rows, rebuild, tensors = _input(x, dtype, method, is_trained)
    with without_autocast(x.device.type):
        return _apply(rows, weight, bias, targets, curve, shares, keeps_sums, rebuild, *tensors)


def _is_trained(weight: Tensor, bias: Tensor | None) -> bool:
    return weight.requires_grad or (bias is not None and bias.requires_grad)


def _input(
    x: Tensor, dtype: torch.dtype, method: Quantiser | None, is_trained: bool
) -> tuple[Tensor, Callable[..., Tensor], tuple[Tensor | None, ...]]:
    """The rows of x as the product takes them, and what is kept of them with what rebuilds them."""
    cast = x if x.dtype == dtype else sharing.cast_of(x, dtype)
    cast = x.to(dtype) if cast is None else cast
    rows = cast.reshape(-1, x.shape[-1])
    if is_trained and torch.is_grad_enabled() and method is not None and worth_packing(x, method):
        kept = pack_input(x, method.for_scores())
        return rows, kept.rebuild, kept.tensors
    return rows, _itself, (rows.detach(),)


def _itself(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x


# ---- one logit of each row -----------------------------------------------------------------------


class _RowLogits(torch.autograd.Function):
    """The logit of each row at its target: a product of x and one row of the head."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [N, width], in the dtype of the product
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        wide = compute_dtype(x)
        z = torch.linalg.vecdot(x.to(wide), weight[targets].to(x.dtype).to(wide))
        if bias is not None:
            z = z + bias[targets].to(x.dtype)
        ctx.rebuild, ctx.dtype, ctx.shape = rebuild, x.dtype, x.shape
        kept = tensors if ctx.needs_input_grad[1] else [None] * len(tensors)
        ctx.save_for_backward(weight, bias, targets, *kept)
        rounded: Tensor = z.to(x.dtype)  # as the plain head rounds it
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        refuse_second_derivative("no logits")
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        weight, bias, targets, *tensors = saved_with_weight(ctx)
        dx = dweight = dbias = None
        if needs_x:
            dx = weight[targets].to(ctx.dtype) * gradient[:, None]
        if needs_weight:
            x = ctx.rebuild(ctx.dtype, *tensors).reshape(ctx.shape)
            wide = compute_dtype(x)
            terms = x.to(wide) * gradient[:, None].to(wide)
            dweight = weight.new_zeros(weight.shape, dtype=wide).index_add_(0, targets, terms)
            dweight = dweight.to(weight.dtype)
        if needs_bias:
            wide = compute_dtype(gradient)
            dbias = bias.new_zeros(bias.shape, dtype=wide)
            dbias = dbias.index_add_(0, targets, gradient.to(wide)).to(bias.dtype)
        return dx, dweight, dbias, *[None] * (len(ctx.needs_input_grad) - 3)


_apply_logits: Callable[..., Tensor] = _RowLogits.apply


def logits_at(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    curve: Curve,
    method: Quantiser | None,
    dtype: torch.dtype,
) -> Tensor:
    """u [N] of rows x [..., width] at targets [N], one class a row; in float32 or float64.

    Keeps x, or a pack of it with a method, where the head is trained, and the targets. Exact but
    for the pack. The gradient of the head is a tensor of its size while it is added up.
    """
    rows, rebuild, tensors = _input(x, dtype, method, weight.requires_grad)
    with without_autocast(x.device.type):
        z = _apply_logits(rows, weight, bias, targets, rebuild, *tensors)
        return bent(z.to(compute_dtype(z)), curve)

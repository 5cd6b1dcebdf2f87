"""The end of a sub-layer with its norm behind the sum: layer_norm(dropout(x W^T + b) + residual).

As BERT has it. Apart, the four are three functions and a sum, with notes between them that nothing
else reads.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import autocast_dtype, refuse_second_derivative, saved_with_weight
from packlight._gradients import as_dtype
from packlight._seeds import Seed, mask_seed, operands
from packlight.fewbit import ops
from packlight.fewbit.dropout import masked
from packlight.layers.linear import affine, linear_gradients
from packlight.layers.norms import as_rows, own_parameters, row_norm_of
from packlight.pack import Pack
from packlight.quantiser import KEEPS, Fused, Quantiser, pack_input
from packlight.reading import reader, reading_of

# Weight and bias of the norm, and its eps.
_Norm = tuple[Tensor, Tensor | None, float]

# ---- what a method without operators of its own does ---------------------------------------------


def plain_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype,
    method: Quantiser,
    seeds: tuple[Seed, Seed],
) -> tuple[Tensor, Tensor, list[Tensor], tuple[Tensor, ...], Tensor | None]:
    """What the method's norm gives of dropout(x, p) + residual in `dtype`, and the mask."""
    mask_of, rounding = seeds
    mask = None
    if p:
        x, mask = ops.dropout(x, *operands(mask_of), p, True)
    total = as_dtype(x + residual, dtype)
    made = row_norm_of(method).forward(total, weight, bias, eps, True, method, rounding)
    return *made, mask


def plain_backward(
    grad_output: Tensor,
    kept: tuple[Tensor, ...],
    rstd: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    p: float,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool],
    method: Quantiser,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the residual, which have these dtypes, and those of the parameters."""
    differentiate = row_norm_of(method).backward
    total, *sums = differentiate(grad_output, kept, rstd, weight, True, *needs, method)
    dx = as_dtype(total, dtypes[0])
    if mask is not None:
        dx = masked(dx, mask, p, dx.stride())
    return dx, as_dtype(total, dtypes[1]), *sums


def _rebuild(y: Tensor, width: int, method: Quantiser) -> Callable[..., Tensor]:
    return row_norm_of(method).rebuild(y, width, method)


_PLAIN = Fused(plain_forward, plain_backward, _rebuild)


def _post_norm_of(method: Quantiser) -> Fused:
    return method.fused.get("post_norm", _PLAIN)


# ---- the function --------------------------------------------------------------------------------


class _PostNorm(torch.autograd.Function):
    """y, the tensors that stand for x_hat, and copies of the norm's parameters.

    Keeps W, the pack of x, the mask of the dropout, rstd, and all of these but y.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        settings: tuple[float, float, Quantiser],
        seeds: tuple[Seed, Seed],
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        p, eps, method = settings
        branch = affine(x, weight, bias)
        dtype = _norm_dtype(branch, residual, gamma, beta)
        fused = _post_norm_of(method)
        given = (branch, residual.contiguous(), gamma, beta, p, eps, dtype, method, seeds)
        y, rstd, copies, kept, mask = fused.forward(*given)
        ctx.mark_non_differentiable(*copies, *kept)
        ctx.set_materialize_grads(False)
        # The graph holds the copy of beta for readers.
        parameters = own_parameters(copies, gamma, beta)
        ctx.save_for_backward(weight, mask, rstd, *parameters, *kept, *tensors)
        ctx.rebuild, ctx.differentiate, ctx.kept = rebuild, fused.backward, len(kept)
        ctx.settings = (p, (branch.dtype, residual.dtype), method)
        ctx.dtypes = [None if each is None else each.dtype for each in (x, weight, bias)]
        ctx.of_norm = gamma.dtype, None if beta is None else beta.dtype
        return y, *copies, *kept

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        needs = ctx.needs_input_grad
        if grad_output is None:
            return (None,) * len(needs)
        weight, mask, rstd, gamma, _, *saved = saved_with_weight(ctx)
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        p, dtypes, method = ctx.settings
        dy = as_rows(grad_output, grad_output.shape[-1])
        branch, total, dgamma, dbeta = ctx.differentiate(
            dy, kept, rstd, gamma, mask, p, dtypes, needs[4:6], method
        )
        gradients = linear_gradients(branch, weight, ctx.rebuild, tensors, needs[:3], ctx.dtypes)
        return (
            *gradients,
            total if needs[3] else None,
            as_dtype(dgamma, ctx.of_norm[0]) if needs[4] else None,
            as_dtype(dbeta, ctx.of_norm[1]) if needs[5] else None,
            *[None] * (len(needs) - 6),
        )


_apply: Callable[..., tuple[Tensor, ...]] = _torch.applied(_PostNorm)


def _norm_dtype(
    branch: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor | None
) -> torch.dtype:
    """That in which torch's layer norm of branch + residual runs."""

    def plain(empty: Tensor) -> Tensor:
        return F.layer_norm(empty.view(0, gamma.numel()), gamma.shape, gamma, beta)

    total = branch.dtype
    if residual.dtype != total:
        total = torch.promote_types(total, residual.dtype)
    return autocast_dtype(branch, ("layer_norm", gamma.dtype), plain, total)


def post_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm: _Norm,
    p: float,
    method: Quantiser,
    norm_method: Quantiser,
) -> Tensor:
    """layer_norm(dropout(x W^T + b, p) + residual), x [..., in], residual [..., out].

    In eager mode, in training, with gradients; the checks are the caller's. Keeps a pack of x, or
    nothing where x is packed already, one bit an element of the dropout, a pack of x_hat, which
    readers of y share, and rstd. Gradients are those of the layers one by one: exact but for the
    packs.
    """
    kept = pack_input(x, method)
    rebuild = reader(kept.reading, kept.rebuild)
    gamma, beta, eps = norm
    seeds = (mask_seed(x) if p else None, norm_method.seed(x))
    given = (x, weight, bias, residual, gamma, beta, (p, eps, norm_method), seeds)
    y, *made = _apply(*given, rebuild, *kept.tensors)
    tensors = (*made[2:], *own_parameters(made[:2], gamma, beta))
    stands_for = _post_norm_of(norm_method).rebuild(y, y.shape[-1], norm_method)
    reading = reading_of(stands_for)
    sharing.note_pack(y, Pack(stands_for, tuple(y.shape), tensors, norm_method.grade, reading))
    return y

"""Sub-layers with their norm behind the sum, as BERT has them.

Their end, layer_norm(dropout(x W^T + b) + residual), and layer_norm(dropout(W_2 f(W_1 x)) + x) and
layer_norm(dropout(W_o attention(W x)) + x) as a whole. Apart, they are three to five functions and
a sum, with notes between them that nothing else reads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import (
    autocast_dtype,
    refuse_second_derivative,
    saved_with_weight,
)
from packlight._gradients import as_dtype
from packlight._seeds import Seed, mask_seed, operands
from packlight.fewbit import ops
from packlight.fewbit.dropout import masked
from packlight.layers.attention_backends import FUSED, Flags, Kernel
from packlight.layers.branches import attended, dtypes_of, feed
from packlight.layers.linear import Parameters, affine, linear_gradients
from packlight.layers.norms import as_rows, own_parameters, row_norm_of
from packlight.layers.self_attention import kernel_of_whole, side_by_side
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


# ---- the norm behind the sum ---------------------------------------------------------------------

# The probability of the dropout, the norm's eps, and how it keeps.
_Settings = tuple[float, float, Quantiser]


def _normed(
    ctx: Any,
    branch: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor | None,
    settings: _Settings,
    seeds: tuple[Seed, Seed],
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The results of a function, y, copies of the parameters and the pack; and what it keeps."""
    p, eps, method = settings
    dtype = _norm_dtype(branch, residual, gamma, beta)
    fused = _post_norm_of(method)
    given = (branch, residual.contiguous(), gamma, beta, p, eps, dtype, method, seeds)
    y, rstd, copies, kept, mask = fused.forward(*given)
    if _torch.is_traced():  # what a compiled region keeps is the region's own
        copies = []
    ctx.mark_non_differentiable(*copies, *kept)
    ctx.set_materialize_grads(False)
    ctx.settings = (p, (branch.dtype, residual.dtype), method)
    ctx.of_norm = gamma.dtype, None if beta is None else beta.dtype
    # The graph holds the copy of beta for readers.
    saved = [mask, rstd, *own_parameters(copies, gamma, beta), *kept]
    ctx.kept = len(saved)
    return (y, *copies, *kept), saved


def _norm_gradients(
    ctx: Any, grad_output: Tensor, saved: Sequence[Any], needs: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Gradients of branch and residual, and those of gamma and beta that are needed."""
    mask, rstd, gamma, _, *kept = saved
    p, dtypes, method = ctx.settings
    dy = as_rows(grad_output, grad_output.shape[-1])
    branch, residual, *sums = _post_norm_of(method).backward(
        dy, kept, rstd, gamma, mask, p, dtypes, needs, method
    )
    found = zip(sums, needs, ctx.of_norm, strict=True)
    return branch, residual, [as_dtype(x, dtype) if need else None for x, need, dtype in found]


def _noted(y: Tensor, made: Sequence[Tensor], norm: _Norm, method: Quantiser) -> Tensor:
    """y, with a note of what stands for it."""
    gamma, beta, _ = norm
    count = 0 if _torch.is_traced() else 2
    tensors = (*made[count:], *own_parameters(made[:count], gamma, beta))
    rebuild = _post_norm_of(method).rebuild(y, y.shape[-1], method)
    pack = Pack(rebuild, tuple(y.shape), tensors, method.grade, reading_of(rebuild))
    sharing.note_pack(y, pack)
    return y


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


# ---- behind a Linear -----------------------------------------------------------------------------


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
        settings: _Settings,
        seeds: tuple[Seed, Seed],
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        branch = affine(x, weight, bias)
        results, saved = _normed(ctx, branch, residual, gamma, beta, settings, seeds)
        ctx.save_for_backward(weight, *saved, *tensors)
        ctx.rebuild = rebuild
        ctx.dtypes = dtypes_of(x, weight, bias)
        return results

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        needs = _torch.needed_gradients(ctx)
        if grad_output is None:
            return (None,) * len(needs)
        weight, *saved = saved_with_weight(ctx)
        normed, tensors = saved[: ctx.kept], saved[ctx.kept :]
        branch, total, sums = _norm_gradients(ctx, grad_output, normed, needs[4:6])
        gradients = linear_gradients(branch, weight, ctx.rebuild, tensors, needs[:3], ctx.dtypes)
        others = (None,) * (len(needs) - 6)
        return *gradients, total if needs[3] else None, *sums, *others


_apply: Callable[..., tuple[Tensor, ...]] = _torch.applied(_PostNorm)


@_torch.one_node
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

    In training, with gradients; the checks are the caller's. Keeps a pack of x, or
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
    return _noted(y, made, norm, norm_method)


# ---- behind attention ----------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """As `_PostNorm`, of W_o attention(W x) and x; keeps the weights and a pack of W x besides.

    What W_o reads comes again with attention. None where torch would take no fused kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        last_weight: Tensor,
        last_bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        mask: Tensor | None,
        settings: _Settings,
        of_attention: tuple[int, Flags, Quantiser, Kernel | None],
        count: int,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,  # as `_Projections` has them
    ) -> tuple[Tensor, ...] | None:
        heads, flags, method, kernel = of_attention
        p, _, of_norm = settings
        whole, ctx.joined = side_by_side(x, count, rebuild, tensors)
        last = (last_weight, last_bias)
        made = attended(whole, heads, mask, flags, method, method.seed(whole), *last, kernel)
        del whole
        if made is None:
            return None
        out, pack, ctx.attended = made
        del made
        branch = affine(out, *last)
        del out
        # As the parts draw them: attention has drawn its dropout.
        seeds = (mask_seed(x) if p else None, of_norm.seed(x))
        results, saved = _normed(ctx, branch, x, gamma, beta, settings, seeds)
        ctx.save_for_backward(
            last_weight, mask, *saved, *pack, *tensors[:count], *tensors[2 * count :]
        )
        ctx.packed = ctx.kept + len(pack)
        return results

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        needs = _torch.needed_gradients(ctx)
        if grad_output is None:
            return (None,) * len(needs)
        last_weight, mask, *saved = saved_with_weight(ctx)
        normed, pack, tensors = (
            saved[: ctx.kept], saved[ctx.kept : ctx.packed], saved[ctx.packed :],
        )  # fmt: skip
        dbranch, total, sums = _norm_gradients(ctx, grad_output, normed, needs[3:5])
        branch = [dbranch]
        del dbranch
        dwhole, last = ctx.attended.gradients(branch, last_weight, mask, pack, needs[1:3])
        dx, others = ctx.joined.gradients(dwhole, tensors, needs[0], any(needs[10:]))
        if dx is not None:
            dx.add_(total)
        return dx, *last, *sums, *[None] * 5, *others


_attend: Callable[..., tuple[Tensor, ...] | None] = _torch.applied(_Attention)


def attention(
    x: Tensor,
    projections: Sequence[Parameters],
    last: Parameters,
    norm: _Norm,
    p: float,
    heads: int,
    mask: Tensor | None,
    flags: Flags,
    methods: tuple[Quantiser, Quantiser, Quantiser],
) -> Tensor | None:
    """layer_norm(dropout(W_o attention(W x), p) + x), x [batch, length, width].

    In training, with gradients; the checks are the caller's. `projections` are W's
    for query, key and value, `last` is W_o; `methods` are those of x, of W x and of the norm. Keeps
    what `post_norm` keeps and a pack of W x. Gradients are those of the layers one by one, but for
    that of W_o, as in `pre_norm.attention`. None where torch would take no fused kernel.
    """
    kernel = kernel_of_whole(x, projections, heads, mask, flags)
    if kernel is not None and kernel[0] not in FUSED:
        return None
    return _attention(x, projections, last, norm, p, heads, mask, flags, methods, kernel)


@_torch.one_node
def _attention(
    x: Tensor,
    projections: Sequence[Parameters],
    last: Parameters,
    norm: _Norm,
    p: float,
    heads: int,
    mask: Tensor | None,
    flags: Flags,
    methods: tuple[Quantiser, Quantiser, Quantiser],
    kernel: Kernel | None,
) -> Tensor | None:
    """`attention` by this kernel of torch's; None for that which torch takes of what there is."""
    method, of_attention, of_norm = methods
    kept = pack_input(x, method)
    rebuild = reader(kept.reading, kept.rebuild)
    gamma, beta, eps = norm
    weights, biases = zip(*projections, strict=True)
    given = (*last, gamma, beta, mask, (p, eps, of_norm), (heads, flags, of_attention, kernel))
    made = _attend(x, *given, len(weights), rebuild, *weights, *biases, *kept.tensors)
    return None if made is None else _noted(made[0], made[1:], norm, of_norm)


# ---- behind a feed-forward layer -----------------------------------------------------------------


class _MLP(torch.autograd.Function):
    """As `_PostNorm`, of W_2 f(W_1 x) and x; keeps both weights and the pack of W_1 x besides."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        last_weight: Tensor,
        last_bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor | None,
        settings: _Settings,
        seeds: tuple[Seed, Seed, Seed],
        how: tuple[str, Quantiser],
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        name, method = how
        h = affine(x, weight, bias)
        branch, pack, ctx.feed = feed(h, name, method, seeds[2], last_weight, last_bias)
        del h
        ctx.dtypes = dtypes_of(x, weight, bias)
        results, saved = _normed(ctx, branch, x, gamma, beta, settings, seeds[:2])
        ctx.save_for_backward(weight, last_weight, *saved, *pack, *tensors)
        ctx.rebuild, ctx.packed = rebuild, len(pack)
        return results

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        needs, dtypes = _torch.needed_gradients(ctx), ctx.dtypes
        if grad_output is None:
            return (None,) * len(needs)
        weight, last_weight, *saved = saved_with_weight(ctx)
        normed, rest = saved[: ctx.kept], saved[ctx.kept :]
        pack, tensors = rest[: ctx.packed], rest[ctx.packed :]
        branch, total, sums = _norm_gradients(ctx, grad_output, normed, needs[5:7])
        dh, last = ctx.feed.gradients(branch, last_weight, pack, needs[3:5])
        del branch
        dx, *first = linear_gradients(dh, weight, ctx.rebuild, tensors, needs[:3], dtypes)
        if dx is not None:
            dx.add_(total)
        return dx, *first, *last, *sums, *[None] * (len(needs) - 7)


_feed: Callable[..., tuple[Tensor, ...]] = _torch.applied(_MLP)


@_torch.one_node
def mlp(
    x: Tensor,
    projections: Sequence[Parameters],
    name: str,
    norm: _Norm,
    p: float,
    method: Quantiser,
    norm_method: Quantiser,
) -> Tensor:
    """layer_norm(dropout(W_2 f(W_1 x), p) + x), f by its name. `projections` are W_1's and W_2's.

    In training, with gradients; the checks are the caller's. Keeps what `post_norm`
    keeps, and a pack of W_1 x. Gradients are those of the layers one by one.
    """
    kept = pack_input(x, method)
    rebuild = reader(kept.reading, kept.rebuild)
    gamma, beta, eps = norm
    # As the parts draw them.
    seed = method.seed(x)
    seeds = (mask_seed(x) if p else None, norm_method.seed(x), seed)
    parameters = [each for projection in projections for each in projection]
    given = (gamma, beta, (p, eps, norm_method), seeds, (name, method), rebuild)
    y, *made = _feed(x, *parameters, *given, *kept.tensors)
    return _noted(y, made, norm, norm_method)

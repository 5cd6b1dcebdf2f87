"""Sub-layers with their norm in front: x + attention(norm(x)) and x + W_2 f(W_1 norm(x)).

As blocks of vision transformers have them. Each is one function: apart, they are five and three,
with notes between them that nothing else reads.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import autocast, refuse_second_derivative, saved_with_weight
from packlight._gradients import as_dtype
from packlight._seeds import Seed
from packlight.layers.attention_backends import FUSED, Flags, Kernel
from packlight.layers.branches import attended, dtypes_of, feed
from packlight.layers.linear import Parameters, affine, linear_gradients
from packlight.layers.norms import (
    as_rows,
    own_parameters,
    rounded_norm_of,
    row_norm_of,
    shaped_as,
)
from packlight.layers.self_attention import kernel_of_whole, linear_dtype
from packlight.quantiser import KEEPS, Quantiser


class Norm(NamedTuple):
    """A layer norm over the last dimension, and how it keeps."""

    weight: Tensor
    bias: Tensor | None
    eps: float
    method: Quantiser


# ---- the norm in front, and the sum behind -------------------------------------------------------


def _normed(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    method: Quantiser,
    seed: Seed,
    projection: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """norm(x) and the tensors that stand for it; how they do is noted on `ctx`."""

    def plain(empty: Tensor) -> Tensor:
        return F.layer_norm(empty.view(0, weight.numel()), weight.shape, weight, bias)

    x = autocast(x, ("layer_norm", weight.dtype), plain).contiguous()
    fused = row_norm_of(method)
    y, rstd, copies, kept = fused.forward(x, weight, bias, eps, True, method, seed)
    if _torch.is_traced():  # what a compiled region keeps is the region's own
        copies = []
    ctx.normed = fused.rebuild(y, y.shape[-1], method), y.dtype, method
    # In the dtype in which the Linear behind reads it: two at once would be in memory for nothing.
    y = as_dtype(y, linear_dtype(y, projection))
    return y, [rstd, *own_parameters(copies, weight, bias), *kept]


def _norm_gradients(
    ctx: Any, dnormed: Any, grad_output: Tensor, saved: Sequence[Any], needs: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, which has one from the sum too, and of weight and bias."""
    rstd, weight, _, *kept = saved
    method, dtype = ctx.normed[2], ctx.dtypes[0]
    dy = as_rows(dnormed, dnormed.shape[-1])
    alike = dy.dtype == dtype == grad_output.dtype
    added = as_rows(grad_output, dy.shape[-1]) if alike else None
    dx, dweight, dbias = rounded_norm_of(method).backward(
        dy, kept, rstd, weight, True, *needs[1:3], method, added
    )
    dx = shaped_as(as_dtype(dx, dtype), grad_output)
    return (
        dx if alike else dx.add_(as_dtype(grad_output, dtype)),
        as_dtype(dweight, ctx.dtypes[1]) if needs[1] else None,
        as_dtype(dbias, ctx.dtypes[2]) if needs[2] else None,
    )


def _reader(ctx: Any, saved: Sequence[Any]) -> tuple[Callable[..., Tensor], list[Any]]:
    """What gives norm(x) again, and of which tensors."""
    _, weight, bias, *kept = saved
    return ctx.normed[0], [*kept, weight, bias]


# ---- attention -----------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """x + W_o attention(W norm(x)); keeps packs of the normalised value and of W norm(x).

    What W_o reads comes again with attention. None where torch would take no fused kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        last_weight: Tensor,
        last_bias: Tensor | None,
        mask: Tensor | None,
        settings: tuple[float, int, Flags, Kernel | None],
        methods: tuple[Quantiser, Quantiser],
        seeds: tuple[Seed, Seed],
    ) -> Tensor | None:
        eps, heads, flags, kernel = settings
        of_norm, of_attention = methods
        y, normed = _normed(ctx, x, gamma, beta, eps, of_norm, seeds[0], weight)
        whole = affine(y, weight, bias)
        del y  # here and below: what is not read again makes room
        last = (last_weight, last_bias)
        made = attended(whole, heads, mask, flags, of_attention, seeds[1], *last, kernel)
        del whole
        if made is None:
            return None
        out, pack, ctx.attended = made
        del made
        branch = affine(out, *last)
        ctx.save_for_backward(weight, last_weight, mask, *normed, *pack)
        ctx.packed, ctx.branch = len(normed), branch.dtype
        ctx.dtypes = dtypes_of(x, gamma, beta, weight, bias)
        return x + branch

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, last_weight, mask, *saved = saved_with_weight(ctx)
        normed, pack = saved[: ctx.packed], saved[ctx.packed :]
        needs, dtypes = _torch.needed_gradients(ctx), ctx.dtypes
        dwhole, last = ctx.attended.gradients(
            [as_dtype(grad_output, ctx.branch)], last_weight, mask, pack, needs[5:7]
        )
        dnormed, *first = linear_gradients(
            dwhole,
            weight,
            *_reader(ctx, normed),
            (True, *needs[3:5]),
            (ctx.normed[1], *dtypes[3:5]),
        )
        del dwhole
        front = _norm_gradients(ctx, dnormed, grad_output, normed, needs)
        return *front, *first, *last, *[None] * 4


_attend: Callable[..., Tensor | None] = _torch.applied(_Attention)


def attention(
    x: Tensor,
    norm: Norm,
    projections: Sequence[Parameters],
    heads: int,
    mask: Tensor | None,
    flags: Flags,
    method: Quantiser,
) -> Tensor | None:
    """x + W_o attention(W norm(x)), x [batch, length, width]; `projections` are W's and W_o's.

    In training, with gradients; the checks are the caller's. `method` is that of
    query, key and value, which W norm(x) has side by side. Keeps packs of the normalised value and
    of W norm(x). Gradients are those of the layers one by one, with attention in the form that runs
    again, but for that of W_o: it is of the output that comes again, with the error of decoded
    query, key and value and without a pack of its own. At 8 bits that is a tenth of a 4-bit pack's,
    and biased, since a softmax is not linear. None where torch would take no fused kernel.
    """
    kernel = kernel_of_whole(x, projections[:1], heads, mask, flags)
    if kernel is not None and kernel[0] not in FUSED:
        return None
    return _attention(x, norm, projections, heads, mask, flags, method, kernel)


@_torch.one_node
def _attention(
    x: Tensor,
    norm: Norm,
    projections: Sequence[Parameters],
    heads: int,
    mask: Tensor | None,
    flags: Flags,
    method: Quantiser,
    kernel: Kernel | None,
) -> Tensor | None:
    """`attention` by this kernel of torch's; None for that which torch takes of what there is."""
    parameters = [each for projection in projections for each in projection]
    seeds = (norm.method.seed(x), method.seed(x))
    given = (mask, (norm.eps, heads, flags, kernel), (norm.method, method), seeds)
    return _attend(x, norm.weight, norm.bias, *parameters, *given)


# ---- feed-forward layers -------------------------------------------------------------------------


class _MLP(torch.autograd.Function):
    """x + W_2 f(W_1 norm(x)); keeps packs of the normalised value and of W_1 norm(x)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        last_weight: Tensor,
        last_bias: Tensor | None,
        eps: float,
        name: str,
        methods: tuple[Quantiser, Quantiser],
        seeds: tuple[Seed, Seed],
    ) -> Tensor:
        of_norm, method = methods
        y, normed = _normed(ctx, x, gamma, beta, eps, of_norm, seeds[0], weight)
        h = affine(y, weight, bias)
        del y
        branch, kept, ctx.feed = feed(h, name, method, seeds[1], last_weight, last_bias)
        del h
        ctx.save_for_backward(weight, last_weight, *normed, *kept)
        ctx.packed, ctx.branch = len(normed), branch.dtype
        ctx.dtypes = dtypes_of(x, gamma, beta, weight, bias)
        return x + branch

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, last_weight, *saved = saved_with_weight(ctx)
        normed, kept = saved[: ctx.packed], saved[ctx.packed :]
        needs, dtypes = _torch.needed_gradients(ctx), ctx.dtypes
        dh, last = ctx.feed.gradients(
            as_dtype(grad_output, ctx.branch), last_weight, kept, needs[5:7]
        )
        dnormed, *first = linear_gradients(
            dh, weight, *_reader(ctx, normed), (True, *needs[3:5]), (ctx.normed[1], *dtypes[3:5])
        )
        del dh
        front = _norm_gradients(ctx, dnormed, grad_output, normed, needs)
        return *front, *first, *last, *[None] * 4


_feed: Callable[..., Tensor] = _torch.applied(_MLP)


@_torch.one_node
def mlp(
    x: Tensor, norm: Norm, projections: Sequence[Parameters], name: str, method: Quantiser
) -> Tensor:
    """x + W_2 f(W_1 norm(x)), f by its name. `projections` are those of W_1 and W_2.

    In training, with gradients; the checks are the caller's. Keeps packs of the
    normalised value and of W_1 norm(x). Gradients are those of the layers one by one.
    """
    parameters = [each for projection in projections for each in projection]
    seeds = (norm.method.seed(x), method.seed(x))
    given = (norm.eps, name, (norm.method, method), seeds)
    return _feed(x, norm.weight, norm.bias, *parameters, *given)

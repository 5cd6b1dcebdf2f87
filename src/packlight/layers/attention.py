"""Scaled dot-product attention that keeps packs of query, key and value.

torch's fused kernels keep query, key, value, output and a statistic a row for their backward pass.
Here the same kernels run, forward and backward, in one of two forms:

- **recomputed**: packs of the three are kept. The backward pass runs the kernel forward once more,
  on what it decodes, so that output and statistic belong to them. Errors are half those of the
  other form at 8 bits, and 4 bits can be used.
- **kept**: the statistic is kept, and a pack of the output, which serves the linear layer that
  reads it too. Nothing runs again. Probabilities are exponentials of decoded scores over a sum of
  exact ones, and so they are off by a factor: a small one at 8 bits.

Below 8 bits the recomputed form packs the query less its mean over tokens, one number a channel,
which is kept beside the pack. Of what all queries have in common a product with a key would have
the errors of all, and errors of the gradients of query and key fall by a twentieth. Keys and values
are packed as they are: the few that most queries look at are far from the mean of all, and their
errors grow without it.

A replay of dropout sets torch's generator back, which is done where passes are launched; in a
compiled region and a captured graph attention with dropout has the kept form, at 8 bits.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch, _tracer, sharing
from packlight._checks import check_tensor, is_taken, needs_gradient, refuse_second_derivative
from packlight._imagined import device_kind
from packlight._seeds import Seed, can_draw_again, drawn_again, draws_at
from packlight.errors import InputError
from packlight.layers.attention_backends import (
    FUSED,
    Flags,
    Inputs,
    Kernel,
    choose,
    gradients,
    is_replaced,
    kernel_of,
    prepared,
    run,
)
from packlight.layers.replayed import replayed
from packlight.pack import Pack
from packlight.packing.layout import dense_stride
from packlight.quantiser import KEEPS, Quantiser, Restore, Shift

# The statistic is kept, where a call does not say, with so many bits and of more keys than that: of
# few keys the second run costs next to nothing. On an H200 it is a sixth of attention's time, and
# saves a twelfth of what a transformer keeps.
STATISTIC_BITS, STATISTIC_KEYS = 8, 256

# Tokens of which the query's mean is taken, about so many: all would be read for it once more, and
# of these it is off by a sixteenth of a deviation.
SAMPLED = 256

# With fewer bits the error is larger than the gradient, in either form.
FEWEST_BITS = 3


class _RecomputedAttention(torch.autograd.Function):
    """The output; keeps packs of query, key and value."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kernel: Kernel,
        flags: Flags,
        method: Quantiser,
        whole: Tensor | None,
        *seeds: Seed,
    ) -> Tensor:
        draws = draws_at(query) if flags[0] else None
        out: Tensor = run(prepared((query, key, value, mask), kernel), kernel, flags)[0]
        mean = mean_of(query, method)
        packs = _packed(ctx, (query, key, value), whole, method, seeds, mean)
        ctx.save_for_backward(*packs, mean, mask)
        ctx.settings = (query.dtype, kernel, flags, draws)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        dtype, kernel, flags, draws = ctx.settings
        *packs, mean, mask = ctx.saved_tensors
        query, key, value = _unpacked(ctx, dtype, packs, mean)
        given = prepared((query, key, value, mask), kernel)
        with nullcontext() if draws is None else drawn_again(query, draws):
            results = run(given, kernel, flags)
        needs, others = ctx.needs_input_grad[:3], len(ctx.needs_input_grad) - 3
        grads = gradients(grad_output, given, results, kernel, flags, needs, by_parts=True)
        return *grads, *[None] * others


class _KeptAttention(torch.autograd.Function):
    """The output, and its pack; keeps packs of all four and what the fused kernel asks for."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        kernel: Kernel,
        flags: Flags,
        method: Quantiser,
        whole: Tensor | None,
        *seeds: Seed,
    ) -> tuple[Tensor, ...]:
        given = prepared((query, key, value, mask), kernel)
        out, tensors, sizes = run(given, kernel, flags)
        packs = _packed(ctx, (query, key, value, out), whole, method, seeds)
        of_output = packs[-len(packs) // len(seeds) :]
        ctx.mark_non_differentiable(*of_output)
        ctx.set_materialize_grads(False)
        # The mask as it was given: a bias made of it would be four times as large, for each layer.
        ctx.save_for_backward(*packs, mask, *tensors)
        ctx.settings = (query.dtype, kernel, flags, sizes, len(packs))
        return out, *of_output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        if grad_output is None:
            return (None,) * len(ctx.needs_input_grad)
        dtype, kernel, flags, sizes, parts = ctx.settings
        saved = ctx.saved_tensors
        query, key, value, out = _unpacked(ctx, dtype, saved[:parts])
        mask, *tensors = saved[parts:]
        results = (out, tensors, sizes)
        needs, others = ctx.needs_input_grad[:3], len(ctx.needs_input_grad) - 3
        given = prepared((query, key, value, mask), kernel)
        return *gradients(grad_output, given, results, kernel, flags, needs), *[None] * others


def _packed(
    ctx: Any,
    tensors: tuple[Tensor, ...],
    whole: Tensor | None,
    method: Quantiser,
    seeds: tuple[Seed, ...],
    mean: Tensor | None = None,
) -> list[Tensor]:
    """The packs of all, one behind the other; how they come back is noted on `ctx`.

    `whole` is what the first three, query, key and value, are parts of, where they are all of it.
    The query is packed less its mean where that is given.
    """
    if whole is None:
        ctx.places = None
        own = tensors if mean is None else (_by_tokens(tensors[0]), *tensors[1:])
    else:
        ctx.places = [_place(x, whole) for x in tensors[:3]]
        own = (whole, *tensors[3:])
    ctx.rebuilds = [Restore(method, tuple(x.shape), dense_stride(x)) for x in own]
    ctx.width = None if mean is None else mean.numel() * (1 if whole is None else 3)
    shift = None if mean is None else Shift(mean, ctx.width)
    first = method.pack_less(own[0], seeds[0], shift)
    packs = [method.pack(x, seed) for x, seed in zip(own[1:], seeds[1:], strict=True)]
    return [part for pack in (first, *packs) for part in pack]


def _unpacked(
    ctx: Any, dtype: torch.dtype, packs: Sequence[Tensor], mean: Tensor | None = None
) -> list[Tensor]:
    parts = len(packs) // len(ctx.rebuilds)
    shift = None if mean is None else Shift(mean, ctx.width)
    first, *rebuilds = ctx.rebuilds
    found = [first(dtype, *packs[:parts], shift=shift)]
    for place, rebuild in enumerate(rebuilds, 1):
        found.append(rebuild(dtype, *packs[parts * place : parts * (place + 1)]))
    if ctx.places is None:
        return found
    return [*(found[0].as_strided(*place) for place in ctx.places), *found[1:]]


_attend_recomputed: Callable[..., Tensor] = _torch.applied(_RecomputedAttention)
_attend_kept: Callable[..., tuple[Tensor, ...]] = _torch.applied(_KeptAttention)


def mean_of(query: Tensor, method: Quantiser) -> Tensor | None:
    """Of each channel of each head over some tokens, [heads size]; none from 8 bits on.

    0 in a channel with a NaN or an infinity, which so stays where it is.
    """
    if method.grade.bits >= STATISTIC_BITS:
        return None
    batch, _, length, _ = query.shape
    step = max(1, min(length, batch * length // SAMPLED))
    some = query[:, :, step // 2 :: step]
    return some.mean((0, 2)).nan_to_num_(0.0, 0.0, 0.0).view(-1)


def _by_tokens(query: Tensor) -> Tensor:
    """The query in an order of memory in which all heads of a token are neighbours."""
    if dense_stride(query)[1::2] == (query.shape[-1], 1):
        return query
    return query.transpose(1, 2).contiguous().transpose(1, 2)


# --- Query, key and value as parts of one tensor.


def _whole(query: Tensor, key: Tensor, value: Tensor, method: Quantiser) -> Tensor | None:
    """The tensor that the three are views of, if they are all of it: one pack serves them.

    As where one projection makes all three. Each would be copied out of it to be packed by itself.
    None where groups of a pack would lie across two of them, and where the query is to be less its
    mean and is not the first part of each row.
    """
    whole = query._base
    if whole is None or key._base is not whole or value._base is not whole:
        return None
    _, heads, _, size = query.shape
    fits = (
        query.shape == key.shape
        and whole.numel() == 3 * query.numel()
        and whole.is_contiguous()
        and heads * size % method.grade.group_size == 0
    )
    if not fits:
        return None
    for x in (query, key, value):  # heads side by side, in the memory that the tensor has now
        if x.stride()[1::2] != (size, 1):
            return None
        if not _torch.is_traced() and not _torch.share_storage(x, whole):
            return None
    if method.grade.bits < STATISTIC_BITS:
        _, (*strides, _), offset = _place(query, whole)
        if offset or strides[0] % (3 * heads * size) or strides[2] % (3 * heads * size):
            return None
    return whole.detach()


def _place(x: Tensor, whole: Tensor) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shape, strides and offset of a view of a contiguous tensor."""
    return tuple(x.shape), x.stride(), int(x.storage_offset() - whole.storage_offset())


@_torch.followed  # which kernel torch takes is asked of the tracer
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    method: Quantiser,
    recompute: bool | None = None,
) -> Tensor:
    """softmax(Q K^T scale) V by torch's fused kernels, q [..., heads, length, head_dim].

    With `recompute` it keeps packs of query, key and value, below 8 bits of the query less its mean
    over tokens, and that mean; the backward pass decodes them, runs
    the kernel forward again on what it decoded, with the same dropout, and backward. The gradient
    is that of attention of the decoded tensors: biased, since a softmax is not linear in them.
    Without, it keeps a pack of the output too, which serves the linear layer behind, and the
    kernel's statistic, 32 bits a row, and recomputes the softmax from packed query and key with the
    exact statistic: biased, with about twice the error at 8 bits. None is the first form below
    `STATISTIC_BITS` = 8 bits and up to `STATISTIC_KEYS` = 256 keys, and the second otherwise.

    The method is taken as it is given; `Quantiser.for_attention` is that of a conversion. Fewer
    than 3 bits raise `InputError`. With dropout in a compiled region or in a captured CUDA graph
    `recompute` is False, and the method that which it gives for scores: 8 bits of `GroupQuant`.

    A mask is kept as it is given, once for all layers that read it; torch keeps a bias made of it
    for each. With `enable_gqa` the heads of key and value are packed once, also where the kernel
    needs them repeated.

    Where torch would not take a fused kernel, where the mask needs a gradient, and where the head
    dimension is no multiple of 8, torch's own function runs, and runs again in the backward pass;
    but not in a compiled region, nor with dropout that cannot be drawn again: there it keeps what
    it keeps. So does what stands in its place, as torch's `context_parallel` puts attention of the
    tokens of all ranks there.
    """
    for tensor in (query, key, value):
        check_tensor(tensor, "scaled_dot_product_attention")
    flags = (dropout_p, is_causal, scale)
    out = attend((query, key, value, attn_mask), flags, enable_gqa, method, recompute)
    if out is not None:
        return out
    plain = functools.partial(
        F.scaled_dot_product_attention,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    operands = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
    return (
        plain(*operands)
        if _stays(operands, dropout_p)
        else replayed(plain, operands, method, dropout_p > 0, range(3, len(operands)))
    )


def _stays(operands: Sequence[Tensor], dropout_p: float) -> bool:
    """Whether torch's own function is to keep what it keeps, or to raise."""
    return (
        _torch.is_traced()
        or is_replaced()
        or not all(is_taken(x) for x in operands[:3])
        or not any(needs_gradient(x) for x in operands)
        or (dropout_p > 0 and not can_draw_again(operands[0]))
    )


def recomputes(method: Quantiser, keys: int) -> bool:
    """Whether a call that does not say runs the kernel again in its backward pass."""
    return method.grade.bits < STATISTIC_BITS or keys <= STATISTIC_KEYS


def attend(
    inputs: Inputs,
    flags: Flags,
    enable_gqa: bool,
    method: Quantiser,
    recompute: bool | None = None,
) -> Tensor | None:
    """`scaled_dot_product_attention`; None where torch's own function is to run.

    With dropout the kernel of the pass with gradients runs in the pass without them too: each
    kernel draws in its own way.
    """
    query, key, value, _ = inputs
    dropout_p, is_causal, _ = flags
    if torch.compiler.is_dynamo_compiling():  # one question: there are many things to look at
        planned: Any = _torch.ask(
            "planned_attention", None, method, enable_gqa, recompute, dropout_p, is_causal, *inputs
        )
        if planned is not None:
            if planned == ():
                return None
            kernel, recompute, casts = planned
            return _attend(_cast(inputs) if casts else inputs, kernel, flags, method, recompute)
    if method.grade.bits < FEWEST_BITS:
        raise InputError(
            f"attention cannot keep query, key and value by {method!r}: at {method.grade.bits} bits"
            " the error of its gradients is larger than they are; take 4 bits or 8"
        )
    if not _fits(inputs, enable_gqa):
        return None
    kind = device_kind(query)
    wanted = needs_gradient(query) or needs_gradient(key) or needs_gradient(value)
    if not wanted and not dropout_p:
        return None
    if torch.is_autocast_enabled(kind):
        inputs = _cast(inputs)
    if not _fits_mask(inputs):
        return None
    kernel = kernel_of(inputs, dropout_p, is_causal)
    if kernel[0] not in FUSED:
        return None
    if not wanted:
        return run(prepared(inputs, kernel), kernel, flags)[0]
    if recompute is None:
        recompute = recomputes(method, key.shape[-2])
    return _attend(inputs, kernel, flags, method, recompute)


def _fits(inputs: Inputs, enable_gqa: bool) -> bool:
    """Whether ours takes query, key, value and mask, as far as their shapes say."""
    query, key, value, mask = inputs
    if not all(is_taken(x) for x in (query, key, value)):
        return False
    if query.dim() != 4 or (mask is not None and mask.requires_grad):
        return False
    if query.shape[-1] % 8 or key.shape[-1] != query.shape[-1]:
        return False
    heads, groups = query.shape[-3], key.shape[-3]
    if heads == 0 or groups == 0:
        return False  # the kernels divide by them
    if heads != groups and (not enable_gqa or heads % groups):
        return False  # torch raises
    # What its kernels do not take, and do not check.
    return key.shape == value.shape and query.shape[0] == key.shape[0]


@_torch.question
def planned_attention(
    tracer: Any, method: Any, enable_gqa: Any, recompute: Any, *given: Any
) -> tuple[Any, ...] | None:
    """The kernel of traced attention, and whether it runs again; () where torch's own is to run.

    None where the tracer is to follow the code: nothing is known, or there is more to do.
    """
    *flags, query, key, value, mask = given
    own, settings = _torch.value_of(tracer, method), [_torch.value_of(tracer, x) for x in flags]
    if own is None or None in settings or own.grade.bits < FEWEST_BITS:
        return None
    if tracer.output.export:
        return ()
    attended: Any = tuple(_tracer.fake_of(x) for x in (query, key, value))
    inputs: Inputs = (
        *attended,
        None if mask.python_type() is type(None) else _tracer.fake_of(mask),
    )
    if not _fits(inputs, enable_gqa.as_python_constant()):
        return ()
    if not any(needs_gradient(x) for x in attended):
        return None
    cast = _cast(inputs) if torch.is_autocast_enabled(device_kind(inputs[0])) else inputs
    kernel, again = choose(cast, *settings), recompute.as_python_constant()
    if not _fits_mask(cast) or kernel[0] not in FUSED:
        return ()
    if again is None:
        again = bool(recomputes(own, inputs[1].shape[-2]))
    return kernel, again, any(x is not y for x, y in zip(cast, inputs, strict=True))


def _cast(inputs: Inputs) -> Inputs:
    """The inputs as autocast has them, which is on."""
    query, key, value, mask = inputs
    dtype = torch.get_autocast_dtype(device_kind(query))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype), mask


def _fits_mask(inputs: Inputs) -> bool:
    """Whether the kernels take the mask beside the query."""
    query, *_, mask = inputs
    return mask is None or mask.dtype in (torch.bool, query.dtype)


@_torch.one_node
def _attend(
    inputs: Inputs, kernel: Kernel, flags: Flags, method: Quantiser, recompute: bool
) -> Tensor:
    query, key, value, mask = inputs
    if recompute and flags[0] and not can_draw_again(query):
        recompute, method = False, method.for_scores()
    whole = _whole(query, key, value, method)
    packs = (3 if whole is None else 1) + (0 if recompute else 1)
    seeds = [method.seed(query) for _ in range(packs)]
    given = (query, key, value, mask, kernel, flags, method, whole, *seeds)
    if recompute:
        return _attend_recomputed(*given)
    out, *kept = _attend_kept(*given)
    shape = tuple(out.shape)
    rebuild = Restore(method, shape, out.stride())
    sharing.note_pack(out, Pack(rebuild, shape, tuple(kept), method.grade))
    return out

"""Query, key and value as parts of one tensor: one projection, one pack, one gradient.

Models that project the three by layers of their own compute them here by one matrix of all three
weights. Apart, they are three functions, three packs and three kernels each way.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import (
    autocast_dtype,
    is_taken,
    needs_gradient,
    refuse_second_derivative,
    saved_with_weight,
)
from packlight._gradients import one_above_another, recast_parts
from packlight._imagined import device_kind
from packlight._overwrite import writable
from packlight._seeds import Seed, can_draw_again, drawn_again, draws_at
from packlight._tracer import fake_of
from packlight.layers import attention
from packlight.layers.attention_backends import (
    FUSED,
    NO_KERNEL,
    Flags,
    Inputs,
    Kernel,
    Results,
    choose,
    gradients,
    kernel_of,
    prepared,
    run,
)
from packlight.layers.linear import Parameters, linear_gradients
from packlight.quantiser import KEEPS, Quantiser, Shift, pack_input
from packlight.reading import reader

# ---- several projections of one tensor -----------------------------------------------------------


class _Projections(torch.autograd.Function):
    """x [W_1; W_2; ...]^T + [b_1; b_2; ...]; keeps the weights and the pack of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        count: int,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,  # `count` weights, as many biases, and the pack of x
    ) -> Tensor:
        y, ctx.joined = side_by_side(x, count, rebuild, tensors)
        ctx.save_for_backward(*tensors[:count], *tensors[2 * count :])
        return writable(y, of_linear=True)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        saved = saved_with_weight(ctx)
        needs = _torch.needed_gradients(ctx)
        of_parameters = needs[3:]
        dx, others = ctx.joined.gradients(grad_output, saved, needs[0], any(of_parameters))
        return dx, None, None, *others


class SideBySide(NamedTuple):
    """How x [W_1; W_2; ...]^T + [b_1; b_2; ...] is differentiated."""

    parts: int
    sizes: list[int]
    rebuild: Callable[..., Tensor]  # x
    dtypes: tuple[Any, Any, Any]  # of x, weights and biases

    def gradients(
        self,
        grad_output: Tensor,
        saved: Sequence[Any],
        needs_input: bool,
        needs_parameters: bool,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """That of x, those of weights and biases, where needed, and of what is kept of x.

        `saved` are the weights and what is kept of x.
        """
        count, sizes, rebuild, dtypes = self
        weights, tensors = saved[:count], saved[count:]
        weight = recast_parts(weights, grad_output) if needs_input else weights[0]
        needs = (needs_input, needs_parameters, needs_parameters and dtypes[2] is not None)
        dweight: Any
        dx, dweight, dbias = linear_gradients(grad_output, weight, rebuild, tensors, needs, dtypes)
        of_weights, of_biases = (
            [None] * count if joined is None else joined.split_with_sizes(sizes)
            for joined in (dweight, dbias)
        )
        return dx, [*of_weights, *of_biases, *[None] * len(tensors)]


def side_by_side(
    x: Tensor, count: int, rebuild: Callable[..., Tensor], tensors: Sequence[Any]
) -> tuple[Tensor, SideBySide]:
    """x [W_1; W_2; ...]^T + [b_1; b_2; ...] and how it is differentiated.

    `tensors` begin with `count` weights and as many biases.
    """
    weights, biases = tensors[:count], tensors[count : 2 * count]
    dtype = linear_dtype(x, weights[0])
    joined = one_above_another(weights, dtype)
    bias = None if biases[0] is None else one_above_another(biases, dtype)
    dtypes = (x.dtype, weights[0].dtype, None if bias is None else biases[0].dtype)
    how = SideBySide(count, [weight.shape[0] for weight in weights], rebuild, dtypes)
    return F.linear(x, joined, bias), how


def linear_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """That in which torch runs a Linear."""
    return autocast_dtype(
        x, "linear", lambda empty: F.linear(empty.view(0, weight.shape[1]), weight)
    )


_project: Callable[..., Tensor] = _torch.applied(_Projections)


@_torch.one_node
def projections(x: Tensor, parameters: Sequence[Parameters], method: Quantiser) -> Tensor:
    """x W_i^T + b_i side by side, [..., sum of rows of W_i].

    In training, with gradients; the checks are the caller's: weights all train, have
    one dtype, and all or none have a bias that trains. Keeps a pack of x, or nothing where x is
    packed already, and the weights. Gradients are those of the layers one by one.
    """
    kept = pack_input(x, method)
    rebuild = reader(kept.reading, kept.rebuild)
    weights, biases = zip(*parameters, strict=True)
    return _project(x, len(weights), rebuild, *weights, *biases, *kept.tensors)


# ---- attention -----------------------------------------------------------------------------------


class _WholeAttention(torch.autograd.Function):
    """The output; keeps one pack of query, key and value, of which attention runs once more."""

    @staticmethod
    def forward(
        ctx: Any,
        whole: Tensor,
        parts: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        kernel: Kernel,
        flags: Flags,
        method: Quantiser,
        seed: Seed,
    ) -> Tensor:
        draws = draws_at(whole) if flags[0] else None
        out: Tensor = run(prepared((*parts, mask), kernel), kernel, flags)[0]
        mean = attention.mean_of(parts[0], method)
        ctx.save_for_backward(mask, mean, *method.pack_less(whole, seed, query_shift(mean)))
        ctx.settings = (whole.dtype, whole.shape, whole.stride(), parts[0].shape[1])
        ctx.how = (kernel, flags, draws, method)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        mask, mean, *pack = ctx.saved_tensors
        dtype, shape, stride, heads = ctx.settings
        kernel, flags, draws, method = ctx.how
        whole = method.unpack_less(dtype, shape, stride, *pack, shift=query_shift(mean))
        given, results = run_again(whole, heads, mask, kernel, flags, draws)
        del whole
        found = gradients(grad_output, given, results, kernel, flags)
        del given, results
        return joined_gradients(found), *[None] * 6


def query_shift(mean: Tensor | None) -> Shift | None:
    """What the query, of query, key and value side by side, is packed less."""
    return None if mean is None else Shift(mean, 3 * mean.numel())


def run_again(
    whole: Tensor,
    heads: int,
    mask: Tensor | None,
    kernel: Kernel,
    flags: Flags,
    draws: tuple[int, int] | None,
) -> tuple[Inputs, Results]:
    """Attention of the parts of `whole` in a backward pass, with the dropout of `draws`."""
    given = prepared((*parts_of(whole, heads), mask), kernel)
    if draws is None:
        return given, run(given, kernel, flags)
    with drawn_again(whole, draws):
        return given, run(given, kernel, flags)


def kernel_of_whole(
    x: Tensor,
    projections: Sequence[Parameters],
    heads: int,
    mask: Tensor | None,
    flags: Flags,
) -> Kernel | None:
    """The kernel that torch takes for parts of what `projections` give side by side, in traced
    code, where that is no tensor that could be asked. Elsewhere None: it is asked then.
    """
    if not torch.compiler.is_dynamo_compiling():
        return None
    dtype = linear_dtype(x, projections[0][0])
    width = sum([weight.shape[0] for weight, _ in projections])
    p, is_causal, _ = flags
    p = next(iter({p}))  # a number again, as in `kernel_of`
    asked = (dtype, width, heads, mask, p, is_causal)
    kernel: Kernel = _torch.ask("whole_kernel", NO_KERNEL, x, *asked)
    return kernel


@_torch.question
def whole_kernel(
    tracer: Any, x: Any, dtype: Any, width: Any, heads: Any, mask: Any, p: Any, is_causal: Any
) -> Kernel:
    fake: Any = fake_of(x)
    of_mask = None if mask.python_type() is type(None) else fake_of(mask)
    with fake.fake_mode:
        whole = fake.new_empty(
            (*fake.shape[:2], width.as_python_constant()), dtype=dtype.as_python_constant()
        )
        parts = parts_of(whole, heads.as_python_constant())
    return choose((*parts, of_mask), p.as_python_constant(), is_causal.as_python_constant())


def joined_gradients(parts: Sequence[Tensor]) -> Tensor:
    """Gradients of query, key and value as that of the tensor whose parts they are."""
    return torch.cat([each.transpose(1, 2) for each in parts], 2).flatten(2)


def parts_of(whole: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [batch, heads, length, size] of [batch, length, 3 heads size]."""
    batch, length, width = whole.shape
    parts = whole.view(batch, length, 3, heads, width // (3 * heads))
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()
    return query, key, value


def wanting_gradients(parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of a tensor without a gradient as torch is to see them, which asks for that of each."""
    for part in parts:
        part.requires_grad_()
    return parts


_attend: Callable[..., Tensor] = _torch.applied(_WholeAttention)


def self_attention(
    whole: Tensor, heads: int, mask: Tensor | None, flags: Flags, method: Quantiser
) -> Tensor:
    """Attention of the parts of `whole` [batch, length, 3 heads size]: [batch, length, heads size].

    In training. Query, key and value lie side by side in that order. What is kept,
    and gradients, are those of `scaled_dot_product_attention` of the three, but that one pack
    serves all where attention runs once more. That function runs where none does: where it keeps
    the statistic, groups would lie across two of the three, or the kernel draws dropout that
    cannot be drawn again.
    """
    out = _at_once(whole, heads, mask, flags, method)
    if out is None:
        dropout_p, is_causal, scale = flags
        out = attention.scaled_dot_product_attention(
            *parts_of(whole, heads), mask, dropout_p, is_causal, scale, method=method
        )
    return out.transpose(1, 2).flatten(2)


def fits(
    x: Tensor,
    dtype: torch.dtype,
    heads: int,
    width: int,
    mask: Tensor | None,
    dropout_p: float,
    method: Quantiser,
) -> bool:
    """Whether one pack serves query, key and value of `width` in `dtype`, on the device of `x`."""
    kind = device_kind(x)
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype:
        return False
    if mask is not None and (mask.requires_grad or mask.dtype not in (torch.bool, dtype)):
        return False
    if not attention.recomputes(method, x.shape[1]) or method.grade.bits < attention.FEWEST_BITS:
        return False
    if width % method.grade.group_size or width // heads % 8:
        return False
    return not dropout_p or can_draw_again(x)


def _at_once(
    whole: Tensor, heads: int, mask: Tensor | None, flags: Flags, method: Quantiser
) -> Tensor | None:
    if torch.compiler.is_dynamo_compiling():  # which finds what the three are parts of by itself
        return None
    if not needs_gradient(whole) or not is_taken(whole) or not whole.is_contiguous():
        return None
    if not fits(whole, whole.dtype, heads, whole.shape[-1] // 3, mask, flags[0], method):
        return None
    parts = wanting_gradients(parts_of(whole.detach(), heads))
    kernel = kernel_of((*parts, mask), flags[0], flags[1])
    if kernel[0] not in FUSED:
        return None
    return _attend(whole, parts, mask, kernel, flags, method, method.seed(whole))

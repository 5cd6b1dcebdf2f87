"""Feed-forward layers as one function: W_2 f(W_1 x), and the gated W_down (f(W_gate x) W_up x).

Also f(W x), for models that have the two halves in layers of their own. Apart, they are two to four
functions, with notes between them that nothing else reads.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packlight import _torch, sharing
from packlight._checks import autocast, refuse_second_derivative, saved_with_weight
from packlight._gradients import as_dtype
from packlight._overwrite import writable
from packlight._seeds import Seed
from packlight.fewbit.activations import CONTINUOUS
from packlight.layers.activations import (
    activation_of,
    overwriting_activation_of,
    overwriting_unit_of,
)
from packlight.layers.branches import dtypes_of, feed
from packlight.layers.linear import Parameters, affine, linear_gradients, once
from packlight.pack import Pack
from packlight.quantiser import KEEPS, Quantiser, pack_input
from packlight.reading import reader


class _Activated(torch.autograd.Function):
    """f(W x + b) and the tensors that stand for W x + b; keeps these, W and the pack of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        name: str,
        method: Quantiser,
        seed: Seed,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        h = writable(affine(x, weight, bias))
        ctx.h = h.dtype
        h = autocast(h, name, CONTINUOUS[name].function)
        y, *kept = overwriting_activation_of(method).forward(h, name, (), method, seed)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, *kept, *tensors)
        # The gradient of y is not ours to overwrite.
        ctx.differentiate = activation_of(method).backward
        ctx.f = (name, (), y.stride(), method)
        ctx.rebuild, ctx.kept = rebuild, len(kept)
        ctx.dtypes = [None if each is None else each.dtype for each in (x, weight, bias)]
        return y, *kept

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        refuse_second_derivative(KEEPS)
        needs = _torch.needed_gradients(ctx)
        if grad_output is None:
            return (None,) * len(needs)
        weight, *saved = saved_with_weight(ctx)
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        dh = as_dtype(ctx.differentiate(grad_output, kept, *ctx.f), ctx.h)
        gradients = linear_gradients(dh, weight, ctx.rebuild, tensors, needs[:3], ctx.dtypes)
        return *gradients, *[None] * (len(needs) - 3)


_activate: Callable[..., tuple[Tensor, ...]] = _torch.applied(_Activated)


@_torch.one_node
def activated(x: Tensor, projection: Parameters, name: str, method: Quantiser) -> Tensor:
    """f(W x + b), f by its name.

    In training, with gradients; the checks are the caller's. Keeps what `mlp` keeps;
    readers share the pack of W x + b.
    """
    kept = pack_input(x, method)
    rebuild = reader(kept.reading, kept.rebuild)
    y, *made = _activate(x, *projection, name, method, method.seed(x), rebuild, *kept.tensors)
    stands_for = activation_of(method).rebuild(y, name, (), method)
    sharing.note_pack(y, Pack(stands_for, tuple(y.shape), tuple(made), method.grade))
    return y


class _MLP(torch.autograd.Function):
    """The output; keeps the weights, the pack of x and that of the input of f."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        last_weight: Tensor,
        last_bias: Tensor | None,
        name: str,
        method: Quantiser,
        seed: Seed,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        y, kept, ctx.feed = feed(
            affine(x, weight, bias), name, method, seed, last_weight, last_bias
        )
        y = writable(y, of_linear=True)
        ctx.save_for_backward(weight, last_weight, *kept, *tensors)
        ctx.rebuild, ctx.kept = rebuild, len(kept)
        ctx.dtypes = dtypes_of(x, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        needs, dtypes = _torch.needed_gradients(ctx), ctx.dtypes
        weight, last_weight, *saved = saved_with_weight(ctx)
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        dh, last = ctx.feed.gradients(grad_output, last_weight, kept, needs[3:5])
        first = linear_gradients(dh, weight, ctx.rebuild, tensors, needs[:3], dtypes)
        return *first, *last, *[None] * (len(needs) - 5)


_apply: Callable[..., Tensor] = _torch.applied(_MLP)


@_torch.one_node
def mlp(x: Tensor, projections: Sequence[Parameters], name: str, method: Quantiser) -> Tensor:
    """W_2 f(W_1 x), f by its name. `projections` are those of W_1 and W_2.

    In training, with gradients; the checks are the caller's. Keeps a pack of x, or
    nothing where x is packed already, and a pack of W_1 x. Gradients are those of the layers one by
    one.
    """
    kept = pack_input(x, method)
    rebuild = reader(kept.reading, kept.rebuild)
    parameters = [each for projection in projections for each in projection]
    return _apply(x, *parameters, name, method, method.seed(x), rebuild, *kept.tensors)


class _GatedMLP(torch.autograd.Function):
    """The output; keeps the weights, the pack of x, and those of gate and up."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_weight: Tensor,
        gate_bias: Tensor | None,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        down_bias: Tensor | None,
        name: str,
        method: Quantiser,
        seeds: tuple[Seed, Seed],
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        gate, up = affine(x, gate_weight, gate_bias), affine(x, up_weight, up_bias)
        fused = overwriting_unit_of(method)
        product, *packs = fused.forward(gate, up, name, method, *seeds)
        y = writable(affine(product, down_weight, down_bias), of_linear=True)
        ctx.save_for_backward(gate_weight, up_weight, down_weight, *packs, *tensors)
        ctx.product = fused.rebuild(tuple(product.shape), product.stride(), name, method)
        ctx.differentiate, ctx.f = fused.backward, (name, product.stride(), method)
        ctx.rebuild, ctx.packs, ctx.middle = rebuild, len(packs), product.dtype
        parameters = (gate_weight, gate_bias, up_weight, up_bias, down_weight, down_bias)
        ctx.dtypes = [None if each is None else each.dtype for each in (x, *parameters)]
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        needs, dtypes = _torch.needed_gradients(ctx), ctx.dtypes
        gate_weight, up_weight, down_weight, *saved = saved_with_weight(ctx)
        packs, tensors = saved[: ctx.packs], saved[ctx.packs :]
        _torch.let_go_of_saved(ctx)
        del saved
        dproduct, *down = linear_gradients(
            grad_output, down_weight, ctx.product, packs, (True, *needs[5:7]),
            (ctx.middle, *dtypes[5:]),
        )  # fmt: skip
        dgate, dup = ctx.differentiate(dproduct, packs, *ctx.f)
        del dproduct, packs
        # Of the parameters first, so that x is gone when dx comes.
        x = once(ctx.rebuild)
        of_gate, of_up = dtypes[:3], (dtypes[0], *dtypes[3:5])
        _, *gate = linear_gradients(dgate, gate_weight, x, tensors, (False, *needs[1:3]), of_gate)
        _, *up = linear_gradients(dup, up_weight, x, tensors, (False, *needs[3:5]), of_up)
        del x
        dx: Tensor | None = None
        if needs[0]:
            of_x = (True, False, False)
            dx, *_ = linear_gradients(dgate, gate_weight, ctx.rebuild, (), of_x, of_gate)
            del dgate
            dx, *_ = linear_gradients(dup, up_weight, ctx.rebuild, (), of_x, of_up, added=dx)
        return dx, *gate, *up, *down, *[None] * (len(needs) - 7)


_apply_gated: Callable[..., Tensor] = _torch.applied(_GatedMLP)


@_torch.one_node
def gated_mlp(
    x: Tensor,
    projections: Sequence[Parameters],
    name: str,
    method: Quantiser,
) -> Tensor:
    """W_down (f(W_gate x) W_up x), f by its name. `projections` are those of gate, up and down.

    In training, with gradients; the checks are the caller's. Keeps a pack of x, or
    nothing where x is packed already, and packs of W_gate x and W_up x. Gradients are those of the
    layers one by one.
    """
    kept = pack_input(x, method)
    rebuild = reader(kept.reading, kept.rebuild)
    # One seed serves both factors where operators of the method's own pack them.
    seeds = (method.seed(x), None if "gated" in method.fused else method.seed(x))
    parameters = [each for projection in projections for each in projection]
    return _apply_gated(x, *parameters, name, method, seeds, rebuild, *kept.tensors)

"""Linear layers that keep a pack of their input, or nothing where something stands for it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import _torch
from packlight._checks import (
    check_tensor,
    needs_gradient,
    refuse_second_derivative,
    saved_with_weight,
)
from packlight._gradients import add_product, as_dtype, column_sums, product, recast
from packlight._overwrite import writable
from packlight.quantiser import KEEPS, Quantiser, pack_input, worth_packing
from packlight.reading import reader

# Weight and bias of a Linear.
Parameters = tuple[Tensor, Tensor | None]


class _Linear(torch.autograd.Function):
    """y = x W^T + b; keeps W and the pack of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,
    ) -> Tensor:
        y = writable(affine(x, weight, bias), of_linear=True)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *tensors)
        ctx.rebuild, ctx.turned = rebuild, is_turned(weight)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        weight, *tensors = saved_with_weight(ctx)
        needs = _torch.needed_gradients(ctx)[:3]
        gradients = linear_gradients(
            grad_output, weight, ctx.rebuild, tensors, needs, ctx.dtypes, ctx.turned
        )
        return *gradients, None, *[None] * len(tensors)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, of which autocast keeps no cast of the weight.

    It would keep a 16-bit copy of each weight until its context ends, for the next reader of the
    weight, which few have: at the end of a forward pass, where memory is highest, those of all.
    """
    if _torch.is_traced() or not torch.is_autocast_cache_enabled():
        return F.linear(x, weight, bias)
    torch.set_autocast_cache_enabled(False)
    try:
        return F.linear(x, weight, bias)
    finally:
        torch.set_autocast_cache_enabled(True)


def is_turned(weight: Tensor) -> bool:
    """Whether columns lie one behind the other, as those of a transposed parameter."""
    return weight.stride(0) == 1 and weight.stride(1) >= weight.shape[0] > 1


def linear_gradients(
    grad_output: Tensor,
    weight: Tensor,
    rebuild: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
    needs: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    turned: bool | None = None,
    added: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, those that are needed, each in its dtype.

    The input comes from what `tensors` keep of it. The gradient of the weight lies as the weight:
    fused optimizers read one that lies otherwise wrongly, and autograd copies it for a parameter.
    `turned` says how that is where the weight is not given. The gradient of the input is written
    over what is to be `added` to it, if there is something.
    """
    needs_input, needs_weight, needs_bias = needs
    x_dtype, weight_dtype, bias_dtype = dtypes
    if needs_input:
        weight = recast(weight, grad_output)
    rows = grad_output.reshape(math.prod(grad_output.shape[:-1]), grad_output.shape[-1])
    dx = dweight = dbias = None
    if needs_weight:  # the first, so that x is gone when dx comes
        x = rebuild(grad_output.dtype, *tensors).reshape(rows.shape[0], -1)
        if is_turned(weight) if turned is None else turned:
            dweight = product(x.t(), rows, weight_dtype).t()
        else:
            dweight = product(rows.t(), x, weight_dtype)
        del x
    if needs_bias:
        wide = torch.promote_types(rows.dtype, bias_dtype)
        dbias = as_dtype(column_sums(rows, wide), bias_dtype)
    if needs_input:
        if added is not None:
            dx = add_product(added.view(rows.shape[0], -1), rows, weight)
        elif rows.dtype == x_dtype or _torch.is_traced():  # which fuses the cast with what follows
            dx = as_dtype(rows.mm(weight), x_dtype)
        else:
            dx = product(rows, weight, x_dtype)
        dx = dx.view(*grad_output.shape[:-1], -1)
    return dx, dweight, dbias


_apply: Callable[..., Tensor] = _torch.applied(_Linear)


class _Linears(torch.autograd.Function):
    """x W_i^T + b_i for each i; keeps the weights and the pack of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        count: int,
        rebuild: Callable[..., Tensor],
        *tensors: Tensor | None,  # `count` weights, as many biases, and the pack of x
    ) -> tuple[Tensor, ...]:
        parameters: Any = list(zip(tensors[:count], tensors[count : 2 * count], strict=True))
        ctx.set_materialize_grads(False)
        weights = tensors[:count] if ctx.needs_input_grad[0] else [None] * count
        ctx.save_for_backward(*weights, *tensors[2 * count :])
        ctx.rebuild, ctx.turned = rebuild, [is_turned(weight) for weight, _ in parameters]
        ctx.dtypes = [(x.dtype, w.dtype, None if b is None else b.dtype) for w, b in parameters]
        return tuple([writable(affine(x, *each), of_linear=True) for each in parameters])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        refuse_second_derivative(KEEPS)
        saved = saved_with_weight(ctx)
        needs, count = _torch.needed_gradients(ctx), len(grads)
        weights, tensors = saved[:count], saved[count:]
        used = [i for i in range(count) if grads[i] is not None]
        dx: Tensor | None = None
        of_weights: list[Tensor | None] = [None] * count
        of_biases: list[Tensor | None] = [None] * count
        x = once(ctx.rebuild)
        for i in used:  # the first, so that x is gone when dx comes
            needed = (False, needs[3 + i], needs[3 + count + i])
            _, of_weights[i], of_biases[i] = linear_gradients(
                grads[i], weights[i], x, tensors, needed, ctx.dtypes[i], ctx.turned[i]
            )
        del x
        if needs[0]:
            of_x = (True, False, False)
            for i in used:  # each product is added to those before it
                dx, *_ = linear_gradients(
                    grads[i], weights[i], ctx.rebuild, (), of_x, ctx.dtypes[i], added=dx
                )
        return dx, None, None, *of_weights, *of_biases, *[None] * len(tensors)


def once(rebuild: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What rebuilds a tensor when it is first asked for, and gives it again after that."""
    found: list[Tensor] = []

    def rebuilt(dtype: torch.dtype, *tensors: Tensor | None) -> Tensor:
        if not found:
            found.append(rebuild(dtype, *tensors))
        return found[0]

    return rebuilt


_apply_all: Callable[..., tuple[Tensor, ...]] = _torch.applied(_Linears)


def linears(x: Tensor, parameters: Sequence[Parameters], method: Quantiser) -> tuple[Tensor, ...]:
    """x W_i^T + b_i for each i, of one gradient of x.

    In training, with gradients; the checks are the caller's: all weights train. Keeps a pack of x,
    or nothing where x is packed already, and the weights. Gradients are those of the layers one by
    one, but for roundings of the sum that is the gradient of x.
    """
    kept = pack_input(x, method)
    rebuild = reader(kept.reading, kept.rebuild)
    weights, biases = zip(*parameters, strict=True)
    return _apply_all(x, len(weights), rebuild, *weights, *biases, *kept.tensors)


@_torch.one_node
def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, method: Quantiser
) -> Tensor:
    """x W^T + b, x [..., in], W [out, in], b [out].

    Keeps a pack of x, or nothing where x is packed already, and W itself. Gradients of input and
    bias are exact; that of the weight is of the rebuilt input, unbiased where the method is.
    """
    check_tensor(input, "linear")
    if not (needs_gradient(weight) and worth_packing(input, method)):
        return F.linear(input, weight, bias)
    kept = pack_input(input, method)
    rebuild = reader(kept.reading, kept.rebuild)
    return _apply(input, weight, bias, rebuild, *kept.tensors)

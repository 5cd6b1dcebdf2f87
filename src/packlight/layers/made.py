"""Products with a weight that is made of few numbers, and made again in the backward pass.

An adapter whose weight is a product of small matrices (LoHa, LoKr) or a power series of one (OFT)
has a weight as large as the layer's own. Plain autograd keeps it, and what it was made of on the
way; here the parameters alone are kept, with a pack of the input.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight._checks import refuse_second_derivative
from packlight.quantiser import KEEPS, Quantiser, pack_input


class Products(NamedTuple):
    """A product of an input and a weight, and its gradients."""

    forward: Callable[[Tensor, Tensor], Tensor]  # of x and W
    of_input: Callable[[Tensor, Tensor], Tensor]  # of dy and W
    of_weight: Callable[[Tensor, Tensor], Tensor]  # of dy and x


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


LINEAR = Products(F.linear, torch.matmul, lambda dy, x: _rows(dy).t().mm(_rows(x)))


def _turned(x: Tensor, blocks: Tensor) -> Tensor:
    count, rows, _ = blocks.shape
    parts = x.reshape(*x.shape[:-1], count, rows)
    return torch.einsum("...rk,rkc->...rc", parts, blocks).reshape(x.shape)


def _turned_back(dy: Tensor, blocks: Tensor) -> Tensor:
    return _turned(dy, blocks.transpose(1, 2))


def blocks_of(count: int) -> Products:
    """x times a block-diagonal matrix of so many square blocks, [blocks, size, size]."""

    def of_weight(dy: Tensor, x: Tensor) -> Tensor:
        parts = (_rows(each).unflatten(1, (count, -1)) for each in (x, dy))
        return torch.einsum("nrk,nrc->rkc", *parts)

    return Products(_turned, _turned_back, of_weight)


class _Made(torch.autograd.Function):
    """y = x W; keeps what W is made of and the pack of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        make: Callable[[], Tensor],
        products: Products,
        rebuild: Callable[..., Tensor],
        count: int,
        *tensors: Tensor | None,
    ) -> Tensor:
        """`tensors` are so many parameters, and the pack."""
        ctx.save_for_backward(*tensors)
        kind = x.device.type
        on = kind != "meta" and torch.is_autocast_enabled(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind)) if on else None
        ctx.settings = (make, products, rebuild, count, x.dtype)
        return products.forward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        refuse_second_derivative(KEEPS)
        make, products, rebuild, count, dtype = ctx.settings
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        parameters, tensors = saved[:count], saved[count:]
        needed = ctx.needs_input_grad[6 : 6 + count]
        # torch has no autocast for meta tensors.
        kind, wide = ctx.autocast or (grad_output.device.type, None)
        wanted = [p for p, is_needed in zip(parameters, needed, strict=True) if is_needed]
        with _requiring_gradients(wanted):
            if ctx.autocast is None and not (kind != "meta" and torch.is_autocast_enabled(kind)):
                with torch.enable_grad():
                    weight = make()
            else:
                on = ctx.autocast is not None
                with torch.enable_grad(), torch.autocast(kind, wide, enabled=on):
                    weight = make()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = products.of_input(grad_output, weight.detach().to(grad_output.dtype)).to(dtype)
        found: list[Tensor | None] = [None] * count
        if any(needed):
            x = rebuild(grad_output.dtype, *tensors)
            dweight = products.of_weight(grad_output, x).to(weight.dtype)
            with _requiring_gradients(wanted):
                grads = iter(torch.autograd.grad(weight, wanted, dweight, allow_unused=True))
            found = [next(grads) if is_needed else None for is_needed in needed]
        return dx, *[None] * 5, *found, *[None] * len(tensors)


@contextlib.contextmanager
def _requiring_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters that were frozen since the forward pass are no leaves of W otherwise."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_()
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


_apply: Callable[..., Tensor] = _Made.apply


def product(
    x: Tensor,
    weight: Tensor,
    make: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    products: Products,
    *,
    method: Quantiser,
) -> Tensor:
    """x W, where `make()` makes W of the parameters, the same each time.

    `weight` is W without history. Keeps a pack of x, or nothing where x is packed already, and the
    parameters. dx is exact; the gradients of the parameters are those of the weight gradient of the
    packed x, which is unbiased where the method is. Not in compiled code: the compiler decides
    there what it makes again.
    """
    kept = pack_input(x, method)
    settings = (make, products, kept.rebuild, len(parameters))
    return _apply(x, weight, *settings, *parameters, *kept.tensors)

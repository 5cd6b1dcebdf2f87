"""Rotary position embedding as a function with a gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packlight import _torch
from packlight._checks import check_tensor, refuse_second_derivative
from packlight.errors import InputError
from packlight.rotary.ops import rotary


class _Rotary(torch.autograd.Function):
    """Both rotated; keeps cos and sin, by which gradients are rotated back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        rotated: tuple[Tensor, Tensor] = rotary(q, k, cos, sin, False)
        return rotated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        refuse_second_derivative("cos and sin")
        dq, dk = rotary(*grads, *ctx.saved_tensors, True)
        return dq, dk, None, None


_apply: Callable[..., tuple[Tensor, Tensor]] = _torch.applied(_Rotary)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q cos + rotated(q) sin and the same of k, where rotated (x1, x2) is (-x2, x1).

    q is [batch, heads, length, size], k alike with heads of its own, cos and sin are
    [batch or 1, length, size], all of one dtype. Keeps cos and sin, nothing of q and k. Gradients
    are exact, but not differentiable again. Raises `InputError` for other shapes or dtypes.

    >>> import torch, packlight.rotary
    >>> q = torch.randn(1, 4, 16, 64)
    >>> angles = torch.randn(1, 16, 32).repeat(1, 1, 2)
    >>> packlight.rotary.rotate(q, q, angles.cos(), angles.sin())[0].shape
    torch.Size([1, 4, 16, 64])
    """
    if not fits(q, k, cos, sin):
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in (q, k, cos, sin))
        raise InputError(
            "rotate takes queries and keys [batch, heads, length, size], cos and sin"
            f" [batch or 1, length, size], of one dtype and device and an even size; got {shapes}"
        )
    check_tensor(q, "rotate")
    return _apply(q, k, cos, sin)


def fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these."""
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    batch, _, length, size = q.shape
    return (
        k.shape == (batch, k.shape[1], length, size)
        and cos.shape in ((batch, length, size), (1, length, size))
        and size % 2 == 0
        and q.dtype == k.dtype == cos.dtype == sin.dtype
        and q.device == k.device == cos.device == sin.device
        and not (cos.requires_grad or sin.requires_grad)
    )

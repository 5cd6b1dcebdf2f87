"""The operator of rotary position embedding, and its reference."""

import torch
from torch import Tensor

from packlight._library import define_op


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _one(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """x cos + rotated(x) sin; transposed x cos - rotated(x sin)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    y = torch.empty_like(x)
    if transposed:
        z1, z2 = _halves(x * sin)
        return y.copy_(x * cos + torch.cat((z2, -z1), -1))
    x1, x2 = _halves(x)
    return y.copy_(x * cos + torch.cat((-x2, x1), -1) * sin)


def _reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, transposed: bool
) -> tuple[Tensor, Tensor]:
    return _one(q, cos, sin, transposed), _one(k, cos, sin, transposed)


rotary = define_op(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transposed) -> (Tensor, Tensor)",
    reference=_reference,
    fake=lambda q, k, cos, sin, transposed: (torch.empty_like(q), torch.empty_like(k)),
    kernel="packlight.rotary.kernels:rotary",
)

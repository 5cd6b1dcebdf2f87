"""What the operators of heads compute, in plain PyTorch; see `ops.py`."""

import torch
from torch import Tensor

from packlight.packing.layout import compute_dtype


def bent(logits: Tensor, scale: float, cap: float) -> Tensor:
    """scale z, or cap tanh(scale z) where cap is not 0, in float32 or float64."""
    u = logits.to(compute_dtype(logits))
    if scale != 1.0:
        u = u * scale
    return torch.tanh(u) * cap if cap else u


def row_sums(logits: Tensor, scale: float, cap: float) -> tuple[Tensor, Tensor]:
    """logsumexp(u) and the sum of u of each row."""
    u = bent(logits, scale, cap)
    return torch.logsumexp(u, -1), u.sum(-1)


def gradient_(
    logits: Tensor,
    logsumexp: Tensor,
    targets: Tensor,
    coefficients: Tensor,
    start: int,
    on_target: float,
    on_all: float,
    scale: float,
    cap: float,
) -> None:
    """coefficients (e^(u - logsumexp) - on_target [column is target] - on_all) du/dz."""
    u = bent(logits, scale, cap)
    g = (u - logsumexp[:, None]).exp_()
    if on_all:
        g -= on_all
    if on_target:
        columns = targets - start
        here = (columns >= 0) & (columns < g.shape[1])
        share = here.to(g.dtype) * -on_target
        g.scatter_add_(1, torch.where(here, columns, 0)[:, None], share[:, None])
    g *= coefficients[:, None] * scale
    if cap:
        g *= cap - u * (u / cap)
    logits.copy_(g)

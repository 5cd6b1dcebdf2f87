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
    on_softmax: Tensor,
    on_target: Tensor,
    on_all: Tensor,
    start: int,
    scale: float,
    cap: float,
) -> None:
    """(on_softmax e^(u - logsumexp) + on_target [column is target] + on_all) du/dz."""
    u = bent(logits, scale, cap)
    g = (u - logsumexp[:, None]).exp_()
    g.mul_(on_softmax[:, None]).add_(on_all[:, None])
    columns = targets - start
    here = (columns >= 0) & (columns < g.shape[1])
    share = torch.where(here, on_target, 0.0)
    g.scatter_add_(1, torch.where(here, columns, 0)[:, None], share[:, None])
    if cap:
        g *= cap - u * (u / cap)
    if scale != 1.0:
        g *= scale
    logits.copy_(g)

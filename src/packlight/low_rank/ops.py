"""The operators. x and y [rows, width] are wide, `low` [rows, rank] is narrow."""

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.low_rank import reference

_KERNELS = "packlight.low_rank.kernels"


def in_tf32() -> bool:
    """Whether torch may multiply float32 rounded to the 10 bits of TF32, as it is set now."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


narrowed = define_op(
    "low_rank_narrowed(Tensor x, Tensor factor) -> Tensor",
    reference=reference.narrowed,
    fake=lambda x, factor: factor.new_empty(x.shape[0], factor.shape[1]),
    kernel=f"{_KERNELS}:narrowed",
)

add_widened_ = define_op(
    "low_rank_add_widened_(Tensor(a!) y, Tensor low, Tensor factor, float scaling, bool rounds)"
    " -> ()",
    reference=reference.add_widened_,
    fake=lambda y, low, factor, scaling, rounds: None,
    kernel=f"{_KERNELS}:add_widened_",
)


def _fake_outer(x: Tensor, low: Tensor) -> Tensor:
    return torch.empty((low.shape[1], x.shape[1]), dtype=low.dtype, device=low.device)


outer = define_op(
    "low_rank_outer(Tensor x, Tensor low) -> Tensor",
    reference=reference.outer,
    fake=_fake_outer,
    kernel=f"{_KERNELS}:outer",
)

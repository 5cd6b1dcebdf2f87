"""The operators of heads: what a chunk of logits gives, and its gradient in its place.

A chunk z [n, c] holds logits as the product of the head gave them. The loss is of
u = scale z, or u = cap tanh(scale z) where cap is not 0. All sums are in float32, or in float64 for
logits of float64. `reference.py` says what is computed.
"""

from packlight._library import define_op
from packlight.head import reference
from packlight.packing.layout import compute_dtype

_KERNELS = "packlight.head.kernels"

# logsumexp(u) [n] and the sum of u [n] of whole rows.
row_sums = define_op(
    "head_row_sums(Tensor logits, float scale, float cap) -> (Tensor, Tensor)",
    reference=reference.row_sums,
    fake=lambda logits, *_: (
        logits.new_empty(logits.shape[0], dtype=compute_dtype(logits)),
        logits.new_empty(logits.shape[0], dtype=compute_dtype(logits)),
    ),
    kernel=f"{_KERNELS}:row_sums",
)

# Overwrites columns of logits, those from `start`, with
# (on_softmax e^(u - logsumexp) + on_target [column is target] + on_all) du/dz; all are [n].
gradient_ = define_op(
    "head_gradient(Tensor(a!) logits, Tensor logsumexp, Tensor targets, Tensor on_softmax,"
    " Tensor on_target, Tensor on_all, int start, float scale, float cap) -> ()",
    reference=reference.gradient_,
    fake=lambda *_: None,
    kernel=f"{_KERNELS}:gradient_",
)

"""The operators of the inverted activations: schema, fake, reference, kernel."""

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.inverted import reference
from packlight.packing.layout import packed_bytes


def _fake_bits(x: Tensor) -> Tensor:
    return x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)


activation = define_op(
    "inverted_activation(Tensor x, str name) -> (Tensor, Tensor)",
    reference=reference.activation,
    fake=lambda x, name: (torch.empty_like(x), _fake_bits(x)),
    kernel="packlight.inverted.kernels:activation",
)

activation_ = define_op(
    "inverted_activation_(Tensor(a!) x, str name) -> Tensor",
    reference=reference.activation_,
    fake=lambda x, name: _fake_bits(x),
    kernel="packlight.inverted.kernels:activation_",
)

backward = define_op(
    "inverted_backward(Tensor grad_output, Tensor y, Tensor? bits, str name, float[] parameters)"
    " -> Tensor",
    reference=reference.backward,
    fake=lambda grad_output, y, bits, name, parameters: torch.empty_like(y),
    kernel="packlight.inverted.kernels:backward",
)

"""The operators of the few-bit layers: schema, fake, reference, kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.fewbit import reference
from packlight.packing.layout import packed_bytes


def _fake_codes(x: Tensor, bits: int, poison: int) -> Tensor:
    return x.new_empty(packed_bytes(x.numel(), bits) + (poison != 0), dtype=torch.uint8)


def _fake_activation(
    x: Tensor,
    name: str,
    parameters: Sequence[float],
    bits: int,
    borders: Sequence[float],
    parity: str,
    poison: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _fake_codes(x, bits, poison)


activation = define_op(
    "few_bit_activation(Tensor x, str name, float[] parameters, int bits, float[] borders,"
    " str parity, int poison) -> (Tensor, Tensor)",
    reference=reference.activation,
    fake=_fake_activation,
    kernel="packlight.fewbit.kernels:activation",
)

activation_ = define_op(
    "few_bit_activation_(Tensor(a!) x, str name, float[] parameters, int bits, float[] borders,"
    " str parity, int poison) -> Tensor",
    reference=reference.activation_,
    fake=lambda x, name, parameters, bits, borders, parity, poison: _fake_codes(x, bits, poison),
    kernel="packlight.fewbit.kernels:activation_",
)

encode = define_op(
    "few_bit_encode(Tensor x, int bits, float[] borders, str parity, int poison,"
    " SymInt[] stride) -> Tensor",
    reference=reference.encode,
    fake=lambda x, bits, borders, parity, poison, stride: _fake_codes(x, bits, poison),
    kernel="packlight.fewbit.kernels:encode",
)

decode_backward = define_op(
    "few_bit_backward(Tensor grad_output, Tensor codes, int bits, float[] levels, bool mask,"
    " SymInt[] stride) -> Tensor",
    reference=reference.decode_backward,
    fake=lambda grad_output, codes, bits, levels, mask, stride: grad_output.new_empty_strided(
        grad_output.shape, stride
    ),
    kernel="packlight.fewbit.kernels:decode_backward",
)

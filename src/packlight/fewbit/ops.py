"""The operators of the few-bit layers: schema, fake, reference, kernel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight._library import define_op, make_early
from packlight.fewbit import dropout_reference, pooling_reference, reference
from packlight.packing.layout import packed_bytes


def _fake_codes(x: Tensor, bits: int, poison: int) -> Tensor:
    return x.new_empty(packed_bytes(x.numel(), bits) + int(poison != 0), dtype=torch.uint8)


def _fake_encoded(
    x: Tensor, bits: int, borders: Sequence[float], parity: str, poison: int
) -> Tensor:
    def table() -> None:
        from packlight.fewbit import kernels

        kernels.borders_on(x.device, borders, bits, parity)

    make_early(x.device, table)
    return _fake_codes(x, bits, poison)


def _fake_decoded(
    grad_output: Tensor,
    codes: Tensor,
    bits: int,
    levels: Sequence[float],
    mask: bool,
    stride: Sequence[int],
) -> Tensor:
    def table() -> None:
        from packlight.fewbit import kernels

        kernels.levels_on(codes.device, levels, bits)

    make_early(codes.device, table)
    return grad_output.new_empty_strided(grad_output.shape, stride)


def _fake_activation(
    x: Tensor,
    name: str,
    parameters: Sequence[float],
    bits: int,
    borders: Sequence[float],
    parity: str,
    center: float,
    poison: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), _fake_encoded(x, bits, borders, parity, poison)


activation = define_op(
    "few_bit_activation(Tensor x, str name, float[] parameters, int bits, float[] borders,"
    " str parity, float center, int poison) -> (Tensor, Tensor)",
    reference=reference.activation,
    fake=_fake_activation,
    kernel="packlight.fewbit.kernels:activation",
)

activation_ = define_op(
    "few_bit_activation_(Tensor(a!) x, str name, float[] parameters, int bits, float[] borders,"
    " str parity, float center, int poison) -> Tensor",
    reference=reference.activation_,
    fake=lambda x, name, parameters, bits, borders, parity, center, poison: _fake_encoded(
        x, bits, borders, parity, poison
    ),
    kernel="packlight.fewbit.kernels:activation_",
)

encode = define_op(
    "few_bit_encode(Tensor x, int bits, float[] borders, str parity, float center, int poison,"
    " SymInt[] stride) -> Tensor",
    reference=reference.encode,
    fake=lambda x, bits, borders, parity, center, poison, stride: _fake_encoded(
        x, bits, borders, parity, poison
    ),
    kernel="packlight.fewbit.kernels:encode",
)

decode_backward = define_op(
    "few_bit_backward(Tensor grad_output, Tensor codes, int bits, float[] levels, bool mask,"
    " SymInt[] stride) -> Tensor",
    reference=reference.decode_backward,
    fake=_fake_decoded,
    kernel="packlight.fewbit.kernels:decode_backward",
)

dropout = define_op(
    "few_bit_dropout(Tensor x, Tensor? seed, int number, float p, bool keep_codes)"
    " -> (Tensor, Tensor)",
    reference=dropout_reference.dropout,
    fake=lambda x, seed, number, p, keep_codes: (
        torch.empty_like(x),
        _fake_codes(x, 1, 0) if keep_codes else x.new_empty(0, dtype=torch.uint8),
    ),
    kernel="packlight.fewbit.dropout_kernels:dropout",
)

dropout_mask = define_op(
    "few_bit_dropout_mask(Tensor seed, SymInt count, float p) -> Tensor",
    reference=dropout_reference.dropout_mask,
    fake=lambda seed, count, p: seed.new_empty(packed_bytes(count, 1), dtype=torch.uint8),
    kernel="packlight.fewbit.dropout_kernels:dropout_mask",
)

dropout_ = define_op(
    "few_bit_dropout_(Tensor(a!) x, Tensor? seed, int number, float p, bool keep_codes) -> Tensor",
    reference=dropout_reference.dropout_,
    fake=lambda x, seed, number, p, keep_codes: (
        _fake_codes(x, 1, 0) if keep_codes else x.new_empty(0, dtype=torch.uint8)
    ),
    kernel="packlight.fewbit.dropout_kernels:dropout_",
)


def _fake_max_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    shape = pooling_reference.output_shape(x, kernel, stride, padding, dilation, ceil_mode)
    layout = pooling_reference.memory_format(x, len(kernel))
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    size = pooling_reference.codes_bytes(y.numel(), kernel)
    return y, x.new_empty(size, dtype=torch.uint8)


def _fake_max_pool_backward(
    grad_output: Tensor,
    codes: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_size: Sequence[int],
    output_stride: Sequence[int],
) -> Tensor:
    layout = pooling_reference.output_format(grad_output.shape, output_stride, len(kernel))
    dtype, device = grad_output.dtype, grad_output.device
    return torch.empty(input_size, dtype=dtype, device=device, memory_format=layout)


max_pool = define_op(
    "few_bit_max_pool(Tensor x, int[] kernel, int[] stride, int[] padding, int[] dilation,"
    " bool ceil_mode) -> (Tensor, Tensor)",
    reference=pooling_reference.max_pool,
    fake=_fake_max_pool,
    kernel="packlight.fewbit.pooling_kernels:max_pool",
)

max_pool_backward = define_op(
    "few_bit_max_pool_backward(Tensor grad_output, Tensor codes, int[] kernel, int[] stride,"
    " int[] padding, int[] dilation, SymInt[] input_size, SymInt[] output_stride) -> Tensor",
    reference=pooling_reference.max_pool_backward,
    fake=_fake_max_pool_backward,
    kernel="packlight.fewbit.pooling_kernels:max_pool_backward",
)

max_pool_indices = define_op(
    "few_bit_max_pool_indices(Tensor codes, int[] kernel, int[] stride, int[] padding,"
    " int[] dilation, SymInt[] input_size, SymInt[] output_size, SymInt[] output_stride) -> Tensor",
    reference=pooling_reference.max_pool_indices,
    fake=lambda codes, kernel, stride, padding, dilation, input_size, output_size, output_stride: (
        torch.empty_strided(output_size, output_stride, dtype=torch.int64, device=codes.device)
    ),
)

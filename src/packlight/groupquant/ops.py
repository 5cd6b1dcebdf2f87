"""The operators of group quantisation: schema, fake, reference, kernel.

Rounding is stochastic by `seed` [1] of int64, where there is one, or else by `number`, and to
nearest where that is `NEAREST` (`_seeds.py`). A pack is codes (uint8)
and scales (int32); `reference.py` says what is in them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from packlight._library import define_op
from packlight.groupquant import norm_reference, reference
from packlight.groupquant.grouping import Grouping, Groups
from packlight.packing.layout import compute_dtype, packed_bytes

_KERNELS = "packlight.groupquant.kernels"
_GATED = "packlight.groupquant.gated_kernels"


def _fake_pack(x: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    return Grouping(1, x.numel(), *groups).empty_pack(x)


def _fake_quantize(
    x: Tensor, stride: Sequence[int], groups: Groups, seed: Tensor | None, number: int
) -> tuple[Tensor, ...]:
    return _fake_pack(x, groups)


quantize = define_op(
    "group_quantize(Tensor x, SymInt[] stride, int[] groups, Tensor? seed, int number)"
    " -> (Tensor, Tensor)",
    reference=reference.quantize,
    fake=_fake_quantize,
    kernel=f"{_KERNELS}:quantize",
)

quantize_less = define_op(
    "group_quantize_less(Tensor x, SymInt[] stride, Tensor shift, SymInt width, int[] groups,"
    " Tensor? seed, int number) -> (Tensor, Tensor)",
    reference=reference.quantize_less,
    fake=lambda x, stride, shift, width, groups, seed, number: _fake_pack(x, groups),
    kernel=f"{_KERNELS}:quantize_less",
)

dequantize = define_op(
    "group_dequantize(Tensor codes, Tensor scales, SymInt[] shape, SymInt[] stride, SymInt width,"
    " int[] groups, ScalarType dtype, str name, float[] parameters, Tensor? weight,"
    " Tensor? bias) -> Tensor",
    reference=reference.dequantize,
    fake=lambda codes, scales, shape, stride, width, groups, dtype, *_: codes.new_empty_strided(
        shape, stride, dtype=dtype
    ),
    kernel=f"{_KERNELS}:dequantize",
)

activation = define_op(
    "group_quant_activation(Tensor x, str name, float[] parameters, int[] groups,"
    " Tensor? seed, int number) -> (Tensor, Tensor, Tensor)",
    reference=reference.activation,
    fake=lambda x, name, parameters, groups, seed, number: (
        torch.empty_like(x),
        *_fake_pack(x, groups),
    ),
    kernel=f"{_KERNELS}:activation",
)

activation_ = define_op(
    "group_quant_activation_(Tensor(a!) x, str name, float[] parameters, int[] groups,"
    " Tensor? seed, int number) -> (Tensor, Tensor)",
    reference=reference.activation_,
    fake=lambda x, name, parameters, groups, seed, number: _fake_pack(x, groups),
    kernel=f"{_KERNELS}:activation_",
)

activation_backward_ = define_op(
    "group_quant_activation_backward_(Tensor(a!) grad_output, Tensor codes, Tensor scales,"
    " str name, float[] parameters, int[] groups) -> ()",
    reference=reference.activation_backward_,
    fake=lambda grad_output, codes, scales, name, parameters, groups: None,
    kernel=f"{_KERNELS}:activation_backward_",
)

activation_backward = define_op(
    "group_quant_activation_backward(Tensor grad_output, Tensor codes, Tensor scales, str name,"
    " float[] parameters, SymInt[] stride, int[] groups) -> Tensor",
    reference=reference.activation_backward,
    fake=lambda grad_output, codes, scales, name, parameters, stride, groups: (
        grad_output.new_empty_strided(grad_output.shape, stride)
    ),
    kernel=f"{_KERNELS}:activation_backward",
)

gated = define_op(
    "group_quant_gated(Tensor gate, Tensor up, str name, int[] groups, Tensor? seed,"
    " int number) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.gated,
    fake=lambda gate, up, name, groups, seed, number: (
        torch.empty_like(gate),
        *_fake_pack(gate, groups),
        *_fake_pack(gate, groups),
    ),
    kernel=f"{_GATED}:gated",
)


def _fake_gated_backward(
    grad_output: Tensor,
    gate_codes: Tensor,
    gate_scales: Tensor,
    up_codes: Tensor,
    up_scales: Tensor,
    name: str,
    stride: Sequence[int],
    groups: Groups,
    through: bool,
) -> tuple[Tensor, Tensor]:
    dgate = grad_output.new_empty_strided(grad_output.shape, stride)
    return dgate, torch.empty_like(dgate)


gated_backward = define_op(
    "group_quant_gated_backward(Tensor grad_output, Tensor gate_codes, Tensor gate_scales,"
    " Tensor up_codes, Tensor up_scales, str name, SymInt[] stride, int[] groups,"
    " bool through) -> (Tensor, Tensor)",
    reference=reference.gated_backward,
    fake=_fake_gated_backward,
    kernel=f"{_GATED}:gated_backward",
)

gated_backward_ = define_op(
    "group_quant_gated_backward_(Tensor(a!) grad_output, Tensor gate_codes, Tensor gate_scales,"
    " Tensor up_codes, Tensor up_scales, str name, int[] groups) -> Tensor",
    reference=reference.gated_backward_,
    fake=lambda grad_output, _1, _2, _3, _4, name, groups: torch.empty_like(grad_output),
    kernel=f"{_GATED}:gated_backward_",
)

gated_product = define_op(
    "group_quant_gated_product(Tensor gate_codes, Tensor gate_scales, Tensor up_codes,"
    " Tensor up_scales, str name, SymInt[] shape, SymInt[] stride, int[] groups,"
    " ScalarType dtype) -> Tensor",
    reference=reference.gated_product,
    fake=lambda codes, _1, _2, _3, name, shape, stride, groups, dtype: codes.new_empty_strided(
        shape, stride, dtype=dtype
    ),
    kernel=f"{_GATED}:gated_product",
)


def _fake_norm(
    x: Tensor,
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    groups: Groups,
    seed: Tensor | None,
    number: int,
    rounded_to: torch.dtype | None,
) -> tuple[Tensor, ...]:
    rows = x.numel() // width
    y = torch.empty_like(x, dtype=norm_reference.output_dtype(x, weight, rounded_to))
    rstd = x.new_empty(rows, dtype=compute_dtype(x))
    copies = [x.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias)]
    return y, *Grouping(rows, width, *groups).empty_pack(x), rstd, *copies


norm = define_op(
    "group_quant_norm(Tensor x, SymInt width, Tensor? weight, Tensor? bias, float eps, bool center,"
    " int[] groups, Tensor? seed, int number, ScalarType? rounded_to)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=norm_reference.norm,
    fake=_fake_norm,
    kernel="packlight.groupquant.norm_kernels:norm",
)


def _fake_norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    center: bool,
    need_weight: bool,
    need_bias: bool,
    groups: Groups,
    added: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    width = grad_output.shape[-1]
    dtype = compute_dtype(grad_output)
    dweight = grad_output.new_empty(width if need_weight else 0, dtype=dtype)
    dbias = grad_output.new_empty(width if need_bias else 0, dtype=dtype)
    return torch.empty_like(grad_output), dweight, dbias


norm_backward = define_op(
    "group_quant_norm_backward(Tensor grad_output, Tensor codes, Tensor scales, Tensor rstd,"
    " Tensor? weight, bool center, bool need_weight, bool need_bias, int[] groups, Tensor? added)"
    " -> (Tensor, Tensor, Tensor)",
    reference=norm_reference.norm_backward,
    fake=_fake_norm_backward,
    kernel="packlight.groupquant.norm_kernels:norm_backward",
)


def _fake_post_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float,
    dtype: torch.dtype,
    groups: Groups,
    mask_seed: Tensor | None,
    mask_number: int,
    seed: Tensor | None,
    number: int,
) -> tuple[Tensor, ...]:
    total = torch.empty_like(x, dtype=dtype)
    made = _fake_norm(total, x.shape[-1], weight, bias, eps, True, groups, seed, number, None)
    return *made, x.new_empty(packed_bytes(x.numel(), 1) if p else 0, dtype=torch.uint8)


post_norm = define_op(
    "group_quant_post_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float p,"
    " float eps, ScalarType dtype, int[] groups, Tensor? mask_seed, int mask_number, Tensor? seed,"
    " int number) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=norm_reference.post_norm,
    fake=_fake_post_norm,
    kernel="packlight.groupquant.post_norm_kernels:post_norm",
)


def _fake_post_norm_backward(
    grad_output: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    mask: Tensor,
    p: float,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    need_weight: bool,
    need_bias: bool,
    groups: Groups,
) -> tuple[Tensor, Tensor, Tensor]:
    apart = p > 0 or dtype != residual_dtype
    dx = torch.empty_like(grad_output, dtype=dtype) if apart else rstd.new_empty(0)
    sums = grad_output.new_empty(
        need_weight + need_bias, grad_output.shape[-1], dtype=compute_dtype(grad_output)
    )
    return dx, torch.empty_like(grad_output, dtype=residual_dtype), sums


post_norm_backward = define_op(
    "group_quant_post_norm_backward(Tensor grad_output, Tensor codes, Tensor scales, Tensor rstd,"
    " Tensor? weight, Tensor mask, float p, ScalarType dtype, ScalarType residual_dtype,"
    " bool need_weight, bool need_bias, int[] groups) -> (Tensor, Tensor, Tensor)",
    reference=norm_reference.post_norm_backward,
    fake=_fake_post_norm_backward,
    kernel="packlight.groupquant.post_norm_kernels:post_norm_backward",
)

"""What `GroupQuant` makes of the layers of torch.nn, and of calls of torch's functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.groupquant import (
    channel_norms,
    conv_modules,
    convolution,
    fixed_point,
    functional,
    modules,
    norms,
)
from packlight.groupquant.attention import scaled_dot_product_attention
from packlight.groupquant.method import GroupQuant
from packlight.groupquant.product import mul
from packlight.method import Swap, call_rule, rule

_QUANTISED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: conv_modules.BatchNorm1d,
    nn.BatchNorm2d: conv_modules.BatchNorm2d,
    nn.BatchNorm3d: conv_modules.BatchNorm3d,
    nn.CELU: modules.CELU,
    nn.Conv1d: conv_modules.Conv1d,
    nn.Conv2d: conv_modules.Conv2d,
    nn.Conv3d: conv_modules.Conv3d,
    nn.ConvTranspose1d: conv_modules.ConvTranspose1d,
    nn.ConvTranspose2d: conv_modules.ConvTranspose2d,
    nn.ConvTranspose3d: conv_modules.ConvTranspose3d,
    nn.ELU: modules.ELU,
    nn.GELU: modules.GELU,
    nn.GLU: modules.GLU,
    nn.GroupNorm: conv_modules.GroupNorm,
    nn.Hardswish: modules.Hardswish,
    nn.LayerNorm: modules.LayerNorm,
    nn.Linear: modules.Linear,
    nn.LogSigmoid: modules.LogSigmoid,
    nn.Mish: modules.Mish,
    nn.RMSNorm: modules.RMSNorm,
    nn.SELU: modules.SELU,
    nn.Sigmoid: modules.Sigmoid,
    nn.SiLU: modules.SiLU,
    nn.Softplus: modules.Softplus,
    nn.Softsign: modules.Softsign,
    nn.Tanh: modules.Tanh,
    nn.Tanhshrink: modules.Tanhshrink,
}


@rule(GroupQuant, *_QUANTISED)
def _quantised(method: GroupQuant, module: Any) -> Swap:
    return Swap(_QUANTISED[type(module)], {"method": method})


@rule(GroupQuant, nn.ReLU)
def _relu(method: GroupQuant, module: Any) -> Swap:
    return Swap(fixed_point.ReLU)  # exact; one bit, or what its producer keeps


def _with_inplace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with torch's argument `inplace`."""

    def call(input: Tensor, inplace: bool = False, **options: Any) -> Tensor:
        return modules.in_place(inplace, input, function(input, **options))

    return call


def _with_alpha_and_inplace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(input: Tensor, alpha: float = 1.0, inplace: bool = False, **options: Any) -> Tensor:
        return modules.in_place(inplace, input, function(input, alpha, **options))

    return call


call_rule(
    GroupQuant,
    {
        F.celu: _with_alpha_and_inplace(functional.celu),
        F.elu: _with_alpha_and_inplace(functional.elu),
        F.gelu: functional.gelu,
        F.glu: functional.glu,
        F.hardswish: _with_inplace(functional.hardswish),
        F.logsigmoid: functional.logsigmoid,
        F.mish: _with_inplace(functional.mish),
        F.selu: _with_inplace(functional.selu),
        F.silu: _with_inplace(functional.silu),
        F.softplus: functional.softplus,
        F.softsign: functional.softsign,
        F.tanhshrink: functional.tanhshrink,
        Tensor.sigmoid: functional.sigmoid,
        Tensor.tanh: functional.tanh,
        torch.sigmoid: functional.sigmoid,
        torch.tanh: functional.tanh,
        F.batch_norm: channel_norms.batch_norm,
        F.conv1d: convolution.conv1d,
        F.conv2d: convolution.conv2d,
        F.conv3d: convolution.conv3d,
        F.conv_transpose1d: convolution.conv_transpose1d,
        F.conv_transpose2d: convolution.conv_transpose2d,
        F.conv_transpose3d: convolution.conv_transpose3d,
        F.group_norm: channel_norms.group_norm,
        F.layer_norm: norms.layer_norm,
        F.linear: functional.linear,
        F.rms_norm: norms.rms_norm,
        Tensor.mul: mul,
        torch.mul: mul,
    },
    dataclasses.asdict,
)

# Scores are exponentials of products of two packs.
call_rule(
    GroupQuant,
    {F.scaled_dot_product_attention: scaled_dot_product_attention},
    lambda method: {**dataclasses.asdict(method), "bits": 8},
)

call_rule(
    GroupQuant,
    {F.relu: fixed_point.relu, Tensor.relu: fixed_point.relu, torch.relu: fixed_point.relu},
)

"""What a quantiser makes of the layers of torch.nn, and of calls of torch's functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.groupquant import conv_modules, fixed_point, modules
from packlight.layers import channel_norms, functional, norms
from packlight.layers.attention import scaled_dot_product_attention
from packlight.layers.casts import CASTS
from packlight.layers.convolution import CONVOLUTIONS, TRANSPOSED
from packlight.layers.linear import linear
from packlight.layers.product import mul
from packlight.method import Swap, call_rule, rule
from packlight.quantiser import Quantiser

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


@rule(Quantiser, *_QUANTISED)
def _quantised(method: Quantiser, module: Any) -> Swap:
    return Swap(_QUANTISED[type(module)], {"method": method})


@rule(Quantiser, nn.ReLU)
def _relu(method: Quantiser, module: Any) -> Swap:
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
    Quantiser,
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
        F.conv1d: CONVOLUTIONS[1],
        F.conv2d: CONVOLUTIONS[2],
        F.conv3d: CONVOLUTIONS[3],
        F.conv_transpose1d: TRANSPOSED[1],
        F.conv_transpose2d: TRANSPOSED[2],
        F.conv_transpose3d: TRANSPOSED[3],
        F.group_norm: channel_norms.group_norm,
        F.layer_norm: norms.layer_norm,
        F.linear: linear,
        F.rms_norm: norms.rms_norm,
        Tensor.mul: mul,
        torch.mul: mul,
    },
    lambda method: {"method": method},
)

# Scores are exponentials of products of two packs.
call_rule(
    Quantiser,
    {F.scaled_dot_product_attention: scaled_dot_product_attention},
    lambda method: {"method": method.for_scores()},
)

call_rule(
    Quantiser,
    {F.relu: fixed_point.relu, Tensor.relu: fixed_point.relu, torch.relu: fixed_point.relu},
)

call_rule(Quantiser, CASTS)

"""What a quantiser makes of the layers of torch.nn, and of calls of torch's functions."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.groupquant import conv_modules, modules, recurrent  # noqa: F401  has its own rule
from packlight.layers import channel_norms, functional, norms
from packlight.layers.arithmetic import ARITHMETIC
from packlight.layers.attention import scaled_dot_product_attention
from packlight.layers.casts import CASTS
from packlight.layers.convolution import CONVOLUTIONS, TRANSPOSED
from packlight.layers.elementary import ELEMENTARY
from packlight.layers.linear import linear
from packlight.layers.matmul import PRODUCTS
from packlight.layers.multi_head import multi_head_attention_forward
from packlight.layers.prelu import prelu
from packlight.layers.product import mul
from packlight.layers.reductions import REDUCTIONS
from packlight.layers.softmax import SOFTMAXES
from packlight.method import call_rule, rows
from packlight.quantiser import Quantiser


def _inplace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function with torch's argument `inplace`."""

    def call(input: Tensor, inplace: bool = False, *, method: Quantiser) -> Tensor:
        return modules.in_place(inplace, input, function(input, method=method))

    return call


def _alpha_inplace(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(
        input: Tensor, alpha: float = 1.0, inplace: bool = False, *, method: Quantiser
    ) -> Tensor:
        return modules.in_place(inplace, input, function(input, alpha, method=method))

    return call


rows(
    Quantiser,
    {
        (nn.CELU, F.celu): (modules.CELU, _alpha_inplace(functional.celu)),
        (nn.ELU, F.elu): (modules.ELU, _alpha_inplace(functional.elu)),
        (nn.GELU, F.gelu): (modules.GELU, functional.gelu),
        (nn.GLU, F.glu): (modules.GLU, functional.glu),
        (nn.Hardswish, F.hardswish): (modules.Hardswish, _inplace(functional.hardswish)),
        (nn.LogSigmoid, F.logsigmoid): (modules.LogSigmoid, functional.logsigmoid),
        (nn.Mish, F.mish): (modules.Mish, _inplace(functional.mish)),
        (nn.PReLU, F.prelu, torch.prelu, Tensor.prelu): (modules.PReLU, prelu),
        (nn.SELU, F.selu): (modules.SELU, _inplace(functional.selu)),
        (nn.Sigmoid, torch.sigmoid, Tensor.sigmoid): (modules.Sigmoid, functional.sigmoid),
        (nn.SiLU, F.silu): (modules.SiLU, _inplace(functional.silu)),
        (nn.Softplus, F.softplus): (modules.Softplus, functional.softplus),
        (nn.Softsign, F.softsign): (modules.Softsign, functional.softsign),
        (nn.Tanh, torch.tanh, Tensor.tanh): (modules.Tanh, functional.tanh),
        (nn.Tanhshrink, F.tanhshrink): (modules.Tanhshrink, functional.tanhshrink),
        (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply): (mul,),
    },
    lambda method: {"method": method.for_functions()},
)

rows(
    Quantiser,
    {
        (nn.LayerNorm, F.layer_norm): (modules.LayerNorm, norms.layer_norm),
        (nn.RMSNorm, F.rms_norm): (modules.RMSNorm, norms.rms_norm),
    },
    lambda method: {"method": method.for_norms()},
)

rows(
    Quantiser,
    {
        (nn.Linear, F.linear): (modules.Linear, linear),
    },
    lambda method: {"method": method},
)

rows(
    Quantiser,
    {
        (nn.BatchNorm1d,): (conv_modules.BatchNorm1d,),
        (nn.BatchNorm2d,): (conv_modules.BatchNorm2d,),
        (nn.BatchNorm3d,): (conv_modules.BatchNorm3d,),
        (F.batch_norm,): (channel_norms.batch_norm,),
        (nn.GroupNorm, F.group_norm): (conv_modules.GroupNorm, channel_norms.group_norm),
        (nn.Conv1d, F.conv1d): (conv_modules.Conv1d, CONVOLUTIONS[1]),
        (nn.Conv2d, F.conv2d): (conv_modules.Conv2d, CONVOLUTIONS[2]),
        (nn.Conv3d, F.conv3d): (conv_modules.Conv3d, CONVOLUTIONS[3]),
        (nn.ConvTranspose1d, F.conv_transpose1d): (conv_modules.ConvTranspose1d, TRANSPOSED[1]),
        (nn.ConvTranspose2d, F.conv_transpose2d): (conv_modules.ConvTranspose2d, TRANSPOSED[2]),
        (nn.ConvTranspose3d, F.conv_transpose3d): (conv_modules.ConvTranspose3d, TRANSPOSED[3]),
    },
    lambda method: {"method": method.for_pixels()},
)

# Attention runs once more on its packs.
rows(
    Quantiser,
    {
        (F.scaled_dot_product_attention,): (scaled_dot_product_attention,),
        (F.multi_head_attention_forward,): (multi_head_attention_forward,),
    },
    lambda method: {"method": method.for_attention()},
)

call_rule(Quantiser, ARITHMETIC)
call_rule(
    Quantiser,
    {**SOFTMAXES, **ELEMENTARY, **REDUCTIONS},
    lambda method: {"method": method.for_functions()},
)
call_rule(Quantiser, PRODUCTS, lambda method: {"method": method})
call_rule(Quantiser, CASTS)

"""What `FewBit` makes of the layers of torch.nn, and of calls of torch's functions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.fewbit import functional, modules, pooling
from packlight.fewbit.dropout import dropout_as_torch
from packlight.fewbit.method import FewBit
from packlight.method import rows

rows(
    FewBit,
    {
        (nn.CELU, F.celu): (modules.CELU, functional.celu),
        (nn.ELU, F.elu): (modules.ELU, functional.elu),
        (nn.GELU, F.gelu): (modules.GELU, functional.gelu),
        (nn.Hardswish, F.hardswish): (modules.Hardswish, functional.hardswish),
        (nn.LogSigmoid, F.logsigmoid): (modules.LogSigmoid, functional.logsigmoid),
        (nn.Mish, F.mish): (modules.Mish, functional.mish),
        (nn.SELU, F.selu): (modules.SELU, functional.selu),
        (nn.Sigmoid, torch.sigmoid, Tensor.sigmoid): (modules.Sigmoid, functional.sigmoid),
        (nn.SiLU, F.silu): (modules.SiLU, functional.silu),
        (nn.Softplus, F.softplus): (modules.Softplus, functional.softplus),
        (nn.Softsign, F.softsign): (modules.Softsign, functional.softsign),
        (nn.Tanh, torch.tanh, Tensor.tanh): (modules.Tanh, functional.tanh),
        (nn.Tanhshrink, F.tanhshrink): (modules.Tanhshrink, functional.tanhshrink),
    },
    lambda method: {"bits": method.bits, "codebook": None},
)

# Exact, whatever the bits.
rows(
    FewBit,
    {
        (nn.Dropout, F.dropout): (modules.Dropout, dropout_as_torch),
        (nn.Hardshrink, F.hardshrink): (modules.Hardshrink, functional.hardshrink),
        (nn.Hardsigmoid, F.hardsigmoid): (modules.Hardsigmoid, functional.hardsigmoid),
        (nn.Hardtanh, F.hardtanh): (modules.Hardtanh, functional.hardtanh),
        (nn.LeakyReLU, F.leaky_relu): (modules.LeakyReLU, functional.leaky_relu),
        (nn.MaxPool1d, F.max_pool1d): (modules.MaxPool1d, pooling.max_pool1d),
        (nn.MaxPool2d, F.max_pool2d): (modules.MaxPool2d, pooling.max_pool2d),
        (nn.MaxPool3d, F.max_pool3d): (modules.MaxPool3d, pooling.max_pool3d),
        (nn.ReLU, F.relu, torch.relu, Tensor.relu): (modules.ReLU, functional.relu),
        (nn.ReLU6, F.relu6): (modules.ReLU6, functional.relu6),
        (nn.Softshrink, F.softshrink): (modules.Softshrink, functional.softshrink),
        (nn.Threshold, F.threshold): (modules.Threshold, functional.threshold),
        (torch.abs, torch.absolute, Tensor.abs, Tensor.absolute): (functional.abs,),
        (torch.clamp, torch.clip, Tensor.clamp, Tensor.clip): (functional.clamp,),
        (torch.clamp_max, Tensor.clamp_max): (functional.clamp_max,),
        (torch.clamp_min, Tensor.clamp_min): (functional.clamp_min,),
    },
)

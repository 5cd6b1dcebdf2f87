"""What `FewBit` makes of the layers of torch.nn, and of calls of torch's functions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.fewbit import functional, modules, pooling
from packlight.fewbit.dropout import dropout_as_torch
from packlight.fewbit.method import FewBit
from packlight.method import Swap, call_rule, rule

_CODED: dict[type[nn.Module], type[nn.Module]] = {
    nn.CELU: modules.CELU,
    nn.ELU: modules.ELU,
    nn.GELU: modules.GELU,
    nn.Hardswish: modules.Hardswish,
    nn.LogSigmoid: modules.LogSigmoid,
    nn.Mish: modules.Mish,
    nn.SELU: modules.SELU,
    nn.Sigmoid: modules.Sigmoid,
    nn.SiLU: modules.SiLU,
    nn.Softplus: modules.Softplus,
    nn.Softsign: modules.Softsign,
    nn.Tanh: modules.Tanh,
    nn.Tanhshrink: modules.Tanhshrink,
}

# Exact, whatever the bits.
_EXACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Dropout: modules.Dropout,
    nn.Hardshrink: modules.Hardshrink,
    nn.Hardsigmoid: modules.Hardsigmoid,
    nn.Hardtanh: modules.Hardtanh,
    nn.LeakyReLU: modules.LeakyReLU,
    nn.MaxPool1d: modules.MaxPool1d,
    nn.MaxPool2d: modules.MaxPool2d,
    nn.MaxPool3d: modules.MaxPool3d,
    nn.ReLU: modules.ReLU,
    nn.ReLU6: modules.ReLU6,
    nn.Softshrink: modules.Softshrink,
    nn.Threshold: modules.Threshold,
}


@rule(FewBit, *_CODED)
def _coded(method: FewBit, module: Any) -> Swap:
    return Swap(_CODED[type(module)], {"bits": method.bits, "codebook": None})


@rule(FewBit, *_EXACT)
def _exact(method: FewBit, module: Any) -> Swap:
    return Swap(_EXACT[type(module)])


call_rule(
    FewBit,
    {
        F.celu: functional.celu,
        F.elu: functional.elu,
        F.gelu: functional.gelu,
        F.hardswish: functional.hardswish,
        F.logsigmoid: functional.logsigmoid,
        F.mish: functional.mish,
        F.selu: functional.selu,
        F.silu: functional.silu,
        F.softplus: functional.softplus,
        F.softsign: functional.softsign,
        F.tanhshrink: functional.tanhshrink,
        Tensor.sigmoid: functional.sigmoid,
        Tensor.tanh: functional.tanh,
        torch.sigmoid: functional.sigmoid,
        torch.tanh: functional.tanh,
    },
    lambda method: {"bits": method.bits},
)

call_rule(
    FewBit,
    {
        F.dropout: dropout_as_torch,
        F.hardshrink: functional.hardshrink,
        F.hardsigmoid: functional.hardsigmoid,
        F.hardtanh: functional.hardtanh,
        F.leaky_relu: functional.leaky_relu,
        F.max_pool1d: pooling.max_pool1d,
        F.max_pool2d: pooling.max_pool2d,
        F.max_pool3d: pooling.max_pool3d,
        F.relu: functional.relu,
        F.relu6: functional.relu6,
        F.softshrink: functional.softshrink,
        F.threshold: functional.threshold,
        Tensor.relu: functional.relu,
        torch.relu: functional.relu,
    },
)

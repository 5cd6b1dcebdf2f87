"""What `Inverted` makes of the layers of torch.nn, and of calls of torch's functions."""

from typing import Any

import torch.nn.functional as F
from torch import nn

from packlight.inverted import functional, linear, modules, norm_modules
from packlight.inverted.method import Inverted
from packlight.method import Swap, call_rule, rule

# Activations, and the layers that read the cast which a norm makes.
_STATELESS: dict[type[nn.Module], type[nn.Module]] = {
    nn.CELU: modules.CELU,
    nn.ELU: modules.ELU,
    nn.GELU: modules.GELU,
    nn.Hardsigmoid: modules.Hardsigmoid,
    nn.Hardswish: modules.Hardswish,
    nn.Hardtanh: modules.Hardtanh,
    nn.LeakyReLU: modules.LeakyReLU,
    nn.LogSigmoid: modules.LogSigmoid,
    nn.Mish: modules.Mish,
    nn.ReLU: modules.ReLU,
    nn.ReLU6: modules.ReLU6,
    nn.SELU: modules.SELU,
    nn.Sigmoid: modules.Sigmoid,
    nn.SiLU: modules.SiLU,
    nn.Softplus: modules.Softplus,
    nn.Softsign: modules.Softsign,
    nn.Tanh: modules.Tanh,
    nn.Tanhshrink: modules.Tanhshrink,
    nn.Conv1d: linear.Conv1d,
    nn.Conv2d: linear.Conv2d,
    nn.Conv3d: linear.Conv3d,
    nn.Linear: linear.Linear,
}

_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: norm_modules.BatchNorm1d,
    nn.BatchNorm2d: norm_modules.BatchNorm2d,
    nn.BatchNorm3d: norm_modules.BatchNorm3d,
    nn.GroupNorm: norm_modules.GroupNorm,
    nn.InstanceNorm1d: norm_modules.InstanceNorm1d,
    nn.InstanceNorm2d: norm_modules.InstanceNorm2d,
    nn.InstanceNorm3d: norm_modules.InstanceNorm3d,
    nn.LayerNorm: norm_modules.LayerNorm,
    nn.RMSNorm: norm_modules.RMSNorm,
}


@rule(Inverted, *_STATELESS)
def _stateless(method: Inverted, module: Any) -> Swap:
    return Swap(_STATELESS[type(module)])


@rule(Inverted, *_NORMS)
def _norm(method: Inverted, module: Any) -> Swap:
    # What the layer learns of its weights goes with the conversion.
    return Swap(_NORMS[type(module)], {"offset_limit": None, "_seen": None})


# Those that torch itself makes of the output are left to it, and so are norms: which channels can
# be inverted is for a layer to remember.
call_rule(
    Inverted,
    {
        F.gelu: functional.gelu,
        F.hardswish: functional.hardswish,
        F.logsigmoid: functional.logsigmoid,
        F.mish: functional.mish,
        F.silu: functional.silu,
        F.softplus: functional.softplus,
        F.softsign: functional.softsign,
        F.tanhshrink: functional.tanhshrink,
    },
)

"""What `Inverted` makes of the layers of torch.nn, and of calls of torch's functions."""

import torch.nn.functional as F
from torch import nn

from packlight.inverted import functional, linear, modules, norm_modules
from packlight.inverted.method import Inverted
from packlight.method import rows

# Calls that torch itself differentiates by the output are left to it.
rows(
    Inverted,
    {
        (nn.CELU,): (modules.CELU,),
        (nn.ELU,): (modules.ELU,),
        (nn.GELU, F.gelu): (modules.GELU, functional.gelu),
        (nn.Hardsigmoid,): (modules.Hardsigmoid,),
        (nn.Hardswish, F.hardswish): (modules.Hardswish, functional.hardswish),
        (nn.Hardtanh,): (modules.Hardtanh,),
        (nn.LeakyReLU,): (modules.LeakyReLU,),
        (nn.LogSigmoid, F.logsigmoid): (modules.LogSigmoid, functional.logsigmoid),
        (nn.Mish, F.mish): (modules.Mish, functional.mish),
        (nn.ReLU,): (modules.ReLU,),
        (nn.ReLU6,): (modules.ReLU6,),
        (nn.SELU,): (modules.SELU,),
        (nn.Sigmoid,): (modules.Sigmoid,),
        (nn.SiLU, F.silu): (modules.SiLU, functional.silu),
        (nn.Softplus, F.softplus): (modules.Softplus, functional.softplus),
        (nn.Softsign, F.softsign): (modules.Softsign, functional.softsign),
        (nn.Tanh,): (modules.Tanh,),
        (nn.Tanhshrink, F.tanhshrink): (modules.Tanhshrink, functional.tanhshrink),
        # These read the cast which a norm makes.
        (nn.Conv1d,): (linear.Conv1d,),
        (nn.Conv2d,): (linear.Conv2d,),
        (nn.Conv3d,): (linear.Conv3d,),
        (nn.Linear,): (linear.Linear,),
    },
)

# Layers alone, which remember the channels that can be inverted. What a layer learns of its weights
# goes with the conversion.
rows(
    Inverted,
    {
        (nn.BatchNorm1d,): (norm_modules.BatchNorm1d,),
        (nn.BatchNorm2d,): (norm_modules.BatchNorm2d,),
        (nn.BatchNorm3d,): (norm_modules.BatchNorm3d,),
        (nn.GroupNorm,): (norm_modules.GroupNorm,),
        (nn.InstanceNorm1d,): (norm_modules.InstanceNorm1d,),
        (nn.InstanceNorm2d,): (norm_modules.InstanceNorm2d,),
        (nn.InstanceNorm3d,): (norm_modules.InstanceNorm3d,),
        (nn.LayerNorm,): (norm_modules.LayerNorm,),
        (nn.RMSNorm,): (norm_modules.RMSNorm,),
    },
    lambda _: {"offset_limit": None, "_seen": None},
)

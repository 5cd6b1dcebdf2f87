"""What `FixedPoint` makes of the layers of torch.nn, and of calls of torch's functions."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.groupquant.fixed_point import functional, modules
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.fixed_point.relu import relu
from packlight.groupquant.fixed_point.residual import add, add_
from packlight.method import rows
from packlight.quantiser import Quantiser

rows(
    FixedPoint,
    {
        (nn.BatchNorm1d,): (modules.BatchNorm1d,),
        (nn.BatchNorm2d,): (modules.BatchNorm2d,),
        (nn.BatchNorm3d,): (modules.BatchNorm3d,),
        (F.batch_norm,): (functional.batch_norm,),
    },
    dataclasses.asdict,
)

# `y + x` and `y += x` are calls of these.
rows(FixedPoint, {(torch.add, Tensor.add): (add,), (Tensor.add_,): (add_,)})

# Exact; one bit, or what its producer keeps.
for method in (FixedPoint, Quantiser):
    rows(method, {(nn.ReLU, F.relu, torch.relu, Tensor.relu): (modules.ReLU, relu)})

"""What `FixedPoint` makes of the layers of torch.nn, and of calls of torch's functions."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packlight.groupquant.fixed_point import functional, modules
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.fixed_point.relu import relu
from packlight.groupquant.fixed_point.residual import add, add_
from packlight.method import Swap, call_rule, rule

_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
}


@rule(FixedPoint, *_NORMS)
def _norm(method: FixedPoint, module: Any) -> Swap:
    return Swap(_NORMS[type(module)], {"bits": method.bits})


@rule(FixedPoint, nn.ReLU)
def _relu(method: FixedPoint, module: Any) -> Swap:
    return Swap(modules.ReLU)


call_rule(FixedPoint, {F.batch_norm: functional.batch_norm}, dataclasses.asdict)
call_rule(FixedPoint, {F.relu: relu, Tensor.relu: relu, torch.relu: relu})
# `y + x` and `y += x` are calls of these.
call_rule(FixedPoint, {torch.add: add, Tensor.add: add, Tensor.add_: add_})

"""Fixed-point codes: one of 4 or 8 bits serves a batch norm, its ReLU and the convolutions."""

from packlight.groupquant.fixed_point.functional import batch_norm
from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.fixed_point.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, ReLU
from packlight.groupquant.fixed_point.relu import relu

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "FixedPoint",
    "ReLU",
    "batch_norm",
    "relu",
]

"""Batch norm that keeps a fixed-point code of its normalised value, as a function.

`batch_norm` has torch.nn.functional's arguments, plus `bits`. A `relu` that reads its output keeps
nothing of its own, its gradient exact; nor does a convolution or a Linear that reads either.
"""

from packlight.groupquant.fixed_point.method import FixedPoint
from packlight.groupquant.relu import relu

__all__ = ["batch_norm", "relu"]

_DEFAULT = FixedPoint()
KEEPS = "fixed-point codes"
# Below so many values a channel, the table of the channels outweighs what the codes save.
MIN_VALUES = 16

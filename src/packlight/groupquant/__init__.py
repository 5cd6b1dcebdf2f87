"""Group quantisation: keep a few bits of each value, and a minimum and a step a group."""

from packlight.groupquant.functional import gelu, linear
from packlight.groupquant.method import GroupQuant

__all__ = ["GroupQuant", "gelu", "linear"]

"""How group quantisation cuts a tensor into groups, and where their codes lie."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Rounding = Literal["stochastic", "nearest"]

ROUNDINGS = get_args(Rounding)

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)

# Bits a code and values a group: `int[] groups` of operators. What implements them is given a list.
# The dispatcher takes a microsecond more to read a NamedTuple, a third of its time.
Groups = tuple[int, int]

# The bits of a code, from the lowest up, by planes: a byte of a plane has 8 / bits elements.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def row_group_size(width: int, group_size: int) -> int | None:
    """The group size for rows of `width` that start groups of their own; None for short rows.

    A row narrower than a group takes the smallest group that holds it; one of fewer values than the
    smallest group is not worth packing.
    """
    if width < GROUP_SIZES[0]:
        return None
    if width >= group_size:
        return group_size
    return min([size for size in GROUP_SIZES if size >= width])


class Grouping(NamedTuple):
    """Where the codes of a tensor lie: rows of `width` elements, each cut into groups of its own.

    A group is `group_bytes` bytes that follow each other, plane by plane. A byte of a plane of w
    bits holds those of 8 / w elements, which lie group_size w / 8 apart. So groups stand by
    themselves, a thread that packs a byte shifts by constants, and neighbours in a warp read and
    write neighbouring addresses. The last group of a row may be ragged; its codes take whole bytes.

    A thread holds `parts` elements of a group for each of its `size` positions: those of one byte
    of the narrowest plane.
    """

    rows: int
    width: int
    bits: int
    group_size: int

    @property
    def parts(self) -> int:
        return 8 // PLANES[self.bits][-1]

    @property
    def size(self) -> int:
        return self.group_size // self.parts

    @property
    def group_bytes(self) -> int:
        return self.group_size * self.bits // 8

    @property
    def row_groups(self) -> int:
        return (self.width + self.group_size - 1) // self.group_size

    @property
    def groups(self) -> int:
        return self.rows * self.row_groups

    @property
    def code_bytes(self) -> int:
        return self.groups * self.group_bytes

    def empty_pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales on the device of `x`, for what is written to them."""
        groups = self.groups
        codes = x.new_empty(groups * self.group_bytes, dtype=torch.uint8)
        return codes, x.new_empty(groups, dtype=torch.int32)

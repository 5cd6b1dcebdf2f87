"""How group quantisation cuts a tensor into groups, and where their codes lie."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Rounding = Literal["stochastic", "nearest", "offset"]
Code = Literal["minmax", "rotated", "scaled", "auto"]

ROUNDINGS = get_args(Rounding)
CODES = get_args(Code)

# How a pack is to be read, the third of `Groups`: minimum, step and codes; the same with an offset
# of the group's; a rotated group. Packs of the latter two begin with their seed.
MINMAX, OFFSET, ROTATED = range(3)

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)
ROTATED_BITS = (1, 2, 3, 4)
ROTATED_SIZES = (64, 128, 256)

# Bits a code, values a group, and how they are read: `int[] groups` of operators. What implements
# them is given a list. The dispatcher takes a microsecond more to read a NamedTuple, a third of its
# time.
Groups = tuple[int, int, int]

# The bits of a code, from the lowest up, by planes: a byte of a plane has 8 / bits elements.
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}

# Words of a seed before those of the groups.
HEADER = 2


def row_group_size(width: int, group_size: int, code: int = MINMAX) -> int | None:
    """The group size for rows of `width` that start groups of their own; None for short rows.

    A row narrower than a group takes the smallest group that holds it; one of fewer values than the
    smallest group is not worth packing.
    """
    if width < GROUP_SIZES[0]:
        return None
    if width >= group_size:
        return group_size
    sizes = ROTATED_SIZES if code == ROTATED else GROUP_SIZES
    return min([size for size in sizes if size >= width])


class Grouping(NamedTuple):
    """Where the codes of a tensor lie: rows of `width` elements, each cut into groups of its own.

    A group is `group_bytes` bytes that follow each other, plane by plane. A byte of a plane of w
    bits has those of 8 / w elements, which lie group_size w / 8 apart. So groups stand by
    themselves, a thread that packs a byte shifts by constants, and neighbours in a warp read and
    write neighbouring addresses. `rotated_reference.py` says where codes of rotated groups lie. The
    last group of a row may be ragged; its codes take whole bytes.

    A thread holds `parts` elements of a group for each of its `size` places: those of one byte
    of the narrowest plane, and eight where the group is rotated.
    """

    rows: int
    width: int
    bits: int
    group_size: int
    code: int = MINMAX

    @property
    def parts(self) -> int:
        return 8 if self.code == ROTATED else 8 // PLANES[self.bits][-1]

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

    @property
    def words(self) -> int:
        """Words of a pack: one a group, behind the seed where reading takes it."""
        return self.groups + (0 if self.code == MINMAX else HEADER)

    def empty_pack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales on the device of `x`, for what is written to them."""
        codes = x.new_empty(self.code_bytes, dtype=torch.uint8)
        return codes, x.new_empty(self.words, dtype=torch.int32)

"""The method object of group quantisation, and how a tensor is cut into groups."""

import dataclasses
from typing import Literal, NamedTuple, get_args

from packlight.errors import InputError
from packlight.method import Method
from packlight.sharing import Grade

Rounding = Literal["stochastic", "nearest"]

ROUNDINGS = get_args(Rounding)

BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class GroupQuant(Method):
    """Keep a b-bit code of each value, and a minimum and a step for each group of values.

    A group is `group_size` values that are neighbours in memory. With m its minimum rounded down
    and s = (maximum - m) / (2^b - 1) rounded up, both in bfloat16,

        code = floor((x - m) / s + u),    x~ = m + s code,

    where u is uniform on [0, 1) (`rounding="stochastic"`: E[x~] = x, so the weight gradient of a
    linear layer is unbiased) or 1/2 (`"nearest"`: half the error, biased). |x~ - x| < s, and <= s/2
    to nearest. Keeps `bits + 32 / group_size` bits an element. A group with a NaN or an infinity
    comes back as NaN; finite values come back finite, past 3.39e38 as that. Sources: ActNN, ICML
    2021, arXiv 2104.14129; GACT, ICML 2022, 2206.11357.

    Of the input of an activation a pack holds what the derivative tells apart (`limits.py`). So a
    mask of -3e38 leaves its group a step, and where torch has a derivative at infinity it is that.

    Stochastic rounding has a stream of random numbers of its own, which torch's generator does not
    feel; `packlight.manual_seed` starts it.

    Args:
        bits: code length: 2, 4 or 8.
        group_size: values a group, a power of two from 32 to 1024.
        rounding: "stochastic" or "nearest".
    """

    bits: int = 4
    group_size: int = 128
    rounding: Rounding = "stochastic"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise InputError(f"bits={self.bits!r} is not 2, 4 or 8; 4 is a good start")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise InputError(
                f"group_size={self.group_size!r} is not a power of two from 32 to 1024;"
                " 128 is a good start"
            )
        if self.rounding not in ROUNDINGS:
            raise InputError(f'rounding={self.rounding!r} is neither "stochastic" nor "nearest"')

    @property
    def grade(self) -> Grade:
        """How near to a tensor its packs are."""
        return Grade(self.bits, self.group_size, self.rounding == "stochastic")


def row_group_size(width: int, group_size: int) -> int | None:
    """The group size for rows of `width` that start groups of their own; None for short rows.

    A row narrower than a group takes the smallest group that holds it; one of fewer values than the
    smallest group is not worth packing.
    """
    if width < GROUP_SIZES[0]:
        return None
    return min([group_size, *[size for size in GROUP_SIZES if size >= width]])


class Grouping(NamedTuple):
    """Where the codes of a tensor lie: rows of `width` elements, each cut into groups of its own.

    A byte holds the codes of 8 / bits = `parts` elements, which lie group_size / parts apart, and a
    group is group_size / parts bytes that follow each other. So groups stand by themselves, a
    thread that packs a byte shifts by constants, and neighbours in a warp read and write
    neighbouring addresses. The last group of a row may be ragged; its codes take whole bytes.
    """

    rows: int
    width: int
    bits: int
    group_size: int

    @property
    def parts(self) -> int:
        return 8 // self.bits

    @property
    def group_bytes(self) -> int:
        return self.group_size // self.parts

    @property
    def row_groups(self) -> int:
        return (self.width + self.group_size - 1) // self.group_size

    @property
    def groups(self) -> int:
        return self.rows * self.row_groups

    @property
    def code_bytes(self) -> int:
        return self.groups * self.group_bytes

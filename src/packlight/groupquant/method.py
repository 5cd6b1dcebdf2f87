"""The method object of group quantisation."""

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor

from packlight._seeds import Seed, operands
from packlight.errors import InputError
from packlight.groupquant import ops, sides
from packlight.groupquant.grouping import (
    BITS,
    GROUP_SIZES,
    ROUNDINGS,
    Groups,
    Rounding,
    row_group_size,
)
from packlight.pack import Grade
from packlight.packing.layout import dense_stride
from packlight.quantiser import Quantiser


@dataclasses.dataclass(frozen=True)
class GroupQuant(Quantiser):
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
        bits: code length: 2, 3, 4 or 8.
        group_size: values a group, a power of two from 32 to 1024.
        rounding: "stochastic" or "nearest".
    """

    bits: int = 4
    group_size: int = 128
    rounding: Rounding = "stochastic"
    _grade: ClassVar[Grade]

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise InputError(f"bits={self.bits!r} is not 2, 3, 4 or 8; 4 is a good start")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise InputError(
                f"group_size={self.group_size!r} is not a power of two from 32 to 1024;"
                " 128 is a good start"
            )
        if self.rounding not in ROUNDINGS:
            raise InputError(f'rounding={self.rounding!r} is neither "stochastic" nor "nearest"')
        # Made once: every layer asks several times.
        grade = Grade(self.bits, self.group_size, self.rounding == "stochastic")
        object.__setattr__(self, "_grade", grade)

    @property
    def groups(self) -> Groups:
        """Bits and group size as operators take them."""
        return self.bits, self.group_size

    @property
    def grade(self) -> Grade:
        """How near to a tensor its packs are."""
        return self._grade

    @property
    def stochastic(self) -> bool:
        """Whether it draws."""
        return self.rounding == "stochastic"

    @property
    def smallest(self) -> int:
        """A group."""
        return self.group_size

    def keep(self, flat: Tensor, seed: Seed) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return self.pack(flat, seed)

    def restore(self, dtype: torch.dtype, count: int, *kept: Tensor) -> Tensor:
        """m + s code."""
        return self.unpack(dtype, (count,), (1,), *kept)

    def pack(self, x: Tensor, seed: Seed) -> tuple[Tensor, ...]:
        """Codes and scales of `x` in its memory order."""
        kept: tuple[Tensor, ...] = ops.quantize(x, dense_stride(x), self.groups, *operands(seed))
        return kept

    def unpack(
        self, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], *kept: Tensor
    ) -> Tensor:
        """m + s code."""
        layout = (shape, stride, math.prod(shape), self.groups)
        x: Tensor = ops.dequantize(*kept, *layout, dtype, "", (), None, None)
        return x

    def with_sides(self, flat: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """Codes next to 0 change, by less than a step."""
        codes, scales = kept
        return sides.with_sides(codes, scales, flat, self.groups), scales

    def for_scores(self) -> "GroupQuant":
        """8 bits: with 4 the recomputed probabilities are off by a tenth."""
        return self if self.bits == 8 else dataclasses.replace(self, bits=8)

    def keeps_rows(self, width: int) -> bool:
        """Whether the smallest group fits: rows narrower than a group have smaller ones."""
        return row_group_size(width, self.group_size) is not None

"""The method object of group quantisation."""

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from packlight._seeds import Seed, operands
from packlight.errors import InputError
from packlight.groupquant import channels, ops, sides
from packlight.groupquant.grouping import (
    BITS,
    CODES,
    GROUP_SIZES,
    MINMAX,
    OFFSET,
    ROTATED,
    ROTATED_BITS,
    ROTATED_SIZES,
    ROUNDINGS,
    Code,
    Groups,
    Rounding,
    row_group_size,
)
from packlight.pack import Grade
from packlight.packing.layout import dense_stride
from packlight.quantiser import Quantiser, Shift

# What a method is that says nothing else.
DEFAULT_ROUNDING: Rounding = "stochastic"
DEFAULT_CODE: Code = "auto"
# The most bits at which "auto" rotates, and at which it takes offsets where it does not. Where two
# bits more halve an error that few can tell from none, the faster code is better.
AUTO_ROTATED, AUTO_OFFSET = 3, 4
# The fewest bits that a conversion gives query, key and value of attention.
ATTENTION_BITS = 8
ROTATED_ATTENTION_BITS = 4


@dataclasses.dataclass(frozen=True)
class GroupQuant(Quantiser):
    """Keep a b-bit code of each value, and two numbers for each group of values.

    A group is `group_size` values that are neighbours in memory, and its numbers are bfloat16.
    Keeps `bits + 32 / group_size` bits an element. A group with a NaN or an infinity comes back as
    NaN; finite values come back finite, past 3.39e38 as that.

    **`code="minmax"`**: with m the group's minimum rounded down and
    s = (maximum - m) / (2^b - 1) rounded up,

        code = floor((x - m) / s + u),    x~ = m + s code,

    where u is uniform on [0, 1) (`rounding="stochastic"`: E[x~] = x, so the weight gradient of a
    linear layer is unbiased) or 1/2 (`"nearest"`: half the error, biased). |x~ - x| < s, and <= s/2
    to nearest. With `"offset"`, u is one number of the group's, which the reader draws again:
    x~ = m + s (code + 1/2 - u) is as unbiased, with half the variance, and |x~ - x| <= s/2. Errors
    of a group then hang together, so convolutions, whose gradients sum over the pixels of a group,
    take "stochastic" in its place. A minimum of 0, as a ReLU has, comes back as 0.
    `minmax_reference.py` derives it. Sources: ActNN, ICML 2021, arXiv 2104.14129; GACT, ICML 2022,
    2206.11357.

    **`code="rotated"`**: the group less its mean is turned by random signs and a Hadamard matrix,
    which makes its values normal whatever they were, and each takes the code of the nearest of 2^b
    levels for a normal distribution (`rotated_reference.py`). At the same bytes the error is two
    thirds of that of stochastic rounding at 4 bits and half at 2. That of a channel far larger than
    the others spreads over its group: little of the gradient as a whole, much of their columns.
    Nearly unbiased: the bias is 2% of the squared error at 2 bits and .3% at 4. `rounding` has no
    part in it. Sources: EDEN, ICML 2022, arXiv 2108.08842; TurboQuant, 2504.19874.

    **`code="scaled"`**: rotated, and before that each channel is taken less its mean and over a
    power of two, so that channels far larger than the others, as large language models have, cost
    these next to nothing (`channels.py`). That is of a Linear's input and of what a norm of rows
    normalises; elsewhere it is "rotated". Both numbers are kept with the pack, 32 bits a channel.
    Of fewer than 256 rows, or rows not of whole groups, groups are rotated alone. Finite values up
    to 1e30 come back finite.

    **`code="auto"`**, the default: "rotated" at 2 and 3 bits in groups of its sizes, and "minmax"
    for convolutions and norms of channels, with 4 and 8 bits, and at 3 for what a ReLU made, with
    the minimum exact. At 3 and 4 bits "minmax" is by offsets in place of stochastic rounding, but
    for convolutions and norms of channels. At 4 bits "rotated" has .7 of the error of offsets or
    less, and steps of a transformer take 5 to 20% longer.

    Of the input of an activation a pack holds what the derivative tells apart (`limits.py`). So a
    mask of -3e38 leaves its group a step, and where torch has a derivative at infinity it is that.

    What is drawn has a stream of random numbers of its own, which torch's generator does not feel;
    `packlight.manual_seed` starts it.

    Args:
        bits: code length: 2, 3, 4 or 8; 1 to 4 for a rotated code. One bit is for linear layers,
            and others keep two in its place.
        group_size: values a group, a power of two from 32 to 1024; 64, 128 or 256 for a rotated
            code.
        rounding: "stochastic", "nearest" or "offset".
        code: "minmax", "rotated", "scaled" or "auto".
    """

    bits: int = 4
    group_size: int = 128
    rounding: Rounding = DEFAULT_ROUNDING
    code: Code = DEFAULT_CODE
    _grade: ClassVar[Grade]
    _groups: ClassVar[Groups]

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise InputError(
                f'code={self.code!r} is none of "minmax", "rotated", "scaled" and "auto"'
            )
        rotated = self.code in ("rotated", "scaled")
        if type(self.bits) is not int or self.bits not in (ROTATED_BITS if rotated else BITS):
            known = "1, 2, 3 or 4, those of a rotated code" if rotated else "2, 3, 4 or 8"
            raise InputError(f"bits={self.bits!r} is not {known}; 4 is a good start")
        sizes = ROTATED_SIZES if rotated else GROUP_SIZES
        if type(self.group_size) is not int or self.group_size not in sizes:
            known = "64, 128 or 256" if rotated else "a power of two from 32 to 1024"
            raise InputError(f"group_size={self.group_size!r} is not {known}; 128 is a good start")
        if self.rounding not in ROUNDINGS:
            raise InputError(
                f'rounding={self.rounding!r} is none of "stochastic", "nearest" and "offset"'
            )
        if rotated and self.rounding == "nearest":
            raise InputError(
                'rounding="nearest" is of code="minmax"; a rotated code draws signs and rounds to'
                " the nearest level in any case, so leave rounding out"
            )
        # Made once: every layer asks several times.
        chosen = self.code == "auto" and self.rounding != "nearest"
        if rotated or (chosen and self.bits <= AUTO_ROTATED and self.group_size in ROTATED_SIZES):
            code = ROTATED
        elif self.rounding == "offset" or (chosen and self.bits <= AUTO_OFFSET):
            code = OFFSET
        else:
            code = MINMAX
        grade = Grade(self.bits, self.group_size, self.rounding != "nearest")
        object.__setattr__(self, "_grade", grade)
        object.__setattr__(self, "_groups", (self.bits, self.group_size, code))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a file that may be older than a field, which then has its default."""
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @staticmethod
    def of(groups: Groups) -> "GroupQuant":
        """A method whose packs operators know by these numbers."""
        bits, group_size, code = (*groups, MINMAX)[:3]
        rounding: Rounding = "offset" if code == OFFSET else "stochastic"
        return GroupQuant(bits, group_size, rounding, "rotated" if code == ROTATED else "minmax")

    @property
    def groups(self) -> Groups:
        """Bits, group size and code as operators take them."""
        return self._groups

    @property
    def grade(self) -> Grade:
        """How near to a tensor its packs are."""
        return self._grade

    @property
    def stochastic(self) -> bool:
        """Whether it draws."""
        return self.rounding != "nearest"

    @property
    def scales_channels(self) -> bool:
        """Whether packs hold scales of channels too."""
        return self.code == "scaled"

    @property
    def smallest(self) -> int:
        """A group."""
        return self.group_size

    def keep(self, flat: Tensor, seed: Seed) -> tuple[Tensor, ...]:
        """Codes and scales."""
        return self.pack(flat, seed)

    def restore(self, dtype: torch.dtype, count: int, *kept: Tensor) -> Tensor:
        """What codes and scales stand for."""
        return self.unpack(dtype, (count,), (1,), *kept)

    def pack(self, x: Tensor, seed: Seed) -> tuple[Tensor, ...]:
        """Codes and scales of `x` in its memory order; scales and means of its channels."""
        of_channels: tuple[Tensor, ...] = ()
        if self.scales_channels:
            if channels.fit(x.shape, dense_stride(x), self.group_size):
                x, scale, mean = channels.scaled(x)
                of_channels = scale, mean
            else:
                of_channels = (x.new_empty(0), x.new_empty(0))
        kept: tuple[Tensor, ...] = ops.quantize(x, dense_stride(x), self.groups, *operands(seed))
        return *kept, *of_channels

    def unpack(
        self, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], *kept: Tensor
    ) -> Tensor:
        """What codes and scales stand for."""
        codes, words, *of_channels = kept
        width, scale, mean = math.prod(shape), None, None
        if of_channels and channels.fit(shape, stride, self.group_size):
            width, (scale, mean) = shape[-1], of_channels
        layout = (shape, stride, width, self.groups)
        x: Tensor = ops.dequantize(codes, words, *layout, dtype, "", (), scale, mean)
        return x

    def pack_less(self, x: Tensor, seed: Seed, shift: Shift | None) -> tuple[Tensor, ...]:
        """`pack` of `x` less a shift, in one pass over it."""
        if shift is None or not self._shifts(shift):
            return super().pack_less(x, seed, shift)
        given = (dense_stride(x), *shift, self.groups)
        kept: tuple[Tensor, ...] = ops.quantize_less(x, *given, *operands(seed))
        return kept

    def unpack_less(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        *kept: Tensor,
        shift: Shift | None,
    ) -> Tensor:
        """What was packed less a shift, with it again."""
        if shift is None or not self._shifts(shift):
            return super().unpack_less(dtype, shape, stride, *kept, shift=shift)
        mean, width = shift
        layout = (shape, stride, width, self.groups)
        x: Tensor = ops.dequantize(*kept, *layout, dtype, "", (), None, mean)
        return x

    def _shifts(self, shift: Shift) -> bool:
        """Whether one pass packs and takes it off: where it ends with a group."""
        whole = shift.values.numel() % self.group_size == 0 == shift.width % self.group_size
        return whole and not self.scales_channels

    def with_sides(self, flat: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """Codes next to 0 change, by less than a step."""
        bits, group_size, code = self.groups
        if code != MINMAX:
            raise InputError(
                f"{self!r} does not keep on which side of 0 a value is, which compiled code may ask"
                ' for; give it code="minmax" and rounding="stochastic" or "nearest"'
            )
        codes, scales = kept
        return sides.with_sides(codes, scales, flat, bits, group_size), scales

    def for_scores(self) -> "GroupQuant":
        """8 bits: with 4 the recomputed probabilities are off by a tenth."""
        if self.bits == 8:
            return self
        code: Code = self.code if self.code == "auto" else "minmax"
        return dataclasses.replace(self, bits=8, code=code)

    def for_pixels(self) -> "GroupQuant":
        """Stochastic rounding in place of offsets, and of what `code="auto"` would choose."""
        method = self.for_functions()
        if method.code == "rotated" or (method.rounding != "offset" and method.code == "minmax"):
            return method
        rounding: Rounding = "nearest" if method.rounding == "nearest" else "stochastic"
        return dataclasses.replace(method, rounding=rounding, code="minmax")

    def for_zeros(self) -> "GroupQuant":
        """The minimum exact, where `code="auto"` is at 3 or 4 bits."""
        if self.code != "auto" or self.bits < 3 or self.rounding == "nearest":
            return self
        return dataclasses.replace(self, rounding="offset", code="minmax")

    def for_functions(self) -> "GroupQuant":
        """Two bits in place of one, and channels as they are."""
        method = self.for_norms()
        return dataclasses.replace(method, code="rotated") if method.scales_channels else method

    def for_norms(self) -> "GroupQuant":
        """Two bits in place of one."""
        return dataclasses.replace(self, bits=2) if self.bits == 1 else self

    def for_attention(self) -> "GroupQuant":
        """`ATTENTION_BITS` at least; where groups are rotated `ROTATED_ATTENTION_BITS`."""
        method = self.for_functions()
        if method.groups[2] == ROTATED:
            bits = max(method.bits, ROTATED_ATTENTION_BITS)
            return dataclasses.replace(method, bits=bits, code="rotated")
        return dataclasses.replace(method, bits=max(method.bits, ATTENTION_BITS))

    def keeps_rows(self, width: int) -> bool:
        """Whether the smallest group fits: rows narrower than a group have smaller ones."""
        return row_group_size(width, self.group_size) is not None

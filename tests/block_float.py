"""A quantiser in a package of one's own: 8-bit block floating point, against public names only."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from packlight import Grade, InputError, Quantiser

_NOT_FINITE = 1000  # the exponent of no float32 number


@dataclasses.dataclass(frozen=True)
class BlockFloat(Quantiser):
    """Keep a mantissa of 8 bits of each value, and one exponent a block of neighbours.

    With 2^e the least power of two above |x| in a block, x~ = round(x 2^(7 - e)) 2^(e - 7), at most
    127 of them: |x~ - x| <= 2^(e - 7). Keeps 8 + 16 / block bits an element; biased. A block with a
    NaN or an infinity comes back as NaN.

    Args:
        block: values a block, at least 8.
    """

    block: int = 32

    def __post_init__(self) -> None:
        if type(self.block) is not int or self.block < 8:
            raise InputError(f"block={self.block!r} is no whole number from 8; 32 is a good start")

    @property
    def grade(self) -> Grade:
        return Grade(bits=8, group_size=self.block, unbiased=False)

    @property
    def smallest(self) -> int:
        return self.block

    def keep(self, flat: Tensor, seed: None) -> tuple[Tensor, Tensor]:
        blocks = F.pad(flat.float(), (0, -flat.numel() % self.block)).view(-1, self.block)
        _, exponent = torch.frexp(blocks.abs().amax(1, keepdim=True))
        exponent = exponent.clamp(min=-100)  # 2^(7 - e) is finite
        mantissa = torch.ldexp(blocks, 7 - exponent).round().clamp(-127, 127)
        finite = blocks.isfinite().all(1, keepdim=True)
        exponent = torch.where(finite, exponent, _NOT_FINITE).to(torch.int16)
        return mantissa.nan_to_num(0.0).to(torch.int8).view(-1), exponent.view(-1)

    def restore(self, dtype: torch.dtype, count: int, *kept: Tensor) -> Tensor:
        mantissa, exponent = kept[0].view(-1, self.block).float(), kept[1].view(-1, 1).int()
        step = torch.ldexp(torch.where(exponent == _NOT_FINITE, torch.nan, 1.0), exponent - 7)
        return (mantissa * step).view(-1)[:count].to(dtype)

"""A quantiser of one's own: 8 bits with one scale a row of 64, in every layer, and its contract.

python examples/own_method.py
python examples/own_method.py --tiny       # the same: it needs no GPU
"""

import argparse
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight
from packlight import Grade, InputError, Quantiser
from packlight.testing import checks

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="as in CI")
options = parser.parse_args()


@dataclasses.dataclass(frozen=True)
class Symmetric(Quantiser):
    """x ~ m s / 127, s the largest |x| of a row of neighbours, m a whole number; biased.

    Keeps 8 + 32 / row bits an element. A row with a NaN or an infinity comes back as NaN.
    """

    row: int = 64

    def __post_init__(self) -> None:
        if type(self.row) is not int or self.row < 8:
            raise InputError(f"row={self.row!r} is no whole number from 8; try 64")

    @property
    def grade(self) -> Grade:
        return Grade(bits=8, group_size=self.row, unbiased=False)

    @property
    def smallest(self) -> int:
        return self.row

    def keep(self, flat: Tensor, seed: None) -> tuple[Tensor, ...]:
        rows = F.pad(flat.float(), (0, -flat.numel() % self.row)).view(-1, self.row)
        scale = rows.abs().amax(1, keepdim=True)
        codes = (rows * (127 / scale.clamp(min=1e-30))).nan_to_num(0.0).round()
        return codes.to(torch.int8).view(-1), scale.view(-1)

    def restore(self, dtype: torch.dtype, count: int, *kept: Tensor) -> Tensor:
        codes, scale = kept[0].view(-1, self.row).float(), kept[1].view(-1, 1)
        scale = torch.where(scale.isfinite(), scale, torch.nan)
        return (codes * (scale / 127)).view(-1)[:count].to(dtype)


run = [check for check in checks(Symmetric()) if "compile" not in str(check)]
for check in run:
    check()
print(f"{len(run)} checks of the contract passed")

model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
x = torch.randn(512, 64)
print(packlight.convert(model, Symmetric()).bytes(x))
model(x).square().mean().backward()

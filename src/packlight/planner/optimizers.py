"""Optimisers by the names that Trainers have for them, as far as their memory goes."""

import functools
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from packlight.errors import InputError


class Bits8:
    """An Adam whose two moments are kept in 8 bits, as bitsandbytes has it, for what it holds.

    A byte an element and moment, and a scale of 4 bytes for 256 elements; tensors of fewer than
    4096 elements keep 32 bits. With `paged` the moments lie in the memory of the host.
    """

    def __init__(self, parameters: list[nn.Parameter], paged: bool = False) -> None:
        self.parameters, self.paged = parameters, paged
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)

    def step(self) -> None:
        for parameter in self.parameters:
            if self.paged or self.state[parameter]:
                continue
            count = parameter.numel()
            small = count < 4096
            for name in ("exp_avg", "exp_avg_sq"):
                dtype = torch.float32 if small else torch.uint8
                state = parameter.new_empty(count, dtype=dtype)
                self.state[parameter][name] = state
                if not small:
                    scales = parameter.new_empty(-(-count // 256), dtype=torch.float32)
                    self.state[parameter][f"{name}_scales"] = scales


OPTIMIZERS: dict[str, Any] = {
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "adamw-8bit": Bits8,
    "paged": functools.partial(Bits8, paged=True),
    "sgd": functools.partial(torch.optim.SGD, lr=1e-3, foreach=True),
    "adafactor": torch.optim.Adafactor,
}


def optimizer_of(name: str) -> Any:
    if name not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {name!r}; expected {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]

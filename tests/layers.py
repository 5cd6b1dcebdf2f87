"""What the tables of layers share: `tests/test_contract.py` runs over all of their rows."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, its function, and torch's own. Tables subclass it, one for each method."""

    name: str  # in the tables of the method's functions
    module: Callable[..., nn.Module] | None
    plain_module: Callable[..., nn.Module] | None
    function: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    arguments: tuple[float | str, ...] = ()
    parameters: tuple[float, ...] = ()  # the arguments, as the tables take them
    inplace: bool = False

    method: ClassVar[str]  # the folder
    operators: ClassVar[tuple[str, ...]]  # those of its ops that have a kernel
    keeps_output: ClassVar[bool]
    # How far gradients may lie apart where outputs differ in their last digit, in float32.
    tolerance: ClassVar[float] = 0.0

    def __str__(self) -> str:
        return self.name

    def apply(self, x: Tensor, **options: object) -> Tensor:
        return self.function(x, *self.arguments, **options)

    def torch(self, x: Tensor, **options: object) -> Tensor:
        return self.plain(x, *self.arguments, **options)

    def make(self, **options: object) -> nn.Module:
        assert self.module is not None
        return self.module(*self.arguments, **options)

    def packed_bytes(self, count: int) -> int:
        """Bytes kept for `count` elements besides the output."""
        raise NotImplementedError

    def kept_bytes(self, y: Tensor) -> int:
        """Bytes kept for the output `y`, itself included where it is kept."""
        own = y.numel() * y.element_size() if self.keeps_output else 0
        return own + self.packed_bytes(y.numel())

    @property
    def derivable_twice(self) -> bool:
        """Whether it is torch's own function, which keeps what this method would."""
        return False

    @property
    def path(self) -> tuple[object, ...]:
        """What its kernels are specialised by, apart from the function itself."""
        return (self.method,)

    def use_kernels(self, monkeypatch) -> None:
        """Runs the kernels where the operators would run the reference."""
        ops = importlib.import_module(f"packlight.{self.method}.ops")
        kernels = importlib.import_module(f"packlight.{self.method}.kernels")
        for operator in self.operators:
            monkeypatch.setattr(ops, operator, getattr(kernels, operator))


def on_both_backends(layers: Sequence[Layer]) -> pytest.MarkDecorator:
    """Every layer on its reference, and one of each path through the kernels on these.

    For what depends on shapes, strides and codes, which the function that a kernel computes has no
    part in. Triton's interpreter takes a second for what a device does in a microsecond.
    """
    first = {layer.path: layer for layer in reversed(layers)}
    rows = [(layer, "reference") for layer in layers]
    rows += [(layer, "kernel") for layer in first.values()]
    ids = [f"{layer.method}-{layer}-{backend}" for layer, backend in rows]
    return pytest.mark.parametrize(("layer", "backend"), rows, ids=ids, indirect=["backend"])


# The truth in float64, which itself loses the digits of 1 + erf and 1 + tanh far left of 0.
TRUTH: dict[str, Callable[..., Tensor]] = {
    "gelu": lambda x, _: x * torch.special.erfc(-x * 0.5**0.5) / 2,
    "gelu_tanh": lambda x, _: x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}

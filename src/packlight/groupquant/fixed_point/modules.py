"""Layers of conv nets that keep fixed-point codes, under torch.nn's own names.

Each is its torch class in all but what it keeps in training; in `eval()` it runs the plain torch
operation.
"""

from typing import Any

from torch import Tensor, nn

from packlight.groupquant.fixed_point.functional import batch_norm
from packlight.groupquant.fixed_point.method import FixedPoint, bin_width
from packlight.groupquant.fixed_point.relu import relu
from packlight.layers.twin import Twin, start_batch

_DEFAULT = FixedPoint()


class _BatchNorm(Twin, nn.modules.batchnorm._NormBase):
    """What the batch norms share."""

    bits: int
    window: float | None

    def __init__(
        self,
        *args: Any,
        bits: int = _DEFAULT.bits,
        window: float | None = _DEFAULT.window,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        bin_width(bits, window)
        self.bits, self.window = bits, window

    @property
    def options(self) -> dict[str, Any]:
        return {"bits": self.bits, "window": self.window}

    def _shown(self) -> dict[str, Any]:
        return {name: value for name, value in self.options.items() if value is not None}

    def training_forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return batch_norm(input, **start_batch(self), **self.options)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`; keeps `bits` bits an element, see `batch_norm`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`; keeps `bits` bits an element, see `batch_norm`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`; keeps `bits` bits an element, see `batch_norm`."""


class ReLU(Twin, nn.ReLU):
    """`torch.nn.ReLU`; exact, keeps nothing behind a fixed-point batch norm, else 1 bit."""

    def training_forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace)

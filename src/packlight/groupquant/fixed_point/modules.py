"""Layers of conv nets that keep fixed-point codes, under torch.nn's own names.

Each is its torch class in all but what it keeps in training; in `eval()` it runs the plain torch
operation.
"""

from typing import Any

from torch import Tensor, nn

from packlight.groupquant.fixed_point.functional import batch_norm
from packlight.groupquant.fixed_point.method import FixedPoint, check_bits
from packlight.groupquant.fixed_point.relu import relu

_DEFAULT = FixedPoint()


def start_batch(module: Any) -> dict[str, Any]:
    """Counts a batch of a batch norm that trains; the function's arguments but for the input."""
    momentum = 0.0 if module.momentum is None else module.momentum
    tracks = module.track_running_stats
    # Looked up once, as a module finds buffers by way of a function in Python.
    batches = module.num_batches_tracked if tracks else None
    if batches is not None:
        batches.add_(1)
        if module.momentum is None:  # a plain average of all batches
            momentum = 1.0 / float(batches)
    return {
        "running_mean": module.running_mean if tracks else None,
        "running_var": module.running_var if tracks else None,
        "weight": module.weight,
        "bias": module.bias,
        "training": True,
        "momentum": momentum,
        "eps": module.eps,
    }


class _BatchNorm(nn.modules.batchnorm._BatchNorm):
    """What the batch norms share."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bits: int = _DEFAULT.bits,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.bits = check_bits(bits)

    def extra_repr(self) -> str:
        inherited = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{inherited}, bits={self.bits}"

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return batch_norm(input, **start_batch(self), bits=self.bits)


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`; keeps `bits` bits an element, see `batch_norm`."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`; keeps `bits` bits an element, see `batch_norm`."""


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`; keeps `bits` bits an element, see `batch_norm`."""


class ReLU(nn.ReLU):
    """`torch.nn.ReLU`; exact, keeps nothing behind a fixed-point batch norm, else 1 bit."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return relu(input, self.inplace)

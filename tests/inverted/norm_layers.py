"""The table of inverted norms: every test of the norms' contract runs over these rows."""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import packlight.inverted as inverted
from packlight.inverted import norm_kernels, norm_ops


@dataclasses.dataclass(frozen=True)
class NormLayer:
    """One norm, torch's own, and an input for them."""

    name: str
    module: Callable[..., nn.Module]
    plain_module: Callable[..., nn.Module]
    arguments: tuple[object, ...]
    shape: tuple[int, ...]
    options: dict[str, object] = dataclasses.field(default_factory=dict)
    kernels: bool = False  # has Triton kernels

    def __str__(self) -> str:
        return self.name

    @property
    def channel_axis(self) -> int:
        return -1 if self.kernels else 1

    def pair(
        self, dtype: torch.dtype = torch.float32, offset: float = 0.3
    ) -> tuple[nn.Module, nn.Module]:
        """Ours and torch's with the same weights: |beta / gamma| is at most `offset`."""
        ours = self.module(*self.arguments, **self.options)
        plain = self.plain_module(*self.arguments, **self.options)
        weight, bias = getattr(plain, "weight", None), getattr(plain, "bias", None)
        with torch.no_grad():
            if weight is not None:
                weight.copy_((torch.rand(weight.shape) + 0.5) * (torch.randn(weight.shape).sign()))
            if bias is not None:
                bias.copy_(torch.empty(bias.shape).uniform_(-offset, offset) * weight)
        ours.load_state_dict(plain.state_dict())
        return ours.to(dtype), plain.to(dtype)

    def sample(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(self.shape) * 2 + 1).to(dtype)

    def statistics(self) -> int:
        """How many rstd it keeps."""
        size = {"GroupNorm": 3, "InstanceNorm": self.shape[1]}
        kind = self.plain_module.__name__.rstrip("123d")
        if self.kernels:
            return torch.Size(self.shape).numel() // torch.Size(self.normalized_shape).numel()
        return self.shape[1] if kind == "BatchNorm" else self.shape[0] * size[kind]

    @property
    def normalized_shape(self) -> tuple[int, ...]:
        given = self.arguments[0]
        return given if isinstance(given, tuple) else (given,)

    def use_kernels(self, monkeypatch) -> None:
        """Runs the kernels where the operators would run the reference."""
        assert self.kernels
        for operator in ("row_norm", "row_norm_backward"):
            monkeypatch.setattr(norm_ops, operator, getattr(norm_kernels, operator))


def _norm(label, kind, arguments, shape, kernels=False, **options):
    ours, plain = getattr(inverted, kind), getattr(nn, kind)
    return NormLayer(f"{kind}{label}", ours, plain, arguments, shape, options, kernels)


LAYERS = [
    _norm("", "LayerNorm", (24,), (5, 3, 24), kernels=True),
    _norm(" 2d", "LayerNorm", ((4, 8),), (5, 4, 8), kernels=True),
    _norm(" no bias", "LayerNorm", (24,), (7, 24), kernels=True, bias=False),
    _norm(" plain", "LayerNorm", (24,), (7, 24), kernels=True, elementwise_affine=False),
    _norm("", "RMSNorm", (24,), (5, 3, 24), kernels=True),
    _norm(" plain", "RMSNorm", (24,), (7, 24), kernels=True, elementwise_affine=False),
    _norm("", "BatchNorm1d", (6,), (9, 6)),
    _norm(" sequence", "BatchNorm1d", (6,), (4, 6, 5)),
    _norm("", "BatchNorm2d", (6,), (3, 6, 4, 5)),
    _norm(" plain", "BatchNorm2d", (6,), (3, 6, 4, 5), affine=False),
    _norm(" average", "BatchNorm2d", (6,), (3, 6, 4, 5), momentum=None),
    _norm(" untracked", "BatchNorm2d", (6,), (3, 6, 4, 5), track_running_stats=False),
    _norm("", "BatchNorm3d", (6,), (2, 6, 3, 2, 4)),
    _norm("", "GroupNorm", (3, 6), (3, 6, 4, 5)),
    _norm(" plain", "GroupNorm", (3, 6), (4, 6, 5), affine=False),
    _norm("", "InstanceNorm1d", (6,), (3, 6, 8)),
    _norm("", "InstanceNorm2d", (6,), (3, 6, 4, 5), affine=True),
    _norm(" tracked", "InstanceNorm2d", (6,), (3, 6, 4, 5), track_running_stats=True),
    _norm("", "InstanceNorm3d", (6,), (2, 6, 3, 2, 4), affine=True, track_running_stats=True),
]
ROWS = [layer for layer in LAYERS if layer.kernels]
CHANNELS = [layer for layer in LAYERS if not layer.kernels]
AFFINE = [
    layer
    for layer in LAYERS
    if getattr(layer.plain_module(*layer.arguments, **layer.options), "weight", None) is not None
]

# Functions of torch and ours, called as F.layer_norm(x, **arguments).
FUNCTIONS = {
    "layer_norm": (inverted.layer_norm, F.layer_norm),
    "rms_norm": (inverted.rms_norm, F.rms_norm),
    "batch_norm": (inverted.batch_norm, F.batch_norm),
    "group_norm": (inverted.group_norm, F.group_norm),
    "instance_norm": (inverted.instance_norm, F.instance_norm),
}

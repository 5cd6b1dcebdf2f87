"""Results lie in memory as torch's do, so that a model's own `view` finds what it expects."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight import FewBit, FixedPoint, GroupQuant, Inverted
from tests.helpers import every_device

C = 32


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def heads(x):
    return x.unflatten(-1, (-1, 4)).transpose(1, 2)


SEQUENCES = {
    "Linear": nn.Linear(C, 48),
    "LayerNorm": nn.LayerNorm(C),
    "RMSNorm": nn.RMSNorm(C),
    "Conv1d": nn.Conv1d(C, 48, 3, padding=1),
    "BatchNorm1d": nn.BatchNorm1d(C),
    "GroupNorm": nn.GroupNorm(4, C),
    "InstanceNorm1d": nn.InstanceNorm1d(C, affine=True),
    "MaxPool1d": nn.MaxPool1d(2),
    "AvgPool1d": nn.AvgPool1d(2),
    "AdaptiveAvgPool1d": nn.AdaptiveAvgPool1d(4),
    "PReLU": nn.PReLU(C),
    **{
        kind.__name__: kind() for kind in (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Hardswish, nn.ELU)
    },
    "GLU": nn.GLU(),
    "Softmax": nn.Softmax(1),
    "Dropout": nn.Dropout(0.0),
    "gate": Function(lambda x: F.silu(x) * x.flip(-1)),
    "product": Function(lambda x: x @ x.transpose(1, 2)),
    "einsum": Function(lambda x: torch.einsum("btc,bsc->bst", x, x)),
    "attention": Function(lambda x: F.scaled_dot_product_attention(*[heads(x)] * 3)),
    "normalize": Function(lambda x: F.normalize(x, dim=1)),
    "pow": Function(lambda x: x.pow(3)),
    "in place": Function(lambda x: F.relu((x * 1.0).add_(x), inplace=True)),
}
IMAGES = {
    "Conv2d": nn.Conv2d(C, 48, 3, padding=1),
    "Conv2d of ones": nn.Conv2d(C, 48, 1),
    "BatchNorm2d": nn.BatchNorm2d(C),
    "BatchNorm2d and ReLU": nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()),
    "GroupNorm of images": nn.GroupNorm(4, C),
    "InstanceNorm2d": nn.InstanceNorm2d(C, affine=True),
    "MaxPool2d": nn.MaxPool2d(2),
    "AvgPool2d": nn.AvgPool2d(2),
    "GELU of images": nn.GELU(),
    "LayerNorm of channels": Function(
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (C,)).permute(0, 3, 1, 2)
    ),
}
LAYERS = {**SEQUENCES, **IMAGES}


def sequences():
    yield torch.randn(4, C, C)
    yield torch.randn(4, C, C).transpose(1, 2)
    yield torch.randn(C, 4, C).transpose(0, 1)
    yield torch.randn(C, C, 4).permute(2, 1, 0)
    yield torch.randn(4, C, 2 * C)[..., :C]
    yield torch.randn(4, 2 * C, C)[:, ::2].transpose(1, 2)
    yield torch.randn(4, 1, C).expand(4, C, C)
    yield torch.randn(1, C, C).expand(4, C, C)
    yield torch.randn(1, C, C).transpose(1, 2)


def images():
    yield torch.randn(4, C, 8, 8)
    yield torch.randn(4, C, 8, 8).to(memory_format=torch.channels_last)
    yield torch.randn(4, 8, 8, C).permute(0, 3, 1, 2)
    yield torch.randn(4, C, 8, 8).transpose(2, 3)
    yield torch.randn(4, 8, 8, C).permute(0, 3, 2, 1)
    yield torch.randn(4, 2 * C, 8, 8)[:, :C]
    yield torch.randn(4, 2 * C, 8, 8).to(memory_format=torch.channels_last)[:, :C]
    yield torch.randn(4, C, 10, 10)[:, :, 1:9, 1:9]
    yield torch.randn(1, C, 8, 8).to(memory_format=torch.channels_last)
    yield torch.randn(4, C, 1, 1).expand(4, C, 8, 8)


@every_device
@pytest.mark.parametrize("name", LAYERS)
def test_results_have_the_strides_of_torch_s(name, device):
    for x in sequences() if name in SEQUENCES else images():
        stride = x.stride()
        x = x.to(device)
        if x.stride() != stride:  # a copy to a device is dense
            whole = torch.empty_strided(x.shape, stride, device=device)
            x = whole.copy_(x) if 0 not in stride else x[:1].expand(x.shape)
        for method in (GroupQuant(4), GroupQuant(8), FixedPoint(), Inverted(), FewBit()):
            plain = nn.Sequential(copy.deepcopy(LAYERS[name])).to(device)
            ours = copy.deepcopy(plain)
            try:
                packlight.convert(ours, method, strict=False)
            except packlight.NothingMatchedError:
                continue
            # channels-last stays so in our group norm on CUDA, where torch's makes it contiguous
            if device == "cuda" and "GroupNorm" in name and x.dim() == 4 and x.stride(1) == 1:
                continue
            leaf = x.detach().requires_grad_()
            expected, found = plain(leaf), ours(leaf)
            where = f"{method} of strides {tuple(x.stride())}"
            assert found.stride() == expected.stride(), where
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3, msg=where)
            found.backward(torch.randn_like(found))

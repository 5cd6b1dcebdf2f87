"""Checkpoints: both passes draw alike, or a dropout behind would drop others; they compile."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from packlight import GroupQuant, convert, fewbit, groupquant, saving
from packlight.layers.product import mul
from tests.helpers import crossing

WEIGHT = nn.Parameter(torch.randn(64, 64) / 8)
KERNEL = nn.Parameter(torch.randn(8, 4, 3, 3) / 6)
STATISTICS = torch.zeros(4), torch.ones(4)
OPTIONS = {"bits": 4, "group_size": 32, "rounding": "stochastic"}


def image(x):
    return x.view(2, 4, 32, 64)


def attention(x):
    q = image(x)
    return groupquant.scaled_dot_product_attention(q, q * 0.5, q * 2)


FUNCTIONS = {
    "linear": lambda x: groupquant.linear(x, WEIGHT),
    "two linear": lambda x: groupquant.linear(x, WEIGHT) + groupquant.linear(x, WEIGHT),
    "gelu, linear": lambda x: groupquant.linear(groupquant.gelu(x), WEIGHT),
    "layer_norm": lambda x: groupquant.layer_norm(x, (64,)),
    "rms_norm": lambda x: groupquant.rms_norm(x, (64,)),
    "attention": attention,
    "swiglu": lambda x: groupquant.swiglu(x, x * 2),
    "product": lambda x: mul(groupquant.silu(x), x * 2, method=groupquant.GroupQuant(**OPTIONS)),
    "conv2d": lambda x: groupquant.conv2d(image(x), KERNEL, padding=1),
    "same": lambda x: groupquant.conv2d(image(x), KERNEL[..., :2], padding="same"),
    "batch_norm": lambda x: groupquant.batch_norm(image(x), *STATISTICS, training=True),
    "group_norm": lambda x: groupquant.group_norm(image(x), 2),
    "plain": lambda x: F.linear(F.gelu(x), WEIGHT),
}


@pytest.mark.parametrize("packed_before", [False, True], ids=["fresh", "packed-before"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("context", ["", "saving"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_passes_see_one_mask(name, context, use_reentrant, packed_before, monkeypatch):
    masks = []
    drop = F.dropout

    def watched(x, p):
        y = drop(x, p)
        masks.append(y != 0)
        return y

    def block(x):
        return fewbit.dropout(watched(FUNCTIONS[name](x), 0.5), 0.5).sin()

    x = torch.randn(256, 64, requires_grad=True) * 1.0
    other = groupquant.linear(x, WEIGHT) if packed_before else x
    context = saving(GroupQuant()) if context else contextlib.nullcontext()
    with context:
        y = checkpoint(block, x, use_reentrant=use_reentrant)
    (y.sum() + other.sum()).backward()
    first, second = masks
    assert torch.equal(first, second)
    assert 0 < first.sum() < first.numel()


class Within(nn.Module):
    """A checkpoint of layers that write notes, also on what is made outside, and a reader after."""

    def __init__(self, *block):
        super().__init__()
        self.block, self.last = nn.Sequential(*block), nn.Linear(64, 64)

    def forward(self, x, use=checkpoint):
        x = x * 1.0
        return use(self.block, x, use_reentrant=False) + self.last(x)


BLOCKS = {
    "linear": lambda: (nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)),
    "norm": lambda: (nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_checkpoint_in_a_compiled_region(block, fresh_compiler):
    model = Within(*block())
    convert(model, GroupQuant(bits=4, rounding="nearest"))
    x, dy = torch.randn(128, 64, requires_grad=True), torch.randn(128, 64)
    leaves = [x, *model.parameters()]

    def plain(block, x, use_reentrant):
        return block(x)

    expected = torch.autograd.grad(model(x, plain), leaves, dy)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), leaves, dy), expected)
    if torch.__version__ < "2.12":
        return  # torch 2.11 loses the tags of what a Function runs, and keeps packs too
    # The checkpoint keeps x itself, from which all packs are made again, and no value within.
    weights = [parameter.shape for parameter in model.parameters()]
    kept = [tensor for tensor in crossing(model, x)[1:] if tensor.shape not in weights]
    assert [tensor.shape for tensor in kept] == [x.shape]

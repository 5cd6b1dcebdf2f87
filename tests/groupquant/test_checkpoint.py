"""A checkpoint's second pass draws what its first drew, or a dropout behind would drop others."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from packlight import GroupQuant, fewbit, groupquant, saving
from packlight.groupquant.product import mul

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
    "product": lambda x: mul(groupquant.silu(x), x * 2, **OPTIONS),
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

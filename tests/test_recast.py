"""Parameters cast in the backward pass: no cast crosses from a compiled forward pass."""

import pytest
import torch
from torch import nn

from packlight import groupquant, sketch
from packlight._recast import recast
from tests.helpers import crossing

LAYERS = {
    "group-quantised Linear": lambda: groupquant.Linear(64, 32),
    "group-quantised Conv2d": lambda: groupquant.Conv2d(64, 32, 3),
    "sketched Linear": lambda: sketch.Linear(64, 32, min_rows=1),
}


def test_is_the_tensor_in_the_dtype_of_the_other():
    x, like = torch.randn(3, 4), torch.randn(2, dtype=torch.bfloat16)
    assert torch.equal(recast(x, like), x.bfloat16())
    assert recast(x, x) is x
    torch.library.opcheck(torch.ops.packlight.recast.default, (x, like))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_no_cast_of_a_weight_crosses(make, fresh_compiler):
    layer: nn.Module = make()
    x = torch.randn(4, 64, 16, 16) if layer.weight.dim() == 4 else torch.randn(256, 64)
    x.requires_grad_()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    crossed = [(t.shape, t.dtype) for t in crossing(run, x)]
    assert (layer.weight.shape, torch.float32) in crossed
    assert (layer.weight.shape, torch.bfloat16) not in crossed

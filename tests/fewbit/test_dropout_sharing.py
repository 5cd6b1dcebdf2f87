"""What is kept of a dropout's input serves the layer that reads its output."""

import pytest
import torch
from torch import nn

import packlight
from packlight import FewBit, GroupQuant
from packlight.packing.layout import packed_bytes
from tests.helpers import crossing, relative_error

METHODS = (GroupQuant(bits=8, group_size=32, rounding="nearest"), FewBit(bits=8))
ROWS, WIDTH, HIDDEN = 32, 64, 128


def block(inplace=False, p=0.25):
    """Of a transformer: the second layer reads what a dropout leaves of an activation."""
    packlight.manual_seed(0)
    model = nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, HIDDEN),
        nn.GELU(),
        nn.Dropout(p, inplace=inplace),
        nn.Linear(HIDDEN, WIDTH),
    )
    packlight.convert(model, METHODS)
    return model


def gradients(model, x, run=None):
    packlight.manual_seed(1)
    x = x.clone().requires_grad_()
    y = (run or model)(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), [x, *model.parameters()])


def test_the_reader_keeps_nothing_of_its_own():
    model = block()
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    rows = packlight.profile(model, x).rows
    pack = {WIDTH: ROWS * WIDTH, HIDDEN: ROWS * HIDDEN}
    codes = sorted(row.bytes for row in rows if row.dtype == "uint8")
    assert codes == sorted([pack[WIDTH], pack[HIDDEN], packed_bytes(ROWS * HIDDEN, 1)])


def test_the_reader_keeps_nothing_behind_a_norm_of_several_dimensions():
    """Whose parameters are flattened for it: nobody else holds those."""
    model = nn.Sequential(nn.LayerNorm((4, WIDTH)), nn.Dropout(0.25), nn.Linear(WIDTH, HIDDEN))
    packlight.convert(model, METHODS)
    x = torch.randn(ROWS, 4, WIDTH, requires_grad=True)
    rows = packlight.profile(model, x).rows
    codes = sorted(row.bytes for row in rows if row.dtype == "uint8")
    assert codes == [packed_bytes(x.numel(), 1), x.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_the_weight_gradient_is_that_of_the_dropped_values(inplace, dtype):
    model = block(inplace).to(dtype)
    x = torch.randn(ROWS, WIDTH, dtype=dtype)
    seen = []
    model[4].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    y, (*_, dweight, dbias) = gradients(model, x)
    dy = 2 * y.double()
    exact = dy.t() @ seen[0].double()
    assert relative_error(dweight, exact) < 0.02
    assert relative_error(dbias, dy.sum(0)) < 0.02
    assert (seen[0] == 0).float().mean() > 0.15


def test_a_tensor_that_was_modified_since_is_packed_afresh():
    model = block()
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    dropped = model[:4](x)
    dropped.mul_(2)
    y = model[4](dropped)
    (dweight,) = torch.autograd.grad(y.sum(), model[4].weight)
    exact = dropped.detach().sum(0).expand_as(dweight)
    assert relative_error(dweight, exact) < 0.02


def test_without_a_pack_of_the_input_nothing_is_noted():
    dropout, linear = nn.Dropout(0.25), nn.Linear(WIDTH, 8)
    model = nn.Sequential(dropout, linear)
    packlight.convert(model, METHODS)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    rows = packlight.profile(model, x).rows
    codes = sorted(row.bytes for row in rows if row.dtype == "uint8")
    assert codes == [packed_bytes(x.numel(), 1), x.numel()]


def test_packs_are_shared_within_a_compiled_region(fresh_compiler):
    model, x = block(), torch.randn(ROWS, WIDTH)

    def run(x):
        return model(x * 1.0)

    seen = crossing(run, x.clone().requires_grad_())
    codes = [t for t in seen if t.dtype == torch.uint8]
    expected = ROWS * (WIDTH + HIDDEN) + packed_bytes(ROWS * HIDDEN, 1)
    assert sum(t.numel() for t in codes) == expected

"""PReLU: an exact bit, and a pack of the input where the slopes train."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight import FewBit, GroupQuant
from packlight.errors import DoubleBackwardError, InputError
from packlight.groupquant import PReLU, prelu
from packlight.groupquant.grouping import OFFSET
from packlight.packing.layout import packed_bytes
from tests.helpers import every_device, kept_bytes, pack_bytes, sample

SHAPES = [(64,), (4, 16), (4, 16, 8, 8), (2, 16, 5)]


def gradients(function, x, weight, dy):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    return y, *torch.autograd.grad(y, (x, weight), dy)


def assert_near(dweight, expected, x, dy):
    """Within what rounding to 8 bits leaves: independent errors of at most a step of the range."""
    step = (x.max() - x.min()).double() / 255
    tolerance = 3 * step * dy.double().norm() + 1e-2 * expected.double().abs()
    assert ((dweight - expected).double().abs() <= tolerance).all()


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("slopes", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_input_s_gradient_is_exact_and_the_slopes_s_near(shape, slopes, dtype, device):
    if slopes > 1 and len(shape) < 2:
        return
    packlight.manual_seed(0)
    x, dy = sample(*shape, dtype=dtype).to(device), torch.randn(shape).to(device, dtype)
    weight = (torch.rand(slopes) - 0.5).to(device, dtype)
    y, dx, dweight = gradients(F.prelu, x, weight, dy)
    ours, our_dx, our_dweight = gradients(lambda x, w: prelu(x, w, bits=8), x, weight, dy)
    assert torch.equal(ours, y)
    assert torch.equal(our_dx, dx)
    assert our_dweight.dtype == dtype
    assert_near(our_dweight, dweight, x, dy)


def test_channels_last_and_views():
    packlight.manual_seed(0)
    x = sample(4, 16, 8, 8).to(memory_format=torch.channels_last)
    weight = torch.rand(16)
    for view in (x, x[:, :, ::2], x.expand(4, 16, 8, 8)[:, :16], x.transpose(2, 3)):
        dy = torch.randn(view.shape)
        y, dx, dweight = gradients(F.prelu, view, weight, dy)
        ours, our_dx, our_dweight = gradients(lambda x, w: prelu(x, w, bits=8), view, weight, dy)
        assert torch.equal(ours, y)
        assert torch.equal(our_dx, dx)
        assert_near(our_dweight, dweight, view, dy)


def test_the_slopes_s_gradient_is_unbiased():
    packlight.manual_seed(0)
    x, dy, weight = torch.randn(8, 4, 32), torch.randn(8, 4, 32), torch.rand(4)
    _, _, expected = gradients(F.prelu, x, weight, dy)
    draws = torch.stack(
        [gradients(lambda x, w: prelu(x, w, bits=2), x, weight, dy)[2] for _ in range(400)]
    )
    error = draws.std(0) / 400**0.5
    assert ((draws.mean(0) - expected).abs() < 4.5 * error).all()
    assert (error > 0).all()


def test_bytes_are_a_bit_and_a_pack_or_the_bit_alone():
    x = torch.randn(4, 16, 64).requires_grad_()
    weight = torch.rand(16, requires_grad=True)
    bit, pack = packed_bytes(x.numel(), 1), pack_bytes(x.numel(), code=OFFSET)
    assert kept_bytes(lambda: prelu(x, weight)) == bit + pack + 16 * 4
    assert kept_bytes(lambda: prelu(x, weight.detach())) == bit + 16 * 4
    with torch.no_grad():
        assert kept_bytes(lambda: prelu(x, weight)) == 0


def test_a_reader_of_the_output_keeps_nothing_of_its_own():
    torch.manual_seed(0)
    packlight.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 8, 3))
    x = torch.randn(2, 3, 12, 12)
    loss = plain(x).square().sum()
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    packlight.convert(plain, GroupQuant(8))
    hidden, read = 2 * 16 * 10 * 10, 2 * 3 * 12 * 12
    pack = hidden + hidden // 128 * 4
    first = read + -(-read // 128) * 4 + 32
    kept = packlight.profile(plain, x).activation_bytes
    assert kept == pytest.approx(packed_bytes(hidden, 1) + pack + 16 * 4 + first, abs=64)
    found = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("method", [FewBit(3), GroupQuant(4)])
def test_modules_are_converted_and_calls_covered(method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.PReLU(4)
            self.weight = nn.Parameter(torch.tensor([0.3]))

        def forward(self, x):
            return F.prelu(self.act(x), self.weight)

    net, x = Net(), torch.randn(6, 4, 64)
    plain = kept_bytes(lambda: net(x))
    y = net(x)
    conversion = packlight.convert(net, method, functional=True)
    assert type(net.act) is PReLU
    assert conversion.replaced[0].method == GroupQuant(4)
    assert torch.equal(net(x), y)
    assert kept_bytes(lambda: net(x)) < 0.4 * plain
    assert list(net.state_dict()) == ["weight", "act.weight"]
    assert packlight.revert(net)


def test_the_slopes_may_change_before_the_backward_pass():
    x, weight = torch.randn(50, 8).requires_grad_(), torch.full((1,), 0.5, requires_grad=True)
    y = prelu(x, weight)
    with torch.no_grad():
        weight.fill_(7.0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert set(dx.unique().tolist()) <= {0.5, 1.0}


def test_compiles_without_a_break(fresh_compiler):
    x, weight = torch.randn(8, 16), torch.rand(16, requires_grad=True)

    def loss(x, weight):
        return prelu(x * 2, weight, rounding="nearest").square().sum()

    expected = torch.autograd.grad(loss(x, weight), weight)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, weight), weight), expected)


def test_autocast_gives_what_torch_gives():
    x, weight = torch.randn(4, 16, 8), torch.rand(16)
    with torch.autocast("cpu", torch.bfloat16):
        y, dx, dweight = gradients(F.prelu, x, weight, torch.ones(4, 16, 8))
        ours, our_dx, our_dweight = gradients(prelu, x, weight, torch.ones(4, 16, 8))
    assert (ours.dtype, our_dx.dtype, our_dweight.dtype) == (y.dtype, dx.dtype, dweight.dtype)
    assert torch.equal(ours, y)


def test_nan_and_empty_and_what_is_refused():
    weight = torch.full((1,), 0.25)
    x = torch.tensor([[1.0, float("nan"), -2.0, float("inf")] * 32])
    dy = torch.ones_like(x)
    _, dx, dweight = gradients(prelu, x, weight, dy)
    assert torch.equal(dx, gradients(F.prelu, x, weight, dy)[1])
    assert dweight.isnan().all()
    empty = gradients(prelu, torch.empty(0, 3), weight, torch.empty(0, 3))
    assert empty[2].item() == 0
    x.requires_grad_()
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(prelu(x, weight).sum(), x, create_graph=True)
    with pytest.raises(InputError, match="prelu takes a tensor of slopes, got float"):
        prelu(x, 0.25)
    with pytest.raises(InputError, match="takes float32"):
        prelu(torch.zeros(3, dtype=torch.int64), weight)

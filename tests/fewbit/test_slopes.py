"""RReLU: torch's own draws, kept as few-bit codes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight import FewBit
from packlight.errors import DoubleBackwardError, InputError
from packlight.fewbit import RReLU, rrelu
from packlight.packing.layout import packed_bytes
from tests.helpers import every_device, kept_bytes, sample


def run(function, x, dy=None, **options):
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = function(x * 1.0, 0.1, 0.7, True, **options)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y) if dy is None else dy)[0]


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_slopes_are_torch_s_and_gradients_in_the_middle_of_their_part(bits, dtype, device):
    x = sample(40, 50, dtype=dtype).to(device)
    y, dx = run(F.rrelu, x)
    ours, our_dx = run(rrelu, x, bits=bits)
    assert torch.equal(ours, y)
    assert torch.equal(our_dx[x > 0], dx[x > 0])
    below = x < 0
    parts = 2**bits - 1
    rounding = 0.02 if dtype == torch.bfloat16 else 1e-6
    assert (our_dx - dx)[below].abs().max() <= 0.6 / (2 * parts) + rounding
    assert our_dx[below].unique().numel() == parts or bits == 8
    # Unbiased over the draws: the mean of the slopes is that of the distribution.
    assert our_dx[below].double().mean().item() == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, ::3], lambda x: x.t()], ids=range(3))
def test_any_stride_and_in_place(view, poison):
    x, dy = view(torch.randn(12, 18)), view(torch.randn(12, 18))
    y, dx = run(rrelu, x, dy)
    assert torch.equal(y, run(F.rrelu, x)[0])
    assert ((dx - run(F.rrelu, x, dy)[1]).abs() <= 0.6 / 14 * dy.abs() + 1e-6).all()
    again, same = run(rrelu, x, dy, inplace=True)
    assert torch.equal(again, y)
    assert torch.equal(same, dx)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        rrelu(x.clone().requires_grad_(), training=True, inplace=True)


def test_bytes():
    x = torch.randn(5, 41, requires_grad=True)
    for bits in (1, 3, 8):
        assert kept_bytes(lambda bits=bits: rrelu(x, training=True, bits=bits)) == packed_bytes(
            205, bits
        )
    assert kept_bytes(lambda: rrelu(x)) == packed_bytes(205, 1)
    with torch.no_grad():
        assert kept_bytes(lambda: rrelu(x, training=True)) == 0


def test_without_training_it_is_a_leaky_relu():
    x = sample(6, 7).requires_grad_()
    y, expected = rrelu(x, 0.2, 0.4), F.rrelu(x, 0.2, 0.4)
    assert torch.equal(y, expected)
    ours, theirs = (torch.autograd.grad(z.sum(), x)[0] for z in (y, expected))
    assert torch.equal(ours, theirs)


def test_zeros_infinities_and_equal_limits():
    x = torch.tensor([0.0, -0.0, -float("inf"), float("nan"), float("inf"), -1.0])
    _, dx = run(rrelu, x)
    torch.testing.assert_close(dx[:3], torch.full((3,), 0.4))
    assert dx[3:5].tolist() == [1.0, 1.0]
    assert run(F.rrelu, x)[1][3:5].tolist() == [1.0, 1.0]
    torch.manual_seed(0)
    x = torch.tensor([-2.0, 3.0], requires_grad=True)
    (dx,) = torch.autograd.grad(rrelu(x, 0.25, 0.25, True).sum(), x)
    assert dx.tolist() == [0.25, 1.0]


def test_layers_and_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = nn.RReLU(0.2, 0.3, inplace=True)

        def forward(self, x):
            return F.rrelu(self.act(x * 1.0), training=self.training)

    net, x = Net(), torch.randn(40, 8, requires_grad=True)
    torch.manual_seed(0)
    y = net(x)
    packlight.convert(net, FewBit(2), functional=True)
    assert repr(net.act) == "RReLU(lower=0.2, upper=0.3, inplace=True, bits=2)"
    torch.manual_seed(0)
    assert torch.equal(net(x), y)
    assert kept_bytes(lambda: net(x)) == 2 * packed_bytes(320, 2)
    net.eval()
    assert torch.equal(net(x), F.rrelu(F.rrelu(x, 0.2, 0.3)))
    assert isinstance(RReLU(bits=4), nn.RReLU)
    with pytest.raises(InputError, match="bits=9"):
        RReLU(bits=9)
    with pytest.raises(DoubleBackwardError, match="codes of its slopes"):
        torch.autograd.grad(rrelu(x, training=True).sum(), x, create_graph=True)


def test_compiles_without_a_break(fresh_compiler):
    x = torch.randn(64, 8, requires_grad=True)

    def loss(x):
        return rrelu(x * 1.0, 0.1, 0.7, True).sum()

    (dx,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert (dx[x > 0] == 1).all()
    assert dx[x < 0].unique().numel() == 7

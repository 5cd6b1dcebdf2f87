"""Products of rows and a trained vector, as of a layer scale: one pack, which readers share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import GroupQuant
from packlight.layers import functional
from packlight.layers.product import scale
from tests.helpers import kept_bytes, pack_bytes, relative_error

NEAREST = GroupQuant(bits=8, group_size=32, rounding="nearest")
TOKENS, WIDTH = 64, 128
PACK = pack_bytes(TOKENS * WIDTH, 8, 32)


class LayerScale(nn.Module):
    """x gamma, as the layers of many models end."""

    def __init__(self, shape=(WIDTH,), dtype=torch.float32, order=1):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.order = order

    def forward(self, x):
        x = x * 1.0
        return x * self.gamma if self.order == 1 else self.gamma * x


def both(model, x):
    """Gradients of a plain and of a converted model, and the bytes that the latter keeps."""
    dy = torch.randn(TOKENS, WIDTH)
    results = []
    for convert in (False, True):
        if convert:
            packlight.convert(model, NEAREST, functional=True)
        y = model(x)
        grads = torch.autograd.grad(y, [x, *model.parameters()], dy.to(y.dtype))
        results.append((y.detach(), *grads))
    return results, kept_bytes(lambda: model(x))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_keeps_a_pack(shape, dtype, order):
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    model = LayerScale(shape, dtype, order)
    (plain, ours), kept = both(model, x)
    assert torch.equal(plain[0], ours[0])
    assert torch.equal(plain[1], ours[1])  # dx is exact
    assert ours[2].shape == model.gamma.shape
    assert ours[2].dtype == dtype
    assert relative_error(ours[2], plain[2]) < 0.02
    assert kept == PACK + model.gamma.nbytes


@pytest.mark.parametrize(
    ("other", "node"),
    [
        (torch.randn(WIDTH), "MulBackward0"),  # not trained
        (nn.Parameter(torch.randn(TOKENS, WIDTH)), "_MultiplicationBackward"),
        (nn.Parameter(torch.randn(TOKENS, 1)), "_MultiplicationBackward"),
        (nn.Parameter(torch.randn(1)), "_MultiplicationBackward"),
    ],
)
def test_other_products_are_no_scales(other, node):
    class Product(nn.Module):
        def forward(self, x):
            return x * 1.0 * other

    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    packlight.convert(model := nn.Sequential(nn.GELU(), Product()), NEAREST, functional=True)
    assert model[1](x).grad_fn.name() == node


def test_readers_of_a_product_share_the_pack():
    gamma = nn.Parameter(torch.randn(WIDTH))
    linear = nn.Linear(WIDTH, 8)
    packlight.convert(linear, NEAREST)
    x = torch.randn(TOKENS, WIDTH, requires_grad=True) * 1.0
    fixed = gamma.nbytes + linear.weight.nbytes
    assert kept_bytes(lambda: linear(scale(x, gamma, method=NEAREST))) == PACK + fixed
    y = linear(scale(x, gamma, method=NEAREST))
    (ours,) = torch.autograd.grad(y.square().sum(), linear.weight)
    plain = F.linear(x * gamma, linear.weight, linear.bias)
    (exact,) = torch.autograd.grad(plain.square().sum(), linear.weight)
    assert relative_error(ours, exact) < 0.02


@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu"])
def test_a_gated_unit_shares_packs_of_both_factors(name):
    gate, up = (torch.randn(TOKENS, WIDTH, requires_grad=True) for _ in range(2))
    vectors = [nn.Parameter(torch.randn(WIDTH)) for _ in range(2)]
    down = nn.Linear(WIDTH, 8)
    unit = getattr(functional, name)
    plain = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}[name]
    packlight.convert(down, NEAREST)

    def run():
        factors = [
            scale(each * 1.0, v, method=NEAREST)
            for each, v in zip((gate, up), vectors, strict=True)
        ]
        return down(unit(*factors, method=NEAREST))

    fixed = sum(each.nbytes for each in vectors) + down.weight.nbytes
    assert kept_bytes(run) == 2 * PACK + fixed
    inputs = [gate, up, *vectors, down.weight]
    ours = torch.autograd.grad(run().square().sum(), inputs)
    exact = F.linear(plain(gate * vectors[0]) * (up * vectors[1]), down.weight, down.bias)
    for a, b in zip(ours, torch.autograd.grad(exact.square().sum(), inputs), strict=True):
        assert relative_error(a, b) < (0.08 if name == "reglu" else 0.03)  # its mask is rounded


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_a_checkpoint(reentrant):
    model, x = LayerScale(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    packlight.convert(model, NEAREST, functional=True)
    expected = torch.autograd.grad(model(x).square().sum(), model.gamma)[0]
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(model.gamma.grad, expected)


def test_compiled(fresh_compiler):
    model, x = LayerScale(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    packlight.convert(model, NEAREST, functional=True)
    expected = torch.autograd.grad(model(x).square().sum(), model.gamma)[0]
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(run(x).square().sum(), model.gamma)[0], expected)

"""Custom activations, codebooks of one's own, and the method object."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
import packlight.fewbit as few_bit
from packlight.errors import DoubleBackwardError, InputError
from packlight.packing.layout import packed_bytes
from tests.fewbit.layers import kept_bytes


def snake(x):
    """x + sin(x)^2, a function the library has never heard of."""
    return x + torch.sin(x).square()


@pytest.fixture(scope="module")
def snake_book():
    return few_bit.fit_codebook(snake, 4, domain=(-4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activation_of_any_elementwise_function(snake_book, dtype):
    function = few_bit.activation(snake, snake_book)
    x = torch.linspace(-3.9, 3.9, 999).to(dtype).requires_grad_()
    y = function(x)
    assert torch.equal(y, snake(x))
    (dx,) = torch.autograd.grad(y.sum(), x)
    coded = snake_book.derivative(x.detach().double().numpy())
    np.testing.assert_allclose(
        dx.double().numpy(), coded, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6
    )
    assert kept_bytes(lambda: function(x)) == packed_bytes(999, 4) + 1
    assert not function(x.detach()).requires_grad


def test_activation_pickles_compiles_and_refuses(snake_book):
    torch._dynamo.reset()
    function = pickle.loads(pickle.dumps(few_bit.activation(snake, snake_book)))
    x = torch.randn(64, requires_grad=True)
    compiled = torch.compile(lambda x: function(x * 1.0).sum(), fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(function(x).sum(), x, create_graph=True)
    with pytest.raises(InputError, match="elementwise"):
        few_bit.activation(lambda x: x.sum(), snake_book)(x)
    with pytest.raises(InputError, match="not a Codebook"):
        few_bit.activation(snake, 3)
    x = torch.tensor([1.0, math.nan], requires_grad=True)
    assert torch.autograd.grad(function(x).sum(), x)[0].isnan().all()


def test_a_codebook_overrides_the_bits():
    book = few_bit.fit_codebook(F.gelu, 2, weight=("normal", 1.0))
    x = torch.randn(640, requires_grad=True)
    module = few_bit.GELU(bits=5, codebook=book)
    assert module.bits == 2
    assert "codebook=custom" in repr(module)
    assert kept_bytes(lambda: module(x)) == 640 * 2 // 8 + 1
    (dx,) = torch.autograd.grad(module(x).sum(), x)
    np.testing.assert_allclose(dx.numpy(), book.derivative(x.detach().numpy()), rtol=1e-6)
    assert copy.deepcopy(module).codebook == book
    with pytest.raises(InputError, match="not a Codebook"):
        few_bit.GELU(codebook="gelu")


def test_parameters_may_change_after_construction():
    module = few_bit.ELU(alpha=1.0, bits=4)
    module.alpha = 0.3
    x = torch.full((8,), -0.01, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).sum(), x)
    assert abs(dx[0].item() - 0.3) < 0.05


def test_a_small_network_trains_as_with_torch():
    def train(activation):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, 64), activation, nn.Linear(64, 64), activation, nn.Linear(64, 1)
        )
        x = torch.randn(256, 8)
        target = torch.sin(x.sum(1, keepdim=True))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(300):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    exact = train(nn.GELU())
    assert train(few_bit.GELU(bits=3)) < 1.5 * exact + 0.01
    assert train(few_bit.GELU(bits=8)) < 1.2 * exact + 0.01


def test_method_is_a_value():
    method = packlight.FewBit(bits=2)
    assert method == packlight.FewBit(2) != packlight.FewBit()
    assert hash(method) == hash(packlight.FewBit(2))
    assert method.to_dict() == {"method": "FewBit", "bits": 2}
    assert packlight.Method.from_dict(method.to_dict()) == method
    with pytest.raises(AttributeError):
        method.bits = 4
    for bits in (0, 9, 2.5, True):
        with pytest.raises(InputError, match="whole number from 1 to 8"):
            packlight.FewBit(bits=bits)
    with pytest.raises(InputError, match=r"unknown method 'Magic'; known methods: FewBit"):
        packlight.Method.from_dict({"method": "Magic"})
    with pytest.raises(InputError, match="FewBit has no field rows; its fields: bits"):
        packlight.Method.from_dict({"method": "FewBit", "rows": 1})

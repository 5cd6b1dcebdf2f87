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
from tests.fewbit.layers import EXACT
from tests.helpers import INTEGERS, dtype_name, every_device, gradient, kept_bytes


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
        packlight.manual_seed(0)
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
    with pytest.raises(
        InputError, match=r"unknown method 'Magic'; known methods: .*FewBit.*packlight.methods"
    ):
        packlight.Method.from_dict({"method": "Magic"})
    with pytest.raises(InputError, match="FewBit has no field rows; its fields: bits"):
        packlight.Method.from_dict({"method": "FewBit", "rows": 1})


@pytest.mark.parametrize("module", [few_bit.ELU, few_bit.CELU, few_bit.Softplus])
def test_compiles_for_several_values_of_a_parameter(module):
    torch._dynamo.reset()
    x = torch.randn(64, requires_grad=True)
    for value in (0.3, 0.6, 1.7):
        layer = module(value)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        (expected,) = torch.autograd.grad(layer(x).sum(), x)
        (actual,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(actual, expected)


def test_default_device_and_modes_do_not_leak_in(snake_book):
    with torch.device("meta"), torch.inference_mode():
        function = few_bit.activation(F.silu, snake_book)
    x = torch.tensor([1.0, math.inf], requires_grad=True)
    assert torch.autograd.grad(function(x).sum(), x)[0].isnan().all()
    y = few_bit.gelu(torch.randn(4, device="meta", requires_grad=True))
    assert y.device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        assert few_bit.elu(torch.randn(4, requires_grad=True), 0.37).shape == (4,)


def test_nothing_is_solved_without_a_gradient(monkeypatch):
    def forbidden(*_):
        raise AssertionError("solved without need")

    monkeypatch.setattr(few_bit.functional, "default_codebook", forbidden)
    few_bit.elu(torch.randn(4), 0.4321)


@pytest.mark.parametrize("p", [0.5, None])
def test_inplace_on_a_leaf_raises_before_it_writes(p):
    leaf = torch.ones(8, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        few_bit.silu(leaf, inplace=True) if p is None else few_bit.dropout(leaf, p, inplace=True)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        few_bit.relu(leaf[2:], inplace=True)
    assert torch.equal(leaf, torch.ones(8))


def test_inplace_dropout_counts_as_a_modification():
    weight, x = torch.ones(4, requires_grad=True), torch.ones(4)
    product = weight * x
    few_bit.dropout(x, 0.5, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda x: few_bit.leaky_relu(x, "a"),
        lambda x: few_bit.elu(x, None),
        lambda x: few_bit.dropout(x, "0.5"),
        lambda x: few_bit.hardtanh(x, None, 1.0),
        lambda x: few_bit.gelu(x.to_sparse()),
    ],
)
def test_wrong_types_raise(call):
    with pytest.raises(InputError):
        call(torch.randn(4, requires_grad=True))


def test_a_clamp_of_other_bounds_is_torch_s():
    x = torch.randn(64, requires_grad=True)
    low = torch.zeros(64, requires_grad=True)
    for bounds in ((low, None), (0.0, torch.ones(())), (torch.nan, 1.0)):
        ours, plain = few_bit.clamp(x, *bounds), torch.clamp(x, *bounds)
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, plain)]
        assert torch.equal(*grads)
    with pytest.raises(RuntimeError, match="must not be None"):
        few_bit.clamp(x)


def test_solving_a_book_is_unseen_by_hooks_around_the_call():
    x = torch.randn(64, requires_grad=True)
    assert kept_bytes(lambda: few_bit.elu(x, 0.123456, bits=2)) == 64 * 2 // 8 + 1


@every_device
@pytest.mark.parametrize("backend", ["reference", "kernel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=dtype_name)
@pytest.mark.parametrize(
    ("ours", "plain", "arguments"),
    [
        (few_bit.hardshrink, F.hardshrink, (0.3,)),
        (few_bit.softshrink, F.softshrink, (0.3,)),
        (few_bit.hardtanh, F.hardtanh, (-0.3, 1.1)),
        (few_bit.clamp, torch.clamp, (-0.3, 1.1)),
        (few_bit.clamp, torch.clamp, (1.1, -0.3)),
        (few_bit.clamp_min, torch.clamp_min, (0.3,)),
        (few_bit.clamp_max, torch.clamp_max, (0.3,)),
        (few_bit.threshold, F.threshold, (0.3, 7.0)),
        (few_bit.threshold, F.threshold, (-0.7, 7.0)),
    ],
)
def test_a_bound_is_rounded_where_torch_rounds_it(
    ours, plain, arguments, dtype, backend, device, monkeypatch
):
    """Bounds that 16 bits cannot hold, and inputs that are what they round to, or next to it."""
    if backend == "kernel":
        EXACT[0].use_kernels(monkeypatch)
    bounds = torch.tensor([sign * bound for sign in (-1, 1) for bound in arguments])
    near = bounds.to(dtype)
    bits = near.view(INTEGERS[dtype])
    x = torch.cat([near, (bits + 1).view(dtype), (bits - 1).view(dtype)]).to(device)
    y, dx = gradient(lambda x: ours(x, *arguments), x)
    expected_y, expected = gradient(lambda x: plain(x, *arguments), x)
    assert torch.equal(dx, expected)
    if backend == "reference" or device == "cuda":
        assert torch.equal(y, expected_y)


def test_exact_layers_say_that_they_need_no_bits():
    for make in (few_bit.ReLU, few_bit.Hardtanh, few_bit.Dropout):
        with pytest.raises(
            InputError, match=r"exact gradient whatever the bits.* leave out bits=3"
        ):
            make(bits=3)
    with pytest.raises(InputError, match="MaxPool2d keeps the exact gradient"):
        few_bit.MaxPool2d(2, bits=3)
    with pytest.raises(TypeError, match="colour"):
        few_bit.ReLU(colour=3)

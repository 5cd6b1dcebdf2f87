"""Which channels a norm keeps exactly, when it looks at its weights, what gradients are worth."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
import packlight.inverted as inverted
from packlight.errors import InputError
from packlight.inverted import norm_modules
from packlight.inverted.norm_ill_posed import OFFSET_LIMIT, SMALLEST
from tests.helpers import dtype_name, every_dtype, node_name
from tests.inverted.norm_layers import AFFINE, LAYERS
from tests.inverted.test_norms import BACKENDS, assert_near, gradients

AFFINE_BACKENDS = [(layer, backend) for layer, backend in BACKENDS if layer in AFFINE]


@pytest.fixture(params=AFFINE_BACKENDS, ids=lambda backend: f"{backend[0]}-{backend[1]}")
def layer(request, monkeypatch):
    row, backend = request.param
    if backend == "kernel":
        row.use_kernels(monkeypatch)
    return row


def spoil(module, *, offset=True):
    """Makes two channels ill-posed, and a third where there is a bias; the same each time."""
    with torch.no_grad():
        weight = module.weight.flatten()
        weight[1] = 0.0
        weight[4] = 1e-36
        if offset and getattr(module, "bias", None) is not None:
            module.bias.flatten()[2] = 1e4
    return module


def looked(module):
    """The channels that the layer last found ill-posed."""
    (verdict,) = module._seen.verdicts.values()
    return [] if verdict.channels is None else verdict.channels.tolist()


# --- What is ill-posed.


@every_dtype
def test_limit_of_offsets(dtype):
    limit = OFFSET_LIMIT[dtype]
    weight = torch.tensor([1.0, 1.0, -2.0, -2.0, 1.0])
    bias = torch.tensor([limit, 1.01 * limit, 2 * limit, -2.02 * limit, 0.0])
    bad = inverted.ill_posed(weight, bias, dtype)
    assert bad.tolist() == [False, True, False, True, False]
    assert inverted.ill_posed(weight, bias, dtype, 2 * limit).tolist() == [False] * 5
    assert inverted.ill_posed(None, bias, dtype).tolist() == [False, True, True, True, False]
    assert inverted.ill_posed(None, None, dtype) is None


@every_dtype
def test_limit_of_underflow(dtype):
    small = SMALLEST[dtype]
    weight = torch.tensor([small, -small, 0.99 * small, 0.0, math.nan], dtype=torch.float64)
    assert inverted.ill_posed(weight, None, dtype).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
def test_gradients_at_the_limit_of_underflow(dtype):
    """The smallest gamma that is not ill-posed costs no more than rounding."""
    norm = inverted.RMSNorm(64).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.full((64,), SMALLEST[dtype]))
    plain = nn.RMSNorm(64).double()
    plain.load_state_dict(norm.state_dict())
    x, dy = torch.randn(32, 64).to(dtype), torch.randn(32, 64).to(dtype)
    _, (_, actual) = gradients(norm, x, dy)
    _, (_, expected) = gradients(plain, x.double(), dy.double())
    assert node_name(norm(x.requires_grad_())).startswith("_Inverted")
    torch.testing.assert_close(
        actual.double(), expected, rtol=0, atol=torch.finfo(dtype).eps * expected.norm().item()
    )


# --- Exact channels.


def test_ill_posed_channels_have_exact_gradients(layer):
    ours, plain = map(spoil, layer.pair())
    x, dy = layer.sample(), torch.randn(layer.shape)
    y, actual = gradients(ours, x, dy)
    expected_y, expected = gradients(plain, x, dy)
    torch.testing.assert_close(y, expected_y, rtol=2e-6, atol=2e-6)
    assert looked(ours) == ([1, 2, 4] if getattr(plain, "bias", None) is not None else [1, 4])
    assert_near(actual, expected, 1e-5)
    assert actual[1].flatten()[1] != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_ill_posed_channels_in_16_bits(layer, dtype):
    ours, plain = (spoil(m, offset=False).to(dtype) for m in layer.pair())
    x, dy = layer.sample(dtype), torch.randn(layer.shape).to(dtype)
    _, actual = gradients(ours, x, dy)
    _, expected = gradients(plain.double(), x.double(), dy.double())
    assert_near([a.double() for a in actual], expected, 0.03)


@pytest.mark.parametrize("layer", AFFINE, ids=str)
def test_mostly_ill_posed_weights_run_torch_s_own(layer):
    ours, plain = layer.pair()
    for module in (ours, plain):
        nn.init.zeros_(module.weight)
    x, dy = layer.sample(), torch.randn(layer.shape)
    _, actual = gradients(ours, x, dy)
    _, expected = gradients(plain, x, dy)
    assert_near(actual, expected, 0)
    assert actual[1].any()
    assert not node_name(ours(x.requires_grad_())).startswith("_Inverted")


def test_zero_initialised_gamma_trains():
    """As the last norm of a residual branch: gamma leaves 0, and the norm is inverted from then."""
    packlight.manual_seed(0)
    ours = nn.Sequential(nn.Linear(8, 8), inverted.LayerNorm(8), nn.Linear(8, 4))
    nn.init.zeros_(ours[1].weight)
    plain = copy.deepcopy(ours)
    plain[1].__class__ = nn.LayerNorm
    x, target = torch.randn(16, 8), torch.randn(16, 4)
    for model in (ours, plain):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(150):
            optimizer.zero_grad()
            (model(x) - target).square().mean().backward()
            optimizer.step()
    assert_near(ours.parameters(), plain.parameters(), 1e-3)
    assert node_name(ours[1](x)).startswith("_Inverted")


def test_given_exact_channels_are_kept():
    x, weight, bias = torch.randn(4, 8, requires_grad=True), torch.rand(8) + 0.5, torch.zeros(8)
    weight.requires_grad_()
    bias.requires_grad_()
    plain = nn.functional.layer_norm(x, (8,), weight, bias)
    for channels in (torch.tensor([5, 2]), torch.tensor([], dtype=torch.int64), None):
        y = inverted.layer_norm(x, (8,), weight, bias, exact_channels=channels)
        actual = torch.autograd.grad(y.square().sum(), (x, weight, bias))
        expected = torch.autograd.grad(plain.square().sum(), (x, weight, bias), retain_graph=True)
        assert_near(actual, expected, 1e-5)


def test_a_gamma_of_zero_that_went_unnoticed_is_nan(layer):
    ours, _ = layer.pair()
    x, dy = layer.sample().requires_grad_(), torch.randn(layer.shape)
    ours(x)
    with torch.no_grad():
        ours.weight.flatten()[3] = 0.0
    _, (dx, dgamma, *_) = gradients(ours, x, dy)
    assert dgamma.flatten()[3].isnan()
    assert dx.isnan().any()
    assert inverted.gradient_error(ours)[""] == math.inf
    ours.refresh()
    _, (dx, dgamma, *_) = gradients(ours, x, dy)
    assert dx.isfinite().all()
    assert dgamma.isfinite().all()


# --- When a layer looks at its weights.


def step(module, x):
    return module(x.detach().requires_grad_()).sum()


@pytest.fixture
def counted(monkeypatch):
    """How often weights were read."""
    counts = []
    look = norm_modules.verdict_of_weights

    def count(*args):
        counts.append(1)
        return look(*args)

    monkeypatch.setattr(norm_modules, "verdict_of_weights", count)
    return counts


def test_looks_again_after_so_many_passes_if_the_weights_changed(counted):
    norm, x = inverted.LayerNorm(8), torch.randn(4, 8)
    for _ in range(3 * norm_modules.RECHECK_AFTER):
        step(norm, x)
    assert len(counted) == 1
    spoil(norm)
    step(norm, x)
    assert len(counted) == 2
    assert looked(norm) == [1, 2, 4]
    for index in range(norm_modules.RECHECK_AFTER - 1):
        with torch.no_grad():
            norm.weight.add_(1.0)
        assert len(counted) == 2, index
        step(norm, x)
    assert len(counted) == 2
    with torch.no_grad():
        norm.weight.add_(1.0)
    step(norm, x)
    assert len(counted) == 3
    assert looked(norm) == [2]


def test_looks_again_after_weights_are_loaded_or_moved():
    norm, x = inverted.LayerNorm(8), torch.randn(4, 8)
    step(norm, x)
    assert looked(norm) == []
    norm.load_state_dict(spoil(nn.LayerNorm(8)).state_dict())
    step(norm, x)
    assert looked(norm) == [1, 2, 4]
    norm.double()
    step(norm, x.double())
    assert list(norm._seen.verdicts) == [torch.float64]


def test_a_norm_without_weights_never_looks(counted):
    for layer in LAYERS:
        if layer not in AFFINE:
            step(layer.pair()[0], layer.sample())
    assert not counted


def test_recomputation_sees_what_its_forward_saw(counted):
    """A checkpoint's second pass never looks: it must keep what the first one kept."""
    norm, x = inverted.LayerNorm(8), torch.randn(4, 8, requires_grad=True)
    for _ in range(norm_modules.RECHECK_AFTER - 1):
        step(norm, x)
    with torch.no_grad():
        norm.weight.mul_(1.5)
    loss = checkpoint(norm, x, use_reentrant=False).square().sum()
    seen = len(counted)
    loss.backward()
    assert len(counted) == seen


def test_capture_without_a_look_raises(monkeypatch):
    monkeypatch.setattr(norm_modules, "_is_capturing", lambda _: True)
    norm, x = inverted.LayerNorm(8), torch.randn(4, 8)
    with pytest.raises(InputError, match="cannot while a CUDA graph is captured; run a forward"):
        step(norm, x)
    norm.refresh()
    step(norm, x)
    spoil(norm)
    for _ in range(2 * norm_modules.RECHECK_AFTER):
        step(norm, x)
    assert norm._seen.verdicts[torch.float32].channels is None


def test_refresh_before_the_first_pass_finds_what_must_be_kept():
    layer = inverted.LayerNorm(8)
    with torch.no_grad():
        layer.weight[3] = 0.0
    for _ in range(2):
        layer.refresh()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert layer._verdict(dtype).channels.tolist() == [3]


def test_only_a_parameter_on_a_device_can_be_captured(monkeypatch):
    on_device = SimpleNamespace(is_cuda=True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda is_=capturing: is_)
        assert norm_modules._is_capturing(on_device) is capturing
        assert not norm_modules._is_capturing(torch.ones(1))
        assert not norm_modules._is_capturing(None)


def test_offset_limit_of_a_layer():
    norm, x = inverted.LayerNorm(8).bfloat16(), torch.randn(4, 8).bfloat16()
    nn.init.constant_(norm.bias, 1.0)
    y = step(norm, x)  # torch 2.11 names no node whose graph is gone
    assert y.grad_fn.next_functions[0][0].name().startswith("NativeLayerNorm")
    norm.offset_limit = 2.0
    norm.refresh()
    y = step(norm, x)
    assert y.grad_fn.next_functions[0][0].name().startswith("_Inverted")
    assert inverted.gradient_error(norm)[""] == 2 * 2**-8


# --- gradient_error.


def test_gradient_error_of_a_model():
    model = nn.Sequential(
        nn.Linear(8, 8), inverted.LayerNorm(8), inverted.RMSNorm(8), nn.LayerNorm(8)
    )
    with torch.no_grad():
        model[1].bias[3] = 0.25
        model[1].bias[4] = 100.0
    assert inverted.gradient_error(model) == {"1": 1.25 * 2**-24, "2": 2**-24}
    in_bf16 = inverted.gradient_error(model, torch.bfloat16)
    assert in_bf16 == {"1": 1.25 * 2**-8, "2": 2**-8}
    nn.init.zeros_(model[2].weight)
    assert inverted.gradient_error(model)["2"] == 0.0
    plain = inverted.LayerNorm(8, elementwise_affine=False)
    assert inverted.gradient_error(plain, torch.float16) == {"": 2**-11}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_gradient_error_bounds_the_error(dtype):
    """Of dgamma beside sum |dy|, on weights that drift after the layer has looked."""
    norm = inverted.LayerNorm(32)
    x, dy = (torch.randn(64, 32) * 2).to(dtype), torch.randn(64, 32).to(dtype)
    step(norm, x)
    for size in (0.3, 3.0, 30.0):
        with torch.no_grad():
            norm.bias.uniform_(-size, size)
        plain = nn.LayerNorm(32).double()
        plain.load_state_dict(norm.state_dict())
        _, (_, actual, _) = gradients(norm, x, dy)
        _, (_, expected, _) = gradients(plain, x.double(), dy.double())
        error = (actual.double() - expected).abs() / dy.double().abs().sum(0)
        bound = inverted.gradient_error(norm, dtype)[""]
        # Single elements of x_hat reach 4 where its deviation is 1.
        assert error.max() <= 2 * bound
        assert error.max() >= bound / 50

"""What inverted activations promise beyond the contract of every layer (tests/test_contract.py)."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
import packlight.inverted as inverted
from packlight.errors import InputError
from packlight.inverted import ops, reference
from packlight.inverted.inverses import INVERSES, fit_of
from packlight.packing.layout import packed_bytes
from tests.helpers import (
    EPSILON,
    all_values,
    crossing,
    dtype_name,
    every_dtype,
    gradient,
    kept_bytes,
    sample,
)
from tests.inverted.accuracy import branch, floats_near, information_limit, true_slope
from tests.inverted.layers import BRANCH, LAYERS, OURS
from tests.layers import on_both_backends

every_layer = pytest.mark.parametrize("layer", OURS, ids=str)
every_branch_layer = pytest.mark.parametrize("layer", BRANCH, ids=str)
SHORT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)


def slope_of(layer, y, left):
    return reference.derivative(y, left, layer.name, layer.parameters).double()


def named(name):
    return next(layer for layer in LAYERS if layer.name == name)


# --- 2: backward. Every 16-bit value goes through the kernels too, in test_activation_kernels.py.


@every_layer
@SHORT
def test_derivative_of_every_value_is_near_what_the_output_tells(layer, dtype):
    """Within 1.5 times the information limit; 1e-6 is the arithmetic of step functions."""
    x = all_values(dtype)
    y = layer.torch(x)
    x, y = x[y.isfinite()], y[y.isfinite()]  # torch's GELU overflows at half of the largest x
    left, truth = branch(layer, x), true_slope(layer, x)
    error = (slope_of(layer, y, left) - truth).abs().max().item()
    assert error <= 1.5 * information_limit(y, left, truth) + 1e-6


@every_layer
def test_derivative_in_float32(layer):
    minimum = INVERSES[layer.name].minimum
    x = torch.cat([torch.randn(20000) * scale for scale in (1e-3, 1.0, 4.0, 30.0)])
    if minimum is not None:
        x = torch.cat([x, minimum + torch.randn(20000) * 1e-3, floats_near(minimum, 1e-4)])
    left, truth = branch(layer, x), true_slope(layer, x)
    # Softplus has one output for inputs on either side of its threshold: off by e^-threshold.
    allowed = 1e-4 if layer.name != "softplus" else math.exp(-layer.parameters[1])
    rounded = layer.torch(x.double()).float()
    assert (slope_of(layer, rounded, left) - truth).abs().max() < allowed
    # torch's own output is off by a unit or two, and next to a minimum tells half as much.
    y = layer.torch(x)
    limit = information_limit(y, left, truth)
    assert (slope_of(layer, y, left) - truth).abs().max() < max(allowed, 2.5 * limit)


@every_layer
def test_derivative_in_float64(layer):
    x = torch.cat([torch.randn(20000, dtype=torch.float64) * s for s in (1e-3, 1.0, 4.0, 30.0)])
    minimum = INVERSES[layer.name].minimum
    away = torch.ones_like(x) if minimum is None else (x - minimum).abs().clamp(max=1)
    if layer.name == "softplus":
        x, away = x[1.5 * x < 9.0], away[1.5 * x < 9.0]
    y = layer.torch(x)
    error = (slope_of(layer, y, branch(layer, x)) - true_slope(layer, x)).abs()
    # A last digit of y is worth more the nearer x is to the minimum. torch's own GELU is off by
    # 1e-14 in the tails, and its celu by a rounding of 1 / alpha to float32.
    assert (error * away).max() < (3e-8 if layer.name == "celu" else 2e-14)
    assert error.max() < 1e-7


@every_layer
def test_gradcheck(layer):
    x = torch.linspace(-6, 6, 49, dtype=torch.float64)
    corners = [0.0, -3.0, 3.0, 6.0, -0.5, 1.25, INVERSES[layer.name].minimum or 0.0]
    far = torch.stack([(x - corner).abs() for corner in corners]).amin(0) > 0.02
    assert torch.autograd.gradcheck(layer.apply, x[far].requires_grad_())


@on_both_backends(OURS)
@every_dtype
def test_gradient_is_dy_times_the_derivative(layer, dtype, backend):
    if backend == "kernel" and dtype == torch.float64:
        return  # kernels compute in fp32; float64 takes the reference
    x, dy = sample(7, 33, dtype=dtype), torch.randn(7, 33).to(dtype)
    y, dx = gradient(layer.apply, x, dy)
    assert dx.dtype == dtype
    expected = dy.double() * slope_of(layer, y, branch(layer, x))
    near = 1e-3 if backend == "kernel" else 1e-7  # outputs differ in their last digit
    torch.testing.assert_close(dx.double(), expected, rtol=EPSILON[dtype], atol=near)


@every_branch_layer
@pytest.mark.parametrize("steps", range(1, 4))
def test_outputs_below_the_minimum_have_a_derivative(layer, steps):
    """Rounding puts y below y*, where an unclamped square root is NaN."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        minimum = torch.tensor([INVERSES[layer.name].minimum], dtype=torch.float64)
        y = layer.torch(minimum).to(dtype)
        for _ in range(steps):
            y = (
                torch.nextafter(y.float(), torch.tensor(-1.0)).to(dtype)
                - torch.finfo(dtype).eps / 8
            )
        for left in (True, False):
            slope = slope_of(layer, y, torch.tensor([left]))
            assert slope.abs() < 2 * math.sqrt(torch.finfo(dtype).eps)


@every_branch_layer
def test_saturated_units_have_no_noise(layer):
    """Far left the gradient is 0 and far right dy, in every dtype."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        far = torch.tensor([-200.0, 40.0, 200.0, 6e4], dtype=dtype)
        _, dx = gradient(layer.apply, far)
        torch.testing.assert_close(
            dx.double(), torch.tensor([0.0, 1, 1, 1]).double(), atol=1e-5, rtol=0
        )


# --- 4: what is kept, and shared.


class _Block(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(8, 64), activation, nn.Linear(64, 8)

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@every_dtype
def test_linear_reads_the_tensor_that_is_kept(layer, dtype):
    """fc2(f(fc1(x))) keeps x, one tensor of the hidden width, and the bits."""
    block = _Block(layer.make()).to(dtype)
    x = torch.randn(32, 8, dtype=dtype, requires_grad=True)
    size = x.element_size()
    report = packlight.profile(block, x)
    assert report.activation_bytes == 32 * 64 * size + layer.packed_bytes(32 * 64)
    plain = packlight.profile(_Block(nn.GELU()).to(dtype), x)
    assert plain.activation_bytes == 2 * 32 * 64 * size


def test_inplace_keeps_the_tensor_that_was_overwritten():
    linear, x = nn.Linear(8, 64), torch.randn(32, 8)
    kept = kept_bytes(lambda: inverted.silu(linear(x), inplace=True))
    assert kept == x.numel() * 4 + 32 * 64 * 4 + packed_bytes(32 * 64, 1)


def test_a_residual_consumer_shares_nothing():
    """The sum keeps no input: the output is kept for this layer alone, no less than torch's."""
    x = torch.randn(32, 64, requires_grad=True)
    assert kept_bytes(lambda: inverted.elu(x) + 1.0) == kept_bytes(lambda: F.elu(x) + 1.0)


def test_in_place_change_of_the_output_raises_though_the_consumer_would_not_mind():
    linear, x = nn.Linear(64, 64), torch.randn(4, 64, requires_grad=True)
    y = inverted.gelu(x)
    result = linear(y.clone())
    y.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (result.sum() + y.sum()).backward()


# --- 8: torch.compile and the operator checks.


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.1])
def test_output_and_bits_cross_to_the_compiled_backward(budget, fresh_compiler):
    def function(x, weight, out):
        return inverted.gelu(x @ weight) @ out

    x = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(32, 48, requires_grad=True)
    out = torch.randn(48, 16, requires_grad=True)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        tensors = crossing(function, x, weight, out)[1:]  # the first is the output itself
    hidden = [t for t in tensors if t.shape in ((64, 48), (48, 64))]
    bits = [t for t in tensors if t.dtype == torch.uint8]
    assert len(hidden) <= 1
    if budget == 1.0:
        assert len(hidden) == 1
        assert [t.numel() for t in bits] == [packed_bytes(64 * 48, 1)]
    (expected,) = torch.autograd.grad(function(x, weight, out).sum(), weight)
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize(
    "module", [inverted.ELU, inverted.CELU, inverted.LeakyReLU, lambda v: inverted.Softplus(v)]
)
def test_compiles_for_several_values_of_a_parameter(module, fresh_compiler):
    x = torch.randn(64, requires_grad=True)
    for value in (0.3, 0.6, 1.7):
        layer = module(value)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        (expected,) = torch.autograd.grad(layer(x).sum(), x)
        (actual,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(actual, expected)


@every_layer
def test_operators_pass_opcheck(layer):
    for x in (
        sample(3, 7),
        sample(4, 6).t(),
        sample(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ):
        y, bits = layer.torch(x), None
        if layer.branch:
            torch.library.opcheck(torch.ops.packlight.inverted_activation.default, (x, layer.name))
            torch.library.opcheck(
                torch.ops.packlight.inverted_activation_.default, (x.clone(), layer.name)
            )
            y, bits = ops.activation(x, layer.name)
        torch.library.opcheck(
            torch.ops.packlight.inverted_backward.default,
            (torch.randn_like(x), y, bits, layer.name, list(layer.parameters)),
        )


# --- 11: NaN and infinity.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@every_layer
@every_dtype
def test_nonfinite_inputs_are_never_silently_finite(layer, dtype, value, backend):
    if backend == "kernel" and dtype == torch.float64:
        return
    x = torch.randn(70).to(dtype)
    x[33] = value
    _, dx = gradient(layer.apply, x)
    _, expected = gradient(layer.torch, x.double())
    assert dx[:33].isfinite().all()
    assert dx[34:].isfinite().all()
    if math.isnan(value) and layer.step:
        return  # torch's vectorised loops and its scalar tails disagree here
    if expected[33].isfinite():
        error = (dx[33].double() - expected[33]).abs()
        assert error <= EPSILON[dtype] / 2  # an output near -alpha is rounded
    else:
        assert not dx[33].isfinite()


@on_both_backends(OURS)
def test_nonfinite_gradients_pass(layer, backend):
    x, dy = sample(64), torch.ones(64)
    dy[20:40:3], dy[21:40:3], dy[22:40:3] = math.nan, math.inf, -math.inf
    _, dx = gradient(layer.apply, x, dy)
    _, expected = gradient(layer.torch, x, dy)
    assert dx[:20].isfinite().all()
    if INVERSES[layer.name].select:
        torch.testing.assert_close(dx, expected, equal_nan=True)
    else:
        assert not dx[20:40].isfinite().any()


# --- Arguments with which the output tells less.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: inverted.elu(x, -0.5), r"alpha=-0\.5.*use packlight\.fewbit\.elu"),
        (lambda x: inverted.leaky_relu(x, -0.1), r"negative_slope=-0\.1"),
        (lambda x: inverted.softplus(x, 1.0, 5.0), r"threshold=5\.0"),
        (lambda x: inverted.softplus(x, 0.0), "beta=0"),
        (lambda x: inverted.hardtanh(x, 1.0, -1.0), "min_val=1.0 is above max_val=-1.0"),
        (lambda x: inverted.gelu(x, "sigmoid"), 'neither "none" nor "tanh"'),
        (lambda x: inverted.leaky_relu(x, "a"), "not a number"),
        (lambda x: inverted.elu(x, None), "not a number"),
        (lambda x: inverted.hardtanh(x, None, 1.0), "not a number"),
        (lambda x: inverted.gelu(x.to_sparse()), "dense tensor"),
    ],
)
def test_arguments_that_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(torch.randn(4, requires_grad=True))


@pytest.mark.parametrize(
    ("ours", "plain", "arguments"),
    [
        (inverted.leaky_relu, F.leaky_relu, (0.0,)),
        (inverted.leaky_relu, F.leaky_relu, (2.0,)),
        (inverted.elu, F.elu, (0.0,)),
        (inverted.elu, F.elu, (3.0,)),
        (inverted.celu, F.celu, (-0.7,)),
        (inverted.softplus, F.softplus, (-1.3,)),
        (inverted.softplus, F.softplus, (0.5, 30.0)),
        (inverted.hardtanh, F.hardtanh, (0.5, 0.5)),
        (inverted.hardtanh, F.hardtanh, (-1.0, math.inf)),
    ],
)
def test_unusual_arguments_are_exact(ours, plain, arguments, backend_of_inverted):
    x, dy = sample(65), torch.randn(65)
    y, dx = gradient(lambda x: ours(x, *arguments), x, dy)
    expected_y, expected = gradient(lambda x: plain(x, *arguments), x, dy)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    torch.testing.assert_close(dx, expected, rtol=2e-5, atol=2e-6)


@pytest.fixture(params=["reference", "kernel"])
def backend_of_inverted(request, monkeypatch):
    if request.param == "kernel":
        LAYERS[0].use_kernels(monkeypatch)


@SHORT
def test_hardtanh_clips_at_bounds_as_the_dtype_holds_them(dtype, backend_of_inverted):
    """0.6 is no bfloat16. Only an input equal to the rounded bound cannot be told from clipped."""
    x = all_values(dtype)
    _, dx = gradient(lambda x: inverted.hardtanh(x, -0.3, 0.6), x)
    _, expected = gradient(lambda x: F.hardtanh(x, -0.3, 0.6), x)
    differ = x[dx != expected]
    bounds = torch.tensor([-0.3, 0.6], dtype=dtype)
    assert torch.isin(differ, bounds).all()


# --- The constants, the method, and training.


@pytest.fixture(scope="module")
def fitting():
    path = Path(__file__).parents[2] / "tools" / "fit_inverses.py"
    spec = importlib.util.spec_from_file_location("fit_inverses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shipped_constants_are_those_of_the_tool(fitting):
    """As functions: solutions of a linear programme may differ in their last digits."""
    v = np.linspace(0, 1, 101)
    for name, by_digits in fitting.fit_all().items():
        for digits, constants in by_digits.items():
            shipped = fit_of(name, int(digits))
            assert shipped.floor == pytest.approx(constants["floor"], rel=1e-12)
            assert shipped.span == pytest.approx(constants["span"], rel=1e-12)
            assert shipped.center == constants["center"]
            np.testing.assert_allclose(shipped.logarithm or [], constants.get("log", []))
            for side in ("right", "left"):
                ours, theirs = getattr(shipped, side), constants[side]
                assert len(ours) == len(theirs)
                np.testing.assert_allclose(
                    np.polyval(ours[::-1], v - shipped.center),
                    np.polyval(theirs[::-1], v - shipped.center),
                    atol=1e-5,
                )


@every_branch_layer
def test_minima_are_those_of_the_tool(layer, fitting):
    if layer.name != "hardswish":
        assert abs(fitting.minimum(layer.name)[0] - INVERSES[layer.name].minimum) < 1e-12


def test_method_is_a_value():
    assert packlight.Inverted() == packlight.Inverted()
    assert packlight.Inverted().to_dict() == {"method": "Inverted"}
    assert packlight.Method.from_dict({"method": "Inverted"}) == packlight.Inverted()


def test_a_small_network_trains_as_with_torch():
    def train(activation):
        packlight.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, 64), activation, nn.Linear(64, 64), activation, nn.Linear(64, 1)
        )
        x = torch.randn(256, 8)
        target = torch.sin(x.sum(1, keepdim=True))
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(200):
            loss = F.mse_loss(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert train(inverted.GELU()) == pytest.approx(train(nn.GELU()), rel=0.02, abs=1e-3)
    assert train(inverted.SiLU()) == pytest.approx(train(nn.SiLU()), rel=0.02, abs=1e-3)

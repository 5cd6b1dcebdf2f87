"""Kernels of the inverted activations against references and float64."""

import math

import pytest
import torch

import packlight.inverted as inverted
from packlight import use_reference
from packlight.inverted import kernels, reference
from packlight.inverted.inverses import INVERSES
from packlight.packing.reference import unpack
from tests.helpers import (
    EPSILON,
    all_values,
    assert_as_near_as_torch,
    dtype_name,
    every_device,
    every_kernel_dtype,
    many_values,
)
from tests.inverted.accuracy import branch, floats_near, information_limit, true_slope
from tests.inverted.layers import BRANCH, OURS
from tests.layers import TRUTH

every_layer = pytest.mark.parametrize("layer", OURS, ids=str)
every_branch_layer = pytest.mark.parametrize("layer", BRANCH, ids=str)
SHORT = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)


def outputs(layer, x):
    """torch's output and the kernel's bits."""
    bits = kernels.activation(x, layer.name)[1] if layer.branch else None
    return layer.torch(x), bits


def slope_of(layer, y, bits):
    """f' unrounded: dy in float32, whatever y is."""
    one = torch.ones_like(y, dtype=torch.float32)
    return kernels.backward(one, y, bits, layer.name, layer.parameters).double()


@every_device
@every_branch_layer
@every_kernel_dtype
def test_forward_is_as_near_the_truth_as_torch(layer, dtype, device):
    x = many_values(dtype, device)
    y, _ = kernels.activation(x, layer.name)
    truth = TRUTH.get(layer.name, layer.plain)(x.double(), *layer.arguments)
    assert_as_near_as_torch(y, layer.torch(x), truth)


@every_device
@every_branch_layer
@every_kernel_dtype
def test_bits_are_those_of_the_reference(layer, dtype, device):
    x = many_values(dtype, device)
    x[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    _, bits = kernels.activation(x, layer.name)
    _, expected = reference.activation(x, layer.name)
    assert torch.equal(unpack(bits, 1, x.numel()), unpack(expected, 1, x.numel()))
    written = x.clone()
    assert torch.equal(kernels.activation_(written, layer.name), bits)


@every_device
@every_layer
@SHORT
def test_derivative_of_every_value_is_near_what_the_output_tells(layer, dtype, device):
    x = all_values(dtype).to(device)
    y = layer.torch(x)
    fine = y.isfinite()
    if device == "cpu":  # the interpreter takes subnormal bf16 for something else
        fine &= (y == 0) | (y.abs() > 1e-35)
    x = x[fine]
    y, bits = outputs(layer, x)
    truth = true_slope(layer, x)
    error = (slope_of(layer, y, bits) - truth).abs().max().item()
    assert error <= 1.5 * information_limit(y, branch(layer, x), truth) + 1e-6


@every_device
@every_layer
def test_derivative_in_float32(layer, device):
    minimum = INVERSES[layer.name].minimum
    x = many_values(torch.float32, device)
    if minimum is not None:
        x = torch.cat([x, floats_near(minimum, 1e-4).to(device)])
    _, bits = outputs(layer, x)
    rounded = layer.torch(x.double()).float()
    allowed = 1e-4 if layer.name != "softplus" else math.exp(-layer.parameters[1])
    assert (slope_of(layer, rounded, bits) - true_slope(layer, x)).abs().max() < allowed


@every_device
@every_layer
@every_kernel_dtype
def test_gradients_equal_the_reference(layer, dtype, device):
    for count in (1, 515) if device == "cpu" else (1, 8 * 1024 * 5, 2**20 + 77):
        x = (torch.randn(count, device=device) * 3).to(dtype)
        dy = torch.randn(count, device=device).to(dtype)
        y, bits = outputs(layer, x)
        dx = kernels.backward(dy, y, bits, layer.name, layer.parameters)
        expected = reference.backward(dy, y, bits, layer.name, layer.parameters)
        # The approximate square root and logarithm are worth 2e-5 of f' in float32.
        torch.testing.assert_close(dx, expected, rtol=EPSILON[dtype], atol=2e-5)


@every_device
@pytest.mark.parametrize("layer", [layer for layer in BRANCH if str(layer) != "hardswish"], ids=str)
def test_small_gradients_keep_their_digits_in_float32(layer, device):
    """Where f' vanishes with y, the error is relative: 2% down to f' = 1e-10."""
    x = torch.linspace(-12, -3, 5000, device=device)
    truth = true_slope(layer, x)
    x, truth = x[truth.abs() > 1e-10], truth[truth.abs() > 1e-10]
    y = TRUTH.get(layer.name, layer.plain)(x.double(), *layer.arguments).float()
    _, bits = outputs(layer, x)
    assert (slope_of(layer, y, bits) / truth - 1).abs().max() < 0.02


# --- What only a device can show.


@pytest.mark.gpu
@every_branch_layer
@every_kernel_dtype
def test_forward_and_backward_may_run_on_different_sides(layer, dtype):
    x = (torch.randn(10000, device="cuda") * 3).to(dtype).requires_grad_()
    y = layer.apply(x)
    (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    with use_reference():
        (expected,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, expected, rtol=EPSILON[dtype], atol=2e-5)


@pytest.mark.gpu
def test_float64_takes_the_reference_on_the_device():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64, device="cuda", requires_grad=True)
    (dx,) = torch.autograd.grad(inverted.gelu(x).sum(), x)
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(x).sum(), x)
    torch.testing.assert_close(dx, expected, rtol=1e-9, atol=1e-9)

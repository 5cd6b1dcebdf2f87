"""What few-bit activations promise beyond the contract of every layer (tests/test_contract.py)."""

import dataclasses
import itertools
import math

import pytest
import torch

from packlight.errors import InputError
from packlight.fewbit import activations, ops
from packlight.fewbit.codebook import default_codebook
from tests.fewbit.layers import CONTINUOUS, EXACT, LAYERS
from tests.helpers import EPSILON, crossing, every_dtype, gradient, kept_bytes, sample
from tests.layers import on_both_backends

every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)
every_layer_on_both = on_both_backends(LAYERS)
every_continuous_layer_on_both = on_both_backends(CONTINUOUS)


def derivative(layer, x, bits):
    """The coded derivative by the book, in float64."""
    book = default_codebook(layer.name, bits, layer.parameters)
    book = dataclasses.replace(book, borders=book.short_borders)
    return torch.from_numpy(book.derivative(x.double().numpy().ravel())).view(x.shape)


# --- 2: backward.


@pytest.mark.parametrize("layer", EXACT, ids=str)
@every_dtype
def test_exact_layers_have_torch_gradients(layer, dtype, backend):
    if backend == "kernel" and dtype == torch.float64:
        return  # kernels compute in fp32; float64 takes the reference
    x, dy = sample(7, 33, dtype=dtype), torch.randn(7, 33).to(dtype)
    _, dx = gradient(layer.apply, x, dy)
    _, expected = gradient(layer.torch, x, dy)
    torch.testing.assert_close(dx, expected, rtol=EPSILON[dtype] / 2, atol=0)


@pytest.mark.parametrize("bits", range(1, 9))
@every_continuous_layer_on_both
def test_continuous_layers_multiply_by_the_coded_derivative(layer, bits, backend):
    x, dy = sample(3, 71), torch.randn(3, 71)
    _, dx = gradient(lambda x: layer.apply(x, bits=bits), x, dy)
    torch.testing.assert_close(
        dx.double(), dy.double() * derivative(layer, x, bits), rtol=1e-6, atol=1e-9
    )


@every_continuous_layer_on_both
@every_dtype
def test_continuous_layers_in_every_dtype(layer, dtype, backend):
    if backend == "kernel" and dtype == torch.float64:
        return
    x, dy = sample(7, 33, dtype=dtype), torch.randn(7, 33).to(dtype)
    _, dx = gradient(layer.apply, x, dy)
    assert dx.dtype == dtype
    expected = dy.double() * derivative(layer, x, 3)
    torch.testing.assert_close(dx.double(), expected, rtol=EPSILON[dtype], atol=1e-7)


@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
def test_gradient_error_is_bounded_by_the_distance_to_the_levels(layer):
    x = torch.linspace(-9.99, 9.99, 4001, dtype=torch.float64)
    _, exact = gradient(layer.torch, x)
    errors = []
    for bits in range(1, 9):
        _, coded = gradient(lambda x, bits=bits: layer.apply(x, bits=bits), x)
        errors.append((coded - exact).square().mean().sqrt().item())
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[7] < 0.02 * errors[0]


# --- 4: what is kept.


@pytest.mark.parametrize("bits", range(1, 9))
@every_layer_on_both
def test_keeps_the_bits_and_nothing_else(layer, bits, backend):
    for shape in [(1,), (64,), (3, 41), (5, 8, 8)]:
        x = sample(*shape).requires_grad_()
        count, kept = x.numel(), kept_bytes(lambda x=x: layer.apply(x, bits=bits))
        assert kept == layer.packed_bytes(count, bits)
        assert kept <= layer.code_bits(bits) * count / 8 + 64


def test_module_keeps_what_its_bits_say():
    x = torch.randn(8, 64, requires_grad=True)
    layer = next(layer for layer in CONTINUOUS if layer.name == "gelu")
    assert kept_bytes(lambda: layer.make(bits=2)(x)) == 8 * 64 * 2 // 8 + 1


# --- 8: torch.compile and the operator checks.


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.1])
def test_codes_cross_to_the_compiled_backward(budget, fresh_compiler):
    """Under default settings the codes cross, and with a budget nothing larger than they."""

    def function(x, weight):
        h = x @ weight
        return next(layer for layer in LAYERS if layer.name == "gelu").apply(h, bits=2) * 3.0

    x = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(32, 48, requires_grad=True)
    with torch._functorch.config.patch(activation_memory_budget=budget):
        tensors = crossing(function, x, weight)
    hidden = [t for t in tensors if t.shape == (64, 48)][1:]  # the first is the output itself
    assert not hidden
    if budget == 1.0:
        assert any(t.dtype == torch.uint8 and t.numel() == 64 * 48 * 2 // 8 + 1 for t in tensors)
    (expected,) = torch.autograd.grad(function(x, weight).sum(), weight)
    assert torch.equal(weight.grad, expected)


@every_layer
def test_operators_pass_opcheck(layer):
    poison = activations.CONTINUOUS[layer.name].poison if layer.bits is None else 0
    borders, parity, bits = (), "none", layer.bits or 2
    if layer.bits is None:
        book = default_codebook(layer.name, bits, layer.parameters)
        borders, parity = book.short_borders, book.parity
    coding = (bits, list(borders), parity, 0.0, poison)
    for x in (
        sample(3, 7),
        sample(4, 6).t(),
        sample(2, 3, 4, 5).to(memory_format=torch.channels_last),
    ):
        arguments = (x, layer.name, list(layer.parameters), *coding)
        torch.library.opcheck(torch.ops.packlight.few_bit_activation.default, arguments)
        torch.library.opcheck(torch.ops.packlight.few_bit_activation_.default, arguments)
        torch.library.opcheck(
            torch.ops.packlight.few_bit_encode.default, (x, *coding, list(x.stride()))
        )
        codes = ops.encode(x, *coding, x.stride())
        levels = [0.1 * i for i in range(2**bits)]
        torch.library.opcheck(
            torch.ops.packlight.few_bit_backward.default,
            (x, codes, bits, levels, False, list(x.stride())),
        )


# --- 11: NaN and infinity.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
def test_nonfinite_inputs_are_never_silently_finite(layer, value, backend):
    x = torch.randn(70)
    x[33] = value
    y, dx = gradient(layer.apply, x)
    plain_y, plain = gradient(layer.torch, x.double())
    # torch's vectorised GELU gives NaN at infinity where its scalar one gives infinity.
    plain_y = layer.torch(x) if backend == "reference" else plain_y.float()
    torch.testing.assert_close(y, plain_y, rtol=1e-5, atol=1e-6, equal_nan=True)
    # torch's vectorised loops and its scalar tails disagree about NaN; any NaN in is NaN out here.
    if math.isnan(value) or not plain[33].isfinite():
        assert dx.isnan().all()
    else:
        assert dx.isfinite().all()


@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
def test_the_table_of_poisons_is_what_torch_does(layer):
    def scalar(x):
        return torch.stack([layer.torch(value.repeat(64))[0] for value in x])

    assert activations.nonfinite_derivative(scalar) == activations.CONTINUOUS[layer.name].poison


@every_layer_on_both
def test_nonfinite_gradients_pass(layer, backend):
    x = sample(64)
    dy = torch.ones(64)
    dy[20:40:3], dy[21:40:3], dy[22:40:3] = math.nan, math.inf, -math.inf
    _, dx = gradient(layer.apply, x, dy)
    _, expected = gradient(layer.torch, x, dy)
    if layer.bits is not None:
        torch.testing.assert_close(dx, expected, equal_nan=True)
    else:
        assert not dx[20:40].isfinite().any()
        assert dx[:20].isfinite().all()


@pytest.mark.parametrize("layer", EXACT, ids=str)
def test_exact_layers_at_infinity(layer, backend):
    x = torch.tensor([math.inf, -math.inf] * 40)
    y, dx = gradient(layer.apply, x)
    expected_y, expected = gradient(layer.torch, x)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(dx, expected)


# --- 12: what is refused.


@pytest.mark.parametrize("bits", [0, 9, -1, 2.0, True, "3", None])
@pytest.mark.parametrize("layer", CONTINUOUS, ids=str)
def test_wrong_bits_raise(layer, bits):
    with pytest.raises(InputError, match="not a whole number from 1 to 8"):
        layer.apply(sample(3).requires_grad_(), bits=bits)
    with pytest.raises(InputError, match="not a whole number from 1 to 8"):
        layer.make(bits=bits)

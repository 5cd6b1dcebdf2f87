"""Finite in, finite out; infinities where torch's derivative is finite; and their neighbours."""

import math

import pytest
import torch
import torch.nn.functional as F

import packlight
import packlight.groupquant as group_quant
from packlight import GroupQuant
from packlight._seeds import operands
from packlight.elementwise.limits import limits
from packlight.groupquant import gated_kernels, kernels, reference
from packlight.layers import functional
from tests.groupquant.layers import LAYERS
from tests.helpers import every_dtype, every_kernel_dtype

every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8])
PLAIN = ("", (), None, None)
SIZE = 64
FAR = (-math.inf, -1.0, 1.0, math.inf)  # 1: the greatest number of the dtype


# torch's vectorised GELU of the greatest float32 number is infinite on some processors.
GELU_OVERFLOWS = F.gelu(torch.full((64,), torch.finfo(torch.float32).max)).isinf().any().item()


def far_values(dtype):
    greatest = torch.finfo(dtype).max
    if dtype == torch.float32 and GELU_OVERFLOWS:
        greatest /= 2
    return [value * greatest if math.isfinite(value) else value for value in FAR]


def groups(dtype):
    """Ordinary values, off the kinks, each group but the first with one far value."""
    x = torch.rand(len(FAR) + 1, SIZE) * 2 + 0.4
    x *= torch.where(torch.rand_like(x) < 0.5, -1.0, 1.0)
    x = x.to(dtype)
    x[1:, 5] = torch.tensor(far_values(dtype), dtype=torch.float64).to(dtype)
    return x


def torch_gradient(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@every_dtype
def test_far_inputs_of_activations_have_the_gradient_of_torch(layer, dtype):
    """And their neighbours too, unless a reader may ask for a function as large as the input."""
    x = groups(dtype)
    y, expected = torch_gradient(layer.torch, x)
    f = (layer.name, layer.parameters)
    _, codes, scales = reference.activation(x.view(-1), *f, (8, SIZE), *operands(None))
    back = (codes, scales, *f, (1,), (8, SIZE))
    dx = reference.activation_backward(torch.ones_like(x).view(-1), *back).view_as(x)
    rebuild = (codes, scales, (x.numel(),), (1,), x.numel(), (8, SIZE), dtype)
    values = reference.dequantize(*rebuild, *f, None, None).view_as(x)
    tolerance = 0.6 if layer.name == "softsign" else 0.08
    for i, value in enumerate([0.0, *far_values(dtype)]):
        if not expected[i].isfinite().all():
            beyond = dtype == torch.float64 and layer.name == "relu_squared"  # past float32
            assert beyond or not dx[i, 5].isfinite()
            continue
        assert dx[i].isfinite().all()
        assert abs(dx[i, 5] - expected[i, 5]) < (0.08 if i == 0 else 2e-5 + 4e-3 * expected[i, 5])
        if math.isinf(value) or abs(y[i, 5]) < 1e3:
            assert (dx[i] - expected[i]).abs().max() < tolerance
        if math.isinf(value):
            assert values[i, 5].isfinite() == y[i, 5].isfinite()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_kernels_keep_far_inputs_as_the_reference_does(layer, dtype):
    x = groups(dtype).view(-1)
    f = (layer.name, layer.parameters)
    ours = kernels.activation(x, *f, (8, SIZE), *operands(None))[1:]
    theirs = reference.activation(x, *f, (8, SIZE), *operands(None))[1:]
    known, expected = [(pack[1] << 16).view(torch.float32).isfinite() for pack in (ours, theirs)]
    assert torch.equal(known, expected)
    assert torch.equal(ours[1][known], theirs[1][known])
    assert torch.equal(ours[0].view(-1, SIZE)[known], theirs[0].view(-1, SIZE)[known])
    dy = torch.ones_like(x)
    back = (*f, (1,), (8, SIZE))
    dx = kernels.activation_backward(dy, *theirs, *back)
    expected = reference.activation_backward(dy, *theirs, *back)
    torch.testing.assert_close(dx, expected, rtol=2e-3, atol=3e-4, equal_nan=True)
    rebuild = ((x.numel(),), (1,), x.numel(), (8, SIZE), dtype, *f, None, None)
    y, truth = kernels.dequantize(*theirs, *rebuild), reference.dequantize(*theirs, *rebuild)
    torch.testing.assert_close(y, truth, rtol=2e-3, atol=3e-4, equal_nan=True)


UNITS = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu": lambda gate, up: F.relu(gate) * up,
    "sigmoid": lambda gate, up: F.glu(torch.stack([up, gate]), 0)[0],
}


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [(reference, torch.float32), (reference, torch.float16), (gated_kernels, torch.float32)],
    ids=["reference, float32", "reference, float16", "kernel, float32"],
)
def test_far_gates_of_gated_units_have_the_gradient_of_torch(name, dtype, backend):
    gate, up = groups(dtype), torch.full((len(FAR) + 1, SIZE), 0.5, dtype=dtype)
    inputs = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    y = UNITS[name](*inputs)
    y.backward(torch.ones_like(y))
    arguments = (name, (8, SIZE), *operands(None))
    _, *packs = backend.gated(gate.view(-1), up.view(-1), *arguments)
    back = (name, (1,), (8, SIZE), True)
    ours = backend.gated_backward(torch.ones_like(gate).view(-1), *packs, *back)
    # NaN in the pack of the gate is NaN in both gradients.
    finite = [all(tensor.grad[i].isfinite().all() for tensor in inputs) for i in range(len(gate))]
    if name == "relu":
        finite[-1] = True  # of the gate's gradient
    for tensor, gradient in zip(inputs, ours, strict=True):
        expected, gradient = tensor.grad, gradient.view_as(gate)
        for i, value in enumerate([0.0, *far_values(dtype)]):
            assert expected[i, 5].isfinite() or not gradient[i, 5].isfinite()
            if finite[i] and expected[i].isfinite().all():
                assert gradient[i].isfinite().all()
                if value <= 0 or math.isinf(value):
                    assert (gradient[i] - expected[i]).abs().max() < 0.08
    shape = ((gate.numel(),), (1,))
    product = backend.gated_product(*packs, name, *shape, (8, SIZE), dtype).view_as(gate)
    assert (product[:, 5].isfinite() <= y[:, 5].isfinite()).all()


# --- Packs of tensors themselves.


def wide_groups(dtype):
    """Groups whose minimum, maximum or range overflows what scales hold."""
    info = torch.finfo(dtype)
    top, low = info.max, info.min
    halves = torch.linspace(-1, 1, SIZE, dtype=torch.float64) * info.max
    rows = [
        torch.linspace(low, 3.0, SIZE, dtype=torch.float64),
        torch.linspace(-3.0, top, SIZE, dtype=torch.float64),
        halves,
        torch.full((SIZE,), top, dtype=torch.float64),
        torch.full((SIZE,), low, dtype=torch.float64),
        torch.tensor([low, top] * (SIZE // 2), dtype=torch.float64),
        torch.tensor([low * 0.999, low] * (SIZE // 2), dtype=torch.float64),
        torch.tensor([low] + [0.5] * (SIZE - 1), dtype=torch.float64),
    ]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "kernel"])
@every_bits
@every_kernel_dtype
def test_finite_values_come_back_finite(backend, dtype, bits):
    x = wide_groups(dtype)
    assert x.isfinite().all()
    n, values = x.numel(), x.double()
    spread = values.amax(1, keepdim=True) - values.amin(1, keepdim=True)
    largest = values.abs().amax(1, keepdim=True)
    # A step, and the rounding of the scales: 8 bits.
    allowed = spread / (2**bits - 1) + (spread + largest) * 2.0**-7
    for seed in (None, torch.tensor([7])):
        pack = backend.quantize(x.view(-1), (1,), (bits, SIZE), *operands(seed))
        for back_dtype in {dtype, torch.bfloat16}:
            y = backend.dequantize(*pack, (n,), (1,), n, (bits, SIZE), back_dtype, *PLAIN)
            assert y.isfinite().all()
            assert ((y.view_as(x).double() - values).abs() <= allowed).all()
        theirs = reference.quantize(x.view(-1), (1,), (bits, SIZE), *operands(seed))
        assert all(torch.equal(a, b) for a, b in zip(pack, theirs, strict=True))


@pytest.mark.parametrize("backend", [reference, kernels], ids=["reference", "kernel"])
@every_bits
def test_wide_tensors_come_back_finite_in_float16(backend, bits):
    x = torch.linspace(-65500, 65500, SIZE)
    pack = backend.quantize(x, (1,), (bits, SIZE), *operands(None))
    y = backend.dequantize(*pack, (SIZE,), (1,), SIZE, (bits, SIZE), torch.float16, *PLAIN)
    assert y.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_dtype
def test_what_is_not_finite_comes_back_as_nan(dtype, value):
    x = torch.randn(SIZE).to(dtype)
    x[3] = value
    pack = reference.quantize(x, (1,), (4, SIZE), *operands(None))
    y = reference.dequantize(*pack, (SIZE,), (1,), SIZE, (4, SIZE), dtype, *PLAIN)
    assert y.isnan().all()


def test_float64_past_float32_comes_back_as_the_greatest():
    x = torch.tensor([1e300, -1e300, *[1.0] * 30], dtype=torch.float64)
    pack = reference.quantize(x, (1,), (8, 32), *operands(None))
    y = reference.dequantize(*pack, (32,), (1,), 32, (8, 32), torch.float64, *PLAIN)
    assert y.isfinite().all()
    assert y[0] > 3e38 > -3e38 > y[1]


@every_dtype
def test_a_linear_of_the_greatest_values_has_a_finite_weight_gradient(dtype):
    x = torch.randn(64, 128).to(dtype)
    x[0, 0], x[1, 1] = torch.finfo(torch.float16).max, torch.finfo(torch.float16).min
    layer = group_quant.Linear(128, 16).to(dtype)
    layer(x).float().mean().backward()
    assert layer.weight.grad.isfinite().all()


def test_limits_of_a_dtype_are_numbers_that_scales_hold():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        lowest = torch.tensor(limits(dtype).lowest)
        assert lowest.bfloat16().float() == lowest
        assert lowest.to(dtype).isfinite()


# ---- GELU at few bits ----------------------------------------------------------------------------

COARSE = {
    "minmax 4": GroupQuant(4, code="minmax"),
    "offset 3": GroupQuant(3, rounding="offset", code="minmax"),
    "rotated 4": GroupQuant(4, code="rotated"),
    "rotated 2": GroupQuant(2, code="rotated"),
}
every_coarse = pytest.mark.parametrize("method", COARSE.values(), ids=COARSE)


def gelu_gradient(layer, x):
    """The derivative that a layer has of each x."""
    own = x.clone().requires_grad_()
    layer(own).backward(torch.ones_like(x))
    return own.grad


@pytest.mark.parametrize("kernels", ["fused", "plain"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@every_coarse
def test_packs_of_a_gelu_end_at_minus_3(method, approximate, kernels, monkeypatch):
    """What lies below is kept as -3, so that a few far off take nothing from their group."""
    if kernels == "plain":
        monkeypatch.setattr(GroupQuant, "fused", {})
    x = torch.randn(64, 128)
    far = x.clone()
    far[:, ::16] = -4.5
    near = far.clamp(min=-3)

    def run(inputs):
        packlight.manual_seed(3)
        return gelu_gradient(lambda own: functional.gelu(own, approximate, method=method), inputs)

    assert torch.equal(run(far), run(near))


@every_coarse
def test_saving_ends_packs_of_a_gelu_at_minus_3(method):
    x = torch.randn(64, 128)
    x[:, ::16] = -4.5

    def run(inputs):
        packlight.manual_seed(3)
        with packlight.saving(method):
            return gelu_gradient(lambda own: F.gelu(own * 1.0), inputs)  # leaves stay exact

    assert torch.equal(run(x), run(x.clamp(min=-3)))

"""Fixed-point codes: the rule of the source, exact masks, kernels against the reference."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import packlight
from packlight.errors import DoubleBackwardError, InputError
from packlight.groupquant import FixedPoint, fixed_point
from packlight.groupquant.fixed_point import kernels, ops, reference
from packlight.groupquant.fixed_point.method import bin_width
from packlight.method import Method
from packlight.packing.layout import is_dense, packed_bytes
from packlight.packing.reference import unpack
from tests.helpers import (
    DTYPES,
    dtype_name,
    every_device,
    every_kernel_dtype,
    kept_bytes,
    relative_error,
)

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda x: torch.cat([x, x], 3)[..., ::2],
}
every_bits = pytest.mark.parametrize("bits", [4, 8])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.fixture(params=["reference", "kernel"])
def backend(request, monkeypatch):
    if request.param == "kernel":
        for name in ("batch_norm", "batch_norm_backward", "relu_backward", "rebuild"):
            monkeypatch.setattr(ops, name, getattr(kernels, name))
    return request.param


def codes_of(x, weight, bias, bits, batch_norm=reference.batch_norm, window=None, eps=1e-5):
    """y, the codes as a tensor like x, and the table."""
    width = bin_width(bits, window)
    y, packed, table = batch_norm(x, weight, bias, None, None, 0.1, eps, bits, width)
    codes = torch.empty_like(y, dtype=torch.uint8)
    codes.as_strided((y.numel(),), (1,)).copy_(unpack(packed, bits, y.numel()))
    return y, codes, table


def channels(values):
    return values.view(-1, 1, 1)


def loss(x, weight, bias, dy, norm, relu):
    y = relu(norm(x, None, None, weight, bias, True))
    return (y.float() * dy.float()).sum()


# --- The rule.


@every_bits
def test_codes_follow_the_source(bits):
    """Inside the window, for positive gamma, every code is that of the published formula.

    There 6 / K stands for the width of a bin.
    """
    count, width = 2**bits, bin_width(bits, None)
    x = torch.randn(8, 6, 20, 20, dtype=torch.float64)
    gamma = torch.tensor([1.0, 0.5, 2.0, 1.5, 0.1, 3.0], dtype=torch.float64)
    beta = gamma * torch.tensor([0.0, 0.3, -0.7, 1.9, -2.5, 2.4], dtype=torch.float64)
    _, codes, table = codes_of(x, gamma, beta, bits)
    x_hat = F.batch_norm(x, None, None, None, None, True, eps=1e-30)  # in units of its deviation
    gamma = gamma * F.batch_norm(x, None, None, None, None, True).std((0, 2, 3), correction=0)
    a = x_hat + channels(beta / gamma)
    shift = (count / 2 - (beta / gamma / width).floor()).clamp(min=1)
    expected = ((a - 1e-6) / width).floor() + channels(shift)
    # Rounding may move a value that lies on an edge.
    edge = ((a - 1e-6) / width - ((a - 1e-6) / width).round()).abs() < 1e-9
    assert torch.equal(table[reference.SHIFT], shift)
    assert ((codes == expected.clamp(0, count - 1)) | edge).all()
    a_rebuilt = (codes.double() - channels(shift) + 0.5) * width
    x_rebuilt = channels(table[reference.UNIT]) * (codes - channels(table[reference.CENTRE]))
    unit = table[reference.UNIT] / width
    torch.testing.assert_close(x_rebuilt / channels(unit), a_rebuilt - channels(beta / gamma))
    y_rebuilt = channels(table[reference.STEP]) * codes + channels(table[reference.LOW])
    torch.testing.assert_close(y_rebuilt, channels(gamma) * a_rebuilt)


def published(act, bias, bits):
    """Codes, mask and values of the source's `tf_quant(bits, act, bias)`, both over gamma."""
    nbins = 2**bits
    shift = torch.clamp(nbins // 2 - torch.floor(bias * nbins / 6.0), min=1.0)
    codes = torch.clamp(torch.floor((act - 1e-6) * nbins / 6.0) + shift, 0, nbins - 1)
    return codes, codes >= shift, (codes + (0.5 - shift)) * 6.0 / nbins


@every_bits
@pytest.mark.parametrize("seed", range(5))
def test_a_window_of_three_is_the_source(bits, seed, backend):
    """Code by code, mask by mask and value by value, with biases up to the window's last bin."""
    torch.manual_seed(seed)
    channels_, end = 24, 3 - 6 / 2**bits
    dtype = torch.float64 if backend == "reference" else torch.float32
    x = torch.randn(8, channels_, 12, 12, dtype=dtype) * 2 + 1
    gamma = torch.rand(channels_, dtype=dtype) + 0.2
    beta = gamma * (torch.rand(channels_, dtype=dtype) * 2 - 1) * end
    run = reference.batch_norm if backend == "reference" else kernels.batch_norm
    _, codes, table = codes_of(x, gamma, beta, bits, run, window=3, eps=1e-30)
    x_hat = F.batch_norm(x.double(), None, None, None, None, True, eps=1e-30)
    bias = channels(beta.double() / gamma.double())
    expected, mask, values = published(x_hat + bias, bias, bits)
    # Within a rounding of an edge of a bin, or of the 1e-6, either side is right.
    place = (x_hat + bias - 1e-6) * 2**bits / 6
    clear = ((place - place.round()).abs() > 1e-4) & ((x_hat + bias).abs() > 1e-5)
    assert clear.double().mean() > 0.999
    assert torch.equal(codes[clear], expected[clear].to(torch.uint8))
    assert torch.equal((codes >= channels(table[reference.SHIFT]))[clear], mask[clear])
    rebuilt = channels(table[reference.STEP]) * codes + channels(table[reference.LOW])
    error = rebuilt.double() / channels(gamma.double()) - values
    assert error[clear].abs().max() < 1e-5


@every_bits
def test_a_layer_keeps_by_the_window_that_it_is_given(bits):
    x = torch.randn(64, 3, 8, 8)
    dy = torch.randn_like(x)
    gradients = {}
    for window in (None, 3.0, 4.0, 8.0):
        layer = fixed_point.BatchNorm2d(3, bits=bits, window=window)
        converted = nn.Sequential(nn.BatchNorm2d(3))
        packlight.convert(converted, FixedPoint(bits, window=window))
        leaf = x.clone().requires_grad_()
        (gradients[window],) = torch.autograd.grad(layer(leaf), leaf, dy)
        assert torch.equal(gradients[window], torch.autograd.grad(converted(leaf), leaf, dy)[0])
    own = {4: 4.0, 8: 8.0}[bits]
    assert torch.equal(gradients[None], gradients[own])
    assert len({gradient.sum().item() for gradient in gradients.values()}) == 3


# gamma and beta: ordinary, negative, window at its ends and far outside, zero, tiny, huge.
CASES = {
    "plain": (1.0, 0.0),
    "negative gamma": (-0.7, 0.4),
    "negative both": (-2.0, -1.0),
    "bias at four sigma": (1.0, 4.0),
    "bias at minus four sigma": (1.0, -4.0),
    "bias at eight sigma": (1.0, 8.0),
    "bias far above": (1.0, 11.0),
    "bias far below": (-1.0, -11.0),
    "gamma zero": (0.0, 0.5),
    "gamma zero, bias negative": (0.0, -0.5),
    "both zero": (0.0, 0.0),
    "gamma minus zero": (-0.0, 0.0),
    "gamma tiny": (1e-30, 1.0),
    "gamma and bias tiny": (1e-30, -1e-30),
    "gamma denormal": (1e-42, 1.0),
    "huge": (1e4, 3e4),
}


@every_bits
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_case_of_gamma_and_beta(case, bits, backend):
    """The mask is exact, and x~ is within half a bin of x_hat wherever the window reaches."""
    count = 2**bits
    x = torch.randn(16, 1, 12, 12)
    gamma, beta = (torch.tensor([value]) for value in case)
    run = reference.batch_norm if backend == "reference" else kernels.batch_norm
    y, codes, table = codes_of(x, gamma, beta, bits, run)
    shift = table[reference.SHIFT]
    assert 1 <= shift <= count - 1
    assert torch.equal(codes >= channels(shift), y > 0)
    x_hat = F.batch_norm(x, None, None, None, None, True)
    x_rebuilt = channels(table[reference.UNIT]) * (codes - channels(table[reference.CENTRE]))
    half = bin_width(bits, None) / 2
    # The window's ends lie at whole bins of a, and one code may be set aside for a rare side of 0.
    sure = x_hat.abs() < count * half - 4 * half
    assert (x_rebuilt - x_hat).abs()[sure].max() <= half * (1 + 1e-3)
    packed = run(x, gamma, beta, None, None, 0.1, 1e-5, bits, 2 * half)[1]
    rebuilt = ops.rebuild(packed, table, y.shape, y.stride(), bits, torch.float32, True)
    assert not rebuilt[y <= 0].any()
    allowed = 2 * half * abs(case[0]) + 1e-6 * abs(case[1])
    assert (rebuilt - y.relu()).abs()[sure].max() <= allowed


@settings(max_examples=40)
@given(st.floats(-4, 4), st.floats(-20, 20), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_mask_is_exact_whatever_the_parameters(gamma, beta, dtype):
    x = torch.randn(4, 1, 8, 8).to(dtype)
    y, codes, table = codes_of(x, torch.tensor([gamma]), torch.tensor([beta]), 4)
    assert torch.equal(codes >= channels(table[reference.SHIFT]), y > 0)


# --- Forward and gradients.


@every_dtype
@every_layout
def test_forward_and_running_statistics_are_torch_s(dtype, layout):
    x = layout(torch.randn(4, 6, 5, 4).to(dtype)).requires_grad_()
    weight, bias = torch.randn(6), torch.randn(6)
    if dtype == torch.float64:
        weight, bias = weight.double(), bias.double()
    ours, plain = ((torch.zeros_like(weight), torch.ones_like(weight)) for _ in range(2))
    y = fixed_point.batch_norm(x, *ours, weight, bias, True, 0.3)
    expected = F.batch_norm(x, *plain, weight, bias, True, 0.3)
    if is_dense(x) and y.stride() == x.stride():
        assert torch.equal(y, expected)
        assert torch.equal(torch.stack(ours), torch.stack(plain))
    else:  # sums are of a copy that lies as the result does, in another order
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.stack(ours), torch.stack(plain))
    assert y.stride() == expected.stride()


@every_dtype
@every_bits
def test_gradients_are_those_of_the_formula(dtype, bits, backend):
    if backend == "kernel" and dtype == torch.float64:
        return  # kernels compute in fp32; float64 takes the reference
    x = (torch.randn(8, 5, 6, 7) * 2 + 1).to(dtype).requires_grad_()
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(5, dtype=kind).requires_grad_()
    bias = torch.randn(5, dtype=kind).requires_grad_()
    y = fixed_point.batch_norm(x, None, None, weight, bias, True, bits=bits)
    dy = torch.randn_like(y)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    _, codes, table = codes_of(x.detach(), weight.detach(), bias.detach(), bits)
    g = dy.double()
    x_rebuilt = channels(table[reference.UNIT]) * (codes - channels(table[reference.CENTRE]))
    x_rebuilt = x_rebuilt.double()
    var = x.detach().double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(dbias.double(), g.sum((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        dweight.double(), (g * x_rebuilt).sum((0, 2, 3)), rtol=1e-4, atol=1e-3
    )
    g = g * channels(weight.detach().double())
    mean = g.mean((0, 2, 3), keepdim=True)
    slope = (g * x_rebuilt).mean((0, 2, 3), keepdim=True)
    expected = (g - mean - x_rebuilt * slope) / channels((var + 1e-5).sqrt())
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(dx.double(), expected, rtol=tolerance, atol=tolerance)
    assert (dx.dtype, dweight.dtype) == (dtype, kind)


def test_gradients_approach_the_exact_ones():
    x = torch.randn(32, 4, 8, 8)
    dy = x + torch.randn_like(x)
    weight, bias = torch.tensor([1.0, -1.0, 0.5, 2.0]), torch.randn(4) / 2
    errors = {}
    for bits in (4, 8):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        norm = lambda *args, bits=bits: fixed_point.batch_norm(*args, bits=bits)  # noqa: E731
        ours = torch.autograd.grad(loss(*leaves, dy, norm, fixed_point.relu), leaves)
        exact = torch.autograd.grad(loss(*leaves, dy, F.batch_norm, F.relu), leaves)
        errors[bits] = [relative_error(a, b) for a, b in zip(ours, exact, strict=True)]
        torch.testing.assert_close(ours[2], exact[2])  # through the exact mask of the ReLU
    assert errors[4][0] < 0.1
    assert errors[4][1] < 0.03
    assert errors[8][0] < 0.3 * errors[4][0]


@pytest.mark.parametrize("inplace", [False, True])
@every_dtype
def test_relu_behind_batch_norm_is_exact(dtype, inplace, backend):
    if backend == "kernel" and dtype == torch.float64:
        return
    x = torch.randn(4, 3, 5, 6).to(dtype).requires_grad_()
    weight = torch.tensor([-1.0, 0.0, 2.0]).to(
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    bias = torch.tensor([0.5, 0.5, -8.0]).to(weight.dtype)
    y = fixed_point.batch_norm(x, None, None, weight, bias, True)
    before = y.detach().clone()
    y.register_hook(lambda g: seen.append(g))
    seen = []
    z = fixed_point.relu(y, inplace)
    assert torch.equal(z, before.relu())
    assert (z.data_ptr() == y.data_ptr()) == inplace
    dz = torch.randn_like(z)
    z.backward(dz)
    if not inplace:  # a hook of an overwritten tensor sees the gradient of its new value
        assert torch.equal(seen[0], torch.where(before > 0, dz, 0))


# --- What is kept, and when.


@every_bits
def test_keeps_codes_and_a_table(bits):
    x = torch.randn(8, 6, 9, 9, requires_grad=True)
    expected = packed_bytes(x.numel(), bits) + 6 * 6 * 4

    def both():
        return fixed_point.relu(fixed_point.batch_norm(x, None, None, training=True, bits=bits))

    assert kept_bytes(both) == expected


def test_plain_torch_where_nothing_is_won(monkeypatch):
    monkeypatch.setattr(ops, "batch_norm", None)
    mean, var = torch.zeros(3), torch.ones(3)
    x = torch.randn(32, 3)
    fixed_point.batch_norm(x, mean, var, training=True)
    assert mean.abs().sum() > 0
    fixed_point.batch_norm(x.requires_grad_(), mean, var)
    with torch.no_grad():
        fixed_point.batch_norm(x, mean, var, training=True)
    fixed_point.batch_norm(x[:15], mean, var, training=True)
    module = fixed_point.BatchNorm1d(3).eval()
    torch.autograd.grad(module(x).sum(), x, create_graph=True)


def test_only_parameters_need_gradients():
    x, weight = torch.randn(32, 3), torch.ones(3, requires_grad=True)
    y = fixed_point.batch_norm(x, None, None, weight, None, True, bits=8)
    y.square().sum().backward()
    assert weight.grad is not None


def test_backward_twice_and_second_derivative():
    x = torch.randn(32, 3, requires_grad=True)
    y = fixed_point.relu(fixed_point.batch_norm(x, None, None, training=True))
    first = torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0])
    with pytest.raises(DoubleBackwardError, match="fixed-point codes"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_parameters_may_change_before_the_backward_pass():
    x = torch.randn(32, 3, requires_grad=True)
    gradients = []
    for change in (False, True):
        weight, bias = torch.ones(3), torch.full((3,), 0.2)
        y = fixed_point.relu(fixed_point.batch_norm(x, None, None, weight, bias, True))
        if change:
            weight.neg_(), bias.neg_()
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_inputs_are_never_silently_finite(value, backend):
    x = torch.randn(8, 3, 4, 4)
    x[2, 1, 3, 3] = value
    leaves = [
        x.requires_grad_(),
        torch.randn(3, requires_grad=True),
        torch.randn(3, requires_grad=True),
    ]
    y = fixed_point.relu(fixed_point.batch_norm(leaves[0], None, None, *leaves[1:], training=True))
    assert y[:, 1].isnan().all()
    dx, dweight, _ = torch.autograd.grad(y.sum(), leaves)
    assert dx[:, 1].isnan().all()
    assert dweight[1].isnan()
    assert dx[:, ::2].isfinite().all()


def test_the_method_is_a_value():
    assert FixedPoint() == FixedPoint(bits=4) == Method.from_dict(FixedPoint().to_dict())
    for bits in (2, 3, 16, "4", True, None, 4.5):
        with pytest.raises(InputError, match="neither 4 nor 8"):
            FixedPoint(bits=bits)
    assert Method.from_dict(FixedPoint(8, window=3).to_dict()) == FixedPoint(8, window=3.0)
    for window in (0, -3.0, math.inf, math.nan):
        with pytest.raises(InputError, match="holds nothing"):
            FixedPoint(window=window)
    for window in ("3", True, [3]):
        with pytest.raises(InputError, match="no number of standard deviations"):
            FixedPoint(window=window)


def test_refusals():
    with pytest.raises(InputError, match="int64"):
        fixed_point.batch_norm(torch.zeros(32, 3, dtype=torch.int64), None, None, training=True)
    with pytest.raises(InputError, match="neither 4 nor 8"):
        fixed_point.batch_norm(torch.zeros(32, 3), None, None, training=True, bits=5)
    with pytest.raises(InputError, match="takes a tensor"):
        fixed_point.relu([1.0])
    with pytest.raises(ValueError, match="expected 4D input"):
        fixed_point.BatchNorm2d(3)(torch.randn(32, 3))


@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}]
)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_modules_are_drop_in(axes, options):
    name = f"BatchNorm{axes}d"
    plain = getattr(torch.nn, name)(4, **options)
    ours = getattr(fixed_point, name)(4, **options, bits=8, window=3)
    assert isinstance(ours, type(plain))
    ours.load_state_dict(plain.state_dict())
    ours = pickle.loads(pickle.dumps(ours))
    assert repr(ours) == repr(plain)[:-1] + ", bits=8, window=3)"
    for _ in range(3):
        x = torch.randn(
            32, 4, *[3] * (axes - 1) if axes > 1 else [], *[2] * (axes > 1), requires_grad=True
        )
        x = torch.randn(32, 4, *[3] * axes, requires_grad=True)
        assert torch.equal(ours(x), plain(x))
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.eval()(x), plain.eval()(x))


# --- Kernels and operators.


def compare_backward(dy, codes, table, stride, bits):
    """The kernels' gradients beside the formula in float64, sums by the size of their terms."""
    dx, dgamma, dbeta = kernels.batch_norm_backward(dy, codes, table, stride, bits)
    kept = (codes, table.double(), stride, bits)
    expected, dgamma_expected, dbeta_expected = reference.batch_norm_backward(dy.double(), *kept)
    terms = dy.double().abs().sum([i for i in range(dy.dim()) if i != 1])
    assert ((dbeta - dbeta_expected).abs() <= 1e-6 * terms + 1e-30).all()
    assert ((dgamma - dgamma_expected).abs() <= 4e-6 * terms + 1e-30).all()
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}.get(dy.dtype, 1.6e-2)
    torch.testing.assert_close(dx.double(), expected, rtol=tolerance, atol=tolerance)
    assert dx.dtype == dy.dtype
    assert dx.stride() == stride


@every_bits
@every_layout
@every_kernel_dtype
@every_device
def test_kernels_equal_the_reference(device, dtype, layout, bits):
    # Batches of 8 have all codes of a word in one channel; others have not.
    for shape in ((8, 16, 4, 4), (5, 7, 9, 3)):
        x = layout((torch.randn(shape, device=device) * 2 + 1).to(dtype))
        count = shape[1]
        weight, bias = torch.randn(2, count, device=device)
        weight[:2], bias[2], bias[3] = torch.tensor([0.0, 1e-30]), 100, -100
        running = [torch.zeros(count, device=device), torch.ones(count, device=device)]
        # On the CPU: for float16 in some layouts torch's CUDA statistics are those of float16.
        given = [tensor.cpu().clone() for tensor in (x, weight, bias, *running)]
        arguments = (0.1, 1e-5, bits, bin_width(bits, None))
        y, codes, table = kernels.batch_norm(x, weight, bias, *running, *arguments)
        made = reference.batch_norm(*given, *arguments)
        plain, expected, expected_table = (tensor.to(device) for tensor in made)
        for ours, theirs in zip(running, given[3:], strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(table, expected_table, rtol=1e-5, atol=1e-5)
        tolerance = {torch.float32: 2e-6, torch.float16: 1e-3}.get(dtype, 1e-2)
        # Where x - mean cancels, the last digit of x counts.
        torch.testing.assert_close(y, plain, rtol=tolerance, atol=tolerance)
        distance = unpack(codes, bits, x.numel()).int() - unpack(expected, bits, x.numel()).int()
        assert distance.abs().max() <= 1
        assert (distance != 0).sum() <= 2 + x.numel() * 1e-3
        dy = torch.randn_like(y)
        kept = (expected, expected_table, y.stride(), bits)
        compare_backward(dy, *kept)
        assert torch.equal(kernels.relu_backward(dy, *kept), reference.relu_backward(dy, *kept))
        for relu in (False, True):
            stored = (expected, expected_table, y.shape, y.stride(), bits, dtype, relu)
            a, b = kernels.rebuild(*stored), reference.rebuild(*stored)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-6)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


# Tiles that are whole or not, one or many, of one part or several.
SHAPES = {
    "two dimensions": lambda: torch.randn(300, 24),
    "two dimensions, ragged": lambda: torch.randn(77, 5),
    "two dimensions, transposed": lambda: torch.randn(24, 64).t(),
    "three dimensions": lambda: torch.randn(6, 3, 50),
    "five dimensions": lambda: torch.randn(2, 4, 3, 5, 6).to(memory_format=torch.channels_last_3d),
    "one channel": lambda: torch.randn(9, 1, 4, 4),
    "one channel of stride 1": lambda: channels_last(torch.randn(9, 1, 4, 4)),
    "one channel of stride 0": lambda: torch.randn(8, 1, 4, 4).as_strided(
        (8, 1, 4, 4), (16, 0, 4, 1)
    ),
    "many channels": lambda: channels_last(torch.randn(8, 200, 3, 3)),
    "many channels, contiguous": lambda: torch.randn(8, 70, 3, 3),
    "several parts": lambda: channels_last(torch.randn(32, 64, 12, 12)),
    "several parts, contiguous": lambda: torch.randn(64, 3, 40, 40),
    "several parts, ragged": lambda: channels_last(torch.randn(33, 48, 11, 13)),
    "several parts, ragged, contiguous": lambda: torch.randn(33, 3, 41, 43),
    "fewer elements than lanes": lambda: torch.randn(4, 4),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def check(x):
    """Statistics, codes and gradients of the kernels at 4 bits."""
    count = x.shape[1]
    weight, bias = torch.randn(2, count, device=x.device)
    running = [torch.zeros(count, device=x.device), torch.ones(count, device=x.device)]
    y, codes, table = kernels.batch_norm(x, weight, bias, *running, 1.0, 1e-5, 4, 0.5)
    others = [i for i in range(x.dim()) if i != 1]
    var, mean = torch.var_mean(x.double(), others)
    torch.testing.assert_close(running[0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running[1].double(), var, rtol=1e-6, atol=1e-30)
    shape = (-1, *[1] * (x.dim() - 2))
    deviation = (torch.var(x.double(), others, correction=0) + 1e-5).sqrt()
    expected = (x.double() - mean.view(shape)) / deviation.view(shape)
    expected = expected * weight.view(shape) + bias.view(shape)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3}.get(x.dtype, 1.6e-2)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    compare_backward(torch.randn_like(y) + 0.5, codes, table, y.stride(), 4)


@every_shape
@every_device
def test_kernels_of_every_shape(device, shape):
    check(shape().to(device))


@every_shape
def test_kernels_with_long_places(shape, monkeypatch):
    monkeypatch.setattr(kernels, "SHORT", 0)
    check(shape().bfloat16())


@every_device
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["contiguous", "last"])
def test_sums_of_many_values(device, layout):
    """Within 1e-5 of the sums in float64, of a few digits that cancel too."""
    side = 48 if device == "cpu" else 400  # the interpreter is slow
    x = layout(torch.randn(16, 2, side, side, device=device))
    y, codes, table = kernels.batch_norm(x, None, None, None, None, 0.1, 1e-5, 8, 1 / 16)
    for shift in (0.1, 1.0, 100.0):
        dy = y + shift
        _, *ours = kernels.batch_norm_backward(dy, codes, table, y.stride(), 8)
        kept = (codes, table.double(), y.stride(), 8)
        _, *theirs = reference.batch_norm_backward(dy.double(), *kept)
        torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-5, atol=shift)
        torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-5, atol=0)


@every_device
@pytest.mark.parametrize("layout", [lambda x: x, channels_last], ids=["contiguous", "last"])
def test_statistics_where_the_mean_is_large(device, layout):
    """What the rounding of x itself leaves, also behind a first value that lies far off."""
    x = torch.randn(16, 3, 64, 64) + 1000 * torch.arange(3).view(3, 1, 1)
    x[0, 2, 0, 0] = 1e5
    x = layout(x.to(device))
    running = [torch.zeros(3, device=device) for _ in range(2)]
    kernels.batch_norm(x, None, None, *running, 1.0, 1e-5, 4, 0.5)
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    torch.testing.assert_close(running[0].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running[1].double(), var, rtol=1e-5, atol=0)


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=dtype_name)
@pytest.mark.parametrize("given", ["mean", "var", "both"])
def test_running_statistics(device, dtype, given):
    x = torch.randn(40, 6, device=device) * 3 + 2
    spread = torch.rand(2, 6, 2, device=device).to(dtype)  # not contiguous, each of them
    ours, plain = ([t[:, 0] for t in values] for values in (spread.clone(), spread.clone()))
    kernels.batch_norm(
        x,
        None,
        None,
        None if given == "var" else ours[0],
        None if given == "mean" else ours[1],
        0.3,
        1e-5,
        4,
        0.5,
    )
    expected = [t.to(torch.float32, copy=True) for t in plain]
    F.batch_norm(x, *expected, training=True, momentum=0.3)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    for i, name in enumerate(("mean", "var")):
        target = expected[i].to(dtype) if given in (name, "both") else plain[i]
        torch.testing.assert_close(ours[i], target, rtol=tolerance, atol=tolerance)


@every_device
@every_layout
def test_nonfinite_gradients_stay_in_their_channel(device, layout):
    x = layout(torch.randn(8, 16, 4, 4, device=device))
    y, codes, table = kernels.batch_norm(x, None, None, None, None, 0.1, 1e-5, 4, 0.5)
    for value in (math.nan, math.inf):
        dy = torch.randn_like(y)
        dy[2, 3, 1, 1] = value
        dx, dgamma, dbeta = kernels.batch_norm_backward(dy, codes, table, y.stride(), 4)
        assert not dx[:, 3].isfinite().any()
        assert not dgamma[3].isfinite()
        assert not dbeta[3].isfinite()
        assert dx[:, :3].isfinite().all()
        assert dx[:, 4:].isfinite().all()


@every_device
def test_gradients_of_any_stride(device):
    x = channels_last(torch.randn(8, 16, 4, 4, device=device))
    y, codes, table = kernels.batch_norm(x, None, None, None, None, 0.1, 1e-5, 4, 0.5)
    for dy in (
        torch.randn(16, 1, 1, device=device).expand(8, 16, 4, 4),
        torch.randn(8, 16, 4, 4, device=device),
        torch.randn(8, 16, 4, 8, device=device)[..., ::2],
    ):
        compare_backward(dy, codes, table, y.stride(), 4)


@every_device
def test_empty_tensors(device):
    kept = (torch.zeros(0, dtype=torch.uint8, device=device), torch.zeros(6, 3, device=device))
    dy = torch.zeros(0, 3, 4, 4, device=device)
    dx, dgamma, dbeta = kernels.batch_norm_backward(dy, *kept, dy.stride(), 4)
    assert dx.shape == dy.shape
    assert not dgamma.any()
    assert not dbeta.any()


@pytest.mark.usefixtures("collected")
@pytest.mark.gpu
def test_captured_in_a_graph():
    x = channels_last(torch.randn(8, 16, 8, 8, device="cuda"))
    running = [torch.zeros(16, device="cuda"), torch.ones(16, device="cuda")]

    def step():
        y, codes, table = kernels.batch_norm(x, None, None, *running, 0.1, 1e-5, 4, 0.5)
        return kernels.batch_norm_backward(x, codes, table, y.stride(), 4)[0]

    expected = step()
    after_one = [t.clone() for t in running]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dx = step()
    running[0].zero_(), running[1].fill_(1)
    graph.replay()
    assert torch.equal(dx, expected)
    assert torch.equal(torch.stack(running), torch.stack(after_one))


def test_opcheck():
    operators = torch.ops.packlight
    for x in (
        torch.randn(4, 3, 5, 5),
        torch.randn(32, 3),
        LAYOUTS["channels-last"](torch.randn(4, 3, 5, 5)),
    ):
        running = (torch.zeros(3), torch.ones(3))
        forward = (x, torch.ones(3), torch.zeros(3), *running, 0.1, 1e-5, 4, 0.5)
        torch.library.opcheck(operators.fixed_point_batch_norm.default, forward)
        forward = (x, None, None, None, None, 0.1, 1e-5, 4, 0.5)
        torch.library.opcheck(operators.fixed_point_batch_norm.default, forward)
        y, codes, table = operators.fixed_point_batch_norm(*forward)
        kept = (y, codes, table, list(y.stride()), 4)
        torch.library.opcheck(
            operators.fixed_point_batch_norm_backward.default, (*kept, False, None)
        )
        torch.library.opcheck(operators.fixed_point_relu_backward.default, kept)
        stored = (codes, table, list(y.shape), list(y.stride()), 4, torch.float32, True)
        torch.library.opcheck(operators.fixed_point_rebuild.default, stored)


@every_device
def test_parts_of_a_few_channels_side_by_side_stay_apart(device):
    """A tile is wider than the channels are, and several parts lie after each other."""
    x = torch.randn(11, 5, 10, 10, device=device).contiguous(memory_format=torch.channels_last)
    weight, bias = (torch.randn(5, device=device) for _ in range(2))
    arguments = (x, weight, bias, None, None, 0.1, 1e-5, 4, 0.5)
    _, codes, table = kernels.batch_norm(*arguments)
    torch.testing.assert_close(table, reference.batch_norm(*arguments)[2], rtol=1e-4, atol=1e-4)
    backward = (torch.randn_like(x), codes, table, x.stride(), 4)
    for ours, theirs in zip(
        kernels.batch_norm_backward(*backward),
        reference.batch_norm_backward(*backward),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)

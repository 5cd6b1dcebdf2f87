"""Convolutions that keep a pack of their input, against torch's own."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from packlight import groupquant
from packlight.errors import DoubleBackwardError, InputError
from tests.helpers import DTYPES, dtype_name, kept_bytes, pack_bytes

# Said by torch's own convolution, once.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


# Long enough for a pack to be worth it.
SIZE = {1: 80, 2: 8, 3: 8}


def gradients(function, x, weight, bias, *arguments, dy=None, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = function(*leaves, *arguments, **options)
    dy = torch.ones_like(y) if dy is None else dy
    return y.detach(), torch.autograd.grad(y, leaves, dy)


def compare(name, x, weight, bias, *arguments):
    """Forward, input and bias gradients are torch's; the weight's is that of the rebuilt input."""
    ours, plain = getattr(groupquant, name), getattr(F, name)
    dy = torch.randn_like(plain(x, weight, bias, *arguments))
    expected, exact = gradients(plain, x, weight, bias, *arguments, dy=dy)
    y, packed = gradients(ours, x, weight, bias, *arguments, dy=dy, bits=8, rounding="nearest")
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}.get(x.dtype, 2e-2)
    torch.testing.assert_close(packed[0], exact[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(packed[2], exact[2], rtol=tolerance, atol=tolerance)
    assert [g.dtype for g in packed] == [x.dtype, weight.dtype, bias.dtype]
    size = exact[1].abs().max() + dy.abs().sum().sqrt()
    assert (packed[1] - exact[1]).abs().max() <= 0.05 * size
    return packed


@settings(max_examples=30)
@given(st.data())
def test_equals_torch(data):
    axes = data.draw(st.integers(1, 3), "axes")
    groups = data.draw(st.sampled_from([1, 2]), "groups")
    kernel = [data.draw(st.integers(1, 3)) for _ in range(axes)]
    stride = data.draw(st.one_of(st.integers(1, 2), st.tuples(*[st.integers(1, 3)] * axes)))
    dilation = data.draw(st.integers(1, 2), "dilation")
    padding: int | str = data.draw(st.sampled_from([0, 1, 2, "same", "valid"]), "padding")
    if padding == "same":
        stride = 1
    batch = data.draw(st.sampled_from([(2,), ()]), "batch")
    x = torch.randn(*batch, 4, *[SIZE[axes]] * axes)
    weight, bias = torch.randn(6, 4 // groups, *kernel), torch.randn(6)
    compare(f"conv{axes}d", x, weight, bias, stride, padding, dilation, groups)
    if isinstance(padding, str):
        return
    output = data.draw(st.integers(0, 1), "output_padding")
    steps = (stride,) if isinstance(stride, int) else stride
    if output >= max(dilation, min(steps)):
        output = 0
    weight, bias = torch.randn(4, 3, *kernel), torch.randn(3 * groups)
    arguments = (stride, min(padding, min(kernel) - 1), output, groups, dilation)
    compare(f"conv_transpose{axes}d", x, weight, bias, *arguments)


@every_dtype
def test_in_every_dtype(dtype):
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((2, 3, 9, 9), (4, 3, 3, 3), (4,)))
    compare("conv2d", x, weight, bias, 2, 1)


@pytest.mark.parametrize("axes", [2, 3])
def test_channels_last_stays(axes):
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[axes]
    x = torch.randn(2, 8, *[6] * axes).to(memory_format=layout)
    weight = torch.randn(4, 8, *[3] * axes).to(memory_format=layout)
    dx, dweight, _ = compare(f"conv{axes}d", x, weight, torch.randn(4))
    assert dx.is_contiguous(memory_format=layout)
    assert dweight.is_contiguous(memory_format=layout)


def test_weight_gradient_is_unbiased():
    x, weight, bias = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3), torch.randn(4)
    dy = torch.randn(2, 4, 7, 7)
    _, exact = gradients(F.conv2d, x, weight, bias, dy=dy)
    draws = torch.stack(
        [gradients(groupquant.conv2d, x, weight, bias, dy=dy, bits=2)[1][1] for _ in range(150)]
    )
    error = (draws.mean(0) - exact[1]) / (draws.std(0) / math.sqrt(150))
    assert draws.std(0).min() > 0
    assert error.square().mean() < 1.5


# --- What is kept, and when.


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (4, 128), (8, 32)])
def test_keeps_a_pack_and_the_weight(bits, group_size):
    x = torch.randn(2, 6, 17, 17, requires_grad=True)
    weight = torch.randn(4, 6, 3, 3, requires_grad=True)
    method = {"bits": bits, "group_size": group_size}
    kept = kept_bytes(lambda: groupquant.conv2d(x, weight, **method))
    assert kept == pack_bytes(x.numel(), bits, group_size) + weight.nbytes


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("padding", [1, "same"])
def test_padding_modes(mode, axes, padding):
    """The unpadded input is packed, and its gradient is exact."""
    kind = f"Conv{axes}d"
    plain = getattr(nn, kind)(4, 6, 4, padding=padding, padding_mode=mode)
    ours = getattr(groupquant, kind)(4, 6, 4, padding=padding, padding_mode=mode, bits=8)
    ours.load_state_dict(plain.state_dict())
    for shape in ((3, 4, *[SIZE[axes]] * axes), (4, *[SIZE[axes]] * axes)):
        x = torch.randn(shape, requires_grad=True)
        y, expected = ours(x), plain(x)
        assert torch.equal(y, expected)
        dy = torch.randn_like(y)
        wanted = (x, ours.weight), (x, plain.weight)
        (dx, dweight), (exact, near) = (
            torch.autograd.grad(output, tensors, dy)
            for output, tensors in zip((y, expected), wanted, strict=True)
        )
        torch.testing.assert_close(dx, exact, rtol=1e-4, atol=1e-5)
        assert (dweight - near).norm() < 0.02 * near.norm()
    x = torch.randn(2, 4, *[SIZE[axes]] * axes, requires_grad=True)
    assert kept_bytes(lambda: ours(x)) == pack_bytes(x.numel(), 8) + ours.weight.nbytes
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    ours.weight.requires_grad_(False)
    assert torch.equal(ours(x), plain(x))
    for_shape = x.nbytes if mode in ("reflect", "replicate") else 0  # as torch keeps it
    assert kept_bytes(lambda: ours(x)) + for_shape == kept_bytes(lambda: plain(x))


def test_plain_torch_where_nothing_is_won():
    x, weight = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(4, 3, 3, 3)
    y = groupquant.conv2d(x, weight)  # the input's gradient needs no input
    torch.autograd.grad(y.sum(), x, create_graph=True)
    with torch.no_grad():
        assert not groupquant.conv2d(x, weight.requires_grad_()).requires_grad
    module = groupquant.Conv2d(3, 4, 3).eval()
    torch.autograd.grad(module(x).square().sum(), x, create_graph=True)


def test_only_the_weight_needs_a_gradient():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    y = groupquant.conv2d(x, weight, bits=8)
    y.sum().backward(retain_graph=True)
    first = weight.grad.clone()
    y.sum().backward()
    assert torch.equal(weight.grad, 2 * first)
    loss = groupquant.conv2d(x, weight).sum()
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(loss, weight, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_autocast(dtype):
    x = torch.randn(2, 8, 8, 8).to(dtype).requires_grad_()
    plain, ours = nn.Conv2d(8, 4, 3), groupquant.Conv2d(8, 4, 3, bits=8)
    ours.load_state_dict(plain.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), plain(x)
        kept = kept_bytes(lambda: ours(x))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert kept == pack_bytes(x.numel(), 8) + ours.weight.nbytes
    dx, dweight = torch.autograd.grad(y.sum(), (x, ours.weight))
    exact, near = torch.autograd.grad(expected.sum(), (x, plain.weight))
    assert (dx.dtype, dweight.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(dx, exact, rtol=2e-2, atol=2e-2)
    assert (dweight - near).norm() < 0.02 * near.norm()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_inputs_are_never_silently_finite(value):
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    x[1, 1, 4, 4] = value
    (dweight,) = torch.autograd.grad(groupquant.conv2d(x, weight).sum(), weight)
    assert not dweight[:, 1, 1, 1].isfinite().any()


# --- Modules.


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_modules_are_drop_in(kind, axes):
    arguments, options = (4, 6, 3, 2), {"padding": 1, "groups": 2, "bias": False}
    name = f"{kind}{axes}d"
    plain = getattr(nn, name)(*arguments, **options)
    ours = getattr(groupquant, name)(*arguments, **options, bits=8, group_size=64)
    assert isinstance(ours, type(plain))
    ours.load_state_dict(plain.state_dict())
    ours = pickle.loads(pickle.dumps(ours))
    shown = ", bits=8, group_size=64, rounding=stochastic, code=minmax)"
    assert repr(ours) == repr(plain)[:-1] + shown
    x = torch.randn(2, 4, *[SIZE[axes]] * axes, requires_grad=True)
    assert torch.equal(ours(x), plain(x))
    assert kept_bytes(lambda: ours(x)) == pack_bytes(x.numel(), 8, 64) + ours.weight.nbytes
    if kind == "ConvTranspose":
        size = [2 * SIZE[axes]] * axes
        assert torch.equal(ours(x, output_size=size), plain(x, output_size=size))
    assert kept_bytes(lambda: ours.eval()(x)) == x.nbytes + ours.weight.nbytes


def test_refusals():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    with pytest.raises(InputError, match="3 or 4 dimensions"):
        groupquant.conv2d(x[0, 0], weight)
    with pytest.raises(InputError, match="weight of 4 dimensions"):
        groupquant.conv2d(x, weight[0])
    with pytest.raises(InputError, match="the input has 3 channels"):
        groupquant.conv2d(x, weight, groups=2)
    with pytest.raises(InputError, match="one or 2 are expected"):
        groupquant.conv2d(x, weight, stride=(1, 1, 1))
    with pytest.raises(InputError, match="neither a whole number"):
        groupquant.conv2d(x, weight, stride=1.5)
    with pytest.raises(InputError, match='"same" or "valid"'):
        groupquant.conv2d(x, weight, padding="full")
    with pytest.raises(InputError, match="needs stride 1"):
        groupquant.conv2d(x, weight, stride=2, padding="same")
    with pytest.raises(InputError, match="not 2, 3, 4 or 8"):
        groupquant.conv2d(x, weight, bits=5)
    with pytest.raises(InputError, match="int64"):
        groupquant.conv2d(x.detach().long(), weight)

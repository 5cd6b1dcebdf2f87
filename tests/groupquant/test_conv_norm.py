"""A convolution, its batch norm and ReLU as one function: operators, and the function itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight import DoubleBackwardError, GroupQuant, ModifiedWeightError
from packlight.groupquant import fixed_point
from packlight.groupquant.fixed_point import kernels, ops, reference
from packlight.groupquant.fixed_point.conv_norm import conv_norm, geometry_of
from packlight.groupquant.fixed_point.method import bin_width
from packlight.groupquant.fixed_point.relu import relu
from packlight.groupquant.fixed_point.residual import add_
from packlight.layers import convolution
from packlight.layers.convolution import CONVOLUTIONS
from packlight.packing.reference import unpack
from packlight.quantiser import pack_input
from tests.helpers import every_device, every_kernel_dtype, peak_bytes, relative_error

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
}
every_bits = pytest.mark.parametrize("bits", [4, 8])
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
# Whole words of one channel; words across channels, and a tail.
SHAPES = [(4, 16, 4, 4), (3, 5, 7, 3)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
METHOD = GroupQuant(bits=8, group_size=32, rounding="nearest")


def arguments(shape, dtype, layout, device="cpu"):
    """Of the operator of a batch norm, but for the bits; the other term of a sum; a gradient."""
    torch.manual_seed(sum(shape))
    x, other, dy = (layout(torch.randn(shape, device=device) * 2 + 1).to(dtype) for _ in range(3))
    channels = shape[1]
    weight = torch.rand(channels, device=device) + 0.5
    weight[1::2] *= -1
    bias = torch.randn(channels, device=device)
    running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    return (x, weight, bias, *running, 0.1, 1e-5), other - 1, dy


def mask_of(signs, like):
    mask = torch.empty_like(like, dtype=torch.uint8)
    mask.as_strided((mask.numel(),), (1,)).copy_(unpack(signs, 1, mask.numel()))
    return mask != 0


# --- The operators.


def in_place(function, given, *rest):
    """What is written over the first argument, and the results."""
    x, *others = given
    y = x.clone(memory_format=torch.preserve_format)
    return y, *function(y, *others, *rest)


@every_device
@every_kernel_dtype
@every_layout
@every_shape
@every_bits
def test_a_batch_norm_with_its_relu_is_the_two_of_them(bits, shape, layout, dtype, device):
    given, _, dy = arguments(shape, dtype, layout, device)
    for side in (reference, kernels):
        numbers = (bits, bin_width(bits, None))
        y, codes, table = side.batch_norm(*given, *numbers)
        for act in (False, True):
            z, others, again = in_place(side.batch_norm_, given, *numbers, act)
            assert torch.equal(z, y.relu() if act else y)
            assert torch.equal(codes, others)
            assert torch.equal(table, again)
        layout_of = (y.stride(), bits)
        expected = side.batch_norm_backward(
            side.relu_backward(dy, codes, table, *layout_of), codes, table, *layout_of
        )
        found = side.batch_norm_backward(dy, codes, table, *layout_of, True)
        for a, b in zip(found, expected, strict=True):
            assert a.stride() == b.stride()
            assert relative_error(a, b) < 1e-6


@every_device
@every_kernel_dtype
@every_layout
@every_shape
@every_bits
def test_a_sum_with_its_relu(bits, shape, layout, dtype, device):
    given, other, dy = arguments(shape, dtype, layout, device)
    for side in (reference, kernels):
        numbers = (bits, bin_width(bits, None))
        y, codes, table = side.batch_norm(*given, *numbers)
        z, others, again, signs = in_place(side.batch_norm_sum_, given, *numbers, other)
        expected = (y + other).relu()
        if side is kernels and dtype == torch.bfloat16 and device == "cpu":
            # The interpreter truncates where the device rounds.
            assert relative_error(z, expected) < 1e-2
        else:
            assert torch.equal(z, expected)
        assert torch.equal(codes, others)
        assert torch.equal(table, again)
        assert torch.equal(mask_of(signs, z), z > 0)
        layout_of = (y.stride(), bits)
        found = side.batch_norm_backward(dy, codes, table, *layout_of, False, signs)
        g = torch.where(z > 0, dy, 0.0)
        expected = side.batch_norm_backward(g, codes, table, *layout_of)
        for a, b in zip(found, expected, strict=True):
            assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("side", [reference, kernels], ids=["reference", "kernel"])
def test_what_is_not_dense_and_of_another_dtype(side):
    given, other, _ = arguments((4, 16, 4, 4), torch.float16, lambda x: x)
    x, *rest = given
    numbers, wide = (4, bin_width(4, None)), torch.cat([x, x], 3)
    expected = in_place(side.batch_norm_sum_, given, *numbers, other.float())
    view = wide[..., ::2]
    view.copy_(x)
    found = side.batch_norm_sum_(view, *rest, *numbers, other.float())
    assert torch.equal(wide[..., 1::2], torch.cat([x, x], 3)[..., 1::2])
    for a, b in zip((view, *found), expected, strict=True):
        torch.testing.assert_close(a, b)
    y, *_ = side.batch_norm(*given, *numbers)
    # Added in place, as torch does.
    torch.testing.assert_close(view, y.add_(other.float()).relu_())


@every_bits
@pytest.mark.parametrize("side", [reference, kernels], ids=["reference", "kernel"])
def test_what_is_not_a_number_has_a_gradient(side, bits):
    """As in torch, whose ReLU lets a NaN and its gradient through."""
    given, other, dy = arguments((4, 16, 4, 4), torch.float32, lambda x: x)
    other[0, 0, 0, 0] = float("nan")
    given[0][0, 3] = float("nan")
    numbers = (bits, bin_width(bits, None))
    y, *_ = in_place(side.batch_norm_, given, *numbers, True)
    assert y[:, 3].isnan().all()
    y, codes, table, signs = in_place(side.batch_norm_sum_, given, *numbers, other)
    assert y[0, 0, 0, 0].isnan()
    assert y[:, 3].isnan().all()
    mask = mask_of(signs, y)
    assert mask[0, 0, 0, 0]
    assert mask[:, 3].all()
    dx, *_ = side.batch_norm_backward(dy, codes, table, y.stride(), bits, False, signs)
    assert dx[:, 3].isnan().all()


@every_device
def test_operators_are_registered_as_they_are(device):
    given, other, dy = arguments((4, 16, 4, 4), torch.float32, lambda x: x, device)
    numbers = (4, bin_width(4, None))
    operators = torch.ops.packlight
    y, codes, table, signs = in_place(ops.batch_norm_sum_, given, *numbers, other)
    layout = (list(y.stride()), 4)
    for operator, operands in (
        (operators.fixed_point_batch_norm_.default, (*given, *numbers, True)),
        (operators.fixed_point_batch_norm_sum_.default, (*given, *numbers, other)),
        (
            operators.fixed_point_batch_norm_backward.default,
            (dy, codes, table, *layout, True, None),
        ),
        (
            operators.fixed_point_batch_norm_backward.default,
            (dy, codes, table, *layout, False, signs),
        ),
    ):
        torch.library.opcheck(operator, operands)


# --- The function.

WINDOW = ((2, 2), (1, 1), (1, 1))  # stride, padding, dilation


def tensors(dtype=torch.float32, groups=1, device="cpu"):
    """x, weight, bias, gamma, beta and the other term."""
    torch.manual_seed(0)
    shapes = [(4, 8, 12, 12), (16, 8 // groups, 3, 3), (16,), (16,), (16,), (4, 16, 6, 6)]
    found = [torch.randn(shape, device=device) for shape in shapes]
    found[1] *= 0.2
    found[3] = found[3].abs() + 0.5
    found = [each.contiguous(memory_format=torch.channels_last) if each.dim() == 4 else each
             for each in found]  # fmt: skip
    return [each.to(dtype).requires_grad_() for each in found]


def at_once(given, act, groups=1, summed=False, bits=4):
    x, weight, bias, gamma, beta, other = given
    geometry, shape = geometry_of(x.shape, weight.shape, *WINDOW, groups)
    settings = (None, None, 0.1, 1e-5, bits, bin_width(bits, None))
    term = (other, None) if summed else None
    layer = (weight, bias, geometry)
    y, _ = conv_norm(x, pack_input(x, METHOD), layer, (gamma, beta), settings, act, term)
    assert tuple(y.shape) == shape
    return y


def one_by_one(given, act, groups=1, summed=False, bits=4):
    x, weight, bias, gamma, beta, other = given
    y = CONVOLUTIONS[2](x, weight, bias, *WINDOW, groups, method=METHOD)
    y = fixed_point.batch_norm(y, None, None, gamma, beta, True, bits=bits)
    y = add_(y, other) if summed else y
    return relu(y) if act or summed else y


def results(function, given, autocast=False, **options):
    with torch.autocast(given[0].device.type, torch.bfloat16, enabled=autocast):
        y = function(given, **options)
    wanted = given if options["summed"] else given[:5]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return y.detach(), torch.autograd.grad(y, wanted, dy)


FORMS = {"norm": (False, False), "relu": (True, False), "sum": (True, True)}


@every_device
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_function_is_its_layers_one_by_one(dtype, autocast, groups, form, device):
    act, summed = FORMS[form]
    options = {"act": act, "groups": groups, "summed": summed}
    y, gradients = results(at_once, tensors(dtype, groups, device), autocast, **options)
    expected, others = results(one_by_one, tensors(dtype, groups, device), autocast, **options)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    exact = dtype == torch.float64 or (dtype == torch.float32 and not autocast)
    for a, b, of in zip(gradients, others, tensors(dtype), strict=False):
        assert a.dtype == b.dtype == of.dtype
        # The bias before a batch norm has no gradient but rounding.
        rounding = (1e-3 if exact else 0.3) * (of.dim() == 1)
        assert (a - b).norm() <= (1e-4 if exact else 3e-2) * b.norm() + rounding


@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_that_are_asked_for(form):
    act, summed = FORMS[form]
    every = tensors()
    y, expected = results(at_once, every, act=act, summed=summed)
    for left_out in (0, 2, 3, 4, 5)[: 5 if summed else 4]:
        given = tensors()
        given[left_out].requires_grad_(False)
        y = at_once(given, act, summed=summed)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        for index, of in enumerate(given[: 6 if summed else 5]):
            if index == left_out:
                assert of.grad is None
            else:
                assert torch.equal(of.grad, expected[index])


def test_a_norm_without_parameters_and_a_convolution_without_bias():
    x, weight, *_ = tensors()
    y = at_once([x, weight, None, None, None, None], True)
    plain = F.batch_norm(F.conv2d(x, weight, None, *WINDOW), None, None, training=True).relu()
    assert torch.equal(y, plain)
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize("form", FORMS)
def test_bytes(form):
    act, summed = FORMS[form]
    given = tensors()
    count = 4 * 16 * 6 * 6
    x = given[0]
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        at_once(given, act, summed=summed)
    pack_of_x = pack_input(x, METHOD).tensors
    sizes = sorted(each.nbytes for each in kept)
    table = 6 * 16 * 4
    expected = [given[1].nbytes, packlight.packing.layout.packed_bytes(count, 4), table]
    expected += [each.nbytes for each in pack_of_x]
    if summed:
        expected.append(packlight.packing.layout.packed_bytes(count, 1))
    assert sizes == sorted(expected)


def test_errors():
    given = tensors()
    y = at_once(given, True, summed=True)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(y.sum(), given[:2], create_graph=True)
    y = at_once(given, True, summed=True)
    with torch.no_grad():
        given[1].mul_(2)
    with pytest.raises(ModifiedWeightError):
        y.sum().backward()


def test_what_does_not_fit_has_no_geometry():
    assert geometry_of(torch.Size((2, 8, 4, 4)), torch.Size((4, 7, 3, 3)), *WINDOW, 1) is None
    assert geometry_of(torch.Size((2, 8, 4)), torch.Size((4, 8, 3, 3)), *WINDOW, 1) is None
    # Three values a channel are no batch.
    assert geometry_of(torch.Size((3, 8, 2, 2)), torch.Size((4, 8, 3, 3)), *WINDOW, 1) is None
    assert geometry_of(torch.Size((16, 8, 2, 2)), torch.Size((4, 8, 3, 3)), *WINDOW, 1) is not None
    big = torch.Size((9, 8, 9, 9))  # larger than the padded input
    assert geometry_of(torch.Size((16, 8, 2, 2)), big, *WINDOW, 1) is None


@pytest.mark.parametrize("window", [((1, 1), (0, 0), (1, 1)), ((2, 1), (3, 0), (1, 2))])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_shape_of_the_output_is_torchs(window, groups):
    x, weight = torch.randn(16, 4, 11, 9), torch.randn(6, 4 // groups, 3, 2)
    _, shape = geometry_of(x.shape, weight.shape, *window, groups)
    assert shape == tuple(F.conv2d(x, weight, None, *window, groups).shape)


# --- Large inputs of convolutions.

WINDOWS = {
    "one": (1, {}),
    "two": (2, {"stride": 2, "padding": 1, "dilation": 2}),
    "three": (3, {"padding": 1}),
    "groups": (2, {"groups": 4}),
    "depthwise": (2, {"groups": 8, "padding": 1}),
    "pointwise": (2, {"kernel_size": 1}),
}


@every_device
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_large_input_is_freed_before_its_gradient_is_made(
    window, transposed, last, device, monkeypatch
):
    """The second operator does not take the input: a convolution the other way."""
    axes, options = WINDOWS[window]
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{axes}d")
    layer = kind(8, 16, **{"kernel_size": 3} | options)
    packlight.convert(layer, METHOD)
    layer.to(device)
    x = torch.randn(4, 8, *(9,) * axes, device=device)
    if last and axes > 1:
        layout = torch.channels_last if axes == 2 else torch.channels_last_3d
        layer, x = layer.to(memory_format=layout), x.to(memory_format=layout)
    found = []
    for large in (2**40, 0):
        monkeypatch.setattr(convolution, "LARGE", large)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        masks = []
        of_torch, convolve = convolution._backward, torch.convolution

        def noting(*args, masks=masks, of_torch=of_torch):
            masks.append(tuple(args[-1]))
            return of_torch(*args)

        def noting_other(*args, masks=masks, convolve=convolve):
            masks.append(args[6])
            return convolve(*args)

        with monkeypatch.context() as patch:
            patch.setattr(convolution, "_backward", noting)
            patch.setattr(torch, "convolution", noting_other)
            y = layer(leaf)
            y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
        at_once = large or layer.groups > 1
        assert masks == ([(True, True, True)] if at_once else [(False, True, True), not transposed])
        found.append([leaf.grad, layer.weight.grad, layer.bias.grad])
        layer.zero_grad()
    for a, b in zip(*found, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b)


def test_an_autocast_around_the_backward_pass_does_not_round_the_gradient(monkeypatch):
    monkeypatch.setattr(convolution, "LARGE", 0)
    layer = nn.Conv2d(8, 16, 3)
    packlight.convert(layer, METHOD)
    found = []
    for enabled in (False, True):
        leaf = torch.ones(2, 8, 9, 9).requires_grad_()
        y = layer(leaf)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y.sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


def test_the_peak_is_lower_by_a_large_input(monkeypatch):
    layer = nn.Conv2d(64, 64, 1, bias=False)
    packlight.convert(layer, METHOD)
    x = torch.randn(8, 64, 16, 16)
    peaks = []
    for large in (2**40, 0):
        monkeypatch.setattr(convolution, "LARGE", large)
        leaf = x.clone().requires_grad_()
        peaks.append(peak_bytes(lambda leaf=leaf: layer(leaf).sum().backward()))
    assert peaks[0] - peaks[1] > 0.9 * x.nbytes


def test_an_input_that_alone_is_channels_last_stays_to_say_so(monkeypatch):
    monkeypatch.setattr(convolution, "LARGE", 0)
    calls = []
    of_torch = convolution._backward
    monkeypatch.setattr(convolution, "_backward", lambda *a: (calls.append(a), of_torch(*a))[1])
    layer = nn.Conv2d(8, 16, 3)
    packlight.convert(layer, METHOD)
    x = torch.randn(4, 8, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    layer(x).sum().backward()
    assert len(calls) == 1
    assert x.grad.is_contiguous(memory_format=torch.channels_last)

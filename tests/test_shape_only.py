"""Functions whose gradient needs the shape of the input: torch's bits, and nothing kept."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import _torch, layers, predict, profile
from tests.helpers import DTYPES, EPSILON, crossing, dtype_name, every_device, kept_bytes
from tests.resnets import preactivation_resnet

# Arguments behind the input, by function and by the dimensions that it pools or pads.
CASES = {
    1: [
        ("avg_pool1d", (2,)),
        ("avg_pool1d", (3, 1, 1, True, False)),
        ("avg_pool1d", ((2,), (), (0,))),
        ("adaptive_avg_pool1d", (3,)),
        ("adaptive_max_pool1d", (3,)),
        ("adaptive_max_pool1d", (3, True)),
        ("lp_pool1d", (2, 2)),
        ("lp_pool1d", (3, 2, 1, True)),
        ("pad", ((1, 2), "reflect")),
        ("pad", ((1, 2), "replicate")),
    ],
    2: [
        ("avg_pool2d", (2,)),
        ("avg_pool2d", ((3, 2), 1, 1, True, False)),
        ("avg_pool2d", (2, [], 0, True, True, 3)),
        ("adaptive_avg_pool2d", (3,)),
        ("adaptive_avg_pool2d", ((None, 2),)),
        ("adaptive_max_pool2d", (3,)),
        ("adaptive_max_pool2d", ((None, 2), True)),
        ("fractional_max_pool2d", (2, 3)),
        ("fractional_max_pool2d", ((2, 2), None, (0.5, 0.5), True)),
        ("lp_pool2d", (2, 2)),
        ("lp_pool2d", (1, (3, 2), 1, True)),
        ("pad", ((1, 2, 0, 1), "reflect")),
        ("pad", ((1, 2, 0, 1), "replicate")),
        ("rrelu", (0.1, 0.3, True)),
    ],
    3: [
        ("avg_pool3d", (2,)),
        ("avg_pool3d", ((3, 2, 1), 1, (1, 1, 0), True, False, 5)),
        ("adaptive_avg_pool3d", ((3, None, 1),)),
        ("adaptive_max_pool3d", (3,)),
        ("fractional_max_pool3d", (2, 3)),
        ("lp_pool3d", (2, 2)),
        ("pad", ((1, 2, 0, 1, 1, 1), "reflect")),
        ("pad", ((1, 2, 0, 1, 1, 1), "replicate")),
    ],
}
INTERPOLATIONS = [((3, 3), None), (None, 0.5), (None, (0.4, 0.7))]
CASES[2] += [("interpolate", (*sizes, "area")) for sizes in INTERPOLATIONS]
every_case = pytest.mark.parametrize(
    ("axes", "name", "arguments"),
    [(axes, *case) for axes, cases in CASES.items() for case in cases],
)

IMAGES = torch.randn(2, 4, 9, 8)
IMAGES[0, 0, :4, :4] = 0  # windows of zeros, whose powers have a derivative of their own
INPUTS = {
    1: [torch.randn(2, 4, 9), torch.randn(4, 9), torch.randn(2, 4, 18)[..., ::2]],
    2: [
        IMAGES,
        IMAGES.to(memory_format=torch.channels_last),
        IMAGES[0],
        IMAGES[:, :, ::2, 1:],
        IMAGES.to(memory_format=torch.channels_last)[:, :, 1:],
        IMAGES[:1].expand(3, -1, -1, -1),
    ],
    3: [
        torch.randn(2, 4, 6, 9, 8),
        torch.randn(2, 4, 6, 9, 8).to(memory_format=torch.channels_last_3d),
        torch.randn(4, 6, 9, 8),
    ],
}


def result(function, x, arguments):
    """The output and the gradient of a weighted sum of it; torch's own words where it refuses."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    try:
        y = function(x, *arguments)
    except (RuntimeError, ValueError) as error:
        return type(error), str(error)
    y = y if isinstance(y, tuple) else (y,)
    dy = torch.randn(y[0].shape, generator=torch.Generator().manual_seed(2)).to(y[0])
    return *(each.detach() for each in y), *torch.autograd.grad(y[0], x, dy)


def assert_same(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@every_case
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["plain", "autocast"])
def test_every_bit_is_torch_s(axes, name, arguments, dtype, autocast):
    for x in INPUTS[axes]:
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            expected, ours = (
                result(getattr(where, name), x.to(dtype), arguments) for where in (F, layers)
            )
        if isinstance(expected[0], type):
            assert ours == expected
            continue
        assert_same(ours, expected)


@every_case
@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_name)
def test_no_value_of_the_empty_tensor_is_read(axes, name, arguments, device, dtype, monkeypatch):
    if device == "cpu" and dtype != torch.float32:
        return  # the test above
    empty = torch.empty

    def poisoned(*args, **options):
        y = empty(*args, **options)
        return y.fill_(torch.nan) if y.is_floating_point() else y

    for x in INPUTS[axes]:
        x = x.to(device, dtype)
        expected = result(getattr(F, name), x, arguments)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            ours = result(getattr(layers, name), x, arguments)
        if isinstance(expected[0], type):
            assert ours == expected
            continue
        *outputs, dx = zip(ours, expected, strict=True)
        for one, other in outputs:
            assert one.stride() == other.stride()
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        # Windows that overlap are summed in any order on a device.
        near = 0.0 if device == "cpu" else 10 * EPSILON[dtype]
        assert dx[0].stride() == dx[1].stride()
        torch.testing.assert_close(*dx, rtol=near, atol=near, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["avg_pool2d", "adaptive_avg_pool2d", "pad"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_memory_on_a_device(name, layout):
    """The input is freed after the forward pass; the backward pass has no more at once."""
    arguments = {"avg_pool2d": (2,), "adaptive_avg_pool2d": (56,), "pad": ((1,) * 4, "reflect")}
    peaks = []
    for where in (F, layers):
        x = torch.randn(32, 64, 112, 112, device="cuda").to(memory_format=layout).requires_grad_()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = getattr(where, name)(x * 1, *arguments[name])
        held = torch.cuda.memory_allocated() - start - y.nbytes
        y.backward(torch.ones_like(y))
        peaks.append((held, torch.cuda.max_memory_allocated() - start))
        del x, y
    (torch_held, torch_peak), (held, peak) = peaks
    assert torch_held >= 32 * 64 * 112 * 112 * 4
    assert held < 1 << 20
    assert peak <= torch_peak


@every_case
def test_what_is_kept(axes, name, arguments):
    x = INPUTS[axes][0].detach().requires_grad_()
    y = getattr(layers, name)(x, *arguments)
    y = y[0] if isinstance(y, tuple) else y
    needed = 0
    if "max_pool" in name:
        needed = 8 * y.numel()
    elif name == "rrelu" or "lp_pool" in name:
        needed = x.nbytes
    assert kept_bytes(lambda: getattr(layers, name)(x, *arguments)) == needed
    assert kept_bytes(lambda: getattr(F, name)(x, *arguments)) >= x.nbytes + (name == "rrelu")


@every_case
def test_it_compiles_to_the_same_bits_and_the_input_does_not_cross(
    axes, name, arguments, fresh_compiler
):
    function = getattr(layers, name)
    x = INPUTS[axes][0].detach().requires_grad_()

    def loss(x):
        y = function(x * 2, *arguments)
        return (y[0] if isinstance(y, tuple) else y) * 3

    torch.manual_seed(1)
    expected = loss(x)
    torch.manual_seed(1)
    y = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    dy = torch.randn_like(y)
    assert_same(
        (y, *torch.autograd.grad(y, x, dy)), (expected, *torch.autograd.grad(expected, x, dy))
    )
    if "lp_pool" not in name:
        large = [
            each
            for each in crossing(loss, x)[1:]
            if each.is_floating_point() and each.numel() >= x.numel()
        ]
        assert len(large) == (name == "rrelu")  # its slopes


@every_case
def test_it_is_differentiated_twice(axes, name, arguments):
    if name == "rrelu" or "fractional" in name:
        return  # random
    x = INPUTS[axes][0].detach().double().requires_grad_()

    def second(function):
        y = function(x * x + 1, *arguments)
        y = y[0] if isinstance(y, tuple) else y
        (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    if "lp_pool" in name:
        with pytest.raises(packlight.DoubleBackwardError):
            second(getattr(layers, name))
    else:
        assert torch.equal(second(getattr(layers, name)), second(getattr(F, name)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_place_and_in_checkpoints(reentrant):
    def run(x):
        return layers.avg_pool2d(x, 2).add_(1.0).relu_()

    x = IMAGES.clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.avg_pool2d(x, 2).add_(1.0).relu_().sum(), x)
    checkpoint(run, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(x.grad, expected)


def test_a_changed_input_does_no_harm():
    """Torch raises: it has the input and would not have read it."""
    x = IMAGES.clone().requires_grad_()
    h = x * 1
    y = layers.avg_pool2d(h, 2)
    h.zero_()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, torch.autograd.grad(F.avg_pool2d(x * 1, 2).sum(), x)[0])


def test_without_the_operator_the_pooling_is_torch_s(monkeypatch):
    monkeypatch.setattr(_torch, "adaptive_avg_pool_gradient", lambda axes: None)
    x = IMAGES.clone().requires_grad_()
    assert torch.equal(layers.adaptive_avg_pool2d(x, 3), F.adaptive_avg_pool2d(x, 3))
    assert kept_bytes(lambda: layers.adaptive_avg_pool2d(x, 3)) == x.nbytes


def test_a_subclass_of_tensors_is_left_to_torch():
    class Own(torch.Tensor):
        pass

    x = IMAGES.clone().as_subclass(Own).requires_grad_()
    pool = layers.AvgPool2d(2)
    assert type(pool(x)) is Own
    assert torch.equal(pool(x), F.avg_pool2d(x, 2))
    assert kept_bytes(lambda: pool(x)) == x.nbytes


def test_a_trained_exponent_is_torch_s():
    p = torch.tensor(3.0, requires_grad=True)
    x = torch.rand(2, 4, 8, 8, requires_grad=True)
    grads = [torch.autograd.grad(where.lp_pool2d(x, p, 2).sum(), (x, p)) for where in (layers, F)]
    assert all(map(torch.equal, *grads))


def test_what_torch_keeps_nothing_of_is_left_alone():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=2), nn.ReLU())
    conversion = packlight.convert(model)
    assert {row.names[0]: row.reason for row in conversion.skipped} == {
        "0": "it is a mean, of which torch keeps nothing",
        "1": "torch keeps nothing in mode 'nearest'",
    }


# ---- networks ------------------------------------------------------------------------------------


def test_pooled_shortcuts_of_the_residual_network_of_approximate_activations():
    """4 bits save 15.5 times; with the inputs of its poolings it was 3.1 times."""
    x = torch.randn(8, 3, 32, 32)
    plain = profile(preactivation_resnet(1, width=2), x).activation_bytes
    kept = {}
    for name, methods in {
        "all": packlight.FixedPoint(bits=4),
        "default": packlight.DEFAULT_METHODS,
        "pools excluded": {nn.AvgPool2d: None, "*": packlight.DEFAULT_METHODS},
    }.items():
        model = preactivation_resnet(1, width=2)
        packlight.convert(model, methods, strict=False)
        kept[name] = profile(model, x).activation_bytes
        assert predict(model, x).activation_bytes == kept[name]
    # Of two stages: 8 images of 128 channels, and of twice as many at a quarter of the size.
    pooled = 8 * 128 * 32**2 * 4 + 8 * 256 * 16**2 * 4
    assert kept["pools excluded"] - kept["default"] == pooled == 6 * 2**20
    assert plain / kept["pools excluded"] == pytest.approx(3.1, abs=0.05)
    assert plain / kept["default"] == pytest.approx(15.5, abs=0.05)


@pytest.mark.parametrize(
    "method",
    [
        packlight.FixedPoint(),
        packlight.FewBit(),
        packlight.GroupQuant(),
        packlight.Inverted(),
        packlight.Sketch(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_method_covers_layers_and_calls(method):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.AvgPool2d(2)

        def forward(self, x):
            x = F.pad(self.pool(x * 1), (1, 1, 1, 1), mode="reflect")
            return F.avg_pool2d(F.interpolate(x, scale_factor=0.5, mode="area"), 2)

    model, x = Net(), torch.randn(2, 4, 16, 16, requires_grad=True)
    assert kept_bytes(functools.partial(model, x)) > x.nbytes
    expected = result(model, x, ())
    packlight.convert(model, method, functional=True)
    assert kept_bytes(functools.partial(model, x)) == 0
    assert all(map(torch.equal, result(model, x, ()), expected))
    packlight.revert(model)
    assert kept_bytes(functools.partial(model, x)) > x.nbytes

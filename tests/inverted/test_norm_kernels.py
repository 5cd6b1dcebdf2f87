"""Kernels of the norms of rows against references, in the interpreter or on a device."""

import os
import subprocess
import sys

import pytest
import torch

import packlight.inverted as inverted
from packlight import use_reference
from packlight.inverted import norm_kernels as kernels
from packlight.inverted import norm_reference as reference
from tests.graphs import captured
from tests.helpers import every_device, every_kernel_dtype

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
# (rows, width): narrow rows, a tile of several, a width that is no power of two, a single row.
SIZES = [(37, 8), (17, 24), (3, 100), (1, 64)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
every_norm = pytest.mark.parametrize("centred", [True, False], ids=["layer", "rms"])


def case(rows, width, dtype, weights, centred, channels, device, cast=None):
    """The arguments of the forward, and a gradient of its output."""
    x = (torch.randn(rows, width, device=device) * 2 + 1).to(dtype)
    weight = (torch.rand(width, device=device) + 0.5).to(weights)
    bias = (torch.rand(width, device=device) - 0.5).to(weights) if centred else None
    output = torch.float32 if cast else dtype
    dy = torch.randn(rows, width, device=device).to(output)
    return (x, (width,), weight, bias, channels, 1e-5, centred, output, cast), dy


def backward_arguments(forward, results, dy):
    x, shape, weight, bias, channels, _, centred, _, cast = forward
    y, narrow, rstd, exact = results
    kept = y if cast is None else narrow
    exact = None if channels is None else exact
    return (dy, kept, shape, weight, bias, channels, rstd, exact, centred, x.dtype, True, True)


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        limit = TOLERANCE[a.dtype]
        scale = b.double().abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=limit, atol=limit * scale)


def compare(forward, dy):
    actual, expected = kernels.row_norm(*forward), reference.row_norm(*forward)
    assert_close(actual, expected)
    arguments = backward_arguments(forward, expected, dy)
    assert_close(kernels.row_norm_backward(*arguments), reference.row_norm_backward(*arguments))


@every_device
@every_kernel_dtype
@every_norm
@pytest.mark.parametrize("exact", [False, True], ids=["inverted", "exact channels"])
def test_kernels_equal_the_reference(exact, centred, dtype, device, poison):
    channels = torch.tensor([6, 1], device=device) if exact else None
    for rows, width in SIZES:
        for weights in {dtype, torch.float32}:
            compare(*case(rows, width, dtype, weights, centred, channels, device))


@every_device
@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cast_beside_the_output(dtype, centred, device, poison):
    """As under autocast: the output in float32, and in bfloat16 what is kept of it."""
    channels = torch.tensor([2], device=device)
    for exact in (None, channels):
        forward, dy = case(17, 24, dtype, torch.float32, centred, exact, device, torch.bfloat16)
        compare(forward, dy)
        y, narrow, *_ = kernels.row_norm(*forward)
        rounding = 2 if device == "cpu" else 1  # the interpreter truncates
        assert ((narrow.double() - y.double()).abs() <= rounding * 2**-8 * y.abs()).all()


@every_device
@every_norm
@pytest.mark.parametrize("exact", [False, True], ids=["inverted", "exact channels"])
def test_rows_wider_than_the_registers(exact, centred, device, monkeypatch, poison):
    if device == "cpu":
        monkeypatch.setattr(kernels, "FORWARD_WIDTH", 16)
        monkeypatch.setattr(kernels, "BACKWARD_WIDTH", 16)
        monkeypatch.setattr(kernels, "WIDE_BLOCK", 16)
        monkeypatch.setattr(kernels, "COLUMNS", 16)
        monkeypatch.setattr(kernels, "COLUMN_ROWS", 4)
    width = 40 if device == "cpu" else 20000
    channels = torch.tensor([6, 33], device=device) if exact else None
    for cast in (None, torch.bfloat16):
        compare(*case(17, width, torch.float32, torch.float32, centred, channels, device, cast))


@every_device
@pytest.mark.parametrize("needs", [(True, False), (False, True)], ids=["input", "affine"])
def test_only_what_is_needed(needs, device):
    forward, dy = case(9, 24, torch.float32, torch.float32, True, None, device)
    arguments = backward_arguments(forward, reference.row_norm(*forward), dy)[:-2]
    assert_close(
        kernels.row_norm_backward(*arguments, *needs),
        reference.row_norm_backward(*arguments, *needs),
    )


@every_device
def test_settings_of_a_sweep_change_nothing(device, monkeypatch):
    forward, dy = case(37, 48, torch.float32, torch.float32, True, None, device)
    arguments = backward_arguments(forward, reference.row_norm(*forward), dy)
    expected = reference.row_norm(*forward), reference.row_norm_backward(*arguments)
    for setting in ((64, 4, 1, 1), (4096, 16, 2, 2), (256, 8, 32, 1)):
        for way in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(kernels, way, {64: kernels.Setting(*setting)})
        assert_close(kernels.row_norm(*forward), expected[0])
        assert_close(kernels.row_norm_backward(*arguments), expected[1])


@every_device
def test_large_means_cancel_no_digits(device):
    """The variance is taken about the mean: the error is that of a mean in float32, and no more."""
    (x, *rest), _ = case(8, 96, torch.float32, torch.float32, True, None, device)
    x = x + 1000
    y, *_ = kernels.row_norm(x, *rest)
    weight, bias = rest[1:3]
    truth = torch.nn.functional.layer_norm(x.double(), (96,), weight.double(), bias.double())
    assert (y - truth).abs().max() <= 1000 * 2**-23


def test_kernels_compile_for_a_gpu_without_one():
    """The interpreter accepts what the compiler refuses; tools/compile_kernels.py tries all."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "tools/compile_kernels.py", "--match", "bf16 1024"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "9 kernels compiled for sm_90" in result.stdout, result.stderr[-2000:]


# --- What only a device can show.


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1024, 2048, 4096, 8192, 16384])
@every_kernel_dtype
@every_norm
def test_usual_widths_on_the_device(centred, dtype, width):
    for channels in (None, torch.tensor([3, 700, 41], device="cuda")):
        compare(*case(515, width, dtype, torch.float32, centred, channels, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_gradients_on_the_device_are_within_1_5_of_torch_s_error(dtype):
    norm = inverted.LayerNorm(1024, device="cuda", dtype=dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.copy_(norm.weight * 0.5 * torch.randn_like(norm.bias).sign())
    x = torch.randn(4096, 1024, device="cuda").to(dtype).requires_grad_()
    dy = torch.randn(4096, 1024, device="cuda").to(dtype)
    plain = torch.nn.LayerNorm(1024, device="cuda", dtype=dtype)
    plain.load_state_dict(norm.state_dict())
    actual = torch.autograd.grad(norm(x), [x, *norm.parameters()], dy)
    torch_s = torch.autograd.grad(plain(x), [x, *plain.parameters()], dy)
    wide = x.detach().double().requires_grad_()
    plain.double()
    truth = torch.autograd.grad(plain(wide), [wide, *plain.parameters()], dy.double())
    for a, b, exact in zip(actual, torch_s, truth, strict=True):
        assert (a - exact).norm() <= 1.5 * (b - exact).norm() * 1.03


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    norm = inverted.LayerNorm(1024, device="cuda", dtype=torch.bfloat16)
    rows = 2**21 + 7
    x = torch.zeros(rows, 1024, dtype=torch.bfloat16, device="cuda")
    x[-64:] = torch.randn(64, 1024, device="cuda").to(torch.bfloat16)
    x.requires_grad_()
    norm(x).square().sum().backward()
    tail = x.detach()[-64:].clone().requires_grad_()
    norm(tail).square().sum().backward()
    assert torch.equal(x.grad[-64:], tail.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("spoilt", [False, True], ids=["inverted", "exact channels"])
def test_cuda_graph_capture(spoilt):
    norm = inverted.LayerNorm(256, device="cuda")
    if spoilt:
        with torch.no_grad():
            norm.weight[3] = 0
    x = torch.randn(64, 256, device="cuda", requires_grad=True)
    dy = torch.randn(64, 256, device="cuda")

    def step():
        return torch.autograd.grad(norm(x), [x, *norm.parameters()], dy)

    graph, result = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for a, b in zip(result, step(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_autocast_on_the_device_shares_the_cast():
    """LayerNorm returns float32 there, also for 16-bit inputs."""
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 64), inverted.LayerNorm(64), inverted.Linear(64, 64)
    ).cuda()
    plain = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Linear(64, 64)
    ).cuda()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(256, 64, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        hidden = model[1](model[0](x))
        assert hidden.dtype == torch.float32
        outputs = [m(x) for m in (model, plain)]
    torch.testing.assert_close(*outputs, rtol=0.02, atol=0.02)
    gradients = [
        torch.autograd.grad(y.float().square().sum(), list(m.parameters()))
        for y, m in zip(outputs, (model, plain), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()


@pytest.mark.gpu
def test_use_reference_runs_the_same_norm_on_the_device():
    norm = inverted.LayerNorm(512, device="cuda")
    x = torch.randn(100, 512, device="cuda", requires_grad=True)
    (actual,) = torch.autograd.grad(norm(x).square().sum(), x)
    with use_reference():
        (expected,) = torch.autograd.grad(norm(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["BatchNorm2d", "GroupNorm", "InstanceNorm2d"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norms_of_channels_on_the_device(dtype, channels_last, kind):
    arguments = {"GroupNorm": (4, 16), "InstanceNorm2d": (16, 1e-5, 0.1, True)}.get(kind, (16,))
    ours = getattr(inverted, kind)(*arguments, device="cuda")
    plain = getattr(torch.nn, kind)(*arguments, device="cuda")
    if kind == "GroupNorm":  # torch's takes weights of the input's dtype only
        ours, plain = ours.to(dtype), plain.to(dtype)
    x = torch.randn(4, 16, 9, 9, device="cuda").to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    dy = torch.randn(4, 16, 9, 9, device="cuda").to(dtype)
    x.requires_grad_()
    y, expected = ours(x), plain(x)
    assert torch.equal(y, expected)
    actual = torch.autograd.grad(y, [x, *ours.parameters()], dy)
    expected = torch.autograd.grad(expected, [x, *plain.parameters()], dy)
    for a, b in zip(actual, expected, strict=True):
        assert (a.float() - b.float()).norm() <= (
            1e-5 if dtype == torch.float32 else 0.02
        ) * b.norm()

"""The contract of every layer (docs/architecture.md) over the table of inverted norms.

`layer` runs a test on the plain-PyTorch reference and, for norms of rows, on the Triton kernels
too.
"""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight.inverted as inverted
from packlight import Inverted, convert
from packlight.errors import DoubleBackwardError, InputError
from packlight.inverted import norm_ops, norms
from tests.helpers import crossing, dtype_name, every_dtype, kept_bytes, node_name, relative_error
from tests.inverted.norm_layers import AFFINE, CHANNELS, FUNCTIONS, LAYERS, ROWS

BACKENDS = [(layer, "reference") for layer in LAYERS] + [(layer, "kernel") for layer in ROWS]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)
# Every norm, and those that may have ill-posed channels with one of them.
WITH_EXACT = [(layer, False) for layer in LAYERS] + [(layer, True) for layer in AFFINE]
with_exact_channels = pytest.mark.parametrize(
    ("layer", "exact"), WITH_EXACT, ids=[f"{row}{' exact' * exact}" for row, exact in WITH_EXACT]
)
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@pytest.fixture(params=BACKENDS, ids=lambda backend: f"{backend[0]}-{backend[1]}")
def layer(request, monkeypatch):
    row, backend = request.param
    if backend == "kernel":
        if request.node.callspec.params.get("dtype") == torch.float64:
            pytest.skip("kernels compute in float32; float64 takes the reference")
        row.use_kernels(monkeypatch)
    return row


def gradients(module, x, dy=None):
    """The output, and the gradients of the input and of the parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    inputs = [x, *module.parameters()]
    dy = torch.ones_like(y) if dy is None else dy
    return y.detach(), torch.autograd.grad(y, inputs, dy)


def assert_near(actual, expected, limit):
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert relative_error(a, b) <= limit


# --- 1: forward.


@every_layer
@every_dtype
def test_forward_and_running_statistics_are_bit_equal_to_torch(layer, dtype):
    ours, plain = layer.pair(dtype)
    for _ in range(3):
        x = layer.sample(dtype).requires_grad_()
        y = ours(x)
        assert y.grad_fn.name().startswith("_Inverted")
        expected = plain(x)
        assert torch.equal(y, expected)
        assert y.stride() == expected.stride()
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_float32_weights_with_16_bit_inputs(layer, dtype):
    ours, plain = layer.pair()
    x = layer.sample(dtype)
    dy = torch.randn(layer.shape).to(dtype)
    y, actual = gradients(ours, x, dy)
    expected_y, expected = gradients(plain, x, dy)
    assert torch.equal(y, expected_y)
    assert_near(actual, expected, 0.01)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_torch_arguments(name):
    ours, theirs = (inspect.signature(f).parameters for f in FUNCTIONS[name])
    assert list(ours) == [*theirs, "exact_channels"]
    defaults = [p.default for p in ours.values()][:-1]
    assert defaults == [p.default for p in theirs.values()]


def test_functions_compute_what_torch_computes():
    x, w, b = torch.randn(4, 6, 5, requires_grad=True), torch.rand(6) + 0.5, torch.zeros(6)
    calls = {
        "layer_norm": ((6, 5), torch.rand(6, 5) + 0.5, torch.zeros(6, 5)),
        "rms_norm": ((5,), torch.rand(5) + 0.5),
        "batch_norm": (torch.zeros(6), torch.ones(6), w, b, True),
        "group_norm": (2, w, b),
        "instance_norm": (None, None, w, b),
    }
    for name, arguments in calls.items():
        ours, theirs = FUNCTIONS[name]
        y = ours(x, *arguments)
        assert y.grad_fn.name().startswith("_Inverted")
        assert torch.equal(y, theirs(x, *arguments))


# --- 2: backward.


@every_dtype
def test_gradients_are_torch_s_to_rounding(layer, dtype):
    ours, plain = layer.pair(dtype)
    x, dy = layer.sample(dtype), torch.randn(layer.shape).to(dtype)
    limit = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    _, actual = gradients(ours, x, dy)
    _, expected = gradients(plain, x, dy)
    assert_near(actual, expected, limit[dtype])


@every_layer
def test_float32_gradients_at_the_limit_of_offsets(layer):
    """Just not ill-posed: |beta / gamma| is 64 everywhere."""
    ours, plain = layer.pair()
    for module in (ours, plain):
        if getattr(module, "bias", None) is not None:
            module.bias.data.copy_(63.9 * module.weight)
    x, dy = layer.sample(), torch.randn(layer.shape)
    _, actual = gradients(ours, x, dy)
    _, expected = gradients(plain, x, dy)
    assert_near(actual, expected, 1e-5)
    x.requires_grad_()
    assert node_name(ours(x)).startswith("_Inverted")


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "BatchNorm2d", "GroupNorm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_16_bit_gradients_are_as_near_the_truth_as_torch_s(kind, dtype):
    """With all channels at the limit of offsets, where it is hardest: within 1.5 of torch's error.

    On the CPU torch rounds more than on a GPU. Where its output is y rounded once (LayerNorm,
    RMSNorm), its error is taken as it is there: the rounding of the exact gradient alone.
    """
    arguments, shape = {
        "LayerNorm": ((1024,), (256, 1024)),
        "RMSNorm": ((1024,), (256, 1024)),
        "BatchNorm2d": ((256,), (4, 256, 8, 8)),
        "GroupNorm": ((8, 256), (4, 256, 8, 8)),
    }[kind]
    ours = getattr(inverted, kind)(*arguments).to(dtype)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 1.5)
        if kind != "RMSNorm":
            ours.bias.copy_(ours.weight * 0.5 * torch.randn(ours.bias.shape).sign())
    plain = getattr(nn, kind)(*arguments)
    plain.load_state_dict(ours.state_dict())
    x, dy = (torch.randn(shape) * 2 + 1).to(dtype), torch.randn(shape).to(dtype)
    _, actual = gradients(ours, x, dy)
    _, truth = gradients(copy.deepcopy(plain).double(), x.double(), dy.double())
    _, torch_s = gradients(plain.to(dtype), x, dy)
    assert all(verdict.channels is None for verdict in ours._seen.verdicts.values())
    for a, b, exact in zip(actual, torch_s, truth, strict=True):
        error = relative_error(b, exact)
        if kind in ("LayerNorm", "RMSNorm"):
            error = min(error, relative_error(exact.to(dtype), exact))
        assert relative_error(a, exact) <= 1.5 * error * 1.03  # the spread of 1024 roundings


@with_exact_channels
def test_gradcheck(layer, exact):
    ours, _ = layer.pair(torch.float64)
    if exact:
        with torch.no_grad():
            ours.weight.flatten()[1] = 0.0
    x = layer.sample(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *ours.parameters()), fast_mode=True)


# --- 3: drop-in.


@every_layer
def test_modules_are_drop_in(layer):
    ours, plain = layer.pair()
    assert isinstance(ours, layer.plain_module)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert ours.state_dict()._metadata == plain.state_dict()._metadata
    assert repr(ours) == repr(plain)
    assert inspect.signature(layer.module) == inspect.signature(layer.plain_module)
    x, dy = layer.sample(), torch.randn(layer.shape)
    _, expected = gradients(copy.deepcopy(ours), x, dy)
    for clone in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert_near(gradients(clone, x, dy)[1], expected, 0)


@every_layer
def test_a_module_of_torch_may_be_given_the_class(layer):
    ours, plain = layer.pair()
    x, dy = layer.sample(), torch.randn(layer.shape)
    plain.__class__ = layer.module
    assert_near(gradients(plain, x, dy)[1], gradients(ours, x, dy)[1], 0)


@every_layer
def test_eval_runs_the_plain_operation(layer):
    ours, plain = (module.double().eval() for module in layer.pair())
    x = layer.sample(torch.float64).requires_grad_()
    y, expected = ours(x), plain(x)
    assert torch.equal(y, expected)
    weights = torch.randn(layer.shape, dtype=torch.float64)
    first = [
        torch.autograd.grad((out * weights).sum(), x, create_graph=True)[0] for out in (y, expected)
    ]
    torch.testing.assert_close(*first)


def test_sync_batch_norm_conversion_gives_torch_s():
    model = nn.Sequential(inverted.BatchNorm2d(4), nn.ReLU())
    weight, mean = model[0].weight, model[0].running_mean
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is nn.SyncBatchNorm
    assert converted[0].weight is weight
    assert converted[0].running_mean is mean


# --- 4: what is kept.


def test_keeps_the_output_and_rstd(layer):
    ours, _ = layer.pair()
    x = layer.sample().requires_grad_()
    outputs = []
    kept = kept_bytes(lambda: outputs.append(ours(x)))
    parameters = sum(p.numel() * 4 for p in ours.parameters())
    assert kept == 4 * x.numel() + 4 * layer.statistics() + parameters
    (y,) = outputs
    saved = y.grad_fn.saved_tensors
    assert saved[0].data_ptr() == y.data_ptr()


@pytest.mark.parametrize("layer", AFFINE, ids=str)
def test_exact_channels_are_kept_besides(layer):
    ours, _ = layer.pair()
    with torch.no_grad():
        ours.weight.flatten()[[1, 4]] = 0.0
    x = layer.sample().requires_grad_()
    kept = kept_bytes(lambda: ours(x))
    parameters = sum(p.numel() * 4 for p in ours.parameters())
    exact = 4 * x.numel() * 2 // ours.weight.numel()
    indices = 2 * 8
    assert kept == 4 * x.numel() + 4 * layer.statistics() + parameters + exact + indices


# --- 5: shapes and strides.


def channels_last(x):
    if x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    return x.transpose(0, -1).contiguous().transpose(0, -1)


STRIDES = {
    "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "channels-last": channels_last,
}


@pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES.keys())
def test_any_stride(layer, stride, poison):
    x, dy = stride(layer.sample()), stride(torch.randn(layer.shape))
    ours, plain = layer.pair()
    y, actual = gradients(ours, x, dy)
    expected_y, expected = gradients(plain, x, dy)
    torch.testing.assert_close(y, expected_y, rtol=2e-6, atol=2e-6)
    assert y.stride() == expected_y.stride()
    assert_near(actual, expected, 4e-6)


def test_expanded_input_and_gradient(layer):
    axis = 0 if layer.kernels else 1  # rows, or channels, that are all alike
    x, dy = layer.sample().narrow(axis, 0, 1).expand(layer.shape), torch.ones(1)
    ours, plain = layer.pair()
    weights = torch.randn(layer.shape)
    for module in (ours, plain):
        module.register_forward_hook(lambda _, __, y: (y * weights).sum().expand(3))
    _, actual = gradients(ours, x, dy.expand(3))
    _, expected = gradients(plain, x, dy.expand(3))
    assert_near(actual, expected, 4e-6)


def test_channels_last_stays():
    x = torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last)
    for module in (inverted.BatchNorm2d(6), inverted.GroupNorm(2, 6)):
        y, (dx, *_) = gradients(module, x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert dx.is_contiguous(memory_format=torch.channels_last)


def outcome(module, x):
    try:
        return gradients(module, x)[0].shape
    except (ValueError, RuntimeError, IndexError) as error:
        return str(error)


@every_layer
def test_empty_gives_what_torch_gives(layer):
    ours, plain = layer.pair()
    x = torch.zeros(0, *layer.shape[1:])
    assert outcome(ours, x) == outcome(plain, x)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (2, 1, 3, 1, 2, 24)], ids=str)
def test_one_row_and_six_dimensions(shape):
    x, dy = torch.randn(shape), torch.randn(shape)
    _, actual = gradients(inverted.LayerNorm(24), x, dy)
    _, expected = gradients(nn.LayerNorm(24), x, dy)
    assert_near(actual, expected, 2e-6)


# --- 6: how autograd may use it.


@every_layer
def test_nothing_is_kept_without_gradient(layer):
    ours, plain = layer.pair()
    x = layer.sample()
    with torch.no_grad():
        expected = plain(x.clone())

    def run():
        with torch.no_grad():
            assert torch.equal(ours(x.clone().requires_grad_()), expected)
        ours.requires_grad_(False)
        assert not ours(x).requires_grad

    assert kept_bytes(run) == 0
    assert ours._seen is None


def test_frozen_parts_get_no_gradient(layer):
    ours, _ = layer.pair()
    x, dy = layer.sample().requires_grad_(), torch.randn(layer.shape)
    names = [name for name, _ in ours.named_parameters()]
    expected = dict(zip(["x", *names], gradients(ours, x, dy)[1], strict=True))
    for frozen in ["x", *names]:
        ours.requires_grad_(True)
        given = x.detach()
        if frozen == "x":
            if not names:
                continue
        else:
            given.requires_grad_()
            getattr(ours, frozen).requires_grad_(False)
        y = ours(given)
        assert y.grad_fn.name().startswith("_Inverted")
        inputs = {"x": given, **dict(ours.named_parameters())}
        inputs = {name: t for name, t in inputs.items() if t.requires_grad}
        grads = torch.autograd.grad(y, list(inputs.values()), dy)
        for name, grad in zip(inputs, grads, strict=True):
            torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6)


@every_layer
def test_retain_graph_and_two_backwards(layer):
    ours, _ = layer.pair()
    x = layer.sample().requires_grad_()
    y = ours(x).square().sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@every_layer
def test_second_derivative_raises(layer):
    ours, _ = layer.pair()
    x = layer.sample().requires_grad_()
    with pytest.raises(DoubleBackwardError, match="its output and cannot be differentiated twice"):
        torch.autograd.grad((ours(x).square() + x**2).sum(), x, create_graph=True)


def test_inputs_gradients_and_output_are_left_alone(layer):
    ours, _ = layer.pair()
    x, dy = layer.sample().requires_grad_(), torch.randn(layer.shape)
    y = ours(x)
    before = [t.detach().clone() for t in (x, dy, y)]
    torch.autograd.grad(y, [x, *ours.parameters()], dy)
    assert all(torch.equal(a, b) for a, b in zip((x, dy, y), before, strict=True))


@every_layer
def test_output_modified_in_place_raises(layer):
    ours, _ = layer.pair()
    y = ours(layer.sample().requires_grad_())
    y.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        y.sum().backward()
    assert "leave such norms out" in caught.value.__notes__[0]


def test_a_resnet_converts_without_its_batch_norms():
    """What the error says: their outputs are overwritten by in-place ReLUs and sums."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    convert(model, {nn.BatchNorm2d: None, "*": Inverted()})
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert type(model[1]) is nn.BatchNorm2d
    assert model[0].weight.grad is not None


# --- 7: autocast. See test_linear.py for what is shared under it.


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_autocast_gives_what_torch_gives(layer, dtype):
    ours, plain = layer.pair()
    x, dy = layer.sample(dtype), torch.randn(layer.shape)
    with torch.autocast("cpu", torch.bfloat16):
        y, actual = gradients(ours, x, dy.to(dtype))
        expected_y, expected = gradients(plain, x, dy.to(dtype))
        kept = kept_bytes(lambda: ours(x.requires_grad_()))
    assert y.dtype == expected_y.dtype
    assert torch.equal(y, expected_y)
    assert_near(actual, expected, 0.02)  # kept in bfloat16
    parameters = sum(p.numel() * 4 for p in ours.parameters())
    assert kept == 2 * x.numel() + 4 * layer.statistics() + parameters


@pytest.mark.parametrize("layer", [ROWS[0], ROWS[4], CHANNELS[7]], ids=str)
def test_autocast_that_returns_float32_for_16_bit_inputs(layer, monkeypatch):
    """As on CUDA, where LayerNorm and GroupNorm run in float32."""
    monkeypatch.setattr(norms, "autocast_dtype", lambda *_: torch.float32)
    ours, plain = layer.pair()
    x, dy = layer.sample(torch.bfloat16), torch.randn(layer.shape)
    with torch.autocast("cpu", torch.bfloat16):
        y, actual = gradients(ours, x, dy)
    expected_y, expected = gradients(plain, x.float(), dy)
    assert torch.equal(y, expected_y)
    assert actual[0].dtype == torch.bfloat16
    assert_near(actual[1:], expected[1:], 0.01)
    assert relative_error(actual[0], expected[0]) < 0.01


# --- 8: torch.compile and the operator checks.


@with_exact_channels
def test_compiles_without_a_break_to_the_same_gradients(layer, exact, fresh_compiler):
    ours, _ = layer.pair()
    if layer.options.get("momentum", 0.1) is None:
        ours.momentum = 0.1  # torch.compile breaks at torch's own momentum=None too
    if exact:
        with torch.no_grad():
            ours.weight.flatten()[1] = 0.0
    x, dy = layer.sample(), torch.randn(layer.shape)
    compiled = copy.deepcopy(ours)
    y, expected = gradients(ours, x, dy)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    actual_y = function(x)
    torch.testing.assert_close(actual_y, y)
    actual = torch.autograd.grad(actual_y, [x, *compiled.parameters()], dy)
    assert_near(actual, expected, 1e-6)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value)


def test_output_and_rstd_cross_to_the_compiled_backward(fresh_compiler):
    norm, fc = inverted.LayerNorm(32), nn.Linear(32, 8)
    tensors = crossing(lambda x: fc(norm(x * 2)), torch.randn(64, 32, requires_grad=True))
    assert sum(t.numel() for t in tensors if t.shape == (64, 32)) == 64 * 32
    assert any(t.shape == (64,) for t in tensors)


def test_function_without_exact_channels_compiles_to_torch_s_own(fresh_compiler):
    def loss(x, weight, channels=None):
        return inverted.rms_norm(x, (8,), weight, exact_channels=channels).square().sum()

    x, weight = torch.randn(4, 8, requires_grad=True), torch.rand(8)
    weight[2] = 0
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (expected,) = torch.autograd.grad(loss(x, weight), x)
    for channels in (None, torch.tensor([2])):
        (actual,) = torch.autograd.grad(compiled(x, weight, channels), x)
        torch.testing.assert_close(actual, expected)


def test_refresh_reaches_a_compiled_region(fresh_compiler):
    norm = inverted.LayerNorm(8)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    x, dy = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    torch.autograd.grad(compiled(x), x, dy)
    with torch.no_grad():
        norm.weight[3] = 0
    (lost,) = torch.autograd.grad(compiled(x), norm.weight, dy)
    assert lost[3].isnan()
    norm.refresh()
    plain = nn.LayerNorm(8)
    plain.load_state_dict(norm.state_dict())
    (actual,) = torch.autograd.grad(compiled(x), norm.weight, dy)
    (expected,) = torch.autograd.grad(plain(x), plain.weight, dy)
    torch.testing.assert_close(actual, expected)


CHANNELS_TO_KEEP = [None, torch.tensor([4, 1])]


@pytest.mark.parametrize("channels", CHANNELS_TO_KEEP, ids=["inverted", "exact channels"])
def test_operators_pass_opcheck(channels):
    ops = torch.ops.packlight
    x, weight, bias = torch.randn(4, 6, 8), torch.rand(8) + 0.5, torch.rand(8) - 0.5
    dtype = torch.float32
    for centred, cast in ((True, None), (False, torch.bfloat16)):
        beta = bias if centred else None
        arguments = (x, [8], weight, beta, channels, 1e-5, centred, dtype, cast)
        torch.library.opcheck(ops.inverted_row_norm.default, arguments)
        y, narrow, rstd, exact = norm_ops.row_norm(*arguments)
        kept = y if cast is None else narrow
        arguments = (y, kept, [8], weight, beta, channels, rstd, exact, centred, dtype, True, True)
        torch.library.opcheck(ops.inverted_row_norm_backward.default, arguments)
    weight, bias = torch.rand(6) + 0.5, torch.rand(6) - 0.5
    running = (torch.zeros(6), torch.ones(6))
    image = torch.randn(2, 6, 4, 5)
    for x in (
        image,
        image.to(memory_format=torch.channels_last),
        torch.randn(2, 6, 4, 10)[..., ::2],
    ):
        arguments = (x, weight, bias, *running, channels, 0.1, 1e-5, dtype, dtype)
        torch.library.opcheck(ops.inverted_batch_norm.default, arguments)
        torch.library.opcheck(ops.inverted_instance_norm.default, arguments)
        group = (x, weight, bias, channels, 3, 1e-5, dtype, dtype)
        torch.library.opcheck(ops.inverted_group_norm.default, group)
        y, rstd, exact = norm_ops.group_norm(*group)
        arguments = (y, y, weight, bias, channels, rstd, exact, dtype, True, True)
        torch.library.opcheck(ops.inverted_channel_norm_backward.default, arguments)


# --- 9: checkpointing.


@every_layer
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_gives_the_same_gradients(layer, reentrant):
    ours, _ = layer.pair()
    x, dy = layer.sample(), torch.randn(layer.shape)
    _, expected = gradients(ours, x, dy)
    x.requires_grad_()
    checkpoint(ours, x, use_reentrant=reentrant).backward(dy)
    assert_near([x.grad, *(p.grad for p in ours.parameters())], expected, 1e-6)


# --- 11: NaN and infinity.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_nonfinite_inputs_are_never_silently_finite(layer, value):
    ours, plain = layer.pair()
    x, dy = layer.sample(), torch.randn(layer.shape)
    x.view(-1)[3] = value
    y, actual = gradients(ours, x, dy)
    expected_y, expected = gradients(plain, x, dy)
    torch.testing.assert_close(y, expected_y, equal_nan=True, rtol=1e-5, atol=1e-5)
    for a, b in zip(actual, expected, strict=True):
        assert not a[~b.isfinite()].isfinite().any()


def test_nonfinite_gradients_pass(layer):
    ours, plain = layer.pair()
    x, dy = layer.sample(), torch.randn(layer.shape)
    dy.view(-1)[3], dy.view(-1)[4] = math.nan, math.inf
    _, actual = gradients(ours, x, dy)
    _, expected = gradients(plain, x, dy)
    for a, b in zip(actual, expected, strict=True):
        assert not a[~b.isfinite()].isfinite().any()


# --- 12: what is refused.


@every_layer
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e5m2])
def test_other_dtypes_are_left_to_torch(layer, dtype):
    ours, plain = layer.pair()
    x = torch.ones(layer.shape).to(dtype)
    try:
        expected = plain(x)
    except RuntimeError:
        with pytest.raises((RuntimeError, InputError), match=r"takes float32|type|not implemented"):
            ours(x)
    else:
        assert torch.equal(ours(x), expected)


def test_torch_says_what_is_wrong():
    x = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        inverted.layer_norm(x, (5,))
    with pytest.raises(RuntimeError, match="weight"):
        inverted.layer_norm(x, (6,), torch.ones(5))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        inverted.BatchNorm1d(6)(x[:1])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        inverted.group_norm(torch.ones(1, 6, requires_grad=True), 6)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        inverted.instance_norm(torch.ones(2, 6, 1, requires_grad=True))
    with pytest.raises(ValueError, match="expected 4D input"):
        inverted.BatchNorm2d(6)(x)
    with pytest.raises(RuntimeError, match="divisible"):
        inverted.group_norm(x, 4)
    with pytest.raises(InputError, match="exact_channels is 3; expected"):
        inverted.layer_norm(x, (6,), torch.ones(6), exact_channels=3)
    with pytest.raises(InputError, match="takes a tensor, got list"):
        inverted.rms_norm([1.0], (1,))


def test_mixed_dtypes_are_torch_s_business():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.ones(4, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        inverted.layer_norm(x, (4,), weight)

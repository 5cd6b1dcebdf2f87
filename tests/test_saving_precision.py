"""`saving`: errors that a backward pass multiplies, masks in a group, sides in compiled regions."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import sharing
from packlight._seeds import rounding_seed
from packlight.groupquant import GroupQuant
from packlight.profile import profile
from packlight.saving import norms, packing, saving, tensors
from tests.helpers import relative_error

FOUR = GroupQuant(bits=4)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights_like(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)


def gradients(function, x: Tensor, parameters=(), method: GroupQuant | None = None):
    """Those of x and of parameters, for a weighted sum of what the function gives."""
    x = x.detach().clone().requires_grad_()
    packlight.manual_seed(1)
    with contextlib.nullcontext() if method is None else saving(method, min_bytes=0):
        y = function(x * 1)
    return torch.autograd.grad((y * weights_like(y)).sum(), [x, *parameters])


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).item()


# --- Inputs of norms.


def hardly_varying(*shape: int, axis: int, dtype=torch.float32) -> Tensor:
    """Of the slices along an axis: still, nearly still, far from 0, hardly varying, 0, ordinary."""
    x = torch.randn(shape).movedim(axis, 0).contiguous()
    x[1] = 1.2345
    x[2] = 1.2345 + 1e-5 * x[2]
    x[3] = -1000.0
    x[4] = 1.2345 + 1e-3 * x[4]
    x[5] = 0.0
    return x.movedim(0, axis).contiguous().to(dtype)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


IMAGES = (8, 16, 16, 16)
NORMS = {
    "batch": (lambda: nn.BatchNorm2d(16), IMAGES, 1, torch.Tensor.contiguous),
    "batch, channels last": (lambda: nn.BatchNorm2d(16), IMAGES, 1, last),
    "batch of rows": (lambda: nn.BatchNorm1d(16), (512, 16), 1, torch.Tensor.contiguous),
    "instance": (lambda: nn.InstanceNorm2d(16, affine=True), IMAGES, 1, torch.Tensor.contiguous),
    "group": (lambda: nn.GroupNorm(16, 16), IMAGES, 1, torch.Tensor.contiguous),
    "group, channels last": (lambda: nn.GroupNorm(16, 16), IMAGES, 1, last),
    "layer": (lambda: nn.LayerNorm(48), (128, 48), 0, torch.Tensor.contiguous),
    "layer, whole groups": (lambda: nn.LayerNorm(256), (64, 256), 0, torch.Tensor.contiguous),
    "RMS": (lambda: nn.RMSNorm(48), (128, 48), 0, torch.Tensor.contiguous),
    "RMS, whole groups": (lambda: nn.RMSNorm(256), (64, 256), 0, torch.Tensor.contiguous),
}


def check_norm(layer, x: Tensor, axis: int) -> None:
    exact = gradients(layer, x, layer.parameters())
    found = gradients(layer, x, layer.parameters(), FOUR)
    slices = zip(found[0].movedim(axis, 0), exact[0].movedim(axis, 0), strict=True)
    assert min(cosine(ours, theirs) for ours, theirs in slices if theirs.any()) > 0.98
    assert cosine(found[1], exact[1]) > 0.965
    if axis == 1:
        still = [1, 3, 5]
        assert (found[1] - exact[1])[still].abs().max() < 0.08 * exact[1].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("make", "shape", "axis", "layout"), NORMS.values(), ids=NORMS.keys())
def test_slices_that_hardly_vary_have_gradients(make, shape, axis, layout, dtype):
    x = layout(hardly_varying(*shape, axis=axis, dtype=dtype))
    check_norm(make().to(dtype), x, axis)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("make", "shape", "axis", "layout"), NORMS.values(), ids=NORMS.keys())
def test_slices_that_hardly_vary_on_a_device(make, shape, axis, layout, dtype):
    """Where other nodes keep the input, of cuDNN and of a fused RMS norm; nothing waits for it."""
    x = layout(hardly_varying(*shape, axis=axis, dtype=dtype)).cuda()
    layer = make().cuda()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        check_norm(layer, x, axis)
    y = x.requires_grad_() * 1
    try:
        torch.cuda.set_sync_debug_mode("error")
        with saving(FOUR, min_bytes=0):
            layer.to(dtype)(y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, last])
def test_a_batch_norm_with_running_statistics(layout):
    x = layout(hardly_varying(*IMAGES, axis=1))
    layer = nn.BatchNorm2d(16, momentum=1.0)
    layer(x)
    layer.eval()
    check_norm(layer, x, 1)
    other = nn.BatchNorm2d(16).eval()  # of which nothing is known of x
    check_norm(other, x, 1)


def test_16_bit_tensors_come_back_through_norms_of_32_bits():
    x = last(hardly_varying(*IMAGES, axis=1, dtype=torch.bfloat16))
    check_norm(nn.BatchNorm2d(16), x, 1)


def test_norms_within_autocast_and_checkpoints():
    layer = nn.LayerNorm(48)
    x = hardly_varying(128, 48, axis=0)

    def cast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    def block(x):
        with saving(FOUR, min_bytes=0):
            return layer(x)

    for function in (cast, lambda x: checkpoint(block, x, use_reentrant=False)):
        exact = gradients(cast if function is cast else layer, x, layer.parameters())
        found = gradients(function, x, layer.parameters(), FOUR)
        assert cosine(found[0], exact[0]) > 0.99
        assert cosine(found[1], exact[1]) > 0.97


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_norm_and_another_reader_share_no_pack(norm_first):
    layer, linear = nn.LayerNorm(48), nn.Linear(48, 48)
    x = hardly_varying(128, 48, axis=0)

    def model(x):
        parts = [lambda: layer(x), lambda: linear(x)]
        return sum(part() for part in (parts if norm_first else parts[::-1]))

    exact, found = (gradients(model, x, layer.parameters(), method) for method in (None, FOUR))
    assert cosine(found[0], exact[0]) > 0.99
    assert cosine(found[1], exact[1]) > 0.97


def test_an_input_that_is_kept_exactly_serves_a_norm():
    layer = nn.LayerNorm(64)
    x = torch.rand(64, 64, requires_grad=True) + 1
    with saving(FOUR, min_bytes=0):
        kept = x.log()
        assert sharing.is_kept_exactly(x)
        y = layer(x)
    with torch.no_grad():
        assert torch.equal(y.grad_fn._saved_input, x)
    del kept


def test_a_norm_keeps_a_pack_and_its_statistics():
    x = torch.randn(*IMAGES, requires_grad=True) * 1
    for layer in (nn.BatchNorm2d(16), nn.BatchNorm2d(16).eval(), nn.GroupNorm(4, 16)):
        with saving(FOUR):
            report = profile(layer, x)
        rows = [row.bytes for row in report.rows if row.dtype == "float32"]
        codes = sum(row.bytes for row in report.rows if row.dtype in ("uint8", "int32"))
        assert codes == x.numel() // 2 + x.numel() // 32
        assert max(rows) <= 4 * 8 * 4  # of a channel, or of a group
        assert sum(rows) <= 3 * 128 + 8  # torch's two, and a measured deviation


@pytest.mark.parametrize("eps", [1e-6, 0.0])  # 0 where nothing says it
def test_an_rms_norm_has_no_mean(eps):
    x = hardly_varying(128, 48, axis=0) * torch.logspace(-4, 4, 128).view(-1, 1)
    rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    statistics = norms.Statistics(norms.NORMS["FusedRmsNorm"], None, rstd, eps)
    found = norms.Normalised.of(x, statistics, lambda values: packing.pack(values, FOUR))
    assert found is not None
    with torch.no_grad():
        assert ((found.unpack() - x) * rstd).abs().max() < 0.7  # a step of values from -5 to 5


def test_statistics_that_are_many_stay_exact():
    x = torch.randn(64, 64, 4, 4) * torch.logspace(-3, 3, 64).view(-1, 1, 1, 1)
    layer = nn.GroupNorm(16, 64)
    exact, found = (gradients(layer, x, layer.parameters(), one) for one in (None, FOUR))
    slices = zip(found[0], exact[0], strict=True)
    assert min(cosine(ours, theirs) for ours, theirs in slices) > 0.98


def test_a_norms_input_has_its_strides_and_saturates():
    x = (60000 + 1000 * torch.rand(64, 33)).half().requires_grad_() * 1
    with saving(GroupQuant(2), min_bytes=0):
        y = F.batch_norm((x * 1.05).t()[:, :32], None, None, training=True)
    with torch.no_grad():
        back = y.grad_fn._saved_input
    assert back.isfinite().all()
    assert back.dtype == torch.float16
    assert (back - (x * 1.05).t()[:, :32]).abs().max() < 1000


def test_a_nan_in_a_norms_input_is_loud(monkeypatch):
    monkeypatch.setattr(tensors, "is_extreme", lambda *_: False)  # as on a GPU
    x = torch.randn(64, 64)
    x[3, 3] = math.nan
    (found,) = gradients(nn.LayerNorm(64), x, (), FOUR)
    assert found[3].isnan().all()


# --- Masks in the input of an activation.

ACTIVATIONS = {
    "softplus": F.softplus,
    "steep softplus": lambda x: F.softplus(x, 3.0, 1.0),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 1, inplace=True),
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "elu in place": lambda x: F.elu(x * 1, inplace=True),
    "elu with a jump": lambda x: F.elu(x, 2.0),
    "celu": lambda x: F.celu(x, 0.5),
    "celu in place": lambda x: F.celu(x * 1, 0.5, inplace=True),
    "selu": torch.selu,
    "logsigmoid": F.logsigmoid,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "glu": lambda x: F.glu(torch.cat([torch.ones_like(x), x], -1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_masks_leave_their_neighbours_a_step(function, dtype, monkeypatch):
    monkeypatch.setattr(tensors, "is_extreme", lambda *_: False)  # as on a GPU
    hidden = torch.rand(64, 256, generator=torch.Generator().manual_seed(5)) < 0.05
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(6)).to(dtype)
    for value in (-1e4, 1e4, torch.finfo(dtype).min, torch.finfo(dtype).max):
        masked = x.masked_fill(hidden, value)
        (exact,), (found,) = gradients(function, masked), gradients(function, masked, (), FOUR)
        # A step is that of values from -14.5 to 3, which are ordinary for a Mish, and not of 10000.
        assert relative_error(found[~hidden], exact[~hidden]) < 0.32
        if exact.isfinite().all():
            # In place the derivative is read off the result, which offsets have off by half a step.
            assert (found - exact)[hidden].abs().max() <= 0.06 * exact[~hidden].abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_infinities_have_torchs_derivative(function, dtype, monkeypatch):
    monkeypatch.setattr(tensors, "is_extreme", lambda *_: False)  # as on a GPU
    method = GroupQuant(8, rounding="nearest")
    for value in (math.inf, -math.inf, math.nan):
        x = torch.randn(64, 128).to(dtype)
        x[:, 5] = value
        (exact,), (found,) = gradients(function, x), gradients(function, x, (), method)
        if exact[:, 5].isnan().any():
            assert found[:, 5].isnan().all()
        else:
            torch.testing.assert_close(found[:, 5], exact[:, 5], rtol=0.02, atol=0.02)
            if value == value:  # the neighbours of a NaN may be NaN
                assert relative_error(found, exact) < 0.1


def test_an_activation_and_another_reader_share_no_pack():
    hidden = torch.rand(64, 128) < 0.1
    linear = nn.Linear(128, 128)
    x = torch.randn(64, 128).masked_fill(hidden, -1e4)

    def model(x):
        return linear(x) * 1e-4 + F.silu(x)

    exact, found = (gradients(model, x, linear.parameters(), one) for one in (None, FOUR))
    assert relative_error(found[0][~hidden], exact[0][~hidden]) < 0.32
    assert relative_error(found[1], exact[1]) < 0.1  # reads the masks too


# --- Sides in compiled regions.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_codes_with_sides(dtype, bits, rounding):
    method = GroupQuant(bits, 64, rounding)
    x = torch.randn(23, 61)
    x[:5] = x[:5].relu()
    x[5:10] = -x[5:10].relu()
    x[10:15] = F.leaky_relu(x[10:15], 0.01)
    x[15:17] += 4
    x[17] = 0
    x[18:20] = x[18:20].relu().square() * 1e-4
    x = x.to(dtype).requires_grad_() * 1
    plain = packing.pack(x.detach(), method)
    found = packing.pack(x.detach(), method, is_compiled=True).unpack
    with torch.no_grad():
        back = found()
    assert torch.equal(back > 0, x > 0)
    assert (back[17] <= 0).all()
    assert (back[:5][x[:5] == 0].count_nonzero()) <= 61  # a group that ends in what follows
    steps = (x.detach().amax() - x.detach().amin()) / (2**bits - 1) * 1.02
    assert (back - x).abs().max() <= steps
    assert plain is not None


def test_zeros_of_a_relu_are_exactly_that():
    x = torch.randn(64, 128).relu()
    codes, scales = GroupQuant(8).pack(x, rounding_seed(x))
    with torch.no_grad():
        back = packing.pack(x, GroupQuant(8), is_compiled=True).unpack()
    assert torch.equal(back == 0, x == 0)
    changed = GroupQuant(8).with_sides(x.flatten(), codes, scales)[0] != codes
    assert 0 < changed.sum() < 0.02 * x.numel()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.PReLU])
def test_compiled_activations_have_exact_sides(activation):
    layers = [
        *(nn.Conv2d(3, 16, 3, padding=1), activation(), nn.Conv2d(16, 16, 3, padding=1)),
        *(activation(), nn.Conv2d(16, 8, 3, padding=1)),
    ]
    model = nn.Sequential(*layers)
    x = torch.randn(8, 3, 32, 32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    weights = [layers[index].weight for index in (0, 2, 4)]

    def weight_gradients(context) -> tuple[Tensor, ...]:
        with context:
            y = compiled(x)
        return torch.autograd.grad(y.square().mean(), weights)

    exact = weight_gradients(contextlib.nullcontext())
    for rounding in ("stochastic", "nearest"):
        found = weight_gradients(saving(GroupQuant(4, rounding=rounding)))
        # One flipped side of 200 would be an error of 0.006.
        assert max(relative_error(a, b) for a, b in zip(found, exact, strict=True)) < 0.003

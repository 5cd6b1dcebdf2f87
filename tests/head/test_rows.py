"""The loss of rows by chunks: against float64, and kernels against the reference."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import packlight
from packlight import GroupQuant
from packlight.head import kernels, linear_cross_entropy, reference, rows
from tests.helpers import (
    DTYPES,
    EPSILON,
    dtype_name,
    every_device,
    every_kernel_dtype,
    kept_bytes,
    pack_bytes,
    relative_error,
)

WIDTH, CLASSES = 24, 151


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 or 16 rows or columns."""
    monkeypatch.setattr(rows, "_ELEMENTS", {"cpu": 16 * CLASSES})
    monkeypatch.setattr(rows, "_LEAST", {"cpu": 8})
    monkeypatch.setattr(rows, "_TILE", 8)


def problem(count=53, dtype=torch.float32, trained=True, bias=True):
    x = torch.randn(count, WIDTH).to(dtype).requires_grad_()
    w = (torch.randn(CLASSES, WIDTH) * 0.5).to(dtype).requires_grad_(trained)
    b = torch.randn(CLASSES).to(dtype).requires_grad_(trained) if bias else None
    target = torch.randint(CLASSES, (count,))
    target[::5] = -100
    return x, w, b, target


def plain(x, w, b, target, logit_scale=1.0, softcap=None, **options):
    z = F.linear(x, w, b) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z.float() if z.dtype.itemsize == 2 else z, target, **options)


def gradients(function, x, w, b, target, **options):
    leaves = [one for one in (x, w, b) if one is not None and one.requires_grad]
    loss = function(x, w, b, target, **options)
    torch.manual_seed(3)
    return loss.detach(), *torch.autograd.grad(loss, leaves, torch.randn(loss.shape).to(loss))


def ours(x, w, b, target, **options):
    return linear_cross_entropy(x, w, target, linear_bias=b, **options)


# Of a single number, whose own error in torch may be any: a few units of its last place.
SLACK = {
    torch.float64: 1e-14,
    torch.float32: 4e-7,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-3,
}

WAYS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.2},
    "scale": {"logit_scale": 0.3},
    "cap": {"softcap": 3.0},
    "cap, scale and smoothing": {"softcap": 2.0, "logit_scale": 4.0, "label_smoothing": 0.1},
    "ignored": {"ignore_index": 3},
    "all smoothed": {"label_smoothing": 1.0},
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.usefixtures("small_chunks", "poison")
def test_loss_and_gradients_are_as_near_the_truth_as_torchs(dtype, way, trained):
    x, w, b, target = problem(dtype=dtype, trained=trained)
    found = gradients(
        ours, x, w, b, target.clamp(min=0) if way == "ignored" else target, **WAYS[way]
    )
    wide = [one.detach().double().requires_grad_(one.requires_grad) for one in (x, w, b)]
    target = target.clamp(min=0) if way == "ignored" else target
    truth = gradients(plain, *wide, target, **WAYS[way])
    torchs = gradients(plain, x, w, b, target, **WAYS[way])
    assert len(found) == (4 if trained else 2)
    for mine, theirs, true in zip(found, torchs, truth, strict=True):
        assert mine.dtype == theirs.dtype
        allowed = 1.5 * relative_error(theirs, true) + SLACK[dtype]
        assert relative_error(mine, true) <= allowed


@settings(max_examples=25)
@given(
    count=st.integers(0, 40),
    classes=st.integers(1, 40),
    elements=st.integers(1, 400),
    tile=st.integers(1, 9),
    trained=st.booleans(),
)
def test_any_shape_in_any_chunks(count, classes, elements, tile, trained):
    patch = pytest.MonkeyPatch()
    patch.setattr(rows, "_ELEMENTS", {"cpu": elements})
    patch.setattr(rows, "_LEAST", {"cpu": 1})
    patch.setattr(rows, "_TILE", tile)
    torch.manual_seed(count)
    x = torch.randn(count, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(classes, 5, dtype=torch.float64, requires_grad=trained)
    target = torch.randint(classes, (count,))
    with patch.context():
        found = gradients(ours, x, w, None, target, reduction="sum", label_smoothing=0.1)
    truth = gradients(plain, x, w, None, target, reduction="sum", label_smoothing=0.1)
    for mine, true in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, true)


def test_weighted_classes_and_rows_of_any_shape():
    x, w, b, target = problem()
    weight = torch.rand(CLASSES)
    found = gradients(ours, x, w, b, target, weight=weight)
    truth = gradients(plain, x, w, b, target, weight=weight)
    torch.testing.assert_close(found, truth)
    some = linear_cross_entropy(
        x[:50].view(5, 10, WIDTH), w, target[:50].view(5, 10), reduction="none"
    )
    assert some.shape == (5, 10)
    all_ignored = linear_cross_entropy(x, w, torch.full_like(target, -100))
    assert all_ignored.isnan()  # as torch's


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_what_is_kept(trained):
    count = 64
    x, w, b, target = problem(count, trained=trained)
    a_row = 4 * WIDTH + (4 + 8 if trained else 0) + 1  # sums and targets, and which rows count
    kept = kept_bytes(lambda: linear_cross_entropy(x, w, target, linear_bias=b))
    parameters = 4 * (CLASSES * WIDTH + CLASSES) if trained else 0
    assert kept <= parameters + count * a_row + 8


def test_a_pack_stands_for_the_input_and_is_as_fine_as_for_scores():
    x, w, _, target = problem(128, bias=False)
    method = GroupQuant(bits=4, group_size=32)
    kept = kept_bytes(lambda: linear_cross_entropy(x, w, target, method=method))
    exact = kept_bytes(lambda: linear_cross_entropy(x, w, target))
    assert exact - kept == x.nbytes - pack_bytes(x.numel(), 8, 32)
    found = gradients(ours, x, w, None, target, method=method)
    truth = gradients(plain, x, w, None, target)
    assert torch.equal(found[0], gradients(ours, x, w, None, target)[0])
    assert 0 < relative_error(found[1], truth[1]) < 0.02
    assert 0 < relative_error(found[2], truth[2]) < 0.02


def test_a_norms_pack_serves_the_head():
    method = GroupQuant(bits=8, group_size=32)
    w = torch.randn(CLASSES, 32, requires_grad=True)
    x = torch.randn(64, 32, requires_grad=True)
    target = torch.randint(CLASSES, (64,))
    norm = packlight.groupquant.RMSNorm(32, bits=8, group_size=32)
    both = kept_bytes(lambda: linear_cross_entropy(norm(x), w, target, method=method))
    assert both - kept_bytes(lambda: norm(x)) <= w.nbytes + 64 * 13 + 64


def test_under_autocast_the_products_are_narrow_and_the_gradients_wide():
    x, w, b, target = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(ours, x, w, b, target)
        torchs = gradients(plain, x, w, b, target)
    truth = gradients(plain, x, w, b, target)
    for mine, theirs, true in zip(found, torchs, truth, strict=True):
        assert mine.dtype == torch.float32
        assert relative_error(mine, true) < 1.5 * relative_error(theirs, true) + 1e-3


def test_a_second_backward_pass_and_a_second_derivative():
    x, w, b, target = problem()
    loss = ours(x, w, b, target)
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, x, retain_graph=True)[0])
    with pytest.raises(packlight.DoubleBackwardError):
        torch.autograd.grad(loss, x, create_graph=True)


def test_a_head_that_was_stepped_is_told():
    x, w, b, target = problem()
    loss = ours(x, w, b, target)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(packlight.ModifiedWeightError):
        loss.backward()


@pytest.mark.parametrize(
    "changes",
    [
        {"target": torch.zeros(53)},
        {"target": torch.zeros(52, dtype=torch.int64)},
        {"linear_weight": torch.randn(7, WIDTH + 1)},
        {"linear_bias": torch.randn(3)},
        {"linear_weight": torch.randn(CLASSES, WIDTH, dtype=torch.float64)},
        {"reduction": "average"},
        {"label_smoothing": 1.5},
        {"softcap": 0.0},
        {"weight": torch.ones(3)},
        {"weight": torch.ones(CLASSES), "label_smoothing": 0.1},
    ],
)
def test_what_does_not_fit_is_refused(changes):
    x, w, b, target = problem()
    arguments = {"linear_weight": w, "target": target, "linear_bias": b, **changes}
    with pytest.raises(packlight.InputError):
        linear_cross_entropy(x, arguments.pop("linear_weight"), **arguments)
    with pytest.raises(RuntimeError):  # as torch's, and not a wrong number
        linear_cross_entropy(x, w, torch.full_like(target, CLASSES))


# ---- kernels -------------------------------------------------------------------------------------

CURVES = {"plain": (1.0, 0.0), "scaled": (0.25, 0.0), "capped": (0.4, 5.0)}


def chunk(dtype, device, width):
    torch.manual_seed(0)
    # Rows that lie apart, as those of odd lengths do.
    z = torch.full((5, width + 7), torch.nan, dtype=dtype, device=device)[:, :width]
    z.copy_(torch.randn(5, width) * 4)
    z[0, 1:4] = -torch.inf  # classes that a mask forbids
    return z


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("classes", [3, 16, 17, 151])
def test_rows_of_logits_begin_where_tensor_cores_want_them(classes, bias):
    x, w = torch.randn(5, WIDTH), torch.randn(classes, WIDTH)
    b = torch.randn(classes) if bias else None
    z = rows._logits(x, w, b)
    torch.testing.assert_close(z, F.linear(x, w, b))
    assert z.stride(1) == 1
    assert z.stride(0) % 16 == 0 or classes < 16


@every_device
@every_kernel_dtype
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("width", [1, 33, 2048, 5000])
def test_sums_of_rows_by_the_kernel(dtype, device, curve, width):
    z = chunk(dtype, device, width)
    scale, cap = CURVES[curve]
    found = kernels.row_sums(z, scale, cap)
    for mine, true in zip(found, reference.row_sums(z.double(), scale, cap), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=2e-6, atol=2e-4)


@every_device
@every_kernel_dtype
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("width", [1, 33, 2048, 5000])
def test_gradients_by_the_kernel(dtype, device, curve, width):
    z = chunk(dtype, device, width)
    scale, cap = CURVES[curve]
    logsumexp = reference.row_sums(z, scale, cap)[0]
    targets = torch.tensor([0, 7, 6 + width, 5, 2], device=device)
    on_softmax = torch.tensor([1.0, -0.5, 0.0, 2.0, 1e-3], device=device)
    ons = (on_softmax, -0.9 * on_softmax, on_softmax.roll(1) / width)
    truth = z.double()
    wide = [one.double() for one in (logsumexp, *ons)]
    reference.gradient_(truth, wide[0], targets, *wide[1:], 7, scale, cap)
    kernels.gradient_(z, logsumexp, targets, *ons, 7, scale, cap)
    torch.testing.assert_close(z.double(), truth, rtol=EPSILON[dtype], atol=1e-6)
    assert z._base[:, width:].isnan().all()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="needs torch 2.13")
def test_gradients_that_torchs_own_hides_are_counted():
    x, w, _, target = problem(bias=False)
    options = torch.nn.LinearCrossEntropyOptions()
    report = packlight.profile(
        lambda: F.linear_cross_entropy(x, w, target.clamp(min=0), options=options)
    )
    assert report.activation_bytes == w.nbytes + x.nbytes  # their gradients

"""Batch norm and group norm that keep a group-quantised normalised value."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from packlight import groupquant
from packlight._seeds import operands
from packlight.errors import DoubleBackwardError, InputError
from tests.helpers import DTYPES, dtype_name, kept_bytes, pack_bytes

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def plain_batch_norm(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, True)


def batch_norm(x, weight, bias, **options):
    return groupquant.batch_norm(x, None, None, weight, bias, True, **options)


def plain_group_norm(x, weight, bias):
    return F.group_norm(x, 2, weight, bias)


def group_norm(x, weight, bias, **options):
    return groupquant.group_norm(x, 2, weight, bias, **options)


NORMS = {"batch": (batch_norm, plain_batch_norm), "group": (group_norm, plain_group_norm)}
every_norm = pytest.mark.parametrize(("norm", "plain"), NORMS.values(), ids=NORMS.keys())


def inputs(dtype=torch.float32, shape=(8, 6, 7, 5)):
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias = torch.randn(shape[1], dtype=kind), torch.randn(shape[1], dtype=kind)
    x = (torch.randn(shape) * 2 + 1).to(dtype)
    if dtype in (torch.bfloat16, torch.float16):
        weight, bias = weight.to(dtype), bias.to(dtype)
    return [t.requires_grad_() for t in (x, weight, bias)]


@every_norm
@every_dtype
def test_forward_is_torch_s_and_gradients_are_near(norm, plain, dtype):
    leaves = inputs(dtype)
    y, expected = norm(*leaves, bits=8, rounding="nearest"), plain(*leaves)
    assert torch.equal(y, expected)
    dy = expected.detach() + torch.randn_like(expected)
    ours = torch.autograd.grad(y, leaves, dy)
    exact = torch.autograd.grad(expected, leaves, dy)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()
    tolerance = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    torch.testing.assert_close(ours[2], exact[2], rtol=tolerance, atol=tolerance)


@every_norm
def test_layouts(norm, plain):
    for view in (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
        lambda x: x[:, :, ::2],
        lambda x: x[..., 0].contiguous(),
        lambda x: x.unsqueeze(2),
    ):
        leaves = inputs()
        leaves[0] = view(leaves[0].detach()).requires_grad_()
        y, expected = norm(*leaves, bits=8), plain(*leaves)
        torch.testing.assert_close(y, expected)
        assert y.stride() == expected.stride()
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, leaves[:1], dy)
        (exact,) = torch.autograd.grad(expected, leaves[:1], dy)
        assert (dx - exact).norm() <= 0.05 * exact.norm()


@every_norm
def test_weight_gradient_is_unbiased(norm, plain):
    leaves = inputs()
    dy = torch.randn_like(leaves[0])
    (exact,) = torch.autograd.grad(plain(*leaves), leaves[1:2], dy)
    draws = torch.stack(
        [torch.autograd.grad(norm(*leaves, bits=2), leaves[1:2], dy)[0] for _ in range(200)]
    )
    error = (draws.mean(0) - exact) / (draws.std(0) / math.sqrt(200))
    assert draws.std(0).min() > 0
    assert error.abs().max() < 4


@every_norm
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_keeps_a_pack(norm, plain, bits):
    leaves = inputs()
    kept = kept_bytes(lambda: norm(*leaves, bits=bits))
    small = 3 * 6 * 4 if norm is batch_norm else 2 * 6 * 4 + 8 * 2 * 4
    assert kept == pack_bytes(leaves[0].numel(), bits) + small


@every_norm
def test_how_autograd_may_use_it(norm, plain):
    leaves = inputs()
    y = norm(*leaves)
    first = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with torch.no_grad():
        assert torch.equal(norm(*leaves), plain(*leaves))
    x, weight, bias = (t.detach() for t in leaves)
    (dbias,) = torch.autograd.grad(norm(x, weight, bias.requires_grad_()).sum(), bias)
    torch.testing.assert_close(dbias, torch.full((6,), 8 * 35.0))
    y = norm(x.requires_grad_(), None, None)
    assert torch.equal(y, plain(x, None, None))
    assert torch.autograd.grad(y.square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_norm
def test_nonfinite_inputs_are_never_silently_finite(norm, plain, value):
    leaves = inputs()
    with torch.no_grad():
        leaves[0][3, 1, 2, 2] = value
    y = norm(*leaves)
    dx, dweight, _ = torch.autograd.grad(y.sum(), leaves)
    exact = torch.autograd.grad(plain(*leaves).sum(), leaves)
    assert not dx[~exact[0].isfinite()].isfinite().any()
    assert not dweight[~exact[1].isfinite()].isfinite().any()


def test_autocast_runs_group_norm_as_torch_does():
    leaves = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = group_norm(*leaves), plain_group_norm(*leaves)
    assert torch.equal(y, expected)
    assert y.dtype == expected.dtype


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm"])
def test_modules_are_drop_in(name):
    arguments = (2, 6) if name == "GroupNorm" else (6,)
    plain, ours = getattr(nn, name)(*arguments), getattr(groupquant, name)(*arguments, bits=8)
    assert isinstance(ours, type(plain))
    ours.load_state_dict(plain.state_dict())
    ours = pickle.loads(pickle.dumps(ours))
    shown = ", bits=8, group_size=128, rounding=stochastic, code=minmax)"
    assert repr(ours) == repr(plain)[:-1] + shown
    axes = 2 if name == "GroupNorm" else int(name[-2])
    for _ in range(2):
        x = torch.randn(32, 6, *[3] * axes, requires_grad=True)
        assert torch.equal(ours(x), plain(x))
    assert kept_bytes(lambda: ours(x)) < x.nbytes / 3
    plain(x)
    for a, b in zip(ours.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.eval()(x), plain.eval()(x))


def test_opcheck():
    operators = torch.ops.packlight
    seed = torch.tensor([5])
    images = torch.randn(4, 4, 6, 6)
    for x in (images, images.contiguous(memory_format=torch.channels_last)):
        affine = (torch.ones(4), torch.zeros(4))
        running = (torch.zeros(4), torch.ones(4))
        forward = (x, *affine, *running, 0.1, 1e-5, (4, 64), *operands(seed))
        torch.library.opcheck(operators.group_quant_batch_norm.default, forward)
        y, *kept = operators.group_quant_batch_norm(*forward)
        backward = (y, *kept, 1e-5, list(y.stride()), (4, 64))
        torch.library.opcheck(operators.group_quant_batch_norm_backward.default, backward)
        forward = (x, 2, *affine, 1e-5, (4, 64), *operands(None))
        torch.library.opcheck(operators.group_quant_group_norm.default, forward)
        y, *kept = operators.group_quant_group_norm(*forward)
        backward = (y, *kept, 1e-5, list(y.stride()), (4, 64))
        torch.library.opcheck(operators.group_quant_group_norm_backward.default, backward)


def test_refusals():
    x = torch.zeros(32, 6, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="int64"):
        batch_norm(x, None, None)
    with pytest.raises(InputError, match="not 2, 3, 4 or 8"):
        group_norm(torch.zeros(32, 6, 4), None, None, bits=5)
    with pytest.raises(RuntimeError, match="divisible"):
        groupquant.group_norm(torch.randn(32, 6, 4, requires_grad=True), 4)

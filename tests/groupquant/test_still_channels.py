"""Channels and rows of little variance, whose gradients are multiplied by up to 1 / sqrt(eps)."""

import pytest
import torch
import torch.nn.functional as F

from packlight import groupquant, inverted
from packlight.groupquant import fixed_point
from packlight.groupquant.fixed_point import kernels, ops
from packlight.groupquant.fixed_point.method import bin_width

# Deviations of the channels' values: none, far below sqrt(eps) = 0.003, near it, ordinary.
DEVIATIONS = (0.0, 1e-5, 1e-3, 1.0)


def fixed(bits):
    def norm(x, weight, bias):
        return fixed_point.batch_norm(x, None, None, weight, bias, True, bits=bits)

    return norm


def group_batch(rounding):
    def norm(x, weight, bias):
        return groupquant.batch_norm(x, None, None, weight, bias, True, rounding=rounding)

    return norm


def group_group(groups):
    def norm(x, weight, bias):
        return groupquant.group_norm(x, groups, weight, bias, rounding="nearest")

    return norm


def plain_batch(x, weight, bias):
    return F.batch_norm(x, None, None, weight, bias, True)


NORMS = {
    "fixed point, 4 bits": (fixed(4), plain_batch),
    "fixed point, 8 bits": (fixed(8), plain_batch),
    "batch, nearest": (group_batch("nearest"), plain_batch),
    "batch, stochastic": (group_batch("stochastic"), plain_batch),
    "group": (group_group(4), lambda x, weight, bias: F.group_norm(x, 4, weight, bias)),
    "instance": (group_group(8), lambda x, weight, bias: F.group_norm(x, 8, weight, bias)),
}
SHAPES = {
    "a few values a channel": ((32, 8, 3, 3), lambda x: x),
    "channels-last": ((16, 8, 6, 6), lambda x: x.contiguous(memory_format=torch.channels_last)),
}


def check(norm, plain, x, weight, bias, axes, rows):
    """Gradients of rows without variance are exact, and their sums, which are bias gradients."""
    dy = torch.randn_like(x) + 1
    leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    y, expected = norm(*leaves), plain(*leaves)
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y, leaves, dy)
    exact = torch.autograd.grad(expected, leaves, dy)
    scale = exact[0].abs().sum(axes, keepdim=True).expand_as(x)[rows]
    error = (ours[0] - exact[0]).sum(axes, keepdim=True).expand_as(x)[rows]
    assert (error.abs() <= 1e-4 * scale + 1e-6).all()
    torch.testing.assert_close(ours[0][rows], exact[0][rows], rtol=1e-3, atol=2e-2)
    assert (ours[0] - exact[0]).norm() <= 0.2 * exact[0].norm()
    return ours, exact


@pytest.mark.parametrize(("norm", "plain"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize(("shape", "layout"), SHAPES.values(), ids=SHAPES)
def test_channels_without_variance(norm, plain, shape, layout):
    deviations = torch.tensor([d for d in DEVIATIONS for _ in range(2)]).view(-1, 1, 1)
    x = layout(torch.randn(shape) * deviations + 0.5)
    weight, bias = torch.rand(8) + 0.5, torch.randn(8)
    still = (slice(None), slice(0, 2))
    axes = (2, 3) if norm in (NORMS["group"][0], NORMS["instance"][0]) else (0, 2, 3)
    ours, exact = check(norm, plain, x, weight, bias, axes, still)
    # Of each channel by itself, whatever lies beside it in a group.
    error = (ours[0] - exact[0]).square().sum((0, 2, 3)) / exact[0].square().sum((0, 2, 3))
    assert error.max() < 0.25**2


@pytest.mark.parametrize("bits", [4, 8])
def test_kernels_and_reference_agree_on_channels_of_any_variance(bits):
    x = torch.randn(16, 8, 4, 4) * torch.tensor(DEVIATIONS * 2).view(-1, 1, 1) + 0.5
    weight, bias = torch.randn(8), torch.randn(8)
    forward = (x, weight, bias, None, None, 0.1, 1e-5, bits, bin_width(bits, None))
    ours, theirs = kernels.batch_norm(*forward), ops.batch_norm(*forward)
    torch.testing.assert_close(ours[2][:, 2:4], theirs[2][:, 2:4], rtol=1e-3, atol=1e-3)
    dy = torch.randn_like(x) + 1
    for (_, codes, table), backward in ((ours, kernels), (theirs, ops)):
        layout = (x.stride(), bits, False, None)
        dx = backward.batch_norm_backward(dy, codes, table, *layout)[0]
        sums = dx.sum((0, 2, 3)).abs() / dx.abs().sum((0, 2, 3))
        assert sums[[0, 4]].max() < 1e-5


ROW_NORMS = {
    "layer": (groupquant.layer_norm, F.layer_norm),
    "inverted": (inverted.layer_norm, F.layer_norm),
}


@pytest.mark.parametrize(("norm", "plain"), ROW_NORMS.values(), ids=ROW_NORMS)
@pytest.mark.parametrize("width", [32, 100, 128])
def test_rows_without_variance(norm, plain, width):
    x = torch.randn(8, width)
    x[:4] = 0.5
    weight, bias = torch.rand(width) + 0.5, torch.randn(width) * 0.2

    def ours(x, weight, bias):
        return norm(x, (width,), weight, bias)

    def exact(x, weight, bias):
        return plain(x, (width,), weight, bias)

    check(ours, exact, x, weight, bias, (1,), slice(0, 4))


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_rebuilt_of_a_channel_without_variance_is_its_bias(bits):
    x = torch.randn(16, 8, 4, 4)
    x[:, :2] = 0.25
    weight, bias = torch.rand(8) + 0.5, torch.randn(8)
    y, codes, table = ops.batch_norm(
        x, weight, bias, None, None, 0.1, 1e-5, bits, bin_width(bits, None)
    )
    for relu in (False, True):
        rebuilt = ops.rebuild(codes, table, x.shape, x.stride(), bits, torch.float32, relu)
        expected = y.relu() if relu else y
        assert (rebuilt - expected)[:, :2].abs().max() < 2e-3
    # A Linear that reads a group-quantised one sees the same.
    leaf = x.requires_grad_()
    for norm in (group_batch("nearest"), group_group(8)):
        kept = packed_output(norm, leaf, weight, bias)
        assert (kept[1] - kept[0])[:, :2].abs().max() < 2e-3


def packed_output(norm, x, weight, bias):
    """The output and what its readers rebuild."""
    from packlight import sharing

    y = norm(x, weight, bias)
    pack = sharing.pack_of(y)
    return y.detach(), pack.rebuild(torch.float32, *pack.tensors).view_as(y).detach()

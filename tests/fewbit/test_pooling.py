"""Max pooling that keeps window offsets, against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import packlight.fewbit as few_bit
from packlight.errors import DoubleBackwardError, InputError
from packlight.packing.layout import packed_bytes
from tests.helpers import kept_bytes

OURS = {1: few_bit.max_pool1d, 2: few_bit.max_pool2d, 3: few_bit.max_pool3d}
PLAIN = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
MODULES = {
    1: (few_bit.MaxPool1d, nn.MaxPool1d),
    2: (few_bit.MaxPool2d, nn.MaxPool2d),
    3: (few_bit.MaxPool3d, nn.MaxPool3d),
}


def compare(x, axes, *arguments, **options):
    x = x.detach().requires_grad_()
    y, index = OURS[axes](x, *arguments, return_indices=True, **options)
    expected, expected_index = PLAIN[axes](x, *arguments, return_indices=True, **options)
    assert torch.equal(y, expected)
    assert torch.equal(index, expected_index)
    assert not index.requires_grad
    dy = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(y, x, dy)
    (plain,) = torch.autograd.grad(expected, x, dy)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6}.get(x.dtype, 2e-2)
    torch.testing.assert_close(dx, plain, rtol=tolerance, atol=tolerance)
    assert dx.stride() == plain.stride()


@given(st.data())
def test_equals_torch(data):
    axes = data.draw(st.integers(1, 3), "axes")
    kernel = [data.draw(st.integers(1, 4)) for _ in range(axes)]
    stride = data.draw(st.one_of(st.none(), st.tuples(*[st.integers(1, 3)] * axes)), "stride")
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    dilation = [data.draw(st.integers(1, 2)) for _ in range(axes)]
    size = [
        d * (k - 1) + 1 + data.draw(st.integers(0, 4))
        for d, k in zip(dilation, kernel, strict=True)
    ]
    leading = data.draw(st.sampled_from([(2, 3), (3,), (1, 1)]), "leading")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    # Few values, so that ties are common.
    x = torch.randint(-3, 4, (*leading, *size)).to(dtype)
    ceil = data.draw(st.booleans(), "ceil_mode")
    compare(x, axes, kernel, stride, padding, dilation, ceil_mode=ceil)


@pytest.mark.parametrize("axes", [2, 3])
def test_channels_last_stays(axes):
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[axes]
    x = torch.randn(2, 3, *[6] * axes).to(memory_format=layout)
    compare(x, axes, 3, 2, 1)
    assert OURS[axes](x.requires_grad_(), 3, 2, 1).is_contiguous(memory_format=layout)


def test_windows_of_more_than_256_elements():
    compare(torch.randn(2, 2, 40, 40), 2, 20, 10)
    x = torch.randn(1, 3, 40, 40, requires_grad=True)
    assert kept_bytes(lambda: few_bit.max_pool2d(x, 20, 10)) == packed_bytes(27, 8) + packed_bytes(
        27, 1
    )


def test_infinities_and_nan():
    x = torch.full((1, 1, 6, 6), -math.inf)
    compare(x, 2, 2)
    x[0, 0, 1, 1] = math.nan
    y = few_bit.max_pool2d(x.requires_grad_(), 2, ())
    assert y[0, 0, 0, 0].isnan()
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx[0, 0, 1, 1] == 1


@pytest.mark.parametrize(
    ("kernel", "bits"), [(2, 2), (3, 4), ((2, 1), 1), ((1, 1), 1), (4, 4), (5, 5)]
)
def test_keeps_the_bits_of_an_offset(kernel, bits):
    x = torch.randn(2, 8, 20, 20, requires_grad=True)
    count = F.max_pool2d(x, kernel).numel()
    assert kept_bytes(lambda: few_bit.max_pool2d(x, kernel)) == packed_bytes(count, bits)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_modules(axes):
    ours, plain = (kind(3, 2, padding=1, ceil_mode=True) for kind in MODULES[axes])
    assert repr(ours) == repr(plain)
    x = torch.randn(2, 2, *[7] * axes, requires_grad=True)
    assert torch.equal(ours(x), plain(x))
    assert kept_bytes(lambda: ours(x)) < kept_bytes(lambda: plain(x)) / 4
    assert kept_bytes(lambda: ours.eval()(x)) == kept_bytes(lambda: plain(x))
    with torch.no_grad():
        assert torch.equal(ours.train()(x), plain(x))


def test_compiles_with_indices():
    torch._dynamo.reset()

    def loss(x):
        y, index = few_bit.max_pool2d(x * 2, 3, 2, 1, return_indices=True)
        return (y * index).sum()

    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(x), x)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected[0])


def test_opcheck():
    images = torch.randn(2, 3, 9, 9)
    window = ([3, 3], [2, 2], [1, 1], [1, 1])
    for x in (images, images.to(memory_format=torch.channels_last), images[0]):
        operators = torch.ops.packlight
        torch.library.opcheck(operators.few_bit_max_pool.default, (x, *window, False))
        y, codes = operators.few_bit_max_pool(x, *window, False)
        geometry = ([*x.shape], [*y.stride()])
        backward = (y, codes, *window, *geometry)
        torch.library.opcheck(operators.few_bit_max_pool_backward.default, backward)
        indices = (codes, *window, [*x.shape], [*y.shape], [*y.stride()])
        torch.library.opcheck(operators.few_bit_max_pool_indices.default, indices)


def test_refusals():
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    with pytest.raises(InputError, match="3 or 4 dimensions"):
        few_bit.max_pool2d(x[0, 0], 2)
    with pytest.raises(InputError, match="one or 2 are expected"):
        few_bit.max_pool2d(x, (2, 2, 2))
    with pytest.raises(InputError, match="neither a whole number"):
        few_bit.max_pool2d(x, 2.0)
    with pytest.raises(InputError, match=r"torch\.int64"):
        few_bit.max_pool2d(x.detach().long(), 2)
    with pytest.raises(DoubleBackwardError):
        torch.autograd.grad(few_bit.max_pool2d(x, 2).sum(), x, create_graph=True)

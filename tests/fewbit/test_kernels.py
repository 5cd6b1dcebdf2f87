"""Kernels against references and both against float64, in the interpreter or on the device."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from packlight._seeds import operands
from packlight.fewbit import (
    dropout_kernels,
    dropout_reference,
    kernels,
    pooling_kernels,
    pooling_reference,
    reference,
)
from packlight.fewbit.bins import bins_of
from packlight.fewbit.codebook import default_codebook
from packlight.packing.layout import packed_bytes
from packlight.packing.reference import unpack
from tests.fewbit.layers import LAYERS
from tests.helpers import (
    INTEGERS,
    assert_as_near_as_torch,
    dtype_name,
    every_device,
    every_kernel_dtype,
    many_values,
    ulps,
)
from tests.layers import TRUTH

every_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)


def coding(layer, bits=3):
    """Arguments of the operators that encode, and the levels that decode."""
    if layer.bits is not None:
        from packlight.fewbit.activations import EXACT

        return (layer.bits, (), "none", 0.0, 0), EXACT[layer.name].levels(*layer.parameters)
    from packlight.fewbit.activations import CONTINUOUS

    book = default_codebook(layer.name, bits, layer.parameters)
    poison = CONTINUOUS[layer.name].poison
    return (book.bits, book.short_borders, book.parity, book.center, poison), book.levels


@every_device
@every_layer
@every_kernel_dtype
def test_forward_is_within_an_ulp_of_torch_or_as_near_the_truth(layer, dtype, device):
    x = many_values(dtype, device)
    y, _ = kernels.activation(x, layer.name, layer.parameters, *coding(layer)[0])
    plain = layer.torch(x)
    truth = TRUTH.get(layer.name, layer.plain)(x.double(), *layer.arguments)
    assert_as_near_as_torch(y, plain, truth)


def codings():
    """Every width in float32, in which codes are computed, and one in what else is loaded."""
    for layer in LAYERS:
        widths = (1, 2, 3, 4, 5, 8) if layer.bits is None else (layer.bits,)
        rows = [(torch.float32, bits) for bits in widths]
        rows += [(dtype, widths[len(widths) // 3]) for dtype in (torch.bfloat16, torch.float16)]
        for dtype, bits in rows:
            yield pytest.param(layer, dtype, bits, id=f"{layer}-{dtype_name(dtype)}-{bits}")


@every_device
@pytest.mark.parametrize(("layer", "dtype", "bits"), list(codings()))
def test_codes_and_gradients_equal_the_reference(layer, dtype, bits, device):
    for count in (1, 515) if device == "cpu" else (1, 8 * 1024 * 5, 2**20 + 77):
        x = (torch.randn(count, device=device) * 3).to(dtype)
        dy = torch.randn(count, device=device).to(dtype)
        (width, *rest), levels = coding(layer, bits)
        size = packed_bytes(count, width)
        _, codes = kernels.activation(x, layer.name, layer.parameters, width, *rest)
        _, expected = reference.activation(x, layer.name, layer.parameters, width, *rest)
        assert torch.equal(
            unpack(codes[:size], width, count), unpack(expected[:size], width, count)
        )
        assert torch.equal(codes[size:], expected[size:])
        dx = kernels.decode_backward(dy, codes, width, levels, False, (1,))
        expected = reference.decode_backward(dy, expected, width, levels, False, (1,))
        assert ulps(dx, expected).max() <= 1


def bins_code(t, bins, folded):
    """What the kernel does with the bins, in float32."""
    entries, scale, offset, low = bins
    if not folded:
        t = np.maximum(t, np.float32(low))
    index = (t * np.float32(scale) + np.float32(offset)).view(np.int32) - 0x4B000000
    assert index.min() >= 0
    index = np.minimum(index, len(entries) - 1)
    entry = entries[index]
    return (entry & 255) + (t > (entry & -256).view(np.float32))


@given(
    st.lists(st.integers(-(2**15), 2**15), min_size=2, max_size=255, unique=True),
    st.sampled_from([1e-6, 1e-3, 0.1, 30.0]),
    st.booleans(),
)
def test_bins_count_the_borders_below(numbers, unit, folded):
    if folded:
        numbers = {abs(number) + 1 for number in numbers}
    borders = np.array(sorted(numbers), dtype=np.float32) * np.float32(unit)
    borders = ((borders.view(np.int32) + 0x80) & ~0xFF).view(np.float32)
    bins = bins_of(borders, folded)
    if bins is None:
        return
    edges = np.concatenate([borders, np.nextafter(borders, np.inf), np.nextafter(borders, -np.inf)])
    wide = np.array([0.0, -0.0, 1e30, -1e30, np.inf, -np.inf], dtype=np.float32)
    t = np.concatenate([edges.astype(np.float32), wide, np.linspace(-3, 3, 99, dtype=np.float32)])
    t = np.abs(t) if folded else t
    assert np.array_equal(bins_code(t, bins, folded), np.searchsorted(borders, t))


@every_device
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_borders_of_any_precision(bits, device):
    """A codebook of one's own need not have borders with zeros for low bits."""
    x = torch.linspace(-3, 3, 997, device=device)
    borders = [-2.5 + 4.7 * i / 2**bits for i in range(1, 2**bits)]
    given = (bits, borders, "none", 0.0, 0, x.stride())
    codes = [unpack(by.encode(x, *given), bits, x.numel()) for by in (kernels, reference)]
    assert torch.equal(*codes)


@pytest.mark.parametrize("layer", LAYERS[:16], ids=str)
@pytest.mark.parametrize("bits", range(3, 9))
def test_shipped_books_fit_bins(layer, bits):
    book = default_codebook(layer.name, bits, layer.parameters)
    if bits - (book.parity == "odd") > 2:
        borders = np.asarray(book.short_borders, dtype=np.float32)
        assert bins_of(borders, book.parity != "none") is not None


@every_device
@every_kernel_dtype
def test_encode_alone_gives_the_same_codes(dtype, device):
    x = (torch.randn(700, device=device) * 3).to(dtype)
    layer = next(layer for layer in LAYERS if layer.name == "silu")
    arguments = coding(layer)[0]
    _, expected = kernels.activation(x, "silu", (), *arguments)
    assert torch.equal(kernels.encode(x, *arguments, (1,)), expected)


@every_device
@every_kernel_dtype
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
@pytest.mark.parametrize("parity", ["even", "odd"])
def test_codes_about_another_point_equal_the_reference(parity, bits, dtype, device):
    x = (torch.randn(700, device=device) * 3).to(dtype)
    x[0] = 1.75
    count = 2 ** (bits - (parity == "odd")) - 1
    borders = tuple(0.25 * (i + 1) for i in range(count))
    for center in (1.75, -0.3):
        arguments = (x, bits, borders, parity, center, 0, (1,))
        codes = [
            unpack(encode(*arguments), bits, 700) for encode in (kernels.encode, reference.encode)
        ]
        assert torch.equal(*codes)


@every_device
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("poison", range(1, 8))
@pytest.mark.parametrize("bits", [2, 3])
def test_every_poison_raises_the_flag_of_the_reference(bits, poison, value, device):
    x = torch.randn(100, device=device)
    x[50] = value
    borders = tuple(float(i) for i in range(2**bits - 1))
    arguments = (bits, borders, "none", 0.0, poison, (1,))
    assert kernels.encode(x, *arguments)[-1] == reference.encode(x, *arguments)[-1]


@every_device
@every_kernel_dtype
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9])
def test_dropout_equals_the_reference(p, dtype, device):
    for count in (1, 700, 8 * 1024):
        x = torch.randn(count, device=device).to(dtype)
        seed = torch.randint(2**63 - 1, (1,), device=device)
        y, codes = dropout_kernels.dropout(x, *operands(seed), p, True)
        expected, expected_codes = dropout_reference.dropout(x, *operands(seed), p, True)
        mask = dropout_kernels.dropout_mask(seed, x.numel(), p)
        assert torch.equal(unpack(mask, 1, x.numel()), unpack(expected_codes, 1, x.numel()))
        assert torch.equal(unpack(codes, 1, count), unpack(expected_codes, 1, count))
        assert ulps(y, expected).max() <= (2 if device == "cpu" else 1)
        written = x.clone()
        assert torch.equal(dropout_kernels.dropout_(written, *operands(seed), p, True), codes)
        assert torch.equal(written, y)


POOLS = {
    "1d": ((2, 3, 17), (3,), (2,), (1,), (1,), False),
    "1d unbatched dilated": ((3, 20), (3,), (1,), (0,), (2,), False),
    "2d": ((2, 3, 9, 11), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "2d uneven": ((1, 2, 12, 10), (2, 3), (3, 1), (1, 0), (2, 3), True),
    "2d ceil": ((2, 1, 7, 8), (2, 2), (2, 2), (0, 0), (1, 1), True),
    "2d one element": ((1, 1, 3, 3), (1, 1), (1, 1), (0, 0), (1, 1), False),
    "2d 7 bits": ((1, 1, 11, 11), (9, 9), (2, 2), (0, 0), (1, 1), False),
    "2d over 256": ((1, 1, 20, 20), (17, 17), (1, 1), (0, 0), (1, 1), False),
    "2d whole words": ((8, 4, 9, 15), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "2d several tiles": ((8, 2, 40, 36), (3, 3), (2, 2), (1, 1), (1, 1), False),
    "2d fewer slabs than codes of a word": ((3, 8, 2, 2), (2, 2), (2, 2), (0, 0), (1, 1), False),
    "3d whole words": ((2, 4, 4, 4, 8), (2, 2, 2), (2, 2, 2), (0, 0, 0), (1, 1, 1), False),
    "3d": ((1, 2, 5, 6, 7), (2, 2, 3), (2, 1, 2), (1, 0, 1), (1, 1, 1), False),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", ["2d", "2d whole words"])
def test_max_pool_with_long_places(case, channels_last, monkeypatch):
    monkeypatch.setattr(pooling_kernels, "SHORT", 0)
    test_max_pool_equals_the_reference(POOLS[case], torch.bfloat16, channels_last, "cpu")


def pools():
    """Every case in bfloat16, and two in what else is loaded."""
    for name, case in POOLS.items():
        for dtype in INTEGERS if name in ("2d", "3d") else [torch.bfloat16]:
            yield pytest.param(case, dtype, id=f"{name}-{dtype_name(dtype)}")


@every_device
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("case", "dtype"), list(pools()))
def test_max_pool_equals_the_reference(case, dtype, channels_last, device):
    shape, *window, ceil = case
    x = torch.randn(shape, device=device).to(dtype)
    x[torch.rand(shape, device=device) < 0.3] = 0.5  # ties
    x.view(-1)[::23] = -math.inf
    x.view(-1)[::37] = math.nan
    if channels_last and len(shape) > 3:
        x = x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])
    y, codes = pooling_kernels.max_pool(x, *window, ceil)
    expected, expected_codes = pooling_reference.max_pool(x, *window, ceil)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert y.stride() == expected.stride()
    geometry = (*window, x.shape, y.shape, y.stride())
    assert torch.equal(
        pooling_reference.max_pool_indices(codes, *geometry),
        pooling_reference.max_pool_indices(expected_codes, *geometry),
    )
    dy = torch.randn(y.shape, device=device).to(dtype)
    backward = (dy, codes, *window, x.shape, y.stride())
    dx = pooling_kernels.max_pool_backward(*backward)
    expected = pooling_reference.max_pool_backward(*backward)
    assert dx.stride() == expected.stride()
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(dx, expected, rtol=tolerance, atol=tolerance)


def test_tables_are_made_while_code_is_traced_that_reads_them(monkeypatch):
    """The first run of a compiled model may have the memory of CUDA graphs as its own."""
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("borders_on", "levels_on"):
        monkeypatch.setattr(kernels, name, lambda device, *_, name=name: made.append(name))
    ours, borders = torch.ops.packlight, [-1.0, 0.0, 1.0]
    how = (2, borders, "none", 0.0, 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(64, device="cuda")
        codes = torch.empty(16, dtype=torch.uint8, device="cuda")
        levels = [0.1, 0.2, 0.3, 0.4]
        for operator, arguments, table in (
            (ours.few_bit_activation, (x, "tanh", [], *how), "borders_on"),
            (ours.few_bit_activation_, (x, "tanh", [], *how), "borders_on"),
            (ours.few_bit_encode, (x, *how, [1]), "borders_on"),
            (ours.few_bit_backward, (x, codes, 2, levels, False, [1]), "levels_on"),
        ):
            operator(*arguments)
            assert made.pop() == table
    assert not made
    with FakeTensorMode():
        ours.few_bit_encode(torch.empty(64), *how, [1])
    assert not made

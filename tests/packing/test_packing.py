"""The packed layout: round trips, size, and the position of every code."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packlight.packing import reference
from packlight.packing.layout import dense_stride, lanes, memory_order, packed_bytes


@pytest.mark.parametrize("bits", range(1, 9))
def test_round_trip_at_every_length(bits):
    for count in [*range(66), 1000]:
        codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
        packed = reference.pack(codes, bits)
        assert packed.numel() == packed_bytes(count, bits)
        assert torch.equal(reference.unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_size_is_bits_an_element_and_less_than_64_bytes(bits):
    for count in [0, 1, 7, 8, 63, 64, 65, 12345]:
        waste = packed_bytes(count, bits) - bits * count / 8
        assert 0 <= waste < 64


@given(st.integers(1, 8), st.integers(1, 300), st.data())
def test_layout_is_as_documented(bits, count, data):
    element = data.draw(st.integers(0, count - 1))
    codes = torch.zeros(count, dtype=torch.uint8)
    codes[element] = 2**bits - 1
    groups = lanes(count)
    planes = reference.pack(codes, bits).view(bits, groups).long()
    row, group = divmod(element, groups)
    words = sum(planes[p] << (8 * p) for p in range(min(bits, 7))).tolist()
    if bits == 8:
        assert planes[row, group] == 255
    else:
        assert words[group] == (2**bits - 1) << (row * bits)
    assert planes.sum(0).nonzero().flatten().tolist() == [group]


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(24.0).view(2, 3, 4),
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
        torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        torch.tensor(3.0),
        torch.empty(0, 4),
    ],
    ids=["contiguous", "permuted", "channels-last", "scalar", "empty"],
)
def test_memory_order_of_a_dense_tensor_is_a_view(x):
    flat = memory_order(x, dense_stride(x))
    assert flat.shape == (x.numel(),)
    assert flat.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "x",
    [torch.arange(24.0).view(4, 6)[:, ::2], torch.arange(3.0).expand(4, 3)],
    ids=["sliced", "expanded"],
)
def test_memory_order_of_other_tensors_is_a_copy_in_that_order(x):
    stride = dense_stride(x)
    flat = memory_order(x, stride)
    assert torch.equal(flat.as_strided(x.shape, stride), x)

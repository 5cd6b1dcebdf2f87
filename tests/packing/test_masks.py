"""Masks in one bit an element: round trips, size, and the kernels against the reference."""

import pytest
import torch
from torch.library import opcheck

from packlight.packing.layout import dense_stride, packed_bytes
from packlight.packing.ops import pack_mask, unpack_mask

MASKS = {
    "empty": torch.zeros(0, 3, dtype=torch.bool),
    "one": torch.ones((), dtype=torch.bool),
    "ragged": torch.rand(5, 7, 9) > 0.5,
    "whole blocks": torch.rand(4096) > 0.5,
    "several blocks": torch.rand(2 * 4096 + 3) > 0.5,
    "transposed": (torch.rand(6, 70) > 0.5).t(),
    "strided": (torch.rand(6, 70) > 0.5)[:, ::2],
    "channels-last": (torch.rand(2, 3, 5, 5) > 0.5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_round_trip_is_lossless(mask):
    stride = dense_stride(mask)
    packed = pack_mask(mask.view(torch.uint8), stride)
    assert packed.numel() == packed_bytes(mask.numel(), 1)
    back = unpack_mask(packed, mask.shape, stride)
    assert back.dtype == torch.bool
    assert back.stride() == stride
    assert torch.equal(back, mask)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_kernels_equal_the_reference(mask, poison):
    from packlight.packing import kernels

    stride, data = dense_stride(mask), mask.view(torch.uint8)
    packed = kernels.pack_mask(data, stride)
    assert torch.equal(packed, pack_mask(data, stride))
    assert torch.equal(kernels.unpack_mask(packed, mask.shape, stride), mask)


def test_the_operators_are_registered_right():
    mask = (torch.rand(3, 50) > 0.5).view(torch.uint8)
    opcheck(torch.ops.packlight.pack_mask.default, (mask, (50, 1)))
    packed = pack_mask(mask, (50, 1))
    opcheck(torch.ops.packlight.unpack_mask.default, (packed, (3, 50), (50, 1)))

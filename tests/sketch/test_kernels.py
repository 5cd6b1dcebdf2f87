"""Kernels against the reference: in Triton's interpreter on the CPU, on the device with --gpu."""

import pytest
import torch

from packlight.sketch import kernels, ops, reference
from packlight.sketch.method import KINDS, ROW_KINDS, Blocks
from tests.helpers import every_device, every_kernel_dtype, relative_error

MIXING = [kind for kind in KINDS if kind not in ROW_KINDS]
# Tokens, features, rows: tails everywhere; several words of signs; several tiles of rows; 16
# places; one block of 512 places.
SIZES = [(100, 33, 30), (1030, 5, 17), (150, 20, 140), (60, 130, 30), (300, 5, 5)]
# Twice the rounding of what is stored and of the entries; in float32 that of logarithm and cosine.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def seed_on(device):
    return torch.randint(2**63 - 1, (1,)).to(device)


def applied(module, x, seed, kind, rows, dtype):
    y = x.new_full((rows, x.shape[1]), float("nan"), dtype=dtype)
    module.apply(x, seed, kind, y)
    return y


def gathered(module, x, index, weight, dtype):
    y = x.new_full((index.shape[0], x.shape[1]), float("nan"), dtype=dtype)
    module.gather(x, index, weight, y)
    return y


@every_device
@every_kernel_dtype
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", MIXING)
def test_sketch_is_the_references(kind, size, dtype, device):
    tokens, features, rows = size
    x, seed = torch.randn(tokens, features).to(device, dtype), seed_on(device)
    expected = applied(reference, x, seed, kind, rows, dtype)
    actual = applied(kernels, x, seed, kind, rows, dtype)
    assert actual.shape == (rows, features)
    assert relative_error(actual, expected) < TOLERANCE[dtype]


@every_device
@every_kernel_dtype
def test_rows_are_the_references(dtype, device):
    x, seed = torch.randn(101, 1030).to(device, dtype), seed_on(device)
    x[3] = 0
    norms, draws = kernels.row_statistics(x, seed)
    expected_norms, expected_draws = reference.row_statistics(x, seed)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)
    assert torch.equal(draws, expected_draws)
    for kind in ROW_KINDS:
        index, weight = reference.select(norms, draws, kind, 20)
        assert torch.equal(gathered(kernels, x, index, None, dtype), x[index])
        actual = gathered(kernels, x, index, weight, dtype)
        expected = gathered(reference, x, index, weight, dtype)
        assert relative_error(actual, expected) < TOLERANCE[dtype]


@every_device
@pytest.mark.parametrize("view", [lambda x: x[:, ::2], lambda x: x[::2], lambda x: x.t()])
def test_any_strides(view, device):
    x, seed = view(torch.randn(64, 64, device=device)), seed_on(device)
    for kind in ("srht", "rademacher"):
        expected = applied(reference, x, seed, kind, 20, x.dtype)
        actual = applied(kernels, x, seed, kind, 20, x.dtype)
        assert relative_error(actual, expected) < TOLERANCE[x.dtype]
    assert torch.equal(kernels.row_statistics(x, seed)[1], reference.row_statistics(x, seed)[1])
    index = torch.tensor([3, 5], dtype=torch.int32, device=device)
    assert torch.equal(gathered(kernels, x, index, None, x.dtype), x[index])


@every_device
@pytest.mark.parametrize("kind", MIXING)
def test_a_cast_is_read_and_not_made(kind, device):
    """Under autocast the input is float32 and the sketch bfloat16."""
    x, seed = torch.randn(100, 33, device=device), seed_on(device)
    expected = applied(reference, x, seed, kind, 30, torch.bfloat16)
    assert relative_error(applied(kernels, x, seed, kind, 30, torch.bfloat16), expected) < 1.6e-2


def test_fewer_tokens_than_a_tensor_core_takes():
    x, seed = torch.randn(7, 4), seed_on("cpu")
    assert Blocks.of(7, 4).length == 8
    for kind in MIXING:
        expected = applied(reference, x, seed, kind, 4, x.dtype)
        torch.testing.assert_close(applied(kernels, x, seed, kind, 4, x.dtype), expected)


@every_device
@pytest.mark.parametrize("kind", MIXING)
def test_empty(kind, device):
    seed = seed_on(device)
    for module in (kernels, reference):
        module.apply(torch.ones(20, 0, device=device), seed, kind, torch.ones(4, 0, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_operators_pass_opcheck(kind, dtype):
    x, seed, dy = torch.randn(40, 5), seed_on("cpu"), torch.randn(40, 7)
    packlight_ops = torch.ops.packlight
    torch.library.opcheck(packlight_ops.sketch_keep.default, (x, seed, kind, 9, dtype))
    kept = ops.keep(x, seed, kind, 9, dtype)
    total = dy.sum(0) if kind in ROW_KINDS else None
    torch.library.opcheck(
        packlight_ops.sketch_weight_gradient.default, (dy, kept, total, kind, 9, 5, dtype)
    )

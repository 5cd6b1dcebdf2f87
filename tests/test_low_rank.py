"""Products with a factor of a low rank: kernels against plain PyTorch, and what they are of."""

import pytest
import torch

from packlight._library import use_reference
from packlight.low_rank import kernels, ops, reference
from tests.helpers import every_device

SIZES = [(1, 16, 4), (100, 130, 16), (70, 300, 24), (257, 64, 3)]
HALVES = [torch.bfloat16, torch.float16]


def tensors(size, dtype, device):
    torch.manual_seed(0)
    rows, width, rank = size
    return (
        torch.randn(rows, width, device=device).to(dtype),
        torch.randn(rows, rank, device=device),
        torch.randn(rank, width, device=device),
    )


def assert_as_near(ours, theirs, truth, ulp):
    """As near the truth as plain PyTorch, or within a rounding of it."""
    error, allowed = (ours.double() - truth).abs().max(), (theirs.double() - truth).abs().max()
    assert error <= 2 * allowed + ulp * truth.abs().max()


@every_device
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("turned", [True, False])
def test_kernels_are_the_reference(size, dtype, turned, device, monkeypatch):
    monkeypatch.setattr(kernels, "_ROWS", 0)
    x, low, factor = tensors(size, dtype, device)
    if turned:  # and rows of a wider tensor
        factor = factor.t().contiguous().t()
        x = torch.cat([x, x], 1)[:, : size[1]]
    wide = x.double()
    assert_as_near(
        kernels.narrowed(x, factor.t()), reference.narrowed(x, factor.t()),
        wide @ factor.t().double(), 1e-6,
    )  # fmt: skip
    truth = low.double().t() @ wide
    assert_as_near(kernels.outer(x, low), reference.outer(x, low), truth, 1e-6)
    truth = wide + 0.3 * (low.double() @ factor.double())
    for rounds in (True, False):
        ours, theirs = x.clone(), x.clone()
        kernels.add_widened_(ours, low, factor, 0.3, rounds)
        reference.add_widened_(theirs, low, factor, 0.3, rounds)
        assert_as_near(ours, theirs, truth, torch.finfo(dtype).eps)


@every_device
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_sum_of_one_dtype_is_rounded_as_the_reference_rounds_it(dtype, size, device):
    x, low, factor = (t.to(dtype) for t in tensors(size, dtype, device))
    for scaling in (2.0, 0.3):
        product = (low.double() @ factor.double()) * scaling
        for rounds in (True, False):
            ours, theirs = x.clone(), x.clone()
            kernels.add_widened_(ours, low, factor, scaling, rounds)
            reference.add_widened_(theirs, low, factor, scaling, rounds)
            # The product, s times it and the sum may each be rounded to a neighbour.
            ulp = torch.finfo(dtype).eps * (product.abs() + (x + product).abs())
            assert ((ours - theirs).double().abs() <= 4 * ulp).all()
            if device == "cuda" or dtype == torch.float16:  # the interpreter cuts bfloat16 off
                assert (ours != theirs).sum() <= 1 + 0.02 * x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_rounded_as_separate_operations_round_it(dtype):
    for narrow in (torch.float32, dtype, torch.float16):
        for scaling in (2.0, 0.3):
            x, low, factor = (t.to(d) for t, d in zip(
                tensors((70, 64, 8), dtype, "cpu"), (dtype, narrow, narrow), strict=True
            ))  # fmt: skip
            for rounds in (True, False):
                delta = low.mm(factor) * scaling
                expected = (x + (delta.to(dtype) if rounds else delta)).to(dtype)
                ops.add_widened_(x_ := x.clone(), low, factor, scaling, rounds)
                assert torch.equal(x_, expected)


def test_tiles_change_no_more_than_the_last_place(monkeypatch):
    x, low, factor = tensors((100, 64, 8), torch.bfloat16, "cpu")
    whole = ops.narrowed(x, factor.t()), ops.outer(x, low)
    ops.add_widened_(y := x.clone(), low, factor, 2.0, False)
    monkeypatch.setattr(reference, "_ELEMENTS", 640)
    torch.testing.assert_close((ops.narrowed(x, factor.t()), ops.outer(x, low)), whole)
    ops.add_widened_(z := x.clone(), low, factor, 2.0, False)
    torch.testing.assert_close(y, z)


def test_operators_are_as_torch_wants_them():
    x, low, factor = tensors((12, 64, 8), torch.bfloat16, "cpu")
    check = torch.library.opcheck
    namespace = torch.ops.packlight
    check(namespace.low_rank_narrowed.default, (x, factor.t()))
    check(namespace.low_rank_add_widened_.default, (x, low, factor, 2.0, False))
    check(namespace.low_rank_outer.default, (x, low))


def test_of_nothing_there_is_nothing():
    x, low, factor = tensors((0, 64, 8), torch.bfloat16, "cpu")
    for run in (ops, kernels):
        assert run.narrowed(x, factor.t()).shape == (0, 8)
        run.add_widened_(x, low, factor, 1.0, False)
        assert torch.equal(run.outer(x, low), torch.zeros(8, 64))
    with use_reference():
        assert ops.outer(x, low).shape == (8, 64)


def test_factors_that_are_not_finite_stay_so(monkeypatch):
    for precision in ("tf32", "tf32x3"):
        monkeypatch.setattr(kernels, "_precision", lambda precision=precision: precision)
        for odd in (torch.inf, -torch.inf, torch.nan):
            x, low, factor = tensors((20, 64, 16), torch.bfloat16, "cpu")
            factor[2, 5] = odd
            ours, theirs = x.clone(), x.clone()
            kernels.add_widened_(ours, low, factor, 2.0, False)
            reference.add_widened_(theirs, low, factor, 2.0, False)
            assert torch.equal(ours.isfinite(), theirs.isfinite())

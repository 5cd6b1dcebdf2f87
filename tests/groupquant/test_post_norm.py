"""layer_norm(dropout(x) + residual) in one kernel each way, against its parts."""

import pytest
import torch

from packlight._seeds import operands
from packlight.fewbit import ops as few_bit
from packlight.groupquant import norm_reference, ops, post_norm_kernels, reference
from packlight.groupquant.grouping import MINMAX, ROTATED
from tests.helpers import every_device

DTYPES = [
    (torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),  # as under autocast
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float16),
]
# In 16 bits the interpreter cuts digits off where the device rounds.
TOLERANCE = {torch.float32: 3e-4, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


def terms(rows, width, dtypes, device):
    x, residual, dy = (
        (torch.randn(rows, width, device=device) * 2 + 1).to(dtype) for dtype in dtypes
    )
    # Of torch's norms on CUDA parameters have the dtype of what is normalised.
    dtype = torch.float32 if device == "cpu" else dtypes[2]
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    return x, residual, dy, weight, bias


def close(a, b, dtypes):
    """Within the rounding of `dtypes`; one of 100,000 elements, on a border, within two."""
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    a, b = a.float(), b.float()
    if a.numel() >= 100_000:
        off = (a - b).abs() > tolerance * (1 + b.abs())
        assert off.float().mean() < 1e-5
        tolerance *= 2
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# With a stripe, a ragged group, without a stripe, without a row.
SHAPES = [(8, 128), (8, 72), (5, 64), (0, 64)]
CASES = [(shape, DTYPES[1], p) for shape in SHAPES for p in (0.0, 0.3)]
CASES += [((8, 64), dtypes, 0.3) for dtypes in DTYPES if dtypes != DTYPES[1]]


@every_device
@pytest.mark.parametrize(("shape", "dtypes", "p"), CASES, ids=str)
def test_one_kernel_gives_what_the_parts_give(shape, dtypes, p, device):
    rows, width = shape
    rows = rows if device == "cpu" else rows * 1000
    x, residual, dy, weight, bias = terms(rows, width, dtypes, device)
    groups, mask_seed, seed = (4, 64, MINMAX), operands(11 if p else None), operands(5)
    forward = (x, residual, weight, bias, p, 1e-5, dtypes[2], groups, *mask_seed, *seed)
    ours, theirs = post_norm_kernels.post_norm(*forward), norm_reference.post_norm(*forward)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert torch.equal(ours[6], theirs[6])  # the mask, bit for bit
    assert torch.equal(ours[4], weight)
    assert torch.equal(ours[5], bias)
    close(ours[0], theirs[0], dtypes)
    close(ours[3], theirs[3], dtypes)
    a, b = (reference.dequantize_rows(*made[1:3], rows, width, groups) for made in (ours, theirs))
    assert not rows or (a - b).abs().mean() < 0.02
    needs = (True, p > 0)
    backward = (dy, *theirs[1:4], weight, theirs[6], p, *dtypes[:2], *needs, groups)
    gradients = post_norm_kernels.post_norm_backward(*backward)
    expected = norm_reference.post_norm_backward(*backward)
    for a, b in zip(gradients, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    close(gradients[0], expected[0], dtypes)
    close(gradients[1], expected[1], dtypes)
    close(gradients[2] / max(rows, 1) ** 0.5, expected[2] / max(rows, 1) ** 0.5, dtypes)


@every_device
def test_gradients_of_parameters_that_are_not_needed_are_not_there(device):
    x, residual, dy, weight, bias = terms(8, 64, DTYPES[0], device)
    groups = (4, 64, MINMAX)
    _, *kept, _, _, mask = norm_reference.post_norm(
        x, residual, weight, bias, 0.0, 1e-5, x.dtype, groups, *operands(None), *operands(5)
    )
    found = {}
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        given = (dy, *kept, weight, mask, 0.0, x.dtype, x.dtype, *needs, groups)
        found[needs] = post_norm_kernels.post_norm_backward(*given)[2]
        assert found[needs].shape == (sum(needs), 64)
    both = found[True, True]
    assert torch.equal(found[True, False], both[:1])
    assert torch.equal(found[False, True], both[1:])


@every_device
def test_it_draws_what_a_dropout_by_itself_draws(device):
    x = torch.randn(2, 8, 64, device=device)
    residual = torch.zeros_like(x)
    y, *_, codes = ops.post_norm(
        x, residual, None, None, 0.4, 1e-5, x.dtype, (4, 64, MINMAX), *operands(3), *operands(7)
    )
    dropped, mask = few_bit.dropout(x, *operands(3), 0.4, True)
    assert torch.equal(codes, mask)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(dropped, (64,)))


@every_device
@pytest.mark.parametrize("code", [MINMAX, ROTATED])
def test_seeds_in_memory_draw_as_the_same_numbers_do(code, device):
    x, residual = torch.randn(2, 8, 64, device=device)
    given = (x, residual, None, None, 0.5, 1e-5, x.dtype, (4, 64, code))
    numbers = post_norm_kernels.post_norm(*given, *operands(3), *operands(7))
    seeds = (torch.tensor([number], device=device) for number in (3, 7))
    in_memory = post_norm_kernels.post_norm(*given, *(x for s in seeds for x in operands(s)))
    for a, b in zip(numbers, in_memory, strict=True):
        assert torch.equal(a, b)


@every_device
def test_what_is_not_finite_is_not_made_finite(device):
    x, residual = torch.randn(2, 8, 64, device=device)
    x[3, 5], residual[6, 2] = float("nan"), float("inf")
    given = (x, residual, None, None, 0.5, 1e-5, x.dtype, (4, 64, MINMAX))
    y, codes, scales, *_ = post_norm_kernels.post_norm(*given, *operands(3), *operands(7))
    rows = reference.dequantize_rows(codes, scales, 8, 64, (4, 64, MINMAX))
    for row in (3, 6):
        assert y[row].isnan().any()
        assert rows[row].isnan().any()
    others = [i for i in range(8) if i not in (3, 6)]
    assert y[others].isfinite().all()
    assert rows[others].isfinite().all()

"""The pack: codes and scales, in the reference and in the kernels."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packlight._seeds import operands
from packlight.errors import InputError
from packlight.groupquant import GroupQuant, draws, kernels, reference
from packlight.groupquant.grouping import GROUP_SIZES, Grouping, row_group_size
from packlight.method import Method
from tests.helpers import every_device, every_kernel_dtype

every_bits = pytest.mark.parametrize("bits", [2, 3, 4, 8])
PLAIN = ("", (), None, None)  # the packed value itself


def seed_of(number, device="cpu"):
    return torch.tensor([number], device=device)


def round_trip(backend, x, bits, group_size, seed):
    flat = x.reshape(-1)
    n = flat.numel()
    codes, scales = backend.quantize(flat, (1,), (bits, group_size), *operands(seed))
    return backend.dequantize(
        codes, scales, (n,), (1,), n, (bits, group_size), x.dtype, *PLAIN
    ).view(x.shape)


def steps(x, bits, group_size):
    """The step of each value's group, before it is rounded to bfloat16."""
    flat = x.double().reshape(-1)
    padding = -flat.numel() % group_size
    groups = torch.cat([flat, flat[-1:].expand(padding)]).view(-1, group_size)
    step = (groups.amax(1) - groups.amin(1)) / (2**bits - 1)
    # Minimum and step are rounded to 8 bits, away from the values.
    slack = groups.abs().amax(1) * 2.0**-7 / (2**bits - 1)
    return (
        (step * (1 + 2.0**-6) + slack).repeat_interleave(group_size)[: flat.numel()].view(x.shape)
    )


@pytest.fixture(params=[reference, kernels], ids=["reference", "kernel"])
def backend(request):
    return request.param


@every_bits
@pytest.mark.parametrize("count", [1, 31, 32, 127, 128, 129, 700, 3 * 1024 + 5])
@pytest.mark.parametrize("group_size", [32, 128, 1024])
def test_values_come_back_within_half_a_step(backend, bits, count, group_size):
    x = torch.randn(count) * 3 + 1
    y = round_trip(backend, x, bits, group_size, None)
    assert ((y - x).abs() <= 0.5001 * steps(x, bits, group_size) + 1e-6).all()


@every_bits
def test_stochastic_rounding_is_unbiased(bits):
    x = torch.randn(257) * 2 + 1
    times = 400
    step = steps(x, bits, 64)
    total = torch.zeros_like(x)
    for number in range(times):
        y = round_trip(reference, x, bits, 64, seed_of(7919 * number + 1))
        assert ((y - x).abs() <= step * 1.0001 + 1e-6).all()
        total += (y - x) / step.float()
    mean = total / times
    # One value's error has a deviation of at most half a step.
    assert mean.abs().max() < 5 * 0.5 / math.sqrt(times)
    assert mean.mean().abs() < 4 * 0.5 / math.sqrt(times * x.numel())


def test_values_of_one_group_round_independently():
    x = torch.full((1 << 14,), 0.3)
    x[::128], x[1::128] = 0.0, 1.0
    y = round_trip(reference, x, 2, 128, seed_of(1))
    up = (y.view(-1, 128)[:, 2:] > 0.3).float()
    pairs = (up[:, 1:] * up[:, :-1]).mean() - up.mean() ** 2
    assert abs(pairs) < 4 * 0.25 / math.sqrt(up.numel())


def numbers_of_calls(bits, calls, seed=1):
    """The eight numbers of each call, [8, calls]."""
    grouping = Grouping(1, calls * 8, bits, 32)
    uniform = draws.draws(seed_of(seed), grouping)[0]  # [groups, group_size]
    parts = uniform.view(-1, 8 // grouping.parts, grouping.parts, grouping.size)
    return parts.permute(1, 2, 0, 3).reshape(8, -1)


@every_bits
def test_random_numbers_are_uniform(bits):
    numbers = numbers_of_calls(bits, 1 << 19)
    assert numbers.amin() == 0
    assert numbers.amax() == 1 - 2.0 ** -draws.fraction_bits(bits)
    for places in (numbers, numbers * 256 % 1):  # high bits, then low bits
        counts = torch.stack([row.histc(128, 0, 1) for row in places])
        expected = counts.sum(1, keepdim=True) / 128
        chi_squared = ((counts - expected) ** 2 / expected).sum(1)
        # 127 degrees of freedom, eight rows.
        assert (chi_squared - 127).abs().max() < 5 * math.sqrt(2 * 127)


@every_bits
def test_only_neighbours_are_correlated_and_by_no_more_than_stated(bits):
    calls = 1 << 20
    numbers = numbers_of_calls(bits, calls)
    bound = 2.0 ** (6 - draws.fraction_bits(bits))
    slack = 5 * 0.25 / math.sqrt(calls)
    neighbours = {(j, j + 1) for j in (0, 1, 2, 4, 5, 6)} | {(0, 3), (4, 7)}
    # The second threshold makes the shared byte matter most.
    for one, two in ((0.5, 0.5), (0.5, 0.5 * (1 + 2 * bound * 256 / 128)), (0.3, 0.9), (0.01, 0.6)):
        ups = [(numbers < one).double(), (numbers < two).double()]
        covariance = ups[0] @ ups[1].T / calls - ups[0].mean(1)[:, None] * ups[1].mean(1)
        for j in range(8):
            for k in range(j):
                pairs = torch.stack([covariance[j, k], covariance[k, j]]).abs().max()
                assert pairs < slack + (bound if (k, j) in neighbours else 0)


@every_bits
@pytest.mark.parametrize("chance", [0.5, 0.5 + 1 / 512, 0.2])
def test_sums_of_roundings_vary_as_if_independent(bits, chance):
    calls = 1 << 18
    sums = (numbers_of_calls(bits, calls) < chance).double().sum(0)
    independent = 8 * chance * (1 - chance)
    bound = 8 * 2.0 ** (7 - draws.fraction_bits(bits))
    slack = 5 * independent * math.sqrt(2 / calls)
    assert abs(sums.var() - independent) < bound + slack


def test_seeds_rows_and_calls_draw_apart():
    grouping = Grouping(4, 256, 4, 128)
    low, high, both = (seed_of(number) for number in (1, 1 << 32, 1 + (1 << 32)))
    rows = torch.cat([draws.draws(seed, grouping).view(4, -1) for seed in (low, high)])
    for i in range(8):
        for j in range(i):
            assert (rows[i] == rows[j]).float().mean() < 0.02
    # The high half of the seed and the row stand in one word: rows 0 and 1 of a seed are rows 1 and
    # 0 of the seed whose high half differs by 1.
    swapped = draws.draws(both, grouping).view(4, -1)
    assert torch.equal(swapped[:2].flip(0), rows[:2])
    other = draws.draws(draws.other_seed(low), grouping).view(4, -1)
    assert torch.equal(other[:2].flip(0), rows[:2])


@every_device
@every_bits
def test_the_greatest_value_never_exceeds_the_greatest_code(backend, bits, device):
    """Whatever is drawn, though its distance in steps may be rounded up."""
    top = 2**bits - 1
    significands = torch.arange(128.0, 256.0, device=device).view(-1, 1)
    x = (significands * top).expand(-1, 64).clone()
    x[:, 0] = 0
    for number in range(2 if device == "cpu" else 100):
        for seed in (seed_of(number, device), None):
            for ulps in (-1, 0, 1):
                near = (x.view(torch.int32) + torch.where(x > 0, ulps, 0).int()).view(torch.float32)
                y = round_trip(backend, near, bits, 64, seed)
                assert ((y - near).abs() <= significands * (1 + 2.0**-6)).all()


@every_bits
def test_values_nearer_than_the_least_step_come_back_near(backend, bits):
    x = torch.arange(128) * 2.0**-133
    for seed in (seed_of(1), None):
        assert (round_trip(backend, x, bits, 32, seed) - x).abs().max() <= 2.0**-126


@settings(max_examples=60)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=80),
    st.sampled_from([2, 4, 8]),
    st.booleans(),
)
def test_any_finite_values_come_back_within_a_step(values, bits, stochastic):
    x = torch.tensor(values, dtype=torch.float32)
    y = round_trip(reference, x, bits, 32, seed_of(3) if stochastic else None)
    assert ((y.double() - x.double()).abs() <= steps(x, bits, 32) * 1.001 + 1e-37).all()


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.7e-4, 12345.678])
@every_bits
def test_a_constant_group_comes_back(backend, bits, value):
    y = round_trip(backend, torch.full((64,), value), bits, 32, None)
    assert (y - value).abs().max() <= abs(value) * 2.0**-8


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_bits
def test_a_group_with_a_non_finite_value_comes_back_as_nan(backend, bits, value):
    x = torch.randn(96)
    x[40] = value
    y = round_trip(backend, x, bits, 32, seed_of(5))
    assert y[32:64].isnan().all()
    assert y[:32].isfinite().all()
    assert y[64:].isfinite().all()


@every_bits
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_bytes_are_what_the_method_says(backend, bits, group_size):
    x = torch.randn(4096)
    codes, scales = backend.quantize(x, (1,), (bits, group_size), *operands(None))
    kept = codes.numel() + 4 * scales.numel()
    assert kept == 4096 * (bits + 32 / group_size) / 8


@every_device
@every_bits
@every_kernel_dtype
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_kernels_equal_the_reference(dtype, bits, stochastic, device):
    seed = seed_of(987654321012345, device) if stochastic else None
    counts = (1, 515, 4 * 4096) if device == "cpu" else (1, 515, 2**20 + 77, 2**22)
    for count in counts:
        for group_size in (32, 128):
            x = (torch.randn(count, device=device) * 2 + 1).to(dtype)
            arguments = ((1,), (bits, group_size), *operands(seed))
            ours, theirs = kernels.quantize(x, *arguments), reference.quantize(x, *arguments)
            assert torch.equal(ours[1], theirs[1])
            layout = ((count,), (1,), count, (bits, group_size))
            values = [
                reference.dequantize(*pack, *layout, torch.float32, *PLAIN)
                for pack in (ours, theirs)
            ]
            if device == "cpu":
                assert torch.equal(*values)
            else:  # product and sum are one operation there
                assert (values[0] != values[1]).sum() <= 1 + count * 1e-4
            again = kernels.dequantize(*theirs, *layout, torch.float32, *PLAIN)
            torch.testing.assert_close(again, values[1], rtol=1e-6, atol=1e-6)


@every_device
@every_bits
@pytest.mark.parametrize(("rows", "width"), [(3, 100), (5, 768), (2, 2048)])
def test_kernels_equal_the_reference_in_rows(bits, rows, width, device):
    x = torch.randn(rows * width, device=device)
    for seed in (seed_of(5 + (7 << 40), device), None):
        ours = kernels._pack(x, None, "", (), width, (bits, 64), *operands(seed))
        theirs = reference.quantize_rows(x, width, (bits, 64), seed)
        assert torch.equal(ours[1], theirs[1])
        values = [
            reference.dequantize_rows(*pack, rows, width, (bits, 64)) for pack in (ours, theirs)
        ]
        assert (values[0] != values[1]).sum() <= (0 if device == "cpu" else 2)


def test_rows_start_groups_of_their_own():
    rows = torch.randn(3, 100)
    codes, scales = reference.quantize_rows(rows.view(-1), 100, (4, 64), None)
    for row in range(3):
        alone = reference.quantize_rows(rows[row], 100, (4, 64), None)
        assert torch.equal(codes.view(3, -1)[row], alone[0])
        assert torch.equal(scales.view(3, -1)[row], alone[1])


def test_the_same_seed_gives_the_same_codes_and_another_another():
    x = torch.randn(1000)
    first, again, other = (
        reference.quantize(x, (1,), (4, 128), *operands(seed_of(number)))[0] for number in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, "not 2, 3, 4 or 8"),
        ({"bits": True}, "not 2, 3, 4 or 8"),
        ({"group_size": 100}, "not a power of two from 32 to 1024"),
        ({"group_size": 16}, "not a power of two from 32 to 1024"),
        ({"rounding": "up"}, 'none of "stochastic", "nearest" and "offset"'),
    ],
)
def test_wrong_methods_raise(arguments, message):
    with pytest.raises(InputError, match=message):
        GroupQuant(**arguments)


def test_method_is_a_value():
    method = GroupQuant(bits=2, rounding="nearest")
    assert Method.from_dict(method.to_dict()) == method
    assert len({method, GroupQuant(bits=2, rounding="nearest")}) == 1


def test_groups_fit_narrow_rows():
    assert row_group_size(16, 128) is None
    assert row_group_size(64, 128) == 64
    assert row_group_size(100, 128) == 128
    assert row_group_size(768, 128) == 128
    assert row_group_size(40, 32) == 32


def test_grouping_counts_bytes():
    grouping = Grouping(rows=3, width=100, bits=4, group_size=32)
    assert (grouping.groups, grouping.code_bytes) == (12, 12 * 16)

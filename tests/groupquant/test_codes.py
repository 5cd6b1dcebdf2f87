"""Codes and roundings: how near they come, what they keep, and what they are chosen for."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import GroupQuant, fewbit, groupquant, predict, profile, saving
from packlight.errors import InputError
from packlight.groupquant import draws, reference
from packlight.groupquant.grouping import HEADER, MINMAX, OFFSET, ROTATED, Grouping
from packlight.groupquant.rotated_reference import hadamard
from packlight.quantiser import pack_input
from tests.helpers import kept_bytes, pack_bytes

CODES = {
    "minmax 3": GroupQuant(3, 64, code="minmax"),
    "offset 4": GroupQuant(4, 64, "offset", "minmax"),
    "offset 3": GroupQuant(3, 64, "offset", "minmax"),
    "rotated 4": GroupQuant(4, 64, code="rotated"),
    "rotated 3": GroupQuant(3, 64, code="rotated"),
    "rotated 2": GroupQuant(2, 64, code="rotated"),
    "auto 2": GroupQuant(2, 64, code="auto"),
    "scaled 2": GroupQuant(2, 64, code="scaled"),
}
every_code = pytest.mark.parametrize("method", CODES.values(), ids=CODES)
CODED = [(4, OFFSET), (2, OFFSET), (4, ROTATED), (3, ROTATED), (2, ROTATED), (1, ROTATED)]
every_coded = pytest.mark.parametrize(("bits", "code"), CODED)


def seed_of(number):
    return torch.tensor([number * 0x9E3779B97F4A7C15 % 2**62 + 1])


def round_trip(x, bits, code, number=0, group_size=128):
    """The values of rows of whole groups."""
    groups, width = (bits, group_size, code), x.shape[-1]
    kept = reference.quantize_rows(x.reshape(-1), width, groups, seed_of(number))
    return reference.dequantize_rows(*kept, x.numel() // width, width, groups).view(x.shape)


def weight_error(x, bits, code, times=4):
    """Of the weight gradient of a linear layer whose output gradient is normal, relative."""
    dy = torch.randn(len(x), 64)
    exact = dy.T @ x
    errors = [dy.T @ round_trip(x, bits, code, number) - exact for number in range(times)]
    return (sum(error.square().sum() for error in errors) / times / exact.square().sum()).sqrt()


# ---- how near they come --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "bits", "greatest"),
    [
        (ROTATED, 4, 0.1),
        (ROTATED, 3, 0.195),
        (ROTATED, 2, 0.37),
        (ROTATED, 1, 0.78),
        (OFFSET, 8, 0.0065),
        (OFFSET, 4, 0.104),
        (OFFSET, 3, 0.225),
        (OFFSET, 2, 0.53),
    ],
)
def test_weight_gradients_of_normal_inputs_err_by_no_more(code, bits, greatest):
    """By stochastic rounding .142, .30 and .71 at 4, 3 and 2 bits."""
    assert weight_error(torch.randn(512, 256), bits, code) < greatest


@pytest.mark.parametrize(("bits", "greatest"), [(4, 0.0105), (3, 0.0375), (2, 0.15)])
def test_a_mean_far_from_zero_takes_nothing_from_a_rotated_code(bits, greatest):
    x = torch.randn(256, 256) + 10
    error = (round_trip(x, bits, ROTATED) - x).square().mean()
    assert error < greatest  # of the variance, which is 1


@pytest.mark.parametrize(("bits", "greatest"), [(4, 0.12), (2, 0.4)])
def test_channels_far_larger_than_others_cost_a_rotated_code_little(bits, greatest):
    """3% of the channels, 60 times larger: by stochastic rounding .34 and 1.7."""
    x = torch.randn(512, 256)
    x[:, ::32] *= 60
    assert weight_error(x, bits, ROTATED) < greatest


@pytest.mark.parametrize("bits", [3, 4])
def test_zeros_of_a_relu_are_exact_by_offset_and_the_error_is_less(bits):
    x = torch.randn(512, 256).relu()
    assert (round_trip(x, bits, OFFSET)[x == 0] == 0).all()
    assert weight_error(x, bits, OFFSET) < 0.9 * weight_error(x, bits, MINMAX)


# ---- offsets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("clip", [False, True], ids=["plain", "from zero"])
def test_offsets_are_unbiased_with_a_twelfth_of_a_step_squared(bits, shift, clip):
    """One row, packed as 4000 rows, each with an offset of its own."""
    x = torch.randn(64) * 2 + shift
    x = x.relu() if clip else x
    times, steps = 4000, 2**bits - (2 if clip and x.amin() == 0 else 1)
    rows = x.expand(times, 64).contiguous()
    error = (round_trip(rows, bits, OFFSET, group_size=64) - rows).double()
    step = float(x.amax() - x.amin()) / steps
    slack = float(x.abs().amax()) * 2.0**-7 / steps + step * 2.0**-7  # bfloat16
    assert error.abs().max() <= (step + slack) / 2 * (1 + 2.0**-8)
    moving = x != 0
    deviation = (step + slack) / math.sqrt(12)
    assert error.mean(0).abs().max() < 5 * deviation / math.sqrt(times)
    assert error[:, moving].square().mean() < 1.05 * deviation**2
    assert error[:, moving].square().mean() > 0.9 * step**2 / 12


@given(
    st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=70),
    st.sampled_from([2, 3, 4, 8]),
    st.integers(0, 2**40),
)
@settings(max_examples=60)
def test_values_come_back_within_half_a_step_of_an_offset_code(values, bits, number):
    x = torch.tensor(values)
    y = round_trip(x.view(1, -1), bits, OFFSET, number, 32).view(-1)
    for group, back in zip(x.split(32), y.split(32), strict=True):
        low, high = float(group.amin()), float(group.amax())
        largest = max(abs(low), abs(high))
        step = ((high - low) + largest * 2.0**-7) / (2**bits - (2 if low == 0 else 1))
        assert (back - group).abs().max() <= step / 2 * (1 + 2.0**-6) + largest * 2.0**-22 + 1e-37


def test_offsets_and_signs_are_fair_and_differ_from_group_to_group():
    groups = 1 << 14
    u = draws.offsets(seed_of(1), groups, 4)
    counts = u.histc(128, 0, 1)
    expected = groups / 128
    assert (((counts - expected) ** 2 / expected).sum() - 127).abs() < 5 * math.sqrt(2 * 127)
    assert ((u[1:] - 0.5) * (u[:-1] - 0.5)).mean().abs() < 5 / 12 / math.sqrt(groups)
    signs = draws.signs(seed_of(1), groups, 128)
    assert signs.mean(0).abs().max() < 5 / math.sqrt(groups)
    assert (signs[1:] * signs[:-1]).mean().abs() < 5 / math.sqrt(signs.numel())
    pairs = signs.T @ signs / groups - torch.eye(128)
    assert pairs.abs().max() < 6 / math.sqrt(groups)
    other = draws.signs(draws.other_seed(seed_of(1)), groups, 128)
    assert (other * signs).mean().abs() < 5 / math.sqrt(signs.numel())


# ---- rotations -----------------------------------------------------------------------------------


def test_the_matrix_is_orthogonal_and_symmetric():
    for size in (64, 128, 256):
        matrix = hadamard(size, torch.device("cpu"))
        assert torch.equal(matrix @ matrix, size * torch.eye(size))
        assert torch.equal(matrix, matrix.T)


@pytest.mark.parametrize(("bits", "share"), [(2, 0.03), (3, 0.012), (4, 0.006)])
def test_little_of_the_error_of_a_rotated_code_is_bias(bits, share):
    times = 4000
    for x in (torch.randn(128), torch.randn(128).relu(), torch.arange(128.0)):
        rows = x.expand(times, 128).contiguous()
        error = round_trip(rows, bits, ROTATED) - rows
        total = error.square().sum(1).mean()
        bias = error.mean(0).square().sum() - total / times  # what chance makes of it
        assert bias < share * total


@given(
    st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=150),
    st.sampled_from([2, 3, 4]),
    st.integers(0, 2**40),
)
@settings(max_examples=60)
def test_a_rotated_group_comes_back_within_its_spread(values, bits, number):
    x = torch.tensor(values)
    y = round_trip(x.view(1, -1), bits, ROTATED, number, 64).view(-1)
    for group, back in zip(x.double().split(64), y.double().split(64), strict=True):
        spread = (group - group.mean()).square().sum().sqrt()
        error = (back - group).square().sum().sqrt()
        # A few values are not normal when turned: no more than all of it at 2 bits.
        scales = group.abs().amax() * 2.0**-7 * math.sqrt(len(group))
        assert error <= 1.2 * spread + scales + 1e-30


# ---- what is not finite, and what is nearly ------------------------------------------------------


@every_coded
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_its_group_nan(value, bits, code):
    x = torch.randn(1, 256)
    x[0, 5] = value
    y = round_trip(x, bits, code)
    assert y[0, :128].isnan().all()
    assert y[0, 128:].isfinite().all()


@every_coded
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_finite_values_come_back_finite_in_every_range(bits, code, dtype):
    top = torch.finfo(dtype).max
    halves = torch.linspace(-1, 1, 128, dtype=torch.float64)
    rows = [halves * top, halves.sign() * top, torch.full((128,), -top, dtype=torch.float64)]
    rows += [torch.eye(128, dtype=torch.float64)[3] * top, halves * 0, halves * 1e-30]
    x = torch.stack(rows).to(dtype)
    y = round_trip(x, bits, code)
    assert y.isfinite().all()
    assert y.to(torch.bfloat16).isfinite().all()
    assert (y[4] == 0).all()


def test_ragged_groups_are_those_of_their_values_alone():
    x = torch.randn(6, 100) + 4
    y = round_trip(x, 4, ROTATED, group_size=64)
    assert (y - x).norm() < 0.12 * (x - 4).norm()


# ---- layers --------------------------------------------------------------------------------------


@every_code
def test_a_pack_is_one_word_a_group_and_its_seed(method):
    bits, group_size, code = method.groups
    x = torch.randn(32, 128)
    codes, scales, *_ = method.pack(x, method.seed(x))
    head = 0 if code == MINMAX else HEADER
    assert scales.numel() == x.numel() // group_size + head
    assert codes.numel() == x.numel() * bits // 8
    assert Grouping(32, 128, *method.groups).words == scales.numel()


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 128)
    )


def gradients(run, model, x):
    model.zero_grad()
    y = run(x)
    (y * torch.linspace(-1, 1, y.shape[-1]) * y.detach()).sum().backward()
    return y.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def near(actual, expected, share):
    for a, b in zip(actual, expected, strict=True):
        assert (a - b).norm() <= share * b.norm()


SHARE = {2: 0.75, 3: 0.5, 4: 0.25}


@every_code
def test_a_network_keeps_one_pack_a_tensor_and_has_near_gradients(method):
    x, model = torch.randn(256, 64), network()
    y, exact = gradients(model, model, x)
    packlight.convert(model, method)
    back, found = gradients(model, model, x)
    assert torch.equal(y, back)
    near(found, exact, SHARE[method.bits])
    kept = profile(model, x).activation_bytes
    packs = sum(pack_bytes(n, *method.groups) for n in (256 * 64, 256 * 128, 256 * 64))
    statistics = 4 * 256 + 2 * 2 * 4 * 64  # rstd, weight and bias, and their copies
    assert packs <= kept <= packs + statistics
    assert predict(model, x).activation_bytes == kept


@every_code
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_have_near_gradients(method, use_reentrant):
    x, model = torch.randn(256, 64, requires_grad=True), network()
    _, exact = gradients(model, model, x)
    packlight.convert(model, method)
    _, found = gradients(lambda x: checkpoint(model, x, use_reentrant=use_reentrant), model, x)
    near(found, exact, SHARE[method.bits])


@every_code
def test_saving_has_near_gradients(method):
    x, model = torch.randn(256, 64), network()
    _, exact = gradients(model, model, x)
    with saving(method):
        y = model(x)
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.shape[-1]) * y.detach()).sum().backward()
    near([p.grad for p in model.parameters()], exact, SHARE[method.bits])


@pytest.mark.usefixtures("fresh_compiler")
@every_code
def test_compiled_networks_draw_anew_and_have_near_gradients(method):
    x, model = torch.randn(256, 64), network()
    _, exact = gradients(model, model, x)
    packlight.convert(model, method)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    passes = [gradients(compiled, model, x)[1] for _ in range(2)]
    for found in passes:
        near(found, exact, SHARE[method.bits])
    assert not torch.equal(passes[0][0], passes[1][0])


def test_seeding_again_repeats_every_code():
    for method in CODES.values():
        model = network()
        packlight.convert(model, method)
        found = []
        for _ in range(2):
            packlight.manual_seed(5)
            found.append(gradients(model, model, torch.randn(64, 64)))
        assert all(map(torch.equal, found[0][1], found[1][1]))


def test_gated_units_keep_two_packs_with_offsets_of_their_own():
    gate, up = torch.randn(64, 128), torch.randn(64, 128)
    for code in (OFFSET, ROTATED):
        groups = (4, 64, code)
        _, *packs = reference.gated(gate, gate, "relu", groups, seed_of(1), 0)
        assert not torch.equal(packs[1], packs[3])
    for method in CODES.values():
        unit = [x.requires_grad_() for x in (gate.clone(), up.clone())]
        y = groupquant.swiglu(*unit, bits=method.bits, group_size=64, code=method.code)
        y.sum().backward()
        plain = [x.requires_grad_() for x in (gate.clone(), up.clone())]
        (F.silu(plain[0]) * plain[1]).sum().backward()
        near([x.grad for x in unit], [x.grad for x in plain], SHARE[method.bits])


@every_code
def test_autocast_changes_no_pack(method):
    """Nor does it round what is read."""
    x = torch.randn(32, 128)
    expected = method.pack(x, 7)
    exact = method.unpack(torch.float32, (32, 128), (128, 1), *expected)
    with torch.autocast("cpu", torch.bfloat16):
        kept = method.pack(x, 7)
        found = method.unpack(torch.float32, (32, 128), (128, 1), *kept)
    assert all(map(torch.equal, kept, expected))
    assert torch.equal(found, exact)


@every_code
def test_layers_of_every_code_train_under_autocast(method):
    model = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128))
    packlight.convert(model, method, functional=True)
    x = torch.randn(32, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- choices -------------------------------------------------------------------------------------


def test_auto_chooses_by_what_a_tensor_is():
    """By the error of each at these bits, and what steps take (benchmarks/NOTES.md)."""
    auto, offset = GroupQuant(3), GroupQuant(4)
    assert auto == GroupQuant(3, code="auto")
    assert auto.groups == (3, 128, ROTATED)
    assert GroupQuant(2).groups == (2, 128, ROTATED)
    assert offset.groups == (4, 128, OFFSET)
    assert GroupQuant(8).groups == (8, 128, MINMAX)
    assert GroupQuant(8, rounding="offset").groups == (8, 128, OFFSET)
    assert GroupQuant(3, rounding="nearest").groups == (3, 128, MINMAX)
    assert GroupQuant(3, 512).groups == (3, 512, OFFSET)
    assert auto.for_pixels().groups == (3, 128, MINMAX)
    assert auto.for_zeros().groups == (3, 128, OFFSET)
    assert offset.for_zeros().groups == (4, 128, OFFSET)
    assert GroupQuant(2).for_zeros().groups == (2, 128, ROTATED)
    assert offset.for_pixels().groups == (4, 128, MINMAX)
    assert auto.for_scores().groups == (8, 128, MINMAX)
    assert GroupQuant(4, code="rotated").for_scores().groups == (8, 128, MINMAX)
    assert GroupQuant(1, code="rotated").for_functions().bits == 2


RELUS = {
    "torch": torch.relu,
    "fewbit": fewbit.relu,
    "fixed point": groupquant.relu,
    "module": lambda x: nn.ReLU()(x),
    "view": lambda x: torch.relu(x).view(-1, 256),
}
every_relu = pytest.mark.parametrize("relu", RELUS.values(), ids=RELUS)


@every_relu
def test_auto_keeps_the_zeros_of_a_relu(relu):
    x = torch.randn(64, 128, requires_grad=True)
    y = relu(x)
    pack = pack_input(y, GroupQuant(3, code="auto"))
    assert (pack.rebuild(torch.float32, *pack.tensors)[y == 0] == 0).all()


@pytest.mark.parametrize("made_otherwise", [False, True])
@every_relu
def test_auto_knows_a_relu_in_a_compiled_region(relu, made_otherwise, fresh_compiler):
    """And takes nothing else for one: what an addition makes of it is rotated."""
    layer = groupquant.Linear(128, 64, bits=3, code="auto")
    x = torch.randn(64, 128, requires_grad=True)

    def run(x):
        y = relu(x)
        return layer((y + 0.0 if made_otherwise else y).view(64, 128))

    # With these gradients the weight's is what the pack stands for.
    torch.compile(run, backend="aot_eager", fullgraph=True)(x).backward(torch.eye(64))
    zeros = layer.weight.grad[x < 0] == 0
    assert zeros.all() if not made_otherwise else zeros.float().mean() < 0.1


def test_layers_of_pixels_and_functions_take_the_method_that_suits_them():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 64))
    model.append(nn.LayerNorm(64))
    packlight.convert(model, GroupQuant(1, code="rotated"))
    assert [layer.method.bits for layer in model if hasattr(layer, "method")] == [2, 2, 1, 2]
    packlight.revert(model)
    packlight.convert(model, GroupQuant(4, rounding="offset", code="minmax"))
    kinds = [layer.method.groups[2] for layer in model if hasattr(layer, "method")]
    assert kinds == [MINMAX, MINMAX, OFFSET, OFFSET]
    assert groupquant.Conv1d(4, 8, 3, bits=3, code="auto").method.groups[2] == MINMAX
    assert groupquant.Linear(4, 8, bits=3, code="auto").method.groups[2] == ROTATED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"code": "turned"}, "none of"),
        ({"bits": 8, "code": "rotated"}, "not 1, 2, 3 or 4"),
        ({"bits": 1}, "not 2, 3, 4 or 8"),
        ({"group_size": 512, "code": "rotated"}, "not 64, 128 or 256"),
        ({"rounding": "nearest", "code": "rotated"}, "leave rounding out"),
    ],
)
def test_methods_that_do_not_exist_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        GroupQuant(**arguments)


@every_code
def test_methods_travel_as_data_and_in_files(method):
    assert packlight.method.Method.from_dict(method.to_dict()) == method
    back = pickle.loads(pickle.dumps(method))
    assert back == method
    assert back.groups == method.groups


def test_texts_and_files_name_codes(tmp_path):
    methods = {"Linear": GroupQuant(3, code="rotated"), "*": GroupQuant(2, rounding="offset")}
    path = tmp_path / "methods.toml"
    packlight.save_methods(methods, path)
    assert packlight.load_methods(path) == methods


def test_a_method_of_an_older_file_has_the_defaults_of_later_fields():
    old = GroupQuant.__new__(GroupQuant)
    old.__setstate__({"bits": 2, "group_size": 64, "rounding": "nearest"})
    assert old == GroupQuant(2, 64, "nearest")
    assert old.groups == GroupQuant(2, 64, "nearest").groups


def test_compiled_code_is_not_given_codes_without_sides():
    x = torch.randn(256)
    for method in (GroupQuant(4, code="rotated"), GroupQuant(4, rounding="offset")):
        with pytest.raises(InputError, match="side of 0"):
            method.with_sides(x, *method.pack(x, 1))


def test_a_linear_keeps_what_its_bits_say():
    for bits in (1, 2, 3, 4):
        layer = groupquant.Linear(128, 8, bias=False, bits=bits, code="rotated")
        x = torch.randn(64, 128)
        kept = kept_bytes(lambda layer=layer, x=x: layer(x))
        assert kept == pack_bytes(64 * 128, bits, code=ROTATED)

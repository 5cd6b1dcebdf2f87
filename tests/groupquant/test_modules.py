"""Modules of group quantisation: torch's own in eval(), packs in training, torch's arguments."""

import pytest
import torch
from torch import Tensor, nn

import packlight
import packlight.groupquant as groupquant
from packlight.groupquant import fixed_point
from tests.helpers import kept_bytes

QUIET = {"bits": 4, "group_size": 64, "rounding": "nearest"}

# Our class, torch's, their arguments, and the shape of an input.
MODULES = {
    "Linear": (groupquant.Linear, nn.Linear, (64, 24), (32, 64)),
    "Linear without bias": (groupquant.Linear, nn.Linear, (64, 24, False), (32, 64)),
    "LayerNorm": (groupquant.LayerNorm, nn.LayerNorm, (64,), (32, 64)),
    "LayerNorm of two axes": (groupquant.LayerNorm, nn.LayerNorm, ((8, 64), 1e-3), (4, 8, 64)),
    "RMSNorm": (groupquant.RMSNorm, nn.RMSNorm, (64, 1e-3), (32, 64)),
    "RMSNorm with torch's eps": (groupquant.RMSNorm, nn.RMSNorm, (64,), (32, 64)),
    "GroupNorm": (groupquant.GroupNorm, nn.GroupNorm, (2, 8, 1e-3), (2, 8, 8, 8)),
    "BatchNorm1d": (groupquant.BatchNorm1d, nn.BatchNorm1d, (64,), (32, 64)),
    "BatchNorm2d": (groupquant.BatchNorm2d, nn.BatchNorm2d, (8,), (2, 8, 8, 8)),
    "BatchNorm3d": (groupquant.BatchNorm3d, nn.BatchNorm3d, (8,), (2, 8, 4, 4, 4)),
    "Conv1d": (groupquant.Conv1d, nn.Conv1d, (4, 8, 3), (2, 4, 64)),
    "Conv2d": (groupquant.Conv2d, nn.Conv2d, (4, 8, 3, 2, 1), (2, 4, 16, 16)),
    "Conv3d": (groupquant.Conv3d, nn.Conv3d, (4, 8, 3), (2, 4, 8, 8, 8)),
    "ConvTranspose1d": (groupquant.ConvTranspose1d, nn.ConvTranspose1d, (4, 8, 3), (2, 4, 64)),
    "ConvTranspose2d": (groupquant.ConvTranspose2d, nn.ConvTranspose2d, (4, 8, 3), (2, 4, 16, 16)),
    "ConvTranspose3d": (groupquant.ConvTranspose3d, nn.ConvTranspose3d, (4, 8, 3), (2, 4, 8, 8, 8)),
    "GLU": (groupquant.GLU, nn.GLU, (), (32, 128)),
    "GLU of channels": (groupquant.GLU, nn.GLU, (1,), (4, 32, 64)),
}
GATED = {
    "SwiGLU": (groupquant.SwiGLU, nn.functional.silu),
    "GEGLU": (groupquant.GEGLU, nn.functional.gelu),
    "ReGLU": (groupquant.ReGLU, nn.functional.relu),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    ours, theirs, arguments, shape = MODULES[name]
    module, plain = ours(*arguments, **QUIET), theirs(*arguments)
    with torch.no_grad():
        for parameter in plain.parameters():  # no norm's ones and zeros
            parameter.add_(torch.rand_like(parameter))
    module.load_state_dict(plain.state_dict())
    return module, plain, torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("name", MODULES)
def test_eval_is_torchs_own(name):
    module, plain, x = pair(name)
    module.eval(), plain.eval()
    y, expected = module(x), plain(x)
    assert torch.equal(y, expected)
    assert kept_bytes(lambda: module(x)) == kept_bytes(lambda: plain(x))
    inputs = [x, *module.parameters()]
    found = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
    exact = torch.autograd.grad(
        expected.square().sum(), [x, *plain.parameters()], create_graph=True
    )
    for a, b in zip(found, exact, strict=True):
        assert torch.equal(a, b)
    torch.autograd.grad(found[0].square().sum(), x)


@pytest.mark.parametrize("name", MODULES)
def test_training_keeps_a_pack_and_computes_torchs_values(name):
    module, plain, x = pair(name)
    y, expected = module(x), plain(x)
    assert torch.equal(y, expected)
    weights = sum(parameter.nbytes for parameter in plain.parameters())
    assert kept_bytes(lambda: module(x)) < 0.5 * kept_bytes(lambda: plain(x)) + weights
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *module.parameters()], dy)
    exact = torch.autograd.grad(expected, [x, *plain.parameters()], dy)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() < 0.25 * b.norm()


@pytest.mark.parametrize("name", ["Linear", "Conv1d"])
def test_inputs_shorter_than_a_group_are_left_to_torch(name):
    module, plain = (
        (groupquant.Linear(32, 8, **QUIET), nn.Linear(32, 8))
        if name == "Linear"
        else (groupquant.Conv1d(32, 8, 1, **QUIET), nn.Conv1d(32, 8, 1))
    )
    for rows in (1, 2):
        shape = (rows, 32) if name == "Linear" else (1, 32, rows)
        x = torch.randn(shape, requires_grad=True)
        # 64 values are a group: their codes and a scale.
        own = 64 * 4 // 8 + 4 + module.weight.nbytes
        expected = own if rows == 2 else kept_bytes(lambda x=x: plain(x))
        assert kept_bytes(lambda x=x: module(x)) == expected


@pytest.mark.parametrize("name", GATED)
def test_gated_units_in_eval_are_the_product_and_in_training_keep_packs(name):
    kind, function = GATED[name]
    module = kind(**QUIET)
    gate, up = (torch.randn(32, 64, requires_grad=True) for _ in range(2))
    expected = function(gate) * up
    assert kept_bytes(lambda: module(gate, up)) <= gate.nbytes
    torch.testing.assert_close(module(gate, up), expected)
    module.eval()
    y = module(gate, up)
    assert torch.equal(y, expected)
    assert kept_bytes(lambda: module(gate, up)) == kept_bytes(lambda: function(gate) * up)
    (first,) = torch.autograd.grad(y.square().sum(), gate, create_graph=True)
    torch.autograd.grad(first.sum(), gate)


def test_what_cannot_be_halved_is_refused():
    for shape, dim in (((), -1), ((4, 5), 1), ((5, 4), 0), ((4, 5), -1)):
        with pytest.raises(packlight.InputError, match=rf"halves dimension {dim} of shape"):
            groupquant.glu(torch.ones(shape), dim)
    x = torch.randn(5, 4)
    assert torch.equal(groupquant.glu(x), nn.functional.glu(x))


@pytest.mark.parametrize(
    ("kind", "plain_kind", "shape"),
    [
        (fixed_point.BatchNorm1d, nn.BatchNorm1d, (64, 8)),
        (fixed_point.BatchNorm2d, nn.BatchNorm2d, (2, 8, 8, 8)),
        (fixed_point.BatchNorm3d, nn.BatchNorm3d, (2, 8, 4, 4, 4)),
    ],
)
def test_fixed_point_norms_in_eval_are_torchs_own(kind, plain_kind, shape):
    module, plain = kind(8).eval(), plain_kind(8).eval()
    x = torch.randn(shape, requires_grad=True)
    assert torch.equal(module(x), plain(x))
    assert kept_bytes(lambda: module(x)) == kept_bytes(lambda: plain(x))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_linear_reads_the_pack_of_an_activation_in_place_too(inplace):
    model = nn.Sequential(groupquant.SiLU(inplace, **QUIET), groupquant.Linear(64, 8, **QUIET))
    x = torch.randn(32, 64, requires_grad=True)
    pack = 32 * 64 * 4 // 8 + 32 * 64 // 64 * 4
    kept = kept_bytes(lambda: model(x * 1))
    assert kept == pack + model[1].weight.nbytes


@pytest.mark.parametrize("name", GATED)
def test_factors_of_two_dtypes_are_left_to_torch(name):
    kind, function = GATED[name]
    gate, up = torch.randn(32, 64), torch.randn(32, 64, dtype=torch.bfloat16)
    for inputs in ((gate, up), (up, gate)):
        inputs = [x.clone().requires_grad_() for x in inputs]
        y, expected = kind(**QUIET)(*inputs), function(inputs[0]) * inputs[1]
        assert torch.equal(y, expected)
        found, exact = (torch.autograd.grad(x.sum(), inputs) for x in (y, expected))
        assert all(map(torch.equal, found, exact))

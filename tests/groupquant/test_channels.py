"""`code="scaled"`: channels far larger than the others cost these nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight import GroupQuant, groupquant
from packlight.groupquant import channels
from packlight.quantiser import new_pack

ROWS, WIDTH = 512, 256


def decoded(x, method):
    pack = new_pack(x, method)
    return pack.rebuild(torch.float32, *pack.tensors)


def inputs_with_outliers(mean=0.0):
    """3% of the channels 60 times larger, and which the others are."""
    x = torch.randn(ROWS, WIDTH)
    large = torch.zeros(WIDTH, dtype=torch.bool)
    large[::32] = True
    x[:, large] = 60 * (x[:, large] + mean)
    return x, ~large


def weight_error(x, method, columns=slice(None)):
    dy = torch.randn(len(x), 128)
    exact = (dy.T @ x)[:, columns]
    return float(((dy.T @ decoded(x, method))[:, columns] - exact).norm() / exact.norm())


@pytest.mark.parametrize("mean", [0.0, 3.0])
@pytest.mark.parametrize(
    ("bits", "greatest", "elsewhere"), [(4, 0.06, 0.12), (3, 0.1, 0.23), (2, 0.2, 0.46)]
)
def test_large_channels_cost_the_others_next_to_nothing(bits, greatest, elsewhere, mean):
    """Without them, the error is .096, .19 and .365."""
    x, ordinary = inputs_with_outliers(mean)
    method = GroupQuant(bits, code="scaled")
    assert weight_error(x, method) < greatest
    assert weight_error(x, method, ordinary) < elsewhere
    # Rotated, the large ones spread over their group.
    assert weight_error(x, GroupQuant(bits, code="rotated"), ordinary) > 5 * elsewhere


def test_channels_alike_are_not_scaled():
    scale, mean = channels.of_channels(torch.randn(300, 128) + 5)
    assert (scale == 1).all()
    assert (mean - 5).abs().max() < 0.4


def test_scales_are_powers_of_two_and_no_channel_is_made_larger():
    x = torch.randn(300, 128) * torch.logspace(-3, 3, 128)
    scale = channels.of_channels(x)[0].float()
    assert (scale >= 1).all()
    assert (torch.log2(scale) == torch.log2(scale).round()).all()
    assert scale.max() > 64


def test_of_many_draws_the_mean_is_the_tensor():
    x, _ = inputs_with_outliers(2.0)
    method = GroupQuant(2, code="scaled")
    one = (decoded(x, method) - x).square().sum()
    mean = sum(decoded(x, method) for _ in range(16)) / 16
    # A sixteenth of the square, and 2% that does not average out.
    assert (mean - x).square().sum() < 0.1 * one


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spoils_its_group_alone(value):
    x = torch.randn(ROWS, WIDTH)
    x[0, 3] = value
    y = decoded(x, GroupQuant(4, code="scaled"))
    assert y[0, :128].isnan().all()
    assert y[0, 128:].isfinite().all()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_greatest_values_come_back_finite(dtype):
    greatest = 6e4 if dtype == torch.float16 else 1e30
    x = torch.randn(ROWS, WIDTH).to(dtype)
    x[:, 5] = greatest
    x[::2, 9] = -greatest
    pack = new_pack(x, GroupQuant(4, code="scaled"))
    y = pack.rebuild(dtype, *pack.tensors)
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert ((y - x)[:, 5].abs() < 0.3 * greatest).all()


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((ROWS, WIDTH), True), ((2, 256, WIDTH), True), ((128, WIDTH), False), ((ROWS, 192), False)],
)
def test_few_rows_and_ragged_ones_are_rotated_alone(shape, fits):
    x = torch.randn(shape)
    kept = GroupQuant(4, code="scaled").pack(x, 7)
    assert [part.numel() for part in kept[2:]] == [shape[-1] if fits else 0] * 2
    if not fits:
        alone = GroupQuant(4, code="rotated").pack(x, 7)
        assert all(map(torch.equal, kept[:2], alone))


def test_tensors_that_are_not_rows_are_rotated_alone():
    x = torch.randn(WIDTH, ROWS).t()
    assert GroupQuant(4, code="scaled").pack(x, 7)[2].numel() == 0
    assert (decoded(x, GroupQuant(4, code="scaled")) - x).norm() < 0.11 * x.norm()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_and_its_readers_share_a_scaled_pack(norm):
    torch.manual_seed(0)
    plain = nn.Sequential(norm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, 64))
    with torch.no_grad():
        plain[0].weight.normal_()
    model = nn.Sequential(norm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, 64))
    model.load_state_dict(plain.state_dict())
    packlight.convert(model, GroupQuant(4, code="scaled"))
    x, ordinary = inputs_with_outliers()
    dy = torch.randn(ROWS, 64)
    for each in (plain, model):
        own = x.clone().requires_grad_()
        each.x = own
        each(own).backward(dy)
    for name, greatest in (("0.weight", 0.1), ("1.weight", 0.1)):
        exact, found = plain.get_parameter(name).grad, model.get_parameter(name).grad
        assert (found - exact).norm() < greatest * exact.norm()
    exact, found = plain[1].weight.grad[:, ordinary], model[1].weight.grad[:, ordinary]
    assert (found - exact).norm() < 0.13 * exact.norm()
    assert (model.x.grad - plain.x.grad).norm() < 0.15 * plain.x.grad.norm()


def test_a_pack_takes_32_bits_a_channel_more():
    x = torch.randn(ROWS, WIDTH)
    layers = [groupquant.Linear(WIDTH, 8, code=code) for code in ("scaled", "rotated")]
    scaled, rotated = (packlight.profile(layer, x).activation_bytes for layer in layers)
    assert scaled - rotated == 4 * WIDTH


def test_functions_and_attention_have_rotated_packs():
    method = GroupQuant(2, code="scaled")
    assert method.for_functions() == method.for_pixels() == GroupQuant(2, code="rotated")
    assert method.for_norms() == method
    assert method.for_attention() == GroupQuant(4, code="rotated")
    assert method.for_scores() == GroupQuant(8, code="minmax")
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.LayerNorm(64))
    packlight.convert(model, GroupQuant(1, code="scaled"))
    assert [layer.method.code for layer in model] == ["scaled", "rotated", "scaled"]
    assert [layer.method.bits for layer in model] == [1, 2, 2]


def test_a_compiled_region_scales_too():
    torch.manual_seed(0)
    layer = groupquant.Linear(WIDTH, 64, code="scaled")
    x, ordinary = inputs_with_outliers()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    found = layer.weight.grad.clone()
    weight = layer.weight.detach().clone().requires_grad_()
    F.linear(x, weight, layer.bias).square().sum().backward()
    error = (found - weight.grad)[:, ordinary].norm() / weight.grad[:, ordinary].norm()
    assert error < 0.2


def test_a_transformer_trains_by_scaled_packs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 128))
    packlight.convert(model, GroupQuant(2, code="scaled"), functional=True)
    x = torch.randn(256, 128)
    x[:, 0] *= 50
    target = torch.randn(256, 128)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]

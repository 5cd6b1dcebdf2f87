"""What backward passes share: casts of parameters, none of which crosses, products and sums."""

import pytest
import torch
from torch import nn

from packlight import _torch, groupquant, sketch
from packlight._gradients import _cast_parts, add_product, column_sums, product, recast
from tests.helpers import crossing

LAYERS = {
    "group-quantised Linear": lambda: groupquant.Linear(64, 32),
    "group-quantised Conv2d": lambda: groupquant.Conv2d(64, 32, 3),
    "sketched Linear": lambda: sketch.Linear(64, 32, min_rows=1),
}


def test_is_the_tensor_in_the_dtype_of_the_other():
    x, like = torch.randn(3, 4), torch.randn(2, dtype=torch.bfloat16)
    assert torch.equal(recast(x, like), x.bfloat16())
    assert recast(x, x) is x
    torch.library.opcheck(torch.ops.packlight.recast.default, (x, like))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_no_cast_of_a_weight_crosses(make, fresh_compiler):
    layer: nn.Module = make()
    x = torch.randn(4, 64, 16, 16) if layer.weight.dim() == 4 else torch.randn(256, 64)
    x.requires_grad_()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    crossed = [(t.shape, t.dtype) for t in crossing(run, x)]
    assert (layer.weight.shape, torch.float32) in crossed
    assert (layer.weight.shape, torch.bfloat16) not in crossed


def test_inductor_writes_casts_of_weights_itself(fresh_compiler):
    layer, x = groupquant.Linear(64, 32), torch.randn(256, 64, requires_grad=True)
    run = torch.compile(layer, fullgraph=True)

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            run(x).float().square().sum().backward()

    step()
    assert torch.ops.packlight.recast.default in _torch.LOWERINGS.values[1]
    with torch.profiler.profile() as profile:
        step()
    called = {event.key for event in profile.key_averages()}
    assert "packlight::group_dequantize" in called
    assert "packlight::recast" not in called


def test_casts_of_parts_are_those_of_the_operator(fresh_compiler):
    parts, like = [torch.randn(n, 8) for n in (3, 5)], torch.randn(2, dtype=torch.bfloat16)
    assert _torch.LOWERINGS.values is not None  # which imports Inductor
    recast_parts_of = torch.ops.packlight.recast_parts.default

    def run(parts, like):
        return recast_parts_of(parts, like)

    # As where a layer is traced: by what comes behind the tracer.
    _torch.lower(recast_parts_of, _cast_parts)
    compiled = torch.compile(run, fullgraph=True)
    assert torch.equal(compiled(parts, like), torch.cat(parts).bfloat16())
    with torch.profiler.profile() as profile:
        compiled(parts, like)
    assert "packlight::recast_parts" not in {event.key for event in profile.key_averages()}


def test_a_product_of_16_bits_is_written_in_32():
    a, b = torch.randn(5, 64).bfloat16(), torch.randn(64, 3).bfloat16()
    assert torch.equal(product(a, b, torch.float32), a.mm(b).float())
    assert product(a, b, torch.bfloat16).dtype == torch.bfloat16
    torch.library.opcheck(torch.ops.packlight.wide_mm.default, (a, b))


def test_a_product_is_added_over_what_it_is_added_to():
    for dtype, of_total in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, None)):
        a, b = torch.randn(5, 64).to(dtype), torch.randn(64, 3).to(dtype)
        total = torch.randn(5, 3).to(of_total or torch.float32)
        truth = total.double() + a.double().mm(b.double())
        apart = total + a.mm(b).to(total.dtype)
        found = add_product(total, a, b)
        assert found is total
        assert (found - truth).norm() <= (apart - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_product_of_16_bits_is_not_rounded(compiled, fresh_compiler):
    a, b = (torch.randn(64, 64, device="cuda").bfloat16() for _ in range(2))
    run = torch.compile(product, fullgraph=True) if compiled else product
    y, truth = run(a.t(), b, torch.float32), a.double().t().mm(b.double())
    assert y.dtype == torch.float32
    assert (y - truth).norm() < 1e-5 * truth.norm()  # 16 bits: 2e-3


@pytest.mark.parametrize("rows", [0, 1, 50, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_sums_of_columns_are_as_near_as_those_of_torch(
    rows, dtype, compiled, device, fresh_compiler
):
    run = torch.compile(column_sums, fullgraph=True) if compiled else column_sums
    x = torch.randn(rows, 40, device=device).to(dtype)
    truth = x.double().sum(0)
    for wanted in (dtype, torch.float32, torch.float64):
        plain, ours = x.sum(0, dtype=wanted), run(x, wanted)
        assert ours.shape == plain.shape
        assert ours.dtype == wanted
        limit = torch.finfo(wanted).eps * (4 * truth.abs() + x.double().abs().sum(0)).norm()
        assert (ours - truth).norm() <= (plain - truth).norm() + limit


def test_sums_of_columns_ask_nothing_of_a_number_of_rows_that_is_not_known(fresh_compiler):
    run = torch.compile(column_sums, dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (128, 200, 255):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(run(x, torch.float32), x.sum(0))


def test_a_linear_layer_without_outputs_has_gradients():
    x, weight = torch.randn(2, 64, requires_grad=True), torch.randn(0, 64, requires_grad=True)
    groupquant.linear(x, weight).sum().backward()
    assert not x.grad.any()
    assert weight.grad.shape == (0, 64)

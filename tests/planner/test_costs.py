"""What operators cost: by their kind, and where hooks see what they save."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import packlight
from packlight import FewBit, GroupQuant
from packlight.planner.costs import THIN_PRODUCTS, Costs, name_of
from packlight.planner.devices import Device, device_of
from packlight.planner.walk import Walker
from tests.planner.models import Latent

H200 = device_of("H200")


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "name"),
    [
        (512, 256, 1024, "aten::mm"),
        (512, 256, 16, THIN_PRODUCTS),
        (512, 64, 1024, THIN_PRODUCTS),
        (1, 512, 1024, THIN_PRODUCTS),
    ],
)
def test_products_with_a_short_side_have_a_rate_of_their_own(
    rows: int, inner: int, columns: int, name: str
) -> None:
    a, b = torch.empty(rows, inner), torch.empty(inner, columns)
    assert name_of(torch.ops.aten.mm.default, (a, b)) == name
    bias = torch.empty(columns)
    added = name_of(torch.ops.aten.addmm.default, (bias, a, b))
    assert added == (name if name == THIN_PRODUCTS else "aten::addmm")
    wide = name_of(torch.ops.packlight.wide_mm.default, (a, b))
    assert wide == name


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_attention_costs_its_traffic_and_its_arithmetic(backward: bool) -> None:
    aten, costs = torch.ops.aten, Costs(H200)

    def ms(length: int, width: int = 128) -> float:
        x = torch.empty(16384 // length, 16, length, width, dtype=torch.bfloat16, device="meta")
        if backward:
            operator = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
            args = (x, x, x, x, x, x[..., 0], 0.0, True)
            tensors = [x] * 8
        else:
            operator = aten._scaled_dot_product_flash_attention_for_cpu.default
            args, tensors = (x, x, x, 0.0, True), [x] * 4
        return costs.of(operator, args, x, tensors)[0]

    # Of as many tokens: short sequences are traffic, which does not shrink with them.
    assert ms(128) == pytest.approx(ms(256), rel=0.25)
    assert ms(8192) == pytest.approx(2 * ms(4096), rel=0.2)
    # Half as wide heads have half of the arithmetic, and take more than half of the time.
    assert 0.55 < ms(8192, 64) / ms(8192) < 0.75


def test_products_of_low_rank_take_the_precision_that_is_set() -> None:
    costs, x = Costs(H200), torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    low, factor = (torch.empty(*size, device="meta") for size in ((4096, 16), (16, 4096)))
    calls = {
        "add_widened_": (x, low, factor, 1.0, True),
        "narrowed": (x, factor.T),
        "outer": (x, low),
    }

    def ms() -> dict[str, float]:
        found = {}
        for name, args in calls.items():
            operator = getattr(torch.ops.packlight, f"low_rank_{name}").default
            found[name] = costs.of(operator, args, None, [x])[0] - 1e-3 * H200.rates.kernel_us
        return found

    exact = ms()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        faster = ms()
    finally:
        torch.set_float32_matmul_precision(before)
    factors = H200.rates.factors
    for name in calls:
        one = f"packlight::low_rank_{name}"
        ratio = factors[f"{one} in TF32"] / factors[one]
        assert ratio < 0.8
        assert faster[name] == pytest.approx(ratio * exact[name])
    assert ms() == exact


def _with(**rates: float) -> Device:
    return dataclasses.replace(H200, rates=dataclasses.replace(H200.rates, **rates))


def test_rotated_packs_take_longer() -> None:
    costs, x = Costs(H200), torch.empty(1024, 1024)
    operator = torch.ops.packlight.group_dequantize.default

    def ms(code: int) -> float:
        args = (x, x, [1024, 1024], [1024, 1], 1024, [4, 128, code])
        return costs.of(operator, args, x, [x, x])[0] - 1e-3 * H200.rates.kernel_us

    assert ms(2) == pytest.approx(1.33 * ms(0))


def _host_ms(model: nn.Module, device: Device) -> float:
    walked = Walker(model, (torch.empty(64, 64, device="meta"),), {}, runs=[]).walk(device)
    return sum(segment.host_ms for segment in walked.timeline.segments)


class Twice(nn.Module):
    """A layer that runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(64, 64), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return y


def test_hooks_of_checkpoints_cost_host_time_in_both_passes() -> None:
    with torch.device("meta"):
        model = Twice()
    free, dear = _with(hooks_us=0.0), _with(hooks_us=1000.0)
    # The product twice, and the GELU once: the second run ends when all that is needed is there.
    assert _host_ms(model, dear) - _host_ms(model, free) == pytest.approx(3.0)
    assert _host_ms(model.layer, dear) == _host_ms(model.layer, free)


def test_hooks_of_a_first_pass_are_not_counted() -> None:
    """Those that find out whether the rest of a model is worth packing; later passes have none."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    packlight.convert(model, (GroupQuant(8), FewBit(8)), rest=GroupQuant(8))
    assert _host_ms(model, _with(hooks_us=1000.0)) == _host_ms(model, _with(hooks_us=0.0))


@pytest.mark.parametrize(
    ("dtype", "measured"), [(torch.bfloat16, 386_926_592), (torch.float32, 739_295_744)]
)
def test_latent_attention_takes_what_it_took_on_an_h200(dtype: torch.dtype, measured: int) -> None:
    """4 x 2048 tokens, 16 heads of 192 and 128 channels, torch 2.11."""

    with torch.device("meta"):
        model, x = Latent(512, 16).to(dtype), torch.empty(4, 2048, 512, dtype=dtype)
    timeline = Walker(model, (x,), {}).walk(H200).timeline
    assert max(s.peak for s in timeline.segments) == pytest.approx(measured, rel=1e-4)

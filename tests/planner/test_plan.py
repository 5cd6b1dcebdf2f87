"""Plans: within their budgets, the faster the larger, and what `convert` makes of them."""

import itertools
import pathlib
from typing import Any

import pytest
import torch

import packlight
from benchmarks import rows as results
from packlight import GroupQuant, InfeasibleBudgetError, InputError, Plan
from packlight.planner.devices import device_of
from packlight.planner.menu import EXACT, MENU, PACKED_3, PACKED_4, PACKED_8, allowed
from packlight.planner.planner import MAX_ERROR
from packlight.planner.planning import _measured, planned
from packlight.planner.searching import candidates
from packlight.planner.study import Study
from packlight.planner.timeline import STEP, allocatable, reserved
from packlight.planner.walk import Walker
from packlight.report.gradients import Deviation, LayerGradients
from tests.planner.models import Model, on_meta, singles

H200 = device_of("H200")
OPTIONS = allowed(MENU, MAX_ERROR)


@pytest.fixture(scope="module")
def study() -> Study:
    model, tokens = on_meta(depth=8)
    return Study(model, (tokens,), {}, H200, None, torch.optim.SGD)


def test_plans_keep_to_their_budgets_and_larger_ones_are_no_slower(study: Study) -> None:
    found = candidates(study, OPTIONS, [PACKED_4])
    least, most = min(one.peak for one in found), max(one.peak for one in found)
    assert least < 0.9 * most
    times = []
    for tenth in range(11):
        budget = reserved(least + (most - least) * tenth // 10) + 1
        plan = planned(study, budget, None, MAX_ERROR)
        assert plan.peak_bytes < plan.reserved_bytes <= budget
        times.append(plan.ms)
    assert times == sorted(times, reverse=True)


def test_sums_of_a_mix_are_those_of_its_timeline(study: Study) -> None:
    for one in candidates(study, OPTIONS, [PACKED_4])[::5]:
        timeline = one.mix.timeline()
        assert (one.peak, one.kept) == (timeline.peak, timeline.kept)
        assert one.ms == pytest.approx(timeline.ms)


def test_a_mix_is_what_the_converted_model_takes(study: Study) -> None:
    """The mix is strung together from walks of other models; here that very model is walked."""
    found = candidates(study, OPTIONS, [PACKED_4])
    mixed = [one for one in found if len(set(one.options.values())) > 1]
    for one in mixed[:: max(len(mixed) // 4, 1)]:
        plan = planned(study, reserved(one.peak) + 1, None, MAX_ERROR)
        model, tokens = on_meta(depth=8)
        walker = Walker(model, (tokens,), {}, None, torch.optim.SGD, singles(model))
        with walker.imagined():
            packlight.convert(walker.model, plan)
        real = walker.walk(H200).timeline
        assert plan.peak_bytes == pytest.approx(real.peak, rel=0.005)
        # Where options meet, the pack of a block's input may not serve the block before as well.
        pack = 8 * 256 * 64 * 33 // 32
        assert plan.kept_bytes == pytest.approx(real.kept, abs=pack + 4096)
        steps = [
            sum(s.device_ms for s in t.segments if s.phase != STEP) for t in (plan.timeline, real)
        ]
        assert steps[0] == pytest.approx(steps[1], rel=0.05)


def test_early_blocks_go_over_first(study: Study) -> None:
    """All of a run, the first too, whose numbers differ by what is around the run."""
    for one in candidates(study, OPTIONS, [PACKED_4]):
        chosen = [option.name for option in one.options.values()]
        assert len(list(itertools.groupby(chosen))) == len(set(chosen)) <= 2


def test_what_no_plan_can_do_is_refused_with_the_least(study: Study) -> None:
    least = min(one.peak for one in candidates(study, OPTIONS, [PACKED_4]))
    planned(study, reserved(least) + 1, None, MAX_ERROR)
    with pytest.raises(
        InfeasibleBudgetError, match=r"the least is .* allocated in the .*pass.*weights"
    ):
        planned(study, reserved(least) - 1, None, MAX_ERROR)
    with pytest.raises(InfeasibleBudgetError, match="keeps 1e-06 of what plain training keeps"):
        planned(study, None, 1e-6, MAX_ERROR)


def test_errors_are_kept_to(study: Study) -> None:
    assert {option.error for option in allowed(MENU, 0.0)} == {0.0}
    plan = planned(study, None, 0.4, 0.0)
    assert plan.error == 0
    assert plan.kept_bytes <= 0.4 * plan.plain.kept
    assert {block.option for block in plan.blocks} <= {"torch", "checkpoint", "offload"}


def test_a_plan_converts_and_saves(tmp_path: pathlib.Path) -> None:
    model, tokens = Model(depth=6), torch.randint(0, 128, (4, 64))
    plan = packlight.plan(model, tokens, memory=0.5, device="H200")
    assert isinstance(plan, Plan)
    conversion = packlight.convert(model, plan)
    assert conversion.replaced
    model(tokens).backward()
    after = conversion.bytes(tokens).after.activation_bytes
    assert after <= 0.5 * plan.plain.kept
    plan.save(tmp_path / "plan.toml")
    assert packlight.load_methods(tmp_path / "plan.toml") == dict(plan)
    saved = packlight.load_methods(tmp_path / "plan.toml")
    assert saved.head == plan.head
    packlight.revert(model)
    packlight.convert(model, saved, strict=False)
    assert conversion.bytes(tokens).after.activation_bytes == after
    text = str(plan)
    for part in ("blocks of blocks:", "the peak is in the", "times measured"):
        assert part in text
    assert plan.to_dict()["peak_bytes"] == plan.peak_bytes
    assert sum(plan.peak_parts().values()) == plan.peak_bytes


def test_a_model_without_blocks_has_plans_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    x = torch.empty(512, 64)
    assert not packlight.plan(model, x, memory=1.0, device="H200").blocks
    packed = packlight.plan(model, x, memory=0.5, device="H200")
    assert packed["*"] is not None
    with pytest.raises(InfeasibleBudgetError):
        packlight.plan(model, x, memory=0.5, device="H200", max_error=0.0)


def test_a_dict_is_keywords_and_a_loss_is_taken() -> None:
    model = Model(depth=2)
    plan = packlight.plan(
        model, {"tokens": torch.zeros(2, 16, dtype=torch.int64)}, memory="1GiB", device="H200",
        loss=lambda value: value * 2,
    )  # fmt: skip
    assert plan.budget == 2**30


def test_estimated_times_say_so() -> None:
    model, tokens = on_meta(depth=2)
    assert "estimated" in packlight.plan(model, tokens, memory="1GiB", device="RTX 4090").source
    assert packlight.plan(model, tokens, memory="1GiB", device="NVIDIA H200").source == "measured"


@pytest.mark.parametrize("memory", ["much", -1, 0, 1.5, 0.0, True, None])
def test_memory_is_bytes_or_a_share(memory: object) -> None:
    with pytest.raises(InputError, match="memory="):
        packlight.plan(Model(depth=1), torch.zeros(1, 4, dtype=torch.int64), memory=memory)


def test_what_is_outside_of_blocks_errs_no_more() -> None:
    model, tokens = on_meta(depth=2)
    plan = packlight.plan(model, tokens, memory="1GiB", device="H200", max_error=0.01)
    choice = plan["*"]
    assert choice is None or GroupQuant(4) not in choice
    assert EXACT in allowed(MENU, 0.01)


@pytest.mark.parametrize("size", [0, 1000, 2**28, 2**31, 2**32 + 7, 10**11])
def test_what_is_allocatable_is_reserved_within_the_size(size: int) -> None:
    assert reserved(allocatable(size)) <= size
    assert reserved(allocatable(size) + 2) >= size
    assert allocatable(size + 1) >= allocatable(size)


def test_what_is_reserved_is_what_an_h200_needed() -> None:
    """The lowest limits in which steps ran, and limits in which they did not; no toy margin."""
    rows = results.read(pathlib.Path("benchmarks/results/planner.jsonl"))
    lowest = [
        (row, reserved(row.get("peak", row["predicted_peak"])) / row["least_limit"])
        for row in rows
        if "least_limit" in row
    ]
    short = [row for row, share in lowest if share < 1]
    assert [(row["scenario"], row["kind"]) for row in short] == [("gpt2m", "checkpoint")]
    assert all(0.98 < share < 1.085 for _, share in lowest)
    failed = [row for row in rows if row["commit"] == "99990b8" and row.get("out_of_memory")]
    assert len(failed) == 6
    assert all(reserved(row["peak"]) > row["budget"] for row in failed)


def test_options_that_torch_refuses_to_run_again_are_left_out() -> None:
    """Packs of 4 bits in offloaded encoder layers, whose input the layer before has packed."""
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    plan = packlight.plan(model, torch.randn(4, 64, 64), memory="1GiB", device="H200")
    packlight.convert(model, plan, strict=False)
    model(torch.randn(4, 64, 64)).sum().backward()


@pytest.mark.parametrize("wrong", [{"optimizer": "adamw"}, {"loss": "mse"}])
def test_what_is_called_must_be_callable(wrong: dict[str, Any]) -> None:
    with pytest.raises(packlight.InputError, match=f"{next(iter(wrong))} is a str, which cannot"):
        packlight.plan(torch.nn.Linear(8, 8), torch.randn(4, 8), memory=1.0, device="H100", **wrong)


def _report(model: Model, scale: float = 1.0, **methods: float) -> packlight.GradientReport:
    """Errors of the layers of a model, by methods; those of block 3 are larger by `scale`."""
    rows = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            times = scale if name.startswith("blocks.3.") else 1.0
            errors = [
                Deviation(4.0, 4.0 * (times * error) ** 2, None, 4.0, 4.0)
                for error in methods.values()
            ]
            kind = type(module).__name__
            rows.append(LayerGradients(name, kind, tuple(errors), None, ()))
    return packlight.GradientReport("Model", tuple(methods), tuple(rows), None, 1)


def test_errors_are_those_of_a_report(study: Study) -> None:
    model, _ = on_meta(depth=8)
    options = (PACKED_8, PACKED_4, PACKED_3)
    of_table = {option.measured_as(): option.error for option in options}
    table = planned(study, None, 0.4, MAX_ERROR)
    same = planned(study, None, 0.4, MAX_ERROR, _report(model, **of_table))
    assert dict(same) == dict(table)
    assert same.error == pytest.approx(table.error)
    # One block errs twice as much, so by 4 bits too much; what is not measured is not there.
    report = _report(model, 2.0, **of_table)
    blocks, outside = (
        {option.name: option.error for option in found} for found in _measured(study, report)
    )
    assert blocks["packs of 4 bits"] == blocks["offload of 8 bits, packs of 4"]
    assert blocks["packs of 4 bits"] == pytest.approx(2 * PACKED_4.error)
    assert blocks["checkpoint of 8 bits"] == pytest.approx(2 * PACKED_8.error)
    assert blocks["torch"] == blocks["checkpoint"] == blocks["offload"] == 0
    assert outside["packs of 4 bits"] == pytest.approx(PACKED_4.error)
    assert "packs of 2 bits" not in {*blocks, *outside}
    careful = planned(study, None, 0.4, MAX_ERROR, report)
    assert careful.error <= 2 * PACKED_8.error
    assert not [row for row in careful.blocks if "packs of 4" in row.option]


def test_a_report_of_a_model_has_the_options_of_a_plan() -> None:
    model, tokens = Model(depth=2, width=32), torch.randint(0, 128, (4, 16))
    options = [option for option in MENU if option.block is None and option.inside]
    report = packlight.gradient_error(model, tokens, *(option.inside for option in options))
    assert {option.measured_as() for option in MENU} == {"", *report.methods}
    plan = packlight.plan(model, tokens, memory=1.0, device="H200", errors=report, max_error=None)
    assert isinstance(plan, Plan)


def test_reports_of_other_models_and_other_things_are_refused() -> None:
    model, tokens = on_meta(depth=5)
    report = packlight.GradientReport("Other", (), (), None, 1)
    with pytest.raises(InputError, match="report of Other, and has no weights of the blocks"):
        packlight.plan(model, tokens, memory=0.5, device="H200", errors=report)
    with pytest.raises(InputError, match=r"errors is a dict; expected"):
        packlight.plan(model, tokens, memory=0.5, device="H200", errors={})  # type: ignore[arg-type]

"""`planned`: the fastest methods with which a training step fits into a number of bytes."""

from collections.abc import Iterator, Sequence

from packlight.errors import InfeasibleBudgetError, InputError
from packlight.planner.menu import MENU, OUTSIDE, Option, allowed, measured, selectors
from packlight.planner.result import Plan, PlannedBlock, peak_parts, where
from packlight.planner.searching import Candidate, candidates, fastest
from packlight.planner.study import Study
from packlight.planner.timeline import FORWARD, allocatable, reserved
from packlight.planner.walked import is_in
from packlight.report.gradients import GradientReport, LayerGradients
from packlight.report.words import human_bytes


def planned(
    study: Study,
    budget: int | None,
    share: float | None,
    max_error: float | None,
    errors: GradientReport | None = None,
) -> Plan:
    """Of a pipeline each stage is planned for itself; bytes and times are those of the stage with
    the highest peak.
    """
    stages = [(one, _best(one, budget, share, max_error, errors)) for one in study.stages]
    worst, best = max(stages, key=lambda stage: stage[1].peak)
    options = {name: option for _, one in stages for name, option in one.options.items()}
    blocks = tuple(row for _, one in stages for row in _rows(one))
    rates = study.device.rates
    source = "measured" if study.device.measured else f"estimated, by rates {rates.source}"
    return Plan(
        selectors(options, best.outside),
        study.head,
        blocks,
        best.mix.timeline(),
        worst.plain().timeline,
        study.device.name,
        source,
        budget,
        worst.stage,
    )


def _best(
    study: Study,
    budget: int | None,
    share: float | None,
    max_error: float | None,
    errors: GradientReport | None,
) -> Candidate:
    kept = study.plain().timeline.kept
    found = _found(study, max_error, errors)
    if share is None:
        assert budget is not None
        best = fastest(found, lambda one: one.peak <= allocatable(budget))
    else:
        best = fastest(found, lambda one: one.kept <= share * kept)
    if best is None:
        raise InfeasibleBudgetError(_why(found, kept, budget, share, max_error))
    return best


def front(study: Study, max_error: float | None) -> Iterator[tuple[float, int]]:
    """Milliseconds and bytes at the peak of mixes that no other is better than in both."""
    least: int | None = None
    for one in _found(study, max_error):  # the fastest first
        if least is None or one.peak < least:
            least = one.peak
            yield one.ms, one.peak


def _found(
    study: Study, max_error: float | None, errors: GradientReport | None = None
) -> list[Candidate]:
    menu, outside = (MENU, OUTSIDE) if errors is None else _measured(study, errors)
    options = allowed(menu, max_error)
    if not options:
        raise InputError(f"max_error={max_error} is below 0, so that nothing is allowed")
    return candidates(study, options, allowed(outside, max_error))


def _measured(study: Study, errors: GradientReport) -> tuple[Sequence[Option], Sequence[Option]]:
    """The options of blocks, and of what is outside of them, by what was measured of a model."""
    names = [name for run in study.walker.runs for name in run.names]
    of_block = {name: [row for row in errors.rows if is_in(row.layer, name)] for name in names}
    within = {row.layer for rows in of_block.values() for row in rows}
    blocks = [LayerGradients.together(name, "", rows) for name, rows in of_block.items() if rows]
    others = [row for row in errors.rows if row.layer not in within]
    if names and not any(block.weights for block in blocks):
        raise InputError(
            f"errors is a report of {errors.model}, and has no weights of the blocks of this model,"
            f" {names[0]} and such; pass what packlight.gradient_error says of the model itself"
        )
    outside = [LayerGradients.together("", "", others)] if others else []
    return measured(MENU, errors, blocks), measured(OUTSIDE, errors, outside)


def _rows(best: Candidate) -> list[PlannedBlock]:
    rows = []
    for name, parts in best.mix.by_block().items():
        kept = sum(part.grows for part in parts if part.phase == FORWARD)
        working = max((part.peak for part in parts if part.phase != FORWARD), default=0)
        ms = sum(part.ms for part in parts)
        option = best.options[name]
        rows.append(PlannedBlock(name, option.name, kept, working, ms, option.error))
    return rows


def _why(
    found: list[Candidate],
    plain_kept: int,
    budget: int | None,
    share: float | None,
    max_error: float | None,
) -> str:
    limit = "" if max_error is None else f" with errors of gradients of at most {max_error:g}"
    if share is not None:
        least = min(found, key=lambda one: one.kept)
        return (
            f"no plan keeps {share:g} of what plain training keeps{limit}; the least is"
            f" {least.kept / max(plain_kept, 1):.3f}, {human_bytes(least.kept)} of"
            f" {human_bytes(plain_kept)}; a smaller batch keeps less"
        )
    assert budget is not None
    least = min(found, key=lambda one: one.peak)
    timeline = least.mix.timeline()
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in peak_parts(timeline).items())
    highest = timeline.highest
    return (
        f"no plan fits into {human_bytes(budget)}{limit}; the least is"
        f" {human_bytes(reserved(least.peak))}, of which {human_bytes(least.peak)} are allocated in"
        f" the {where(highest.phase, highest.place)}: {parts}. A smaller batch, a shorter"
        " sequence, fewer trained weights or a smaller optimiser would take less"
    )

"""`fit`: does a training step fit a card, and how large may the batch be, by each choice."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import nn

from packlight.errors import InfeasibleBudgetError, InputError
from packlight.parallel import ONE_RANK, Parallel, checked
from packlight.planner.cutting import group_for
from packlight.planner.devices import Device, parse_bytes
from packlight.planner.menu import CHECKPOINTED, EXACT, MENU, PACKED_4, TILED, Option, allowed
from packlight.planner.parts import batch_and_length, resized
from packlight.planner.planner import MAX_ERROR, Loss, OptimizerOf
from packlight.planner.planning import front, planned
from packlight.planner.result import Plan
from packlight.planner.study import Study
from packlight.planner.timeline import Timeline, allocatable
from packlight.report.printing import new_table, render
from packlight.report.words import human_bytes

# What CUDA's context and libraries take of a card, beside the allocator: 430 to 520 MiB.
_CONTEXT = 2**29


def usable(memory: int) -> int:
    """Bytes for tensors: what CUDA leaves, but for what the allocator cannot hand out."""
    return allocatable(memory - _CONTEXT)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a user can do about memory, and the lines of code that do it."""

    name: str
    option: Option
    outside: Option
    head: bool
    code: str


def choices(has_head: bool, transformers: bool) -> list[Choice]:
    head = ", head=True" if has_head else ""
    checkpointing = (
        "TrainingArguments(gradient_checkpointing=True)"
        if transformers
        else "packlight.convert(model, packlight.Checkpoint(keep=None))"
    )
    return [
        Choice("PyTorch", EXACT, EXACT, False, ""),
        Choice("checkpointing", CHECKPOINTED, EXACT, False, checkpointing),
        Choice(
            "packlight", PACKED_4, PACKED_4, has_head,
            f"packlight.convert(model, functional=True{head})",
        ),
        Choice(
            "packlight, tiles", TILED, PACKED_4, has_head,
            "methods = (packlight.Checkpoint(), packlight.Tiles(), *packlight.DEFAULT_METHODS)\n"
            f"packlight.convert(model, methods, functional=True{head})",
        ),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """A choice: its bytes, and the largest batch and the longest sequence that fit.

    Of a parallel run they are those of the stage with the highest peak, and `sent` are the bytes
    that one of its ranks sends in a step, by the degree that asks for them. `margin` is what is
    left of the card's memory, negative where something is missing. Sizes are None where they were
    not asked for, and 0 where not even the smallest fits.
    """

    name: str
    code: str
    peak: int
    kept: int
    gradients: int
    working: int
    ms: float
    margin: int
    largest_batch: int | None
    longest_sequence: int | None
    stage: int = 0
    sent: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.margin >= 0

    @property
    def verdict(self) -> str:
        return "fits" if self.fits else "does not fit"


@dataclasses.dataclass(frozen=True, repr=False)
class Fit:
    """Whether training fits; prints as a table."""

    title: str
    device: Device
    usable: int
    weights: int
    optimizer: int
    other: int
    rows: tuple[Row, ...]
    timelines: dict[str, Timeline]
    plan: Plan | None
    why_no_plan: str | None
    front: tuple[tuple[float, int], ...]  # milliseconds and bytes of what plans can do
    parallel: Parallel = ONE_RANK
    microbatches: int = 1
    wires: int = 0  # weights that stay gathered, and buffers of what is sent

    @property
    def fastest(self) -> Row | None:
        """The plainest of those that are as fast to three digits."""
        fitting = (row for row in self.rows if row.fits)
        return min(fitting, key=lambda row: float(f"{row.ms:.3g}"), default=None)

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "device": self.device.name,
            "memory": self.device.memory,
            "usable": self.usable,
            "measured": self.device.measured,
            "weights": self.weights,
            "optimizer": self.optimizer,
            "other": self.other,
            "rows": [{**dataclasses.asdict(row), "fits": row.fits} for row in self.rows],
            "fastest": None if self.fastest is None else self.fastest.name,
            "plan": None if self.plan is None else self.plan.to_dict(),
            "why_no_plan": self.why_no_plan,
            "front": [{"ms": ms, "peak": peak} for ms, peak in self.front],
            "parallel": {**self.parallel.to_dict(), "microbatches": self.microbatches},
            "wires": self.wires,
        }

    @property
    def sizes(self) -> dict[str, list[str]]:
        """The largest batch and the longest sequence of each row, where one has any."""
        columns = {
            "batch": [row.largest_batch for row in self.rows],
            "sequence": [row.longest_sequence for row in self.rows],
        }
        return {
            name: ["" if n is None else f"{n:,}" for n in found]
            for name, found in columns.items()
            if any(n is not None for n in found)
        }

    @property
    def of_ranks(self) -> list[str]:
        """How a parallel run is spread, and what a rank sends."""
        parallel = self.parallel
        if parallel.ranks == self.microbatches == 1:
            return []
        parts = "1 micro-batch" if self.microbatches == 1 else f"{self.microbatches} micro-batches"
        found = [f"a rank of {parallel.ranks}: {parallel}; {parts}"]
        if parallel.pipeline > 1:
            idle = (parallel.pipeline - 1) / (self.microbatches + parallel.pipeline - 1)
            found[0] += f"; the pipeline stands still for {idle:.0%} of a step, which ms leave out"
        for row in self.rows:
            sent = [f"{kind} {human_bytes(size)}" for kind, size in row.sent.items() if size]
            if sent:
                stage = f", stage {row.stage}" if parallel.pipeline > 1 else ""
                found.append(f"{row.name}{stage} sends a step: {', '.join(sent)}")
        return found

    @property
    def room(self) -> str:
        """What the device has."""
        return (
            f"{self.device.name}: {human_bytes(self.usable)} of {human_bytes(self.device.memory)}"
            " for tensors, the rest is CUDA's and the allocator's"
        )

    @property
    def verdict(self) -> list[str]:
        """What fits, and of what the times are."""
        fastest = self.fastest
        found = [
            f"nothing fits: {self.why_no_plan}"
            if fastest is None
            else f"the fastest that fits: {fastest.name}"
        ]
        if parse_bytes(self.device.name) is not None:
            found.append("times are those of an H200, since the card has no name; --gpu takes one")
        elif not self.device.measured:
            found.append(
                f"times are estimated from the bandwidth and the arithmetic of {self.device.name}"
            )
        return found

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title)
        yield Text(self.room)
        yield Text(
            f"weights {human_bytes(self.weights)}, optimiser {human_bytes(self.optimizer)},"
            + (f" gathered and buffers {human_bytes(self.wires)}," if self.wires else "")
            + f" batch and cuBLAS {human_bytes(self.other)}; beside these:"
        )
        sizes = self.sizes
        table = new_table()
        table.padding = (0, 1, 0, 0)  # so that a hundred columns are enough
        for column in ["choice", "kept", "on top", "peak", "margin", "ms", *sizes]:
            left = column in ("choice", "margin")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for place, row in enumerate(self.rows):
            table.add_row(
                row.name,
                *map(human_bytes, (row.kept, row.gradients + row.working, row.peak)),
                f"{row.verdict}, {human_bytes(row.margin)}",
                f"{row.ms:.0f}",
                *(found[place] for found in sizes.values()),
            )
        yield table
        words = {
            "batch": "; batch: the largest",
            "sequence": "; sequence: the longest of a batch of one",
        }
        yield Text(
            "kept: as the backward pass begins; on top: gradients and the working set; margin: what"
            f" is left of the memory{''.join(words[name] for name in sizes)}"
        )
        for line in self.of_ranks:
            yield Text(line)
        verdict, *source = self.verdict
        yield Text(verdict)
        if self.fastest is not None and self.fastest.code:
            yield Text(self.fastest.code)
        for line in source:
            yield Text(line)


def fit(
    title: str,
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: Device,
    optimizer: OptimizerOf | None,
    loss: Loss | None = None,
    head: bool | None = None,
    sizes: bool = True,
    longest: int | None = None,
    plan_file: str | None = None,
    parallel: Parallel | None = None,
) -> Fit:
    """By each choice, and by a plan; `sizes` asks for the largest batch and the longest sequence,
    which is no longer than `longest`. Of a parallel run the inputs are those of a data-parallel
    rank (see `packlight.Parallel`).
    """
    if device.memory <= _CONTEXT:
        raise InputError(
            f"a GPU of {human_bytes(device.memory)} has no room for tensors: CUDA itself takes"
            f" {human_bytes(_CONTEXT)}"
        )
    degrees = checked(parallel)
    with group_for(degrees):
        study = Study(model, inputs, kwargs, device, loss, optimizer, head, degrees)
        return _fit(title, model, study, sizes, longest, plan_file)


def _fit(
    title: str,
    model: nn.Module,
    study: Study,
    sizes: bool,
    longest: int | None,
    plan_file: str | None,
) -> Fit:
    device, parallel = study.device, study.parallel
    room = usable(device.memory)
    transformers = hasattr(model, "gradient_checkpointing_enable")
    rows, timelines, stages = [], {}, {}
    all_choices = choices(study.head, transformers)
    for choice in all_choices:
        stages[choice.name] = _highest(study, choice)
        timelines[choice.name] = _timeline(stages[choice.name], choice)
    plan, why = None, None
    try:
        plan = planned(study, device.memory - _CONTEXT, None, MAX_ERROR)
        timelines["plan"] = plan.timeline
        stages["plan"] = study.stages[plan.stage]
    except InfeasibleBudgetError as error:
        why = str(error)
    static = timelines[all_choices[0].name].parts
    for choice in all_choices:
        found: dict[str, int | None] = {"batch": None, "sequence": None}
        if sizes:
            found = extremes(stages[choice.name], choice, room, longest)
        timeline, stage = timelines[choice.name], stages[choice.name].stage
        rows.append(_row(choice.name, choice.code, timeline, stage, room, found))
    if plan is not None:
        file = plan_file or "plan.toml"
        code = f'packlight.convert(model, packlight.load_methods("{file}"), strict=False)'
        code += "" if plan_file else f"  # --plan {file} writes that file"
        found = {"batch": None, "sequence": None}
        if sizes:
            found = _most(rows, extremes(stages["plan"], _smallest(study), room, longest))
        rows.append(_row("plan", code, plan.timeline, plan.stage, room, found))
    return Fit(
        title,
        device,
        room,
        static.parameters + static.buffers,
        static.optimizer,
        static.inputs + static.workspace,
        tuple(rows),
        timelines,
        plan,
        why,
        tuple(front(stages[all_choices[0].name], MAX_ERROR)),
        parallel,
        study.microbatches,
        static.wires,
    )


def _highest(study: Study, choice: Choice) -> Study:
    """The stage with the highest peak: the first has most micro-batches, the last the loss."""
    ends = sorted({0, study.parallel.pipeline // 2, study.parallel.pipeline - 1})
    return max((study.stages[end] for end in ends), key=lambda s: _timeline(s, choice).peak)


def _smallest(study: Study) -> Choice:
    """The option with the lowest peak, for all blocks: what a plan for larger sizes takes."""
    walked = {
        option: study.walked(option, PACKED_4).timeline.peak
        for option in allowed(MENU, MAX_ERROR)
        if study.runs(option, PACKED_4)
    }
    return Choice("plan", min(walked, key=walked.__getitem__), PACKED_4, study.head, "")


def _most(rows: list[Row], found: dict[str, int | None]) -> dict[str, int | None]:
    """The largest sizes of any; what a choice can do, a plan can."""
    batches = [found["batch"], *(row.largest_batch for row in rows)]
    sequences = [found["sequence"], *(row.longest_sequence for row in rows)]
    return {
        "batch": max((n for n in batches if n is not None), default=None),
        "sequence": max((n for n in sequences if n is not None), default=None),
    }


def _timeline(study: Study, choice: Choice) -> Timeline:
    return study.walked(choice.option, choice.outside, choice.head).timeline


def _row(
    name: str,
    code: str,
    timeline: Timeline,
    stage: int,
    usable: int,
    found: dict[str, int | None],
) -> Row:
    """The peak is static bytes, what is kept as the backward pass begins, and what comes on top: of
    that as much as there are gradients is theirs.
    """
    on_top = timeline.peak - timeline.static - timeline.kept
    gradients = max(min(on_top, timeline.parts.trained), 0)
    return Row(
        name,
        code,
        timeline.peak,
        timeline.kept,
        gradients,
        on_top - gradients,
        timeline.ms,
        usable - timeline.peak,
        found["batch"],
        found["sequence"],
        stage,
        timeline.sent,
    )


# ---- the largest batch and the longest sequence --------------------------------------------------


def extremes(
    study: Study, choice: Choice, usable: int, longest: int | None
) -> dict[str, int | None]:
    """The largest batch, and the longest sequence of a batch of one, whose peak is in `usable`.

    Of a parallel run, where a rank has parts of both: a batch of one in each micro-batch.
    """
    parts, count = study.parallel.context, study.microbatches
    longest = None if longest is None else longest // parts
    inputs, kwargs = study.inputs, study.kwargs
    batch, length = was = batch_and_length(inputs, kwargs)
    if batch is None:
        return {"batch": None, "sequence": None}

    def peak(**sizes: int) -> int:
        study.walker.see(*resized((inputs, kwargs), was, **sizes))
        return study.walk().timeline.peak

    found: dict[str, int | None] = {"batch": None, "sequence": None}
    known = {batch: _timeline(study, choice).peak}
    try:
        with study.converted(choice.option, choice.outside, choice.head):
            found["batch"] = count * largest(lambda n: peak(batch=n), usable, known, 1, None)
            if length is not None:
                one = {length: known[batch] if batch == 1 else peak(batch=1)}
                found["sequence"] = parts * largest(
                    lambda n: peak(batch=1, length=n), usable, one, 64, longest
                )
    finally:
        study.walker.see(inputs, kwargs)
    return found


def largest(
    peak: Callable[[int], int], usable: int, known: dict[int, int], unit: int, most: int | None
) -> int:
    """The largest multiple of `unit`, up to `most`, whose peak fits; 0 where there is none.

    The peak is near linear in the size, so the line through the two sizes that are nearest to the
    limit says where to look next, until one fits and takes all but a 200th, or one that fits and
    one that does not are within a hundredth. `known` has the peaks of sizes that are known.
    """
    points = dict(known)
    most = None if most is None else max(most // unit * unit, unit)
    for _ in range(8):
        low = max((n for n, p in points.items() if p <= usable), default=0)
        high = min((n for n, p in points.items() if p > usable), default=None)
        step = max(low // 100 // unit, 1) * unit
        if low and (low == most or points[low] > 0.995 * usable):
            break
        if high is not None and high - low <= step:
            break
        if len(points) == 1:
            size = 2 * low if low else max(min(points) // 2, unit)
        else:
            size = _where_it_meets(points, usable)
        size = max(size // unit * unit, low + step)
        if high is not None and size >= high:
            size = max(int(math.sqrt(max(low, 1) * high)) // unit * unit, low + unit)
        size = size if most is None else min(size, most)
        if size in points or size < unit:
            break
        points[size] = peak(size)
    fitting = [n for n, p in points.items() if p <= usable]
    return max(fitting, default=0) // unit * unit


def _where_it_meets(points: dict[int, int], usable: int) -> int:
    """Where the line through the two points nearest to the limit meets it."""
    nearest = sorted(points.items(), key=lambda point: abs(point[1] - usable))
    (one, at_one), (other, at_other) = nearest[:2]
    slope = (at_other - at_one) / (other - one)
    return int(one + (usable - at_one) / slope) if slope > 0 else 2 * max(one, other)

"""`Plan`: which method each block takes, and what a step takes of the device."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from packlight.planner.timeline import BACKWARDS, FORWARD, PASSES, STEP, Timeline, reserved
from packlight.report.names import condensed
from packlight.report.printing import cell, new_table, render
from packlight.report.words import human_bytes
from packlight.selectors import Choice, Selector


@dataclasses.dataclass(frozen=True)
class PlannedBlock:
    """A block: what it keeps, the most that is allocated while its backward pass runs, its time.

    `working` is above what is allocated as that pass begins; `error` that of the option.
    """

    name: str
    option: str
    kept: int
    working: int
    ms: float
    error: float


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Plan(Mapping[Selector, Choice]):
    """Methods by selectors, as `packlight.convert` takes them, and what a training step takes.

    A plan is a mapping; `convert` covers calls of functions and the head as the plan says. Bytes
    are predicted ones: those that the allocator of CUDA counts as allocated.

    - `methods`: the mapping. `head`: whether losses of heads are computed by chunks of logits.
    - `blocks`: a row a block. `timeline`: the step in its order.
    - `plain`: the step as PyTorch trains it.
    - `device`, `source`: what the times are of, and whether they were measured there.
    - `stage`: that of a pipeline of which the bytes and times are: that with the highest peak.
    - `budget`: the reserved bytes that were asked for; None where a share of what is kept was.
    """

    methods: dict[Selector, Choice]
    head: bool
    blocks: tuple[PlannedBlock, ...]
    timeline: Timeline
    plain: Timeline
    device: str
    source: str
    budget: int | None = None
    stage: int = 0

    def __getitem__(self, selector: Selector) -> Choice:
        return self.methods[selector]

    def __iter__(self) -> Iterator[Selector]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at once."""
        return self.timeline.peak

    @property
    def reserved_bytes(self) -> int:
        """What the allocator reserves for that: no more than the budget."""
        return reserved(self.peak_bytes)

    @property
    def kept_bytes(self) -> int:
        """What is allocated for the backward pass as it begins."""
        return self.timeline.kept

    @property
    def ms(self) -> float:
        """Of a step."""
        return self.timeline.ms

    @property
    def error(self) -> float:
        """The largest of a block."""
        return max((block.error for block in self.blocks), default=0.0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the methods to a TOML file, which `packlight.load_methods` and the CLI read."""
        from packlight.method_files import save_methods  # which knows the methods of `convert`

        save_methods(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON."""
        return {
            "device": self.device,
            "source": self.source,
            "budget": self.budget,
            "peak_bytes": self.peak_bytes,
            "reserved_bytes": self.reserved_bytes,
            "kept_bytes": self.kept_bytes,
            "ms": self.ms,
            "error": self.error,
            "plain": {
                "peak_bytes": self.plain.peak,
                "kept_bytes": self.plain.kept,
                "ms": self.plain.ms,
            },
            "parts": self.peak_parts(),
            "blocks": [dataclasses.asdict(block) for block in self.blocks],
        }

    def peak_parts(self) -> dict[str, int]:
        """The bytes at the peak, by what they are."""
        return peak_parts(self.timeline)

    def __repr__(self) -> str:
        budget = "" if self.budget is None else f", budget={self.budget}"
        blocks = f"blocks=<{len(self.blocks)}>"
        return f"Plan(peak_bytes={self.peak_bytes}, ms={self.ms:.1f}, {blocks}{budget})"

    def __str__(self) -> str:
        return render(self)

    def sentence(self) -> str:
        """What a step takes, beside what it takes as PyTorch trains it."""
        budget = "" if self.budget is None else f" of {human_bytes(self.budget)}"
        return (
            f"a step takes {human_bytes(self.peak_bytes)}, for which the allocator reserves"
            f" {human_bytes(self.reserved_bytes)}{budget}, and {self.ms:.0f} ms on {self.device}"
            f" (times {self.source}); PyTorch takes {human_bytes(self.plain.peak)} and"
            f" {self.plain.ms:.0f} ms"
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.sentence())
        containers = {block.name.rpartition(".")[0] for block in self.blocks}
        container = containers.pop() if len(containers) == 1 else ""
        if container:
            yield Text(f"blocks of {container}:")
        table = new_table()
        for column in ("blocks", "become", "keep", "work with", "ms", "error"):
            right = column in ("keep", "work with", "ms", "error")
            table.add_column(column, justify="right" if right else "left")
        for rows in self._alike():
            first = rows[0]
            table.add_row(
                cell(
                    ", ".join(condensed([row.name[len(container) :].lstrip(".") for row in rows]))
                ),
                Text(first.option),
                human_bytes(sum(row.kept for row in rows)),
                human_bytes(max(row.working for row in rows)),
                f"{sum(row.ms for row in rows):.1f}",
                f"{first.error:.2g}",
            )
        yield table
        highest = self.timeline.highest
        parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.peak_parts().items())
        yield Text(f"the peak is in the {where(highest.phase, highest.place)}: {parts}")

    def _alike(self) -> list[list[PlannedBlock]]:
        """Blocks that follow each other and become the same."""
        found: list[list[PlannedBlock]] = []
        for block in self.blocks:
            if found and found[-1][-1].option == block.option:
                found[-1].append(block)
            else:
                found.append([block])
        return found


def peak_parts(timeline: Timeline) -> dict[str, int]:
    """The bytes at the peak of a step, by what they are."""
    static = timeline.parts
    highest = timeline.highest
    found = {
        "weights": static.parameters + static.buffers,
        "optimiser": static.optimizer,
        "batch": static.inputs,
        "cuBLAS": static.workspace,
        "weights gathered and buffers": static.wires,
    }
    if highest.phase == FORWARD:
        found["kept"] = highest.before
    elif highest.phase in PASSES:
        found["kept and gradients"] = highest.before
    else:
        found["gradients"] = highest.before
    found["working set"] = highest.peak - highest.before
    return {name: size for name, size in found.items() if size}


def where(phase: str, place: str) -> str:
    """A place of a step for reading."""
    if phase == STEP:
        return "optimiser's step"
    name = "backward pass" if phase in BACKWARDS else "forward pass"
    return f"{name} of {place or 'what is outside of blocks'}"

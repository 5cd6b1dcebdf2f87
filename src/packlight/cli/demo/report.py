"""The demo's numbers, as a table and as JSON."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from packlight import __version__
from packlight._files import write_text
from packlight.cli.demo.settings import Settings
from packlight.cli.demo.training import Result
from packlight.report import human_bytes


def gelu_elements(settings: Settings) -> int:
    """How many numbers go through GELU in one step."""
    return settings.layers * settings.batch * settings.context * 4 * settings.width


def kinds_of(results: dict[str, Result]) -> list[str]:
    """The kinds of modules that keep anything in any run, the largest of the first run first."""
    return list(dict.fromkeys(kind for result in results.values() for kind in result.kept_bytes))


def print_report(
    results: dict[str, Result], settings: Settings, console: Console, again: Result | None = None
) -> None:
    """One table, and what it says about GELU and about the losses.

    `again` is the first run with another seed: what differences of losses are to be held against.
    """
    runs = list(results.values())
    table = Table("")
    for name in results:
        table.add_column(name, justify="right")

    def add_row(title: str, show: Callable[[float], str], values: list[float]) -> None:
        """Values, and after those that differ from the first how much they differ."""
        first = values[0]
        changes = [f" ({v / first - 1:+.1%})" if first and v != first else "" for v in values]
        table.add_row(title, *(show(v) + change for v, change in zip(values, changes, strict=True)))

    def size(value: float) -> str:
        return human_bytes(int(value))

    add_row("kept for the backward pass", size, [run.total_bytes for run in runs])
    for kind in kinds_of(results):
        add_row(f"  by {kind}", size, [run.kept_bytes.get(kind, 0) for run in runs])
    table.add_section()
    peaks: list[float] = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    if peaks:
        add_row("peak memory on the GPU, as graphs", size, peaks)
    add_row("a step, median", "{:.1f} ms".format, [run.median_step_ms for run in runs])
    table.add_row("training loss, last tenth", *(f"{run.training_loss:.4f}" for run in runs))
    table.add_row("validation loss", *(f"{run.validation_losses[-1]:.4f}" for run in runs))
    console.print(table)

    elements = gelu_elements(settings)
    for name, run in results.items():
        gelu = run.kept_bytes.get("GELU", 0)
        rest = human_bytes(run.total_bytes - gelu)
        console.print(f"{name}: GELU keeps {gelu / elements:.3f} bytes an element, the rest {rest}")
    (base_name, base), *others = results.items()
    if again is not None:
        others.append((f"{base_name} with another seed", again))
    for name, run in others:
        training = run.training_loss - base.training_loss
        validation = run.validation_losses[-1] - base.validation_losses[-1]
        console.print(
            f"{name} minus {base_name}: training loss {training:+z.4f}, "
            f"validation loss {validation:+z.4f}"
        )


def save_json(
    results: dict[str, Result], settings: Settings, path: Path, again: Result | None = None
) -> None:
    """Everything that was measured, and on what; `again` is as in `print_report`."""
    cuda = settings.device != "cpu"
    data = {
        "packlight": __version__,
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name(settings.device) if cuda else "cpu",
        "settings": {**dataclasses.asdict(settings), "autocast": settings.autocast},
        "gelu_elements": gelu_elements(settings),
        "results": {name: dataclasses.asdict(result) for name, result in results.items()},
        "again": None if again is None else dataclasses.asdict(again),
    }
    write_text(path, json.dumps(data, indent=1) + "\n")

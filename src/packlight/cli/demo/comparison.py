"""All of the demo: every variant trained, the table printed, the files written."""

import dataclasses
import math
import os
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from packlight.cli.demo.further import print_further
from packlight.cli.demo.model import VARIANTS, VOCABULARY
from packlight.cli.demo.picture import check_matplotlib, save_picture
from packlight.cli.demo.report import print_report, save_json
from packlight.cli.demo.settings import Settings
from packlight.cli.demo.text import Text, load_text
from packlight.cli.demo.training import Result, train
from packlight.errors import InputError


def run(
    settings: Settings, out: Path, plot: bool = True, text: Text | None = None
) -> dict[str, Result]:
    """Train every variant, print the table, write demo.json and demo.png into `out`."""
    console = Console()
    if plot:
        check_matplotlib()
    check_folder(out)
    text = load_text() if text is None else text
    check_length(text, settings)
    console.print(
        f"A GPT of {settings.layers} layers, width {settings.width}, on {settings.device}"
        f"{' in bfloat16' if settings.autocast else ''}; {len(text.training) / 1e6:.1f} MB of "
        "Python's standard library to train on."
    )
    results: dict[str, Result] = {}
    first = next(iter(VARIANTS))
    other_seed = dataclasses.replace(settings, seed=settings.seed + 1)
    runs = [(name, change, settings) for name, change in VARIANTS.items()]
    runs.append((f"{first}, seed {other_seed.seed}", VARIANTS[first], other_seed))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    last = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(*columns, last, TimeRemainingColumn(), console=console) as progress:
        for name, change, chosen in runs:
            task = progress.add_task(name, total=settings.steps, loss=math.log(VOCABULARY))

            def after_step(result: Result, task: TaskID = task) -> None:
                progress.update(task, advance=1, loss=result.training_losses[-1])

            try:
                results[name] = train(change, text, chosen, after_step)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"{name} with batch={settings.batch} does not fit into the memory of "
                    f"{settings.device}; choose a smaller --batch, --width or --layers"
                ) from error
    again = results.pop(runs[-1][0])
    print_report(results, settings, console, again)
    print_further(settings, console)
    save_json(results, settings, out / "demo.json", again)
    written = [out / "demo.json"]
    if plot:
        save_picture(results, settings, out / "demo.png")
        written.append(out / "demo.png")
    console.print("written:", *written, soft_wrap=True, highlight=False)
    return results


def check_folder(out: Path) -> None:
    """Make the folder for the results, or raise `InputError`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={str(out)!r} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise InputError(f"out={str(out)!r} cannot be written to; choose another folder")


def check_length(text: Text, settings: Settings) -> None:
    """Both texts must be longer than one window."""
    shortest = min(len(text.training), len(text.validation))
    if shortest < settings.context + 2:
        raise InputError(
            f"context={settings.context} is longer than the text to train or validate on, "
            f"{shortest} bytes; choose a smaller --context"
        )

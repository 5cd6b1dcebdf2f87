"""Tables and pictures of the rows of a user's step."""

import argparse
import pathlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks import plot, rows
from benchmarks.table import markdown
from benchmarks.user.choices import CHOICES
from benchmarks.user.runner import check
from benchmarks.user.scenarios import SCENARIOS

Row = dict[str, Any]
Rows = Sequence[Row]

STEPS = ("step", "once")

# The columns of the README; a table of all is as wide as there are choices.
README = (
    "eager",
    "checkpoint",
    "liger+checkpoint",
    "compile",
    "default",
    "default+head",
    "default+graphed",
    "head+graphed",
    "plan",
)


def read(paths: Sequence[pathlib.Path] | None = None, device: str | None = None) -> list[Row]:
    """The rows at full size of one device, that with most of them if none is named."""
    paths = paths or sorted(rows.RESULTS.glob("user*.jsonl"))
    found = [row for path in paths for row in rows.read(path) if not row.get("tiny")]
    if device is None and found:
        [(device, _)] = Counter(row.get("device") for row in found).most_common(1)
    return [row for row in found if row.get("device") == device]


def latest(found: Rows) -> dict[str, dict[str, Row]]:
    """By scenario and choice the last row of a step of the scenario's size that is right."""
    timed = [row for row in found if row["mode"] in STEPS and "ms" in row and _is_whole(row)]
    last: dict[str, dict[str, Row]] = {scenario: {} for scenario in SCENARIOS}
    for row in timed:
        if not check(row, timed).startswith("failed"):
            last[row["scenario"]][row["choice"]] = row
    # One choice alone says nothing.
    return {scenario: own for scenario, own in last.items() if len(own) > 1}


def _is_whole(row: Row) -> bool:
    return row.get("length") in (None, SCENARIOS[row["scenario"]].size.length)


def points(own: dict[str, Row]) -> list[plot.Point]:
    """Peak in GiB, and milliseconds with a minus, for which more is better."""
    return [
        plot.Point(CHOICES[choice].title, row["peak_gib"], -row["ms"])
        for choice, row in own.items()
    ]


def _table(cells: dict[str, dict[str, str]], choices: Sequence[str]) -> str:
    """A column for each choice that has a cell."""
    there = [name for name in choices if any(name in own for own in cells.values())]
    body = [[title, *(own.get(name, "") for name in there)] for title, own in cells.items()]
    return markdown(["", *(CHOICES[name].title for name in there)], body)


def steps(found: Rows, choices: Sequence[str] = tuple(CHOICES)) -> str:
    """Ms / GiB at the peak by scenario and choice, in bold what no other choice beats in both."""
    shown, cells = latest(found), dict[str, dict[str, str]]()
    for scenario, own in shown.items():
        best = {point.choice for point in plot.front(points(own))}
        texts = cells.setdefault(SCENARIOS[scenario].title, {})
        for row in found:
            if row["scenario"] == scenario and "out of memory" in row.get("error", ""):
                texts[row["choice"]] = "out of memory"
        for choice, row in own.items():
            ms, peak = row["ms"], row["peak_gib"]
            text = f"{ms:.{int(ms < 99.5)}f} / {peak:.{1 + (peak < 9.995)}f}"
            texts[choice] = f"**{text}**" if CHOICES[choice].title in best else text
    return _table(cells, choices)


def extremes(found: Rows) -> str:
    """The largest batch or longest sequence in a limit of memory, and items a second there."""
    cells: dict[str, dict[str, str]] = {}
    for row in found:
        if row["mode"] not in STEPS and "error" not in row:
            by = "length" if row["mode"] == "longest" else "batch"
            what = f"{row['mode']} {by} in {row['limit_gib']:g} GiB"
            title = f"{SCENARIOS[row['scenario']].title.rpartition(',')[0]}: {what}"
            text = f"{row[by]} ({row['per_s']:.0f} {row['unit']}/s)"
            cells.setdefault(title, {})[row["choice"]] = text
    return _table(cells, tuple(CHOICES))


def draw(scenario: str, own: dict[str, Row], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axis = pyplot.subplots(figsize=(7.4, 5.6))
    shown, row = points(own), next(iter(own.values()))
    plot.draw_panel(axis, shown)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{-value:g}"))
    axis.set_xlabel("peak of memory, GiB: left is better", fontsize=9)
    axis.set_ylabel("ms a step: up is better", fontsize=9)
    title = f"{SCENARIOS[scenario].title}, one {row['device']}, torch {row['torch']}"
    axis.set_title(title, loc="left", fontsize=10)
    absent = {"launched by Python: no CUDA graph of both"}
    absent |= set() if any(point.is_compiled for point in shown) else {"compiled"}
    marks = [mark for mark in plot.legend() if mark.get_label() not in absent]
    figure.legend(handles=marks, loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    plot.label_points(axis, shown)
    plot.save(figure, path)


def main(options: argparse.Namespace) -> None:
    found = read(options.results, options.device)
    if not (shown := latest(found)):
        raise SystemExit(f"no rows of a user's step on {options.device or 'any device'}")
    if options.command == "table":
        print(steps(found))
        if any(row["mode"] not in STEPS for row in found):
            print(f"\n{extremes(found)}")
        return
    for scenario, own in shown.items():
        draw(scenario, own, (options.out or plot.PICTURES) / f"user-{scenario}.png")

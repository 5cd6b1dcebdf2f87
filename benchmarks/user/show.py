"""The table and the pictures of the rows of a user's step."""

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

Rows = Sequence[dict[str, Any]]
Found = dict[str, dict[str, dict[str, Any]]]  # scenario, choice


def read(paths: Sequence[pathlib.Path] | None = None) -> list[dict[str, Any]]:
    """The rows of whole steps at full size."""
    paths = paths or sorted(rows.RESULTS.glob("user*.jsonl"))
    found = [row for path in paths for row in rows.read(path)]
    return [row for row in found if row["mode"] == "step" and "ms" in row and not row.get("tiny")]


def latest(found: Rows, device: str | None = None) -> Found:
    """The last row of each choice on one device, that with most rows; those that are right."""
    if device is None and found:
        [(device, _)] = Counter(row["device"] for row in found).most_common(1)
    last: Found = {}
    for row in found:
        if row["device"] == device and not check(row, found).startswith("failed"):
            last.setdefault(row["scenario"], {})[row["choice"]] = row
    return {
        scenario: {choice: last[scenario][choice] for choice in CHOICES if choice in last[scenario]}
        for scenario in SCENARIOS
        if scenario in last
    }


def points(of_scenario: dict[str, dict[str, Any]]) -> list[plot.Point]:
    """Peak in GiB, and milliseconds with a minus, for which more is better."""
    return [
        plot.Point(CHOICES[choice].title, row["peak_gib"], -row["ms"])
        for choice, row in of_scenario.items()
    ]


def table(found: Rows, device: str | None = None) -> str:
    """A scenario a line: ms / GiB at the peak, in bold what no other choice beats in both."""
    shown = latest(found, device)
    choices = [name for name in CHOICES if any(name in own for own in shown.values())]
    body = []
    for scenario, own in shown.items():
        best = {point.choice for point in plot.front(points(own))}
        cells = [f"{SCENARIOS[scenario].title}"]
        for name in choices:
            if name not in own:
                cells.append("")
                continue
            ms, peak = own[name]["ms"], own[name]["peak_gib"]
            text = f"{ms:.{int(ms < 99.5)}f} / {peak:.{1 + (peak < 9.995)}f}"
            cells.append(f"**{text}**" if CHOICES[name].title in best else text)
        body.append(cells)
    return markdown(["", *(CHOICES[name].title for name in choices)], body)


def draw(scenario: str, of_scenario: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axis = pyplot.subplots(figsize=(7.4, 5.6))
    shown = points(of_scenario)
    plot.draw_panel(axis, shown)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{-value:g}"))
    axis.set_xlabel("peak of memory, GiB: left is better", fontsize=9)
    axis.set_ylabel("ms a step: up is better", fontsize=9)
    row = next(iter(of_scenario.values()))
    axis.set_title(
        f"{SCENARIOS[scenario].title}, one {row['device']}, torch {row['torch']}",
        loc="left",
        fontsize=10,
    )
    kept = [mark for mark in plot.legend() if "launched" not in mark.get_label()]
    figure.legend(handles=kept, loc="lower center", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    plot.place_labels(axis, shown)
    plot.save(figure, path)


def main(options: argparse.Namespace) -> None:
    found = read(options.results)
    if not (shown := latest(found, options.device)):
        raise SystemExit(f"no rows of a user's step on {options.device or 'any device'}")
    if options.command == "table":
        print(table(found, options.device))
        return
    for scenario, own in shown.items():
        draw(scenario, own, (options.out or plot.PICTURES) / f"user-{scenario}.png")

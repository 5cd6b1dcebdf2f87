"""A report of gradients as a picture: a line a layer, a dot a method, a mark for the noise."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packlight._files import replaced
from packlight.errors import InputError
from packlight.report.plotting import COLOURS, figure_class
from packlight.report.words import percent, shortened

if TYPE_CHECKING:
    from packlight.report.gradients import GradientReport, LayerGradients

_GREY = "#8a8380"

# A name, a share for each line, a mark and a colour.
_Series = tuple[str, Sequence[float | None], str, str]


def draw(report: "GradientReport", path: Path, limit: int) -> None:
    if limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 line")
    rows = [row for row in report.lines(limit) if row.weights and row.weights[0].exact]
    if not rows:
        raise InputError("no layer has a gradient of its weights, so there is nothing to plot")
    rows = [report.whole, *rows]
    figure = figure_class()(figsize=(9, 1.7 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    series = [
        (name, [row.weights[i].error for row in rows]) for i, name in enumerate(report.methods)
    ]
    noises = [row.noise for row in rows]
    marks: list[_Series] = [("this batch's own noise", noises, "|", _GREY)]
    marks += [
        (name, errors, "o", COLOURS[i % len(COLOURS)]) for i, (name, errors) in enumerate(series)
    ]
    for name, shares, mark, colour in marks:
        seen = [(share, place) for share, place in zip(shares, places, strict=True) if share]
        if seen:
            size = {"markersize": 13, "markeredgewidth": 4} if mark == "|" else {}
            axes.plot(*zip(*seen, strict=True), mark, color=colour, label=name, **size)
    axes.set_yticks(places, [_name(row) for row in rows], fontsize=9)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    ticks = [digit * 10.0**power for power in range(-8, 3) for digit in (1, 2, 5)]
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.2, high * 1.2)
    axes.set_xticks([tick for tick in ticks if low / 1.2 <= tick <= high * 1.2])
    axes.xaxis.set_major_formatter(lambda share, _: percent(share))
    axes.minorticks_off()
    axes.set_xlabel("error of the weight gradient, relative to it")
    axes.set_title(report.model, loc="left")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    with replaced(path) as beside:
        figure.savefig(beside, dpi=150)


def _name(row: "LayerGradients") -> str:
    return f"{shortened(row.layer)} ({row.kind})" if row.layer else row.kind

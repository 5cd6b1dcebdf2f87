"""A report as a picture: a bar a module."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packlight._files import replaced
from packlight.errors import InputError, MissingDependencyError
from packlight.report.words import add_up, cut_path, human_bytes, short_operation, shortened

if TYPE_CHECKING:
    from packlight.report.memory import KeptTensor, MemoryReport


# Tableau's ten colours without the grey, which stands for "other".
COLOURS = (
    "#4e79a7",
    "#f28e2b",
    "#59a14f",
    "#e15759",
    "#76b7b2",
    "#edc948",
    "#b07aa1",
    "#ff9da7",
    "#9c755f",
)
_OTHER = "#bab0ac"


def draw(report: "MemoryReport", path: Path, depth: int | None, by: str, limit: int) -> None:
    keys: dict[str, Callable[[KeptTensor], str]] = {
        "operation": lambda row: short_operation(row.operation),
        "dtype": lambda row: row.dtype,
    }
    if by not in keys:
        raise InputError(f"by is {by!r}; expected 'operation' or 'dtype'")
    if limit < 1:
        raise InputError(f"limit is {limit}; expected at least 1 bar")
    if not report.rows:
        raise InputError("nothing is kept for the backward pass, so there is nothing to plot")
    depth = _fitting_depth(report, limit) if depth is None else depth
    bars = _bars(report, depth, limit, keys[by])
    series = _series(bars)
    unit, scale = _axis_unit(max(sum(bar.values()) for bar in bars.values()))
    height = 1.6 + 0.28 * max(len(bars), 1) + 0.22 * ((len(series) + 3) // 4)
    figure = figure_class()(figsize=(9, height), layout="constrained")
    axes = figure.add_subplot()
    names = [_bar_name(report, name) for name in bars]
    places = range(len(bars))
    left = [0.0] * len(bars)
    for name, colour in series.items():
        widths = [_size_in(bar, name, series) / scale for bar in bars.values()]
        axes.barh(places, widths, left=left, color=colour, label=name, height=0.8)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end, bar in zip(places, left, bars.values(), strict=True):
        axes.annotate(
            human_bytes(sum(bar.values())),
            (end, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#444444",
        )
    axes.set_yticks(places, names, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"kept for the backward pass ({unit})")
    axes.set_title(f"{report.model}: {human_bytes(report.activation_bytes)}", loc="left")
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    with replaced(path) as beside:
        figure.savefig(beside, dpi=150)


def figure_class() -> Any:
    """The figure alone, without pyplot: no global state, no window, nothing to close."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plotting a report needs matplotlib; install it with: pip install 'packlight[plot]'"
        ) from error
    return Figure


def _fitting_depth(report: "MemoryReport", limit: int) -> int:
    deepest = max(len(row.module.split(".")) for row in report.rows)
    fitting = (n for n in range(deepest, 1, -1) if len(report.by_module(n)) <= limit)
    return next(fitting, 1)


def _bars(
    report: "MemoryReport", depth: int | None, limit: int, key: "Callable[[KeptTensor], str]"
) -> dict[str, dict[str, int]]:
    """Bytes by module and by series, in the order of the forward pass; the smallest are summed."""
    totals = report.by_module(depth)
    largest = set(list(totals)[:limit])
    rest = f"{len(totals) - len(largest)} more"
    bars: dict[str, dict[str, int]] = {}
    others: dict[str, int] = {}
    for row in report.rows:
        name = cut_path(row.module, depth)
        bar = bars.setdefault(name, {}) if name in largest else others
        bar[key(row)] = bar.get(key(row), 0) + row.bytes
    return {**bars, rest: others} if others else bars


# A series below this share of the whole is not seen in any bar.
_VISIBLE = 0.003


def _series(bars: dict[str, dict[str, int]]) -> dict[str, str]:
    """Colour by series, the largest first; what exceeds the palette or is tiny is "other"."""
    totals = add_up(pair for bar in bars.values() for pair in bar.items())
    least = _VISIBLE * sum(totals.values())
    seen = [name for name, size in totals.items() if size >= least][: len(COLOURS)]
    colours = dict(zip(seen, COLOURS, strict=False))
    return {**colours, "other": _OTHER} if len(seen) < len(totals) else colours


def _size_in(bar: dict[str, int], name: str, series: dict[str, str]) -> int:
    if name != "other":
        return bar.get(name, 0)
    return sum(size for key, size in bar.items() if key not in series)


def _axis_unit(largest: int) -> tuple[str, int]:
    unit, scale = "B", 1
    for name in ("KiB", "MiB", "GiB", "TiB"):
        if largest < 1024 * scale:
            break
        unit, scale = name, 1024 * scale
    return unit, scale


def _bar_name(report: "MemoryReport", path: str) -> str:
    """A module's path and its type."""
    name = shortened(path or report.model)
    kind = report.module_types.get(path, "")
    return f"{name} ({kind})" if kind else name

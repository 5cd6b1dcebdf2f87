"""Draws pictures from the rows in `benchmarks/results/`; needs matplotlib and no GPU.

    python -m benchmarks.plot

`docs/pictures/step.png`: activation memory against speed, a panel a model, of the device with most
points or the one that `--device` names. A point is the latest row of its choice, beside the eager
row of the same commit. Where there are rows, `docs/pictures/cifar.png`: losses and accuracies; and
`docs/pictures/plans.png`: plans, as foretold and as measured.
"""

import argparse
import itertools
import math
import pathlib
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from benchmarks import rows, step, train_suite

PICTURES = rows.RESULTS.parents[1] / "docs" / "pictures"

OURS, OTHERS, FRONT = "#0b62c4", "#b3471d", "#9a9a9a"

# ---- points ---------------------------------------------------------------------------------


class Point(NamedTuple):
    """A choice: GiB of activations kept, and speed as a share of eager's."""

    choice: str
    memory: float
    speed: float
    as_graph: bool = True  # whether the GPU alone was timed

    @property
    def is_ours(self) -> bool:
        return self.choice.startswith("packlight")

    @property
    def is_compiled(self) -> bool:
        return "compile" in self.choice

    @property
    def label(self) -> str:
        """What colour and shape do not say."""
        short = self.choice.removeprefix("packlight ").removesuffix(", compile")
        first, *rest = short.split(", ") if self.is_ours else [short]
        if first.split(" ")[0].isdigit():
            bits, *more = first.removesuffix(" bits").split(" ")
            first = " ".join([f"{bits} bits", *more])
        elif short == "compile + checkpoint":
            first = "checkpoint"
        return ", ".join([first.removeprefix("compile, "), *rest])


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats: less memory than all that are as fast. By memory."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.memory, -point.speed)):
        if not best or point.speed > best[-1].speed:
            best.append(point)
    return best


# Bytes; what keeps less keeps it somewhere else (`save_on_cpu`), and would stretch the axis.
LEAST = 1 << 20


def latest(found: Sequence[dict[str, Any]], device: str) -> dict[str, list[Point]]:
    """By model, a point for each choice: the last row that did not fail."""
    last = {
        (row["model"], row["choice"]): row
        for row in found
        if row["device"] == device and "kept_bytes" in row
    }
    points: dict[str, list[Point]] = {}
    for (model, choice), row in last.items():
        eager = step.baseline(row, found)
        if eager is None or row["kept_bytes"] < LEAST:
            continue
        key = "graph_ms" if "graph_ms" in row and "graph_ms" in eager else "step_ms"
        speed = step.speed(row, eager, key)
        point = Point(choice, row["kept_bytes"] / 2**30, speed, key == "graph_ms")
        points.setdefault(model, []).append(point)
    return points


# ---- drawing --------------------------------------------------------------------------------


def draw_steps(found: Sequence[dict[str, Any]], device: str | None, path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    points = {(row["device"], row["model"], row["choice"]) for row in found if "kept_bytes" in row}
    counts = Counter(device for device, *_ in sorted(points))
    if device is None:
        device = counts.most_common(1)[0][0] if counts else ""
    panels = latest(found, device)
    if not panels:
        raise SystemExit(f"no rows of whole steps on {device or 'any device'}")
    order = [name for name in step.MODELS if name in panels]
    columns = min(2, len(order))
    height = -(-len(order) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(6.4 * columns, 5.6 * height + 0.9), squeeze=False
    )
    for axis, name in itertools.zip_longest(axes.flat, order):
        if name is None:
            axis.set_visible(False)
            continue
        draw_panel(axis, panels[name])
        axis.set_title(step.MODELS[name].title, loc="left", fontsize=11, weight="bold")
    versions = [row["torch"] for row in found if row["device"] == device]
    figure.suptitle(
        f"One training step on one {device}, torch {versions[-1]}", x=0.02, y=0.995, ha="left"
    )
    figure.legend(
        handles=legend(),
        loc="upper left",
        bbox_to_anchor=(0.012, 1 - 0.22 / figure.get_figheight()),
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.68 / figure.get_figheight()))
    for axis, name in zip(axes.flat, order, strict=False):
        label_points(axis, panels[name])
    save(figure, path)


def draw_panel(axis: Any, points: list[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    memory = [point.memory for point in points]
    lowest, highest = min(memory) / 1.5, max(memory) * 1.6
    speeds = [point.speed for point in points]
    top, bottom = max(speeds), min(speeds)
    margin = 0.12 * max(top - bottom, 0.1)
    axis.set(xscale="log", xlim=(lowest, highest), ylim=(bottom - margin, top + margin))
    others = [point for point in points if not point.is_ours]
    for chosen, line in ((others, "--"), (points, "-")):
        best = front(chosen)
        # Where no point is, the next one with less memory is the best there is.
        xs = [*(point.memory for point in best), highest]
        ys = [*(point.speed for point in best), best[-1].speed]
        axis.plot(
            [best[0].memory, *xs],
            [bottom - margin, *ys],
            line,
            drawstyle="steps-post",
            color=FRONT,
            linewidth=1.1,
            zorder=1,
        )
    for point in points:
        colour = OURS if point.is_ours else OTHERS
        axis.scatter(
            point.memory,
            point.speed,
            marker="s" if point.is_compiled else "o",
            s=44,
            facecolor=colour if point.as_graph else "white",
            edgecolor=colour,
            linewidth=1.3,
            zorder=3,
        )
    axis.set_xticks(ticks(lowest, highest))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}x"))
    axis.set_xlabel("activations kept for the backward pass, GiB: left is better", fontsize=9)
    axis.set_ylabel("speed, of eager's: up is better", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(color="#eeeeee", zorder=0)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def ticks(lowest: float, highest: float) -> list[float]:
    """Powers of two, and between them equal parts, the more the shorter the axis is."""
    span = highest / lowest
    parts = 8 if span < 2.5 else 4 if span < 8 else 2 if span < 12 else 1
    all_ticks = [2.0**e * (1 + k / parts) for e in range(-8, 8) for k in range(parts)]
    return [tick for tick in all_ticks if lowest <= tick <= highest]


def legend() -> list[Any]:
    from matplotlib.lines import Line2D

    def mark(marker: str, colour: str, label: str, filled: bool = True) -> Any:
        face = colour if filled else "white"
        return Line2D(
            [], [], marker=marker, color=colour, markerfacecolor=face, linestyle="", label=label
        )

    return [
        mark("o", OURS, "packlight"),
        mark("o", OTHERS, "what PyTorch and others offer"),
        mark("o", "#444444", "eager"),
        mark("s", "#444444", "compiled"),
        mark("o", "#444444", "launched by Python: no CUDA graph of both", filled=False),
        Line2D([], [], color=FRONT, label="fastest of all at a given memory"),
        Line2D([], [], color=FRONT, linestyle="--", label="fastest without packlight"),
    ]


class Label(NamedTuple):
    """A text at a point of the data."""

    x: float
    y: float
    text: str
    colour: str


def label_points(axis: Any, points: Sequence[Point]) -> None:
    labels = [
        Label(point.memory, point.speed, point.label, OURS if point.is_ours else OTHERS)
        for point in points
    ]
    place_labels(axis, labels, [label[:2] for label in labels])


def place_labels(axis: Any, labels: Sequence[Label], points: Sequence[tuple[float, float]]) -> None:
    """Writes each label where nothing else is, neither a label nor a point, as near as can be."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axis.figure
    renderer = figure.canvas.get_renderer()
    inside = axis.get_window_extent(renderer)
    size = 5 * figure.dpi / 72
    dots = [axis.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - size, y - size, 2 * size, 2 * size) for x, y in dots]
    # Nearest first; beside a point before above or below it.
    reaches = (0.5, 1.0, 1.6, 2.4, 3.4, 4.6, 6.0, 7.6, 9.4, 11.4, 14.0)
    steps = [0.0, *reaches, *(-reach for reach in reaches)]
    places = sorted(
        (place for place in itertools.product(steps, steps) if max(map(abs, place)) >= 1),
        key=lambda place: math.hypot(place[0], 1.01 * place[1]),
    )
    for x, y, words, colour in labels:
        for across, up in places:
            text = axis.annotate(
                words,
                (x, y),
                xytext=(8 * across, 9 * up),
                textcoords="offset points",
                ha={1: "left", -1: "right", 0: "center"}[(across > 0) - (across < 0)],
                va="center",
                fontsize=8,
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.4},
                zorder=4,
                arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.4, "linewidth": 0.6}
                if max(abs(across), abs(up)) > 1.6
                else None,
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(1)  # without its arrow
            if not any(box.overlaps(other) for other in taken) and (
                inside.x0 <= box.x0 and box.x1 <= inside.x1 + size
                and inside.y0 <= box.y0 and box.y1 <= inside.y1
            ):  # fmt: skip
                taken.append(box)
                break
            text.remove()
        else:
            raise RuntimeError(f"no room for {words!r} at {x:.3g}, {y:.3g}")


def draw_training(found: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Loss and test accuracy by epoch, a row of panels for each network."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    networks: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        networks.setdefault(row.get("model") or "resnet18", []).append(row)
    figure, axes = pyplot.subplots(
        len(networks), 2, figsize=(12.8, 4.6 * len(networks)), squeeze=False
    )
    for (network, own), pair in zip(networks.items(), axes, strict=True):
        draw_network(network, own, pair)
    figure.tight_layout()
    save(figure, path)


def draw_network(network: str, found: Sequence[dict[str, Any]], axes: Sequence[Any]) -> None:
    """The mean over seeds, with the lowest and the highest."""
    from matplotlib import pyplot

    found = train_suite.main_experiment(found)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for row in found:
        runs.setdefault(row["method"], {})[row["seed"]] = row
    colours = pyplot.get_cmap("tab10").colors
    for (method, seeds), colour in zip(runs.items(), itertools.cycle(colours)):
        kept = statistics.median(row["kept_bytes"] for row in seeds.values()) / 2**30
        for axis, key in zip(axes, ("loss", "accuracy"), strict=True):
            curves = list(zip(*(row[key] for row in seeds.values()), strict=True))
            epochs = range(1, len(curves) + 1)
            axis.plot(
                epochs,
                [statistics.fmean(values) for values in curves],
                color="black" if method == "exact" else colour,
                label=f"{method}: {kept:.2f} GiB, {len(seeds)} seed" + "s" * (len(seeds) > 1),
            )
            axis.fill_between(
                epochs,
                [min(values) for values in curves],
                [max(values) for values in curves],
                color="black" if method == "exact" else colour,
                alpha=0.12,
                linewidth=0,
            )
            axis.set(xlabel="epoch", ylabel={"loss": "training loss"}.get(key, "test accuracy"))
            axis.grid(color="#eeeeee")
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    settings = found[0]
    axes[0].set_title(
        f"CIFAR-10, {network}, {settings.get('epochs')} epochs, batch {settings.get('batch')}, on"
        f" {settings['device']}; kept for the backward pass of a batch",
        fontsize=11,
        loc="left",
    )


def draw_plans(found: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Plans beside choices that are one for all blocks, a panel a model: peak and time, that of the
    GPU alone where it was measured. A line leads from what was foretold to what was measured.
    """
    import matplotlib

    from benchmarks.user.scenarios import SCENARIOS

    matplotlib.use("agg")
    from matplotlib import pyplot

    measured = [row for row in found if row.get("ms") and row.get("predicted_ms")]
    last = {row["scenario"]: row["commit"] for row in measured}  # of a model its latest run
    measured = [row for row in measured if row["commit"] == last[row["scenario"]]]
    found_names = [row["scenario"] for row in measured]
    # One row alone, of a run that was cut off, is beside nothing; so are choices without a plan.
    planned = {row["scenario"] for row in measured if row["kind"] == "plan"}
    names = [name for name in dict.fromkeys(found_names) if found_names.count(name) > 1]
    names = [name for name in names if name in planned]
    figure, axes = pyplot.subplots(1, len(names), figsize=(5.4 * len(names), 5.2), squeeze=False)
    labels: dict[str, list[Label]] = {name: [] for name in names}
    dots: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for axis, name in zip(axes[0], names, strict=True):
        own = [row for row in measured if row["scenario"] == name]
        clock = "device_ms" if all("device_ms" in row for row in own) else "ms"
        axis.set_ylabel("ms of the GPU a step" if clock == "device_ms" else "ms a step")
        for row in own:
            is_plan = row["kind"] == "plan"
            colour = OURS if is_plan and row["max_error"] != 0.0 else FRONT if is_plan else OTHERS
            sizes = [row[key] / 2**30 for key in ("predicted_peak", "peak")]
            times = [row[f"predicted_{clock}"], row[clock]]
            axis.plot(sizes, times, color=colour, linewidth=1)
            axis.plot(sizes[1], times[1], "o" if is_plan else "s", color=colour, markersize=6)
            dots[name].append((sizes[1], times[1]))
            if not is_plan:
                labels[name].append(Label(sizes[1], times[1], row["kind"], colour))
        peaks = [row["peak"] / 2**30 for row in own]
        low, high = 0.8 * min(peaks), 1.3 * max(peaks)
        axis.set_xscale("log")
        axis.set(xlabel="peak, GiB", ylim=(0, None), xlim=(low, high))
        axis.set_title(SCENARIOS[name].title, fontsize=11)
        axis.set_xticks(marks := ticks(low, high), [f"{mark:g}" for mark in marks])
        axis.set_xticks([], minor=True)
        axis.grid(color="#eeeeee")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    exact = any(row.get("max_error") == 0.0 and row["scenario"] in names for row in measured)
    handles = [
        pyplot.Line2D([], [], marker=marker, color=colour, linestyle="", label=label)
        for marker, colour, label in (
            ("o", OURS, "plans"),
            *([("o", FRONT, "plans without errors")] * exact),
            ("s", OTHERS, "one choice for all blocks"),
        )
    ]
    handles.append(pyplot.Line2D([], [], color=FRONT, label="from what was foretold"))
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    for axis, name in zip(axes[0], names, strict=True):
        place_labels(axis, labels[name], dots[name])
    save(figure, path)


def save(figure: Any, path: pathlib.Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(path)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=pathlib.Path, default=rows.RESULTS)
    parser.add_argument("--out", type=pathlib.Path, default=PICTURES, help="folder of pictures")
    parser.add_argument("--device", help="its name in the rows")
    options = parser.parse_args(words)
    draw_steps(rows.read(options.results / step.OUT), options.device, options.out / "step.png")
    training = [row for row in rows.read(options.results / "cifar.jsonl") if "accuracy" in row]
    if training:
        draw_training(training, options.out / "cifar.png")
    if plans := rows.read(options.results / "planner.jsonl"):
        draw_plans(plans, options.out / "plans.png")


if __name__ == "__main__":
    main()

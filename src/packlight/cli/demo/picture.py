"""The demo's picture: losses, and bytes by kind of module."""

import statistics
from pathlib import Path

from packlight._files import replaced
from packlight.cli.demo.report import kinds_of
from packlight.cli.demo.settings import Settings
from packlight.cli.demo.training import Result
from packlight.errors import MissingDependencyError
from packlight.report import human_bytes

# Okabe and Ito's colours, which stay apart for colour-blind readers. Other kinds of modules are
# shades of one, since only GELU is to stand out.
RUN_COLOURS = ("#56b4e9", "#d55e00", "#009e73", "#cc79a7")
GELU_COLOUR = "#e69f00"
OTHER_COLOURS = ("#e4eaef", "#8fa9bd", "#b3c5d3", "#d3dee6")


def check_matplotlib() -> None:
    """Raise `MissingDependencyError` now, and not after minutes of training."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "the demo's picture needs matplotlib; install it with: pip install 'packlight[plot]', "
            "or leave the picture out with --no-plot"
        ) from error


def save_picture(results: dict[str, Result], settings: Settings, path: Path) -> None:
    """Loss curves on the left, bytes kept by kind of module on the right."""
    # The figure alone, without pyplot: no window, no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    losses, memory = figure.subplots(1, 2, width_ratios=(1.2, 1))

    # Later runs are drawn thinner, so that curves that lie on each other can all be seen.
    for place, (name, result) in enumerate(results.items()):
        colour, width = RUN_COLOURS[place % 4], max(1.5, 5 - 3.5 * place)
        curve = smoothed(result.training_losses, max(1, settings.steps // 20))
        steps = range(1, settings.steps + 1)
        losses.plot(steps, curve, color=colour, linewidth=width, label=f"{name}, training")
        losses.plot(
            result.validation_steps,
            result.validation_losses,
            "o",
            color=colour,
            markersize=width + 3.5,
            markeredgecolor="white",
            label=f"{name}, validation: {result.validation_losses[-1]:.4f} at the end",
        )
    losses.set_xlabel("step")
    losses.set_ylabel("loss (nats per byte)")
    losses.set_title("Loss, same seed and same batches", loc="left")
    losses.legend(loc="upper right", frameon=False)
    losses.grid(color="#e5e5e5", linewidth=0.8)

    # From the bottom up: what is too small for a label, the others, and GELU on top.
    largest = max(result.total_bytes for result in results.values())
    kinds = [kind for kind in kinds_of(results) if kind != "GELU"]
    small = [
        kind
        for kind in kinds
        if max(result.kept_bytes.get(kind, 0) for result in results.values()) < largest / 20
    ]
    kinds = [kind for kind in kinds if kind not in small]
    unit, unit_bytes = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    for place, result in enumerate(results.values()):
        kept = {kind: result.kept_bytes.get(kind, 0) for kind in [*kinds, "GELU"]}
        bars = {"other": result.total_bytes - sum(kept.values()), **kept}
        bottom = 0.0
        for index, (kind, count) in enumerate(bars.items()):
            colour = GELU_COLOUR if kind == "GELU" else OTHER_COLOURS[index % 4]
            height, label = count / unit_bytes, None if place else kind
            memory.bar(place, height, 0.6, bottom, color=colour, edgecolor="white", label=label)
            if count > largest / 12:  # tall enough to be written in
                middle = bottom + height / 2
                memory.text(place, middle, human_bytes(count), ha="center", va="center", size=8)
            bottom += height
        memory.annotate(
            human_bytes(result.total_bytes),
            (place, result.total_bytes / unit_bytes),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            weight="bold",
        )
    titles = [
        name if run.peak_bytes is None else f"{name}\npeak on the GPU {human_bytes(run.peak_bytes)}"
        for name, run in results.items()
    ]
    memory.set_xticks(range(len(results)), titles)
    memory.margins(y=0.1)
    memory.legend(reverse=True, frameon=False)
    memory.set_ylabel(f"kept for the backward pass of one batch ({unit})")
    memory.set_title(f"Memory, FewBit at {settings.bits} bits an element", loc="left")

    for axes in (losses, memory):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    with replaced(path) as beside:
        figure.savefig(beside, dpi=150)


def smoothed(values: list[float], window: int) -> list[float]:
    """The mean of each value and those before it, `window` of them."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]

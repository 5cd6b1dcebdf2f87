"""`VarianceMonitor`: is a sketch harmless on these layers, in this training run?"""

import csv
import math
import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from packlight._files import replaced
from packlight.errors import InputError, MissingDependencyError
from packlight.report.printing import cell, new_table, render
from packlight.sketch import modules
from packlight.sketch.method import Sketch
from packlight.sketch.variances import Variances
from packlight.sketch.watching import Taker, watch


class VarianceSample(NamedTuple):
    """What one layer showed at one step; the variances are those of `packlight.sketch`."""

    step: int  # the layer's forward passes with gradient before this one
    layer: str
    kind: str
    tokens: int
    rows: int
    sketch_variance: float
    sample_variance: float
    alpha: float  # `packlight.sketch.correlation`
    bound: (
        float  # `packlight.sketch.ratio_bound`: on the ratio of a Gaussian sketch of as many rows
    )

    @property
    def ratio(self) -> float:
        """Sketch variance over the batch's own; well below 1, the sketch is harmless."""
        return self.sketch_variance / self.sample_variance


class VarianceMonitor:
    """Compares a sketch's variance with the noise of the batch, per layer, while a model trains.

        with packlight.sketch.VarianceMonitor(model, every=100) as monitor:
            train(model)
        print(monitor)
        monitor.plot("variance.png")

    Every `every` forward passes of a layer with gradient it takes, when the layer's output gradient
    arrives, `variance(x, grad_output, kind, rows)` and `sample_variance(x, grad_output)`. The ratio
    says how much a sketch adds to the noise that the weight gradient has anyway because a batch is
    a sample: at 0.1, its standard deviation grows by 5%. Beside it stand alpha and the bound that
    follows from alpha alone, on the ratio of a Gaussian sketch of as many rows. Printed, a monitor
    is a table of them by layer. Between samples nothing but a counter runs. A sample holds
    the layer's input until then, and costs a few times the layer's exact weight gradient, with no
    synchronisation; nothing of the training changes.

    Args:
        model: its layers of `packlight.sketch` are watched.
        every: forward passes of a layer from one sample to the next.
        method: watch the plain `nn.Linear` layers too, as if they kept by this method: to judge a
            sketch before one converts.

    Layers inside `torch.compile` are not seen, nor is an input that is modified in place before
    the backward pass. Raises `InputError` where no layer is to be watched.
    """

    def __init__(self, model: nn.Module, every: int = 100, method: Sketch | None = None) -> None:
        if not every >= 1:
            raise InputError(f"every={every!r} is not a number of forward passes, 1 or more")
        self.every = every
        self._passes: dict[str, int] = {}
        self._taken: list[tuple[tuple[int, str, str, int, int], tuple[Tensor, ...]]] = []
        self._handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            own = _method_of(module, method)
            if own is not None:
                self._handles.append(watch(module, self._sampling(name, own)))
        if not self._handles:
            raise InputError(
                f"{type(model).__name__} has no layer of packlight.sketch to watch; convert some,"
                " or give a method, VarianceMonitor(model, method=Sketch(rows=0.2)), to judge it"
                " on the nn.Linear layers"
            )

    def __enter__(self) -> "VarianceMonitor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the hooks away; what was sampled stays."""
        while self._handles:
            self._handles.pop().remove()

    @property
    def samples(self) -> list[VarianceSample]:
        """All samples so far. Waits for the device."""
        return [
            VarianceSample(*where, *(value.item() for value in values))
            for where, values in self._taken
        ]

    def ratios(self) -> dict[str, float]:
        """By layer, the mean sketch variance over the mean sample variance."""
        return {layer: _ratio(own) for layer, own in self._by_layer().items()}

    def _by_layer(self) -> dict[str, list[VarianceSample]]:
        found: dict[str, list[VarianceSample]] = {}
        for sample in self.samples:
            found.setdefault(sample.layer, []).append(sample)
        return found

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        by_layer = self._by_layer()
        yield Text(f"{len(by_layer)} layers, {len(self._taken)} samples; means over samples")
        table = new_table()
        for column in ("layer", "kind", "rows", "ratio", "alpha", "bound"):
            table.add_column(column, justify="left" if column in ("layer", "kind") else "right")
        for layer, own in by_layer.items():
            last = own[-1]
            alpha, bound = (
                statistics.fmean(getattr(sample, name) for sample in own)
                for name in ("alpha", "bound")
            )
            numbers = (f"{value:.3g}" for value in (_ratio(own), alpha, bound))
            table.add_row(cell(layer), last.kind, f"{last.rows} of {last.tokens}", *numbers)
        yield table

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the samples, a line each, under the names of `VarianceSample` and `ratio`."""
        with replaced(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*VarianceSample._fields, "ratio"])
            writer.writerows([*sample, sample.ratio] for sample in self.samples)

    def to_tensorboard(self, writer: Any) -> None:
        """Writes the ratios as scalars `sketch_variance_ratio/<layer>` with a `SummaryWriter`."""
        for sample in self.samples:
            tag = f"sketch_variance_ratio/{sample.layer}"
            writer.add_scalar(tag, sample.ratio, sample.step)

    def plot(self, path: str | os.PathLike[str], *, limit: int = 12) -> None:
        """Draws the ratio of each layer over the steps; of many, the `limit` with the largest.

        The suffix of `path` picks the format. Needs matplotlib.
        """
        _draw(self.samples, self.ratios(), path, limit)

    def _sampling(self, name: str, method: Sketch) -> Callable[[Tensor], Taker | None]:
        def begin(_: Tensor) -> Taker | None:
            step = self._passes.get(name, 0)
            self._passes[name] = step + 1
            return sample_of(step) if step % self.every == 0 else None

        def sample_of(step: int) -> Taker:
            def take(x: Tensor, grad_output: Tensor) -> None:
                of = Variances(x, grad_output)
                rows = min(method.row_count(of.tokens), of.tokens)
                values = of.of(method.kind)(rows), of.of_sample, of.correlation
                where = step, name, method.kind, of.tokens, rows
                self._taken.append((where, (*values, of.ratio_bound(rows))))

            return take

        return begin


def _ratio(samples: list[VarianceSample]) -> float:
    """The mean sketch variance over the mean sample variance."""
    own = math.fsum(sample.sample_variance for sample in samples)
    ours = math.fsum(sample.sketch_variance for sample in samples)
    return ours / own if own else float("nan")


def _method_of(module: nn.Module, given: Sketch | None) -> Sketch | None:
    if isinstance(module, modules.Sketched):
        return module.method
    return given if type(module) is nn.Linear else None


def _draw(
    samples: list[VarianceSample],
    ratios: dict[str, float],
    path: str | os.PathLike[str],
    limit: int,
) -> None:
    if not samples:
        raise InputError("nothing was sampled yet: train for some steps under the monitor first")
    try:
        # The figure alone, without pyplot: no global state, no window, nothing to close.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plotting needs matplotlib; install it with: pip install 'packlight[plot]'"
        ) from error
    layers = sorted(ratios, key=lambda layer: ratios[layer], reverse=True)[:limit]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    for layer in layers:
        points = [(sample.step, sample.ratio) for sample in samples if sample.layer == layer]
        axes.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=layer)
    axes.axhline(1.0, color="#444444", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_xlabel("forward passes")
    axes.set_ylabel("variance of the sketch / of the batch")
    shown = f", the {len(layers)} noisiest of {len(ratios)} layers" if limit < len(ratios) else ""
    axes.set_title(f"What the sketch adds to the noise of the batch{shown}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    with replaced(path) as beside:
        figure.savefig(beside, dpi=150)

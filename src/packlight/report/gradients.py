"""What `packlight.gradient_error` found: squares that add up over layers, and what they say."""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console, ConsoleOptions, Group, RenderResult

from packlight.errors import InputError
from packlight.report.gradient_plotting import draw
from packlight.report.gradient_printing import gradient_parts
from packlight.report.names import condensed, without_numbers
from packlight.report.printing import render
from packlight.report.words import percent

# Raised when a field changes its meaning, so that an old file is refused instead of misread.
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Deviation:
    """Gradients g~ under a method, drawn several times, beside the exact gradient g.

    All are sums over elements, so that deviations of several layers add up:

    - `exact`: |g|^2
    - `squared_error`: the mean over draws of |g~ - g|^2
    - `squared_bias`: an unbiased estimate of |E[g~] - g|^2, which may be below 0; None of one draw
    - `product`: the mean over draws of <g~, g>
    - `size`: the mean over draws of |g~|^2
    """

    exact: float
    squared_error: float
    squared_bias: float | None
    product: float
    size: float

    def __add__(self, other: "Deviation") -> "Deviation":
        biases = (self.squared_bias, other.squared_bias)
        return Deviation(
            self.exact + other.exact,
            self.squared_error + other.squared_error,
            None if biases[0] is None or biases[1] is None else biases[0] + biases[1],
            self.product + other.product,
            self.size + other.size,
        )

    @property
    def error(self) -> float:
        """The root of the mean |g~ - g|^2, relative to |g|."""
        return _share(self.squared_error, self.exact)

    @property
    def bias(self) -> float | None:
        """|E[g~] - g| relative to |g|; 0 where the estimate of its square is negative."""
        if self.squared_bias is None:
            return None
        return _share(max(self.squared_bias, 0.0), self.exact)

    @property
    def cosine(self) -> float | None:
        """The cosine of the angle between g~ and g; None where one of them is 0."""
        sizes = math.sqrt(self.exact * self.size)
        return self.product / sizes if sizes else None


def _share(square: float, whole: float) -> float:
    """The root of the ratio: 0 of 0, and infinite where only the whole is 0."""
    if not whole:
        return math.inf if square else 0.0
    return math.sqrt(square / whole)


@dataclass(frozen=True, slots=True)
class LayerGradients:
    """One layer, or several together, with a `Deviation` for each of the report's methods.

    - `layer`, `kind`: the path that `named_modules` gives, and the class before any conversion.
    - `weights`: of the gradients of the layer's own parameters, as one vector; empty where there
      are none, and `note` says why where there are parameters.
    - `squared_noise`: an estimate of E|g - E[g]|^2 over batches of this size; None if not known.
    - `inputs`: of the gradient of the layer's input, from all that reads it; empty if it has none.
    """

    layer: str
    kind: str
    weights: tuple[Deviation, ...]
    squared_noise: float | None
    inputs: tuple[Deviation, ...]
    note: str = ""

    @property
    def noise(self) -> float | None:
        """The batch's own noise relative to |g|; None if not known."""
        if self.squared_noise is None or not self.weights:
            return None
        return _share(self.squared_noise, self.weights[0].exact)

    def of_noise(self, method: int = 0) -> float | None:
        """The error of the weight gradient as a share of the batch's own noise."""
        if self.squared_noise is None or not self.weights:
            return None
        return _share(self.weights[method].squared_error, self.squared_noise)

    @staticmethod
    def together(layer: str, kind: str, rows: "Iterable[LayerGradients]") -> "LayerGradients":
        """Layers as one: their gradients as one vector.

        One whose noise is not known adds none, so that the errors' share of it is rather too large.
        """
        rows = list(rows)
        weighted = [row for row in rows if row.weights]
        known = [row.squared_noise for row in weighted if row.squared_noise is not None]
        return LayerGradients(
            layer,
            kind,
            _added(row.weights for row in weighted),
            sum(known) if known else None,
            _added(row.inputs for row in rows if row.inputs),
            rows[0].note if len({row.note for row in rows}) == 1 else "",
        )


def _added(columns: Iterable[tuple[Deviation, ...]]) -> tuple[Deviation, ...]:
    total: tuple[Deviation, ...] = ()
    for column in columns:
        added = (a + b for a, b in zip(total, column, strict=True))
        total = tuple(added) if total else column
    return total


@dataclass(frozen=True, repr=False)
class GradientReport:
    """How far a conversion moves the gradients of each layer. Holds no tensor; prints as a table.

    - `methods`: what was compared, as text; the deviations of a row are in this order.
    - `rows`: one `LayerGradients` a layer, in the order of the model.
    - `batch`: rows of the batch; None where it could not be split, and its noise is not known.
    - `draws`: how often gradients were drawn under each method.
    """

    model: str
    methods: tuple[str, ...]
    rows: tuple[LayerGradients, ...]
    batch: int | None
    draws: int

    @property
    def whole(self) -> LayerGradients:
        """All weights as one vector; without gradients of inputs, which follow each other."""
        return LayerGradients.together("", self.model, (_weights_of(row) for row in self.rows))

    def lines(self, limit: int) -> list[LayerGradients]:
        """The rows; where there are more than `limit`, names that differ in numbers together."""
        if len(self.rows) <= limit:
            return list(self.rows)
        groups: dict[tuple[str, str], list[LayerGradients]] = {}
        for row in self.rows:
            groups.setdefault((without_numbers(row.layer), row.kind), []).append(row)
        return [
            rows[0]
            if len(rows) == 1
            else LayerGradients.together(
                condensed(row.layer for row in rows)[0], f"{len(rows)} x {kind}", rows
            )
            for (_, kind), rows in groups.items()
        ]

    def sentence(self, layer: str | None = None, method: int = 0) -> str:
        """The error of a layer's weight gradient, or of all, beside the batch's own noise."""
        row = self.whole if layer is None else self._row(layer)
        who = f"all weights of {self.model}" if layer is None else f"{row.layer} ({row.kind})"
        name = self.methods[method]
        if not row.weights:
            return f"{name}: {who} has no weight gradient" + (f", {row.note}" if row.note else "")
        text = f"{name}: the gradient of {who} is off by {percent(row.weights[method].error)}"
        share = row.of_noise(method)
        if share is None:
            return f"{text}; this batch's own noise is not known"
        return f"{text}: this is {percent(share)} of your batch's own noise"

    def _row(self, layer: str) -> LayerGradients:
        for row in self.rows:
            if row.layer == layer:
                return row
        raise InputError(f"no layer {layer!r} in this report; it has {len(self.rows)}, see .rows")

    def to_json(self) -> str:
        """The report as JSON text, for `from_json`."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Raises `InputError` for anything else."""
        try:
            data = json.loads(text)
            if data.pop("format") != _FORMAT:
                raise InputError(
                    f"this report is not of format {_FORMAT}, the one that this version of"
                    " packlight reads; measure the gradients again"
                )
            rows = tuple(_row_from(row) for row in data.pop("rows"))
            return cls(rows=rows, methods=tuple(data.pop("methods")), **data)
        except InputError:
            raise
        except (TypeError, AttributeError, KeyError, ValueError, RecursionError) as error:
            raise InputError(
                f"not the text of a GradientReport ({str(error)[:200]}); pass what its to_json()"
                " returned"
            ) from error

    def plot(self, path: str | os.PathLike[str], *, limit: int = 30) -> None:
        """Draw the error of each layer's weight gradient beside the batch's own noise.

        Layers whose names differ in their numbers share a line where there are more than `limit`.
        The suffix of `path` picks the format (.png, .svg, .pdf). Needs matplotlib.
        """
        draw(self, Path(path), limit)

    def to_text(self, every_layer: bool = False) -> str:
        """The printed report; with `every_layer` a line a layer, however many there are."""
        return render(Group(*gradient_parts(self, every_layer)))

    def __repr__(self) -> str:
        return (
            f"GradientReport(model={self.model!r}, methods={self.methods!r},"
            f" rows=<{len(self.rows)}>)"
        )

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from gradient_parts(self, every_layer=False)


def _weights_of(row: LayerGradients) -> LayerGradients:
    return LayerGradients(row.layer, row.kind, row.weights, row.squared_noise, ())


def _row_from(data: dict[str, Any]) -> LayerGradients:
    for name in ("weights", "inputs"):
        data[name] = tuple(Deviation(**deviation) for deviation in data[name])
    return LayerGradients(**data)

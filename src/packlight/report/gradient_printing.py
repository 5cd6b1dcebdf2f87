"""Reports of gradients as tables."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import ConsoleRenderable
from rich.table import Table
from rich.text import Text

from packlight.report.printing import LINES, cell, new_table
from packlight.report.words import percent, shortened

if TYPE_CHECKING:
    from packlight.report.gradients import GradientReport, LayerGradients

_EXPLANATION = (
    "error: |g~ - g| / |g| of a layer's weights; noise: of g itself, another batch's for this one's"
)

_NAME = 24  # characters of a layer's name and kind, however many methods stand beside it
_LONGEST = 32  # characters of a name, of which the end says more than the beginning


def gradient_parts(report: "GradientReport", every_layer: bool) -> Iterator[ConsoleRenderable]:
    batch = "" if report.batch is None else f" on a batch of {report.batch}"
    draws = f", {report.draws} draws" if report.draws > 1 else ", one draw"
    yield Text(f"{report.model}: gradients beside exact ones{batch}{draws}")
    for index in range(len(report.methods)):
        number = f"({index + 1}) " if len(report.methods) > 1 else ""
        yield Text(number + report.sentence(method=index))
    yield _table(report, len(report.rows) if every_layer else LINES)
    yield Text(_EXPLANATION)


def _table(report: "GradientReport", limit: int) -> Table:
    """All that is known of one method; of several, side by side, the errors of weights."""
    several = len(report.methods) > 1
    table = new_table()
    table.add_column("layer", min_width=_NAME)
    table.add_column("noise", justify="right", no_wrap=True)
    for index in range(len(report.methods)):
        number = f"({index + 1}) " if several else ""
        others = () if several else ("bias", "cosine", "input's error")
        for title in (f"{number}error", "of noise", *others):
            table.add_column(title, justify="right", no_wrap=True)
    whole = report.whole
    for row in [whole, *report.lines(limit)]:
        name = shortened(row.layer, _LONGEST) or (
            row.kind if row is whole else "(the model itself)"
        )
        kind = f" ({row.kind})" if row.layer else ""
        note = f", {row.note}" if row.note else ""
        indent = "" if row is whole else "  "
        cells = [part for i in range(len(report.methods)) for part in _cells(row, i, several)]
        table.add_row(cell(f"{indent}{name}{kind}{note}"), _percent(row.noise), *cells)
    return table


def _cells(row: "LayerGradients", method: int, several: bool) -> list[str]:
    weights = row.weights[method] if row.weights else None
    error = None if weights is None else weights.error
    cells = [_percent(error), _percent(row.of_noise(method))]
    if several:
        return cells
    inputs = row.inputs[method].error if row.inputs else None
    bias, cosine = (None, None) if weights is None else (weights.bias, weights.cosine)
    return [*cells, _percent(bias), "" if cosine is None else f"{cosine:.4f}", _percent(inputs)]


def _percent(share: float | None) -> str:
    return "" if share is None else percent(share)

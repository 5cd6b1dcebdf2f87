"""`Left`: what a converted model still keeps, largest first, and what would help."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from packlight.report.names import condensed
from packlight.report.printing import cell, new_table, render
from packlight.report.words import human_bytes, percent, times_less

# Shares below this are summed up where the report prints.
_SHOWN = 0.01


@dataclass(frozen=True, slots=True)
class LeftRow:
    """What operations of one kind keep in modules of one class, in all.

    - `operation`: the autograd node, without "Backward"; `module_type`, `modules`: where it runs.
    - `source`: the line of the call that keeps most of it, in someone's own `forward`; or None.
    - `is_packed`: whether these are packs, codes or bits that packlight made.
    - `why`: why it is kept so; `remedy`: what would help, empty where nothing does.
    """

    bytes: int
    operation: str
    module_type: str
    modules: tuple[str, ...]
    source: str | None
    is_packed: bool
    why: str
    remedy: str


@dataclass(frozen=True, repr=False)
class Left:
    """What `Conversion.left` found: prints as a table, goes to plain data by `to_dict`.

    `rows` are the largest first. `before_bytes` and `after_bytes` are kept for the backward pass by
    the model as it was and as it is converted.
    """

    model: str
    before_bytes: int
    after_bytes: int
    rows: tuple[LeftRow, ...]

    def share(self, row: LeftRow) -> float:
        """The part of all that is kept after the conversion."""
        return row.bytes / self.after_bytes if self.after_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as for JSON: lists, texts and numbers."""
        data = asdict(self)
        data["rows"] = [{**row, "modules": list(row["modules"])} for row in data["rows"]]
        return data

    def __repr__(self) -> str:
        return (
            f"Left(model={self.model!r}, after_bytes={self.after_bytes}, rows=<{len(self.rows)}>)"
        )

    def __str__(self) -> str:
        return render(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        before, after = self.before_bytes, self.after_bytes
        yield Text(
            f"{self.model} keeps {human_bytes(before)} before and {human_bytes(after)} after"
            f"{times_less(before, after)}"
        )
        if not self.rows:
            return
        table = new_table()
        for column in ("still kept", "share", "by", "in", "why", "what would help"):
            table.add_column(column)
        packed = [row for row in self.rows if row.is_packed]
        others = [row for row in self.rows if not row.is_packed and self.share(row) < _SHOWN]
        lines = [
            (row.bytes, self._cells(row)) for row in self.rows if row not in (*packed, *others)
        ]
        if packed:
            size = sum(row.bytes for row in packed)
            lines.append((size, [cell("packs"), "", "", packed[0].remedy]))
        for size, cells in sorted(lines, key=lambda line: line[0], reverse=True):
            table.add_row(human_bytes(size), percent(size / after), *cells)
        if others:
            size = sum(row.bytes for row in others)
            table.add_row(human_bytes(size), percent(size / after), "others")
        yield table

    def _cells(self, row: LeftRow) -> list[RenderableType]:
        place = row.source or ", ".join(condensed(list(row.modules)))
        where = cell(f"{row.module_type}: {place}")
        return [cell(row.operation), where, Text(row.why), Text(row.remedy)]
